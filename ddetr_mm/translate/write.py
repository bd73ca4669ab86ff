"""A config draft as Python text that people can read and edit, and ``mmengine.Config.fromfile`` runs."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddetr_mm.translate.draft import ConfigDraft, Reference, Section

LINE_LENGTH = 100


def format_value(value: Any, indent: int = 0, prefix: int = 0) -> str:
    """Python source of plain data, wrapped at :data:`LINE_LENGTH` columns.

    Args:
        value: dicts (with string keys), lists, tuples, strings, numbers, booleans or None, nested; references
            to other sections.
        indent: columns that the enclosing block is indented by.
        prefix: columns in use on the first line before the value.

    Returns:
        Text whose first line continues the current one.

    Raises:
        TypeError: for any other type; a config holds data, not objects.
        ValueError: for a number that is not finite, which Python source cannot spell.
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
    """Python source of a text that mmengine leaves as it is.

    Before it runs a config, mmengine replaces ``{{...}}`` in its source, with no regard to where a text ends:
    what stands in a spec could become code.
    """
    return repr(text).replace("{{", "{\\x7b")


def _is_keyword_argument(key: str) -> bool:
    # Python reads identifiers in a normal form, so that µ would become another letter.
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
        title: comment lines for the head of the file.
        describe: gives the comment for one spec key, e.g. ``"model.num_queries = 300 (line 12)"``.
    """
    blocks = ["\n".join(_comment(line) for line in title)] if title else []
    blocks += [_section_text(section, describe) for section in draft.sections]
    return "\n\n".join(blocks) + "\n"


def _comment(text: str) -> str:
    """One comment line, whatever the text holds: see :func:`_text_literal`."""
    line = f"# {' '.join(text.splitlines())}".rstrip()
    return re.sub(r"\{(?=\{)", "{ ", line)


def _section_text(section: Section, describe: Callable[[str], str] | None) -> str:
    lines = [f"# {line}".rstrip() for line in section.remark.splitlines()]
    if describe is not None:
        lines += [_comment(f"  {describe(key)}") for key in section.source_keys]
    assignment = f"{section.name} = "
    lines.append(assignment + format_value(section.value, prefix=len(assignment)))
    return "\n".join(lines)
