"""``key=value`` overrides from the command line, applied to the tree of a spec file.

A value is read as YAML: a plain scalar, a quoted text, or a list or mapping in flow style. A mapping given
for a section is merged into it; any other value replaces the one of the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddetr_mm.errors import Problem
from ddetr_mm.spec.fields import Kind, SchemaField, Section, field_names, fields_of
from ddetr_mm.spec.releases import suggest_key
from ddetr_mm.spec.yaml_source import OVERRIDE, Branch, Leaf, Listing, Tree, parse_yaml, plain_leaf

FORM = "key=value with a dotted key, as in train.num_epochs=20 or 'train.optim.lr_steps=[10, 20]'"

_TOKEN = re.compile(r"\.?([^.\[\]]+)|\[(\d{1,6})\]")


@dataclass(frozen=True)
class Token:
    """One step of an override's path, and where its text starts in the whole path."""

    text: str
    start: int


class _BadOverride(Exception):
    """An override that cannot be applied."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


def split_path(path: str) -> list[Token] | None:
    """The steps of ``a.b[0].c`` or ``a.b.0.c``; None when the path is malformed."""
    tokens = []
    position = 0
    while position < len(path):
        match = _TOKEN.match(path, position)
        if match is None or (position == 0 and path[0] in ".["):
            return None
        group = 1 if match.group(1) is not None else 2
        if group == 1 and position > 0 and path[position] != ".":
            return None
        tokens.append(Token(match.group(group), match.start(group)))
        position = match.end()
    return tokens or None


def read_value(text: str, file: Path | None, key: str) -> Tree:
    """The value of an override; raises :class:`_BadOverride` where it is not valid YAML."""
    stripped = text.strip()
    if not stripped:
        return Leaf("", "", OVERRIDE)
    if stripped[0] not in "[{\"'":
        return plain_leaf(stripped, OVERRIDE)
    tree, problems = parse_yaml(stripped, file, where=f"{key}, {OVERRIDE}")
    if tree is None or problems:
        what = problems[0].what.replace("is not valid YAML", "the value is not valid YAML")
        hint = "quote text that contains brackets, commas or quotes"
        raise _BadOverride(Problem(what, file=file, where=f"{key}, {OVERRIDE}", hint=hint))
    return _as_override(tree, file, key)


def _as_override(tree: Tree, file: Path | None, key: str) -> Tree:
    """Mark every node of an override's value, and read Hydra's notation of mappings.

    Hydra omits the blank after a colon, ``{person:red,car:blue}``, which YAML reads as keys without values.
    """
    if isinstance(tree, Leaf):
        return Leaf(tree.value, tree.text, OVERRIDE)
    if isinstance(tree, Listing):
        return Listing([_as_override(item, file, key) for item in tree.items], OVERRIDE)
    items: dict[str, Tree] = {}
    for name, item in tree.items.items():
        bare, colon, rest = name.partition(":")
        if colon and isinstance(item, Leaf) and item.value is None and item.text == "":
            items[bare] = read_value(rest, file, key)
        else:
            items[name] = _as_override(item, file, key)
    return Branch(items, OVERRIDE)


class _Applier:
    """Applies overrides to one tree; ``root`` is the model of the spec."""

    def __init__(self, root: type[Section], file: Path | None) -> None:
        self.root = root
        self.file = file

    def error(self, path: str, what: str, **more: Any) -> _BadOverride:
        return _BadOverride(Problem(what, file=self.file, where=f"{path}, {OVERRIDE}", **more))

    def apply(self, tree: Branch, override: str) -> None:
        key, equals, text = override.partition("=")
        key = key.strip()
        bare = key.removeprefix("++").removeprefix("+")
        tokens = split_path(bare)
        if not equals or tokens is None:
            shown = "…" if "encryption_key" in override else override
            raise _BadOverride(Problem("is not an override", where=OVERRIDE, value=shown, allowed=FORM))
        value = read_value(text, self.file, bare)
        self.in_section(tree, self.root, bare, tokens, 0, value)

    def in_section(
        self, branch: Branch, cls: type[Section], path: str, tokens: list[Token], at: int, value: Tree
    ) -> None:
        token = tokens[at]
        prefix = path[: token.start]
        known = fields_of(cls)
        name = field_names(cls).get(token.text)
        if name is None:
            hint = suggest_key(self.root, prefix, token.text, known)
            raise self.error(prefix + token.text, "is not a key of the spec", hint=hint)
        one = known[name]
        if at + 1 == len(tokens):
            self.set_field(branch, one, value)
            return
        kind = one.kind
        if kind is Kind.SECTION:
            self.descend_section(branch, one, path, tokens, at, value)
        elif kind in (Kind.SECTIONS, Kind.SCALARS):
            self.in_list(branch, one, path, tokens, at + 1, value)
        elif kind is Kind.MAPPING:
            self.in_mapping(branch, one, path, tokens, at + 1, value)
        else:
            here = path[: token.start + len(token.text)]
            raise self.error(path, f"{here} is a single value and has no keys below it")

    def descend_section(
        self, branch: Branch, one: SchemaField, path: str, tokens: list[Token], at: int, value: Tree
    ) -> None:
        below = branch.items.get(one.name)
        if isinstance(below, Listing) and one.optional and len(below.items) == 1:
            below = below.items[0]
        if below is None or (isinstance(below, Leaf) and below.value is None):
            below = branch.items[one.name] = Branch({}, OVERRIDE)
        if isinstance(below, Branch):
            self.in_section(below, one.base, path, tokens, at + 1, value)
        # Anything else is reported where the file's own value is checked.

    def set_field(self, branch: Branch, one: SchemaField, value: Tree) -> None:
        """Set a whole field; a mapping is merged into a section field by field."""
        below = branch.items.get(one.name)
        if one.kind is Kind.SECTION and isinstance(value, Branch) and isinstance(below, Branch):
            known = fields_of(one.base)
            for key, item in value.items.items():
                if key in known:
                    self.set_field(below, known[key], item)
                else:
                    below.items[key] = item
        else:
            branch.items[one.name] = value

    def listing(self, branch: Branch, one: SchemaField, path: str) -> Listing:
        """The list an index refers to: the file's, else the default."""
        below = branch.items.get(one.name)
        if below is None:
            default = one.default if one.kind is Kind.SCALARS and one.default else []
            below = Listing([Leaf(item, str(item), OVERRIDE) for item in default], OVERRIDE)
        elif isinstance(below, Leaf) and below.value is None:
            below = Listing([], OVERRIDE)
        elif isinstance(below, Branch) and one.single:
            below = Listing([below], below.where)
        if not isinstance(below, Listing):
            raise self.error(path, "the spec has no list at this place", value=getattr(below, "text", None))
        branch.items[one.name] = below
        return below

    def in_list(
        self, branch: Branch, one: SchemaField, path: str, tokens: list[Token], at: int, value: Tree
    ) -> None:
        token = tokens[at]
        below = self.listing(branch, one, path)
        index = self.index(below, token, path)
        last = at + 1 == len(tokens)
        if one.kind is Kind.SCALARS and not last:
            raise self.error(path, "an item of this list has no keys below it")
        if last:
            below.items[index : index + 1] = [value]
            if one.kind is Kind.SCALARS:
                below.where = OVERRIDE
            return
        if index == len(below.items):
            below.items.append(Branch({}, OVERRIDE))
        item = below.items[index]
        if isinstance(item, Branch):
            self.in_section(item, one.base, path, tokens, at + 1, value)

    def index(self, below: Listing, token: Token, path: str) -> int:
        """A list position: an existing one, or the one after the last."""
        size = len(below.items)
        if not re.fullmatch(r"[0-9]{1,6}", token.text) or int(token.text) > size:
            raise self.error(
                path, "is not an item of the list", value=token.text, allowed=f"0 to {size}, {size} adds one"
            )
        return int(token.text)

    def in_mapping(
        self, branch: Branch, one: SchemaField, path: str, tokens: list[Token], at: int, value: Tree
    ) -> None:
        """Set an entry of a free mapping. In a mapping of names to text, the rest of the path is the name."""
        below = branch.items.get(one.name)
        if below is None or (isinstance(below, Leaf) and below.value is None):
            below = branch.items[one.name] = Branch({}, OVERRIDE)
        if one.base is str and isinstance(below, Branch):
            below.items[path[tokens[at].start :].rstrip("]")] = value
            return
        for step in range(at, len(tokens) - 1):
            below = self.child(below, tokens[step], path)
        if isinstance(below, Listing):
            index = self.index(below, tokens[-1], path)
            below.items[index : index + 1] = [value]
        elif isinstance(below, Branch):
            below.items[tokens[-1].text] = value
        else:
            raise self.error(path, "the spec has neither a mapping nor a list at this place")

    def child(self, below: Tree, token: Token, path: str) -> Tree:
        """One step down in a free mapping, creating what is missing."""
        if isinstance(below, Listing):
            index = self.index(below, token, path)
            if index == len(below.items):
                below.items.append(Branch({}, OVERRIDE))
            return below.items[index]
        if isinstance(below, Branch):
            return below.items.setdefault(token.text, Branch({}, OVERRIDE))
        raise self.error(path, "the spec has neither a mapping nor a list at this place")


