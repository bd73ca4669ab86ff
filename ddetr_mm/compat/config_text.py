"""The draft of a config (:class:`ConfigDraft`), and how it is written as commented Python."""

from __future__ import annotations

import copy
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """A reference to the value of another section, written as that section's name."""

    name: str


@dataclass(frozen=True)
class Section:
    """One top-level name of an mmengine config.

    Attributes:
        name: the variable, e.g. ``"model"``.
        value: plain Python data (dicts, lists, tuples, strings, numbers, booleans, None), and references
            to earlier sections.
        source_keys: dotted paths of the spec fields that it was made from, in reading order.
        remark: one or more lines, written as a comment above the section.
    """

    name: str
    value: Any
    source_keys: tuple[str, ...] = ()
    remark: str = ""


@dataclass
class ConfigDraft:
    """The sections of one config, in the order they are written.

    Attributes:
        sections: the sections.
        notes: what a user should know about the translation, one line each.
    """

    sections: list[Section] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, source_keys: tuple[str, ...] = (), remark: str = "") -> None:
        """Append a section; a name may appear once.

        Raises:
            ValueError: the name exists already (a defect of the translation).
        """
        if any(section.name == name for section in self.sections):
            raise ValueError(f"config section {name!r} is written twice")
        self.sections.append(Section(name, value, source_keys, remark))

    def to_dict(self) -> dict[str, Any]:
        """All sections as one dict, for ``mmengine.Config``."""
        known: dict[str, Any] = {}
        for section in self.sections:
            known[section.name] = _resolved(section.value, known)
        return known


def _resolved(value: Any, known: dict[str, Any]) -> Any:
    """A copy of ``value`` with references replaced by copies of the sections' values."""
    if isinstance(value, Reference):
        return copy.deepcopy(known[value.name])
    if isinstance(value, dict):
        return {key: _resolved(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolved(item, known) for item in value)
    return value


# --- a draft as Python source for ``mmengine.Config.fromfile`` ---

LINE_LENGTH = 100


def format_value(value: Any, indent: int = 0, prefix: int = 0) -> str:
    """Python source of plain data, wrapped at :data:`LINE_LENGTH` columns.

    Args:
        value: nested dicts (with string keys), lists, tuples, strings, numbers, booleans, None and references
            to other sections.
        indent: indentation of the enclosing block.
        prefix: columns before the value on its first line.

    Returns:
        Source whose first line continues the current one.

    Raises:
        TypeError: a value of any other type.
        ValueError: a number that is not finite, which has no literal in Python.
    """
    if isinstance(value, Mapping):
        opening, items, closing = _mapping_parts(value)
    elif isinstance(value, (list, tuple)):
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        items = [("", item) for item in value]
    elif isinstance(value, Reference):
        return value.name
    elif isinstance(value, str):
        return _text_literal(value)
    elif value is None or isinstance(value, (bool, int)):
        return repr(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value!r} cannot be written into a config")
        return repr(value)
    else:
        raise TypeError(f"a config holds plain data, not {type(value).__name__}")

    flat = ", ".join(key + format_value(item, indent) for key, item in items)
    if isinstance(value, tuple) and len(value) == 1:
        flat += ","
    if "\n" not in flat and indent + prefix + len(opening) + len(flat) + len(closing) <= LINE_LENGTH:
        return opening + flat + closing
    inner = indent + 4
    lines = [" " * inner + key + format_value(item, inner, prefix=len(key)) + "," for key, item in items]
    return "\n".join([opening, *lines, " " * indent + closing])


def _mapping_parts(value: Mapping[str, Any]) -> tuple[str, list[tuple[str, Any]], str]:
    """Opening, ``(key text, item)`` pairs and closing: ``dict(a=1)`` where keys are identifiers."""
    if value and all(isinstance(key, str) and _is_keyword_argument(key) for key in value):
        return "dict(", [(f"{key}=", item) for key, item in value.items()], ")"
    return "{", [(f"{_text_literal(key)}: ", item) for key, item in value.items()], "}"


def _text_literal(text: Any) -> str:
    """Python source of a string, with ``{{`` escaped.

    mmengine replaces ``{{...}}`` in the source of a config before running it, also across the end of a
    string, so a string in a spec could become code.
    """
    return repr(text).replace("{{", "{\\x7b")


def _is_keyword_argument(key: str) -> bool:
    # Python normalises identifiers, so that µ would become another letter.
    return key.isascii() and key.isidentifier() and not keyword.iskeyword(key)


def config_text(
    draft: ConfigDraft,
    *,
    title: Sequence[str] = (),
    describe: Callable[[str], str] | None = None,
) -> str:
    """The whole config as Python source.

    Args:
        draft: the sections, in order.
        title: comment lines at the top of the file.
        describe: returns the comment for a spec key, e.g. ``"model.num_queries = 300 (line 12)"``.
    """
    blocks = ["\n".join(_comment(line) for line in title)] if title else []
    blocks += [_section_text(section, describe) for section in draft.sections]
    return "\n\n".join(blocks) + "\n"


def _comment(text: str) -> str:
    """One comment line; ``{{`` is broken up, see :func:`_text_literal`."""
    line = f"# {' '.join(text.splitlines())}".rstrip()
    return re.sub(r"\{(?=\{)", "{ ", line)


def _section_text(section: Section, describe: Callable[[str], str] | None) -> str:
    lines = [f"# {line}".rstrip() for line in section.remark.splitlines()]
    if describe is not None:
        lines += [_comment(f"  {describe(key)}") for key in section.source_keys]
    assignment = f"{section.name} = "
    lines.append(assignment + format_value(section.value, prefix=len(assignment)))
    return "\n".join(lines)
