"""Reads YAML into a tree that keeps line numbers and raw text, and reports every error of a file at once.

PyYAML scans and composes; values are read from its nodes here and not by its constructors, so that no tag
can create an object. Scalars keep their raw text, because a text field needs ``no``, ``1_000`` or
``2024-01-01`` as written. Numbers are those of YAML 1.2: ``1e-4`` is one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddetr_mm.errors import Problem, SpecError

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_NUMBER_LENGTH = 64

OVERRIDE = "override"
"""Where a value comes from that was given on the command line."""

_TAG = "tag:yaml.org,2002:"
_SIMPLE_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_TRUE = {"yes", "true", "on"}
_BOOL = re.compile(r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_MERGE = re.compile(r"<<$")
_FOLDED = re.compile("[\x85\u2028\u2029]")  # NEL, line and paragraph separator


class SpecLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers as in YAML 1.2 and dates left as text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- as PyYAML declares it; filled below


class SpecDumper(yaml.SafeDumper):
    """Quotes and escapes what :class:`SpecLoader` would read as something else."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- as PyYAML declares it; filled below

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out in full, without anchors."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text as a scalar, in double quotes where it holds a line break that YAML would fold to a blank."""
    style = '"' if _FOLDED.search(text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


SpecDumper.add_representer(str, _represent_text)


for _class in (SpecLoader, SpecDumper):
    _class.add_implicit_resolver(_TAG + "bool", _BOOL, list("yYnNtTfFoO"))
    _class.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
    _class.add_implicit_resolver(_TAG + "null", _NULL, ["~", "n", "N", ""])
    _class.add_implicit_resolver(_TAG + "merge", _MERGE, ["<"])


@dataclass
class Leaf:
    """A scalar: its value, the text it was written as, and where."""

    value: Any
    text: str
    where: str


@dataclass
class Branch:
    """A mapping, by key text."""

    items: dict[str, Tree]
    where: str


@dataclass
class Listing:
    """A sequence."""

    items: list[Tree]
    where: str


Tree = Leaf | Branch | Listing


class _Unreadable(Exception):
    """Problems that end the reading of a text."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems


def read_scalar(text: str, tag: str) -> Any:
    """The value of scalar ``text`` under a resolved or given tag.

    Raises:
        ValueError: the text does not fit the tag.
    """
    kind = tag[len(_TAG) :]
    if kind in ("int", "float") and len(text) > MAX_NUMBER_LENGTH:
        return text
    if kind == "null":
        return None
    if kind == "bool":
        if not _BOOL.match(text):
            raise ValueError(text)
        return text.lower() in _TRUE
    if kind == "int":
        return _read_int(text)
    if kind == "float":
        lowered = text.lower().replace("_", "")
        if lowered.lstrip("+-") == ".inf":
            return -math.inf if lowered.startswith("-") else math.inf
        return math.nan if lowered == ".nan" else float(lowered)
    return text


def _read_int(text: str) -> int:
    """An integer as YAML 1.1 writes it (underscores; 0b, 0x, and 0 for octal)."""
    digits = text.replace("_", "").lower()
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    if digits.startswith("0b"):
        return sign * int(digits[2:], 2)
    if digits.startswith("0x"):
        return sign * int(digits[2:], 16)
    if digits.startswith("0") and len(digits) > 1:
        return sign * int(digits, 8)
    return sign * int(digits)


def plain_leaf(text: str, where: str) -> Leaf:
    """A leaf from the text of a plain (unquoted) YAML scalar."""
    for kind, pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
        if pattern.match(text):
            try:
                return Leaf(read_scalar(text, _TAG + kind), text, where)
            except ValueError:
                break
    return Leaf(text, text, where)


class _TreeBuilder:
    """Makes a :data:`Tree` of composed YAML nodes, and collects problems."""

    def __init__(self, file: str | Path | None, where: str | None) -> None:
        self.file = file
        self.fixed_where = where
        self.problems: list[Problem] = []
        self.count = 0
        self.active: list[yaml.Node] = []

    def where(self, node: yaml.Node) -> str:
        return self.fixed_where or f"line {node.start_mark.line + 1}"

    def problem(self, what: str, node: yaml.Node, **more: Any) -> Problem:
        return Problem(what, file=self.file, where=self.where(node), **more)

    def build(self, node: yaml.Node) -> Tree:
        self.count += 1
        if self.count > MAX_NODES:
            what = f"expands to more than {MAX_NODES} values"
            raise _Unreadable(self.problem(what, node, hint="use fewer aliases"))
        if any(node is parent for parent in self.active):
            raise _Unreadable(self.problem("an alias refers to a value that contains it", node))
        if len(self.active) >= MAX_DEPTH:
            raise _Unreadable(self.problem(f"is nested more than {MAX_DEPTH} levels deep", node))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.active.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                self.refuse_tag(node, _TAG + "map")
                return self.mapping(node)
            self.refuse_tag(node, _TAG + "seq")
            return Listing([self.build(item) for item in node.value], self.where(node))
        finally:
            self.active.pop()

    def refuse_tag(self, node: yaml.Node, expected: str) -> None:
        if node.tag != expected:
            self.problems.append(
                self.problem(
                    "a YAML tag is not allowed here",
                    node,
                    value=node.tag.replace(_TAG, "!!"),
                    allowed="plain mappings, lists, text, numbers, true/false and null",
                    hint="remove the tag",
                )
            )

    def scalar(self, node: yaml.ScalarNode) -> Leaf:
        text, tag = node.value, node.tag
        if tag == _TAG + "merge":
            tag = _TAG + "str"
        if tag not in _SIMPLE_TAGS:
            self.refuse_tag(node, _TAG + "str")
            return Leaf(None, text, self.where(node))
        try:
            return Leaf(read_scalar(text, tag), text, self.where(node))
        except ValueError:
            self.problems.append(
                self.problem(f"does not fit the tag {tag.replace(_TAG, '!!')}", node, value=text)
            )
            return Leaf(None, text, self.where(node))

    def mapping(self, node: yaml.MappingNode) -> Branch:
        items: dict[str, Tree] = {}
        lines: dict[str, str] = {}
        merged: list[Branch] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(self.problem("a key must be plain text", key_node))
                continue
            if key_node.tag == _TAG + "merge":
                merged.extend(self.merge_sources(value_node))
                continue
            key = key_node.value
            if key in lines:
                self.problems.append(
                    self.problem(
                        f"the key {key!r} is given twice, first on {lines[key]}",
                        key_node,
                        hint="keep one of the two",
                    )
                )
            lines.setdefault(key, self.where(key_node))
            value = self.build(value_node)
            value.where = self.where(key_node)
            items[key] = value
        for branch in merged:
            for key, value in branch.items.items():
                items.setdefault(key, value)
        return Branch(items, self.where(node))

    def merge_sources(self, node: yaml.Node) -> list[Branch]:
        """The mappings a ``<<`` key brings in; the first one wins."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        branches = [self.build(part) for part in parts]
        if not all(isinstance(branch, Branch) for branch in branches):
            self.problems.append(self.problem("'<<' takes a mapping or a list of mappings", node))
        return [branch for branch in branches if isinstance(branch, Branch)]


def _yaml_problem(error: yaml.YAMLError, text: str, file: str | Path | None) -> Problem:
    """An error of PyYAML's scanner or parser as a problem with line and column."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else None
    hint = None
    if mark is None and isinstance(getattr(error, "position", None), int):
        where = f"line {text.count(chr(10), 0, error.position) + 1}"  # type: ignore[attr-defined]
    if mark is not None:
        lines = text.splitlines()
        if mark.line < len(lines) and "\t" in lines[mark.line]:
            hint = "indent with spaces; YAML does not allow tabs"
    return Problem(f"is not valid YAML: {what}", file=file, where=where, hint=hint)


def _check_size(text: str, file: str | Path | None) -> None:
    """Refuse text that is nested too deep or holds too many values."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=SpecLoader)):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        where = f"line {event.start_mark.line + 1}" if event.start_mark else None
        if depth > MAX_DEPTH:
            raise _Unreadable(Problem(f"is nested more than {MAX_DEPTH} levels deep", file=file, where=where))
        if count >= MAX_NODES:
            raise _Unreadable(Problem(f"holds more than {MAX_NODES} values", file=file, where=where))


def parse_yaml(
    text: str, file: str | Path | None = None, where: str | None = None
) -> tuple[Tree | None, list[Problem]]:
    """Parse one YAML document.

    Args:
        text: the document.
        file: named in the problems.
        where: used in place of line numbers (for overrides).

    Returns:
        The tree (None for an empty document) and the problems found; with problems the tree may hold
        None in the places they concern, and is None when the text cannot be read at all.
    """
    try:
        _check_size(text, file)
        node = yaml.compose(text, Loader=SpecLoader)
        if node is None:
            return None, []
        builder = _TreeBuilder(file, where)
        tree = builder.build(node)
    except _Unreadable as error:
        return None, list(error.problems)
    except yaml.YAMLError as error:
        return None, [_yaml_problem(error, text, file)]
    return tree, builder.problems


def read_text(path: Path) -> str:
    """The text of a spec file.

    Raises:
        SpecError: missing, not a file, unreadable, larger than :data:`MAX_BYTES`, or not UTF-8.
    """
    try:
        if path.is_dir():
            raise SpecError(Problem("is a folder, not a spec file", file=path, hint="name the .yaml file"))
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(Problem("does not exist", file=path, hint="check the path after -e")) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(Problem(f"cannot be read: {reason}", file=str(path))) from error
    if len(data) > MAX_BYTES:
        raise SpecError(Problem(f"is larger than {MAX_BYTES} bytes, the limit for a spec", file=path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(
            Problem(
                "is not UTF-8 text",
                file=path,
                where=f"line {line}",
                value=data[error.start : error.start + 1],
                hint="save the file as UTF-8",
            )
        ) from None