def _without_split(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Return the overrides that are whole, and one problem for each that spaces have split.

    A shell makes three arguments of ``train.optim.lr = 1e-4``, and two of ``train.optim.lr_steps=[10, 20]``.
    """
    whole: list[str] = []
    problems = []
    rest = list(overrides)
    while rest:
        parts = [rest.pop(0)]
        joined = parts[0]
        if "=" not in joined and rest and rest[0].startswith("="):  # key = value, key =value
            parts.append(rest.pop(0))
            if parts[-1] == "=" and rest:
                parts.append(rest.pop(0))
            joined = "".join(parts)
        elif joined.endswith("=") and rest and "=" not in rest[0]:  # key= value
            parts.append(rest.pop(0))
            joined = "".join(parts)
        else:
            while _is_open(" ".join(parts)) and rest and "=" not in rest[0]:  # key=[1, 2]
                parts.append(rest.pop(0))
            joined = f"'{' '.join(parts)}'"
        if len(parts) == 1:
            whole.append(parts[0])
        else:
            what = "was split at its spaces"
            problems.append(Problem(what, where=OVERRIDE, value=" ".join(parts), hint=f"write {joined}"))
    return whole, problems


def _is_open(text: str) -> bool:
    return "=" in text and any(text.count(left) > text.count(right) for left, right in ("[]", "{}"))


def apply_overrides(
    tree: Branch, root: type[Section], overrides: Sequence[str], file: Path | None
) -> list[Problem]:
    """Apply overrides in order, changing ``tree``; return the problems of those that do not fit."""
    applier = _Applier(root, file)
    overrides, problems = _without_split(overrides)
    for override in overrides:
        try:
            applier.apply(tree, override)
        except _BadOverride as error:
            problems.append(error.problem)
    return problems
