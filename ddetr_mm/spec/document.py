"""The complete default spec as commented YAML, from the schema alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from ddetr_mm.spec.bind import MISSING
from ddetr_mm.spec.effects import NO_EFFECT
from ddetr_mm.spec.mandatory import Requirement, requirements_of
from ddetr_mm.spec.schema.fields import REFERENCE, REFERENCE_5_1
from ddetr_mm.spec.source import SpecDumper
from ddetr_mm.spec.walk import Kind, SchemaField, fields_of, root_of

_WIDTH = 100
_STEP = "  "


def _comment(text: str, indent: str, inside: str = "") -> Iterator[str]:
    """Comment lines; ``inside`` indents the text behind the hash, continuation lines twice."""
    head = f"{indent}# {inside}"
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=head + 2 * _STEP if inside else head,
        break_on_hyphens=False,
        break_long_words=False,
    )


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.dump(
        value, Dumper=SpecDumper, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _needed(requirement: Requirement) -> str:
    text = requirement.subtask
    if requirement.unless:
        text += f" (unless {requirement.unless} is set)"
    if requirement.only_with:
        text += f" (with {requirement.only_with[0]}: {requirement.only_with[1]})"
    return text


def describe(one: SchemaField, path: str, root: type) -> str:
    """Everything known of a field in one paragraph: meaning, type, range, options, need, effect, origin."""
    meta = one.meta
    parts = [meta.doc]
    if one.type.kind not in (Kind.SECTION, Kind.SECTIONS):
        words, bounds = one.type.words(), meta.bounds()
        each = "each " if one.type.kind is Kind.SCALARS else ""
        parts.append(words[0].upper() + words[1:] + (f"; {each}{bounds}" if bounds else "") + ".")
    if meta.options:
        parts.append("One of: " + ", ".join(map(str, meta.options)) + ".")
    if meta.pattern_words:
        parts.append(f"Form: {meta.pattern_words}.")
    needed = requirements_of(path, root)
    if needed:
        parts.append("Mandatory for " + ", ".join(map(_needed, needed)) + ".")
    if path in NO_EFFECT:
        parts.append(f"No effect: {NO_EFFECT[path]}.")
    if meta.origin != REFERENCE:
        parts.append(f"Origin: {meta.origin}.")
    return " ".join(parts)


def _keys_below(cls: type, root: type, indent: str, inside: str) -> Iterator[str]:
    """The keys of an optional section, as comments above its null."""
    for name, one in fields_of(cls).items():
        if one.type.kind is Kind.SECTION:
            yield from _comment(f"{name}: {one.meta.doc}", indent, inside)
            yield from _keys_below(one.type.base, root, indent, inside + _STEP)
        else:
            yield from _comment(f"{name}: {describe(one, name + '[]', root)}", indent, inside)


def _section(cls: type, root: type, prefix: str, indent: str) -> Iterator[str]:
    for name, one in fields_of(cls).items():
        path = prefix + name
        if indent == "":
            yield ""
        yield from _comment(describe(one, path, root), indent)
        if one.type.kind is Kind.SECTION and not one.type.optional:
            yield f"{indent}{name}:"
            yield from _section(one.type.base, root, path + ".", indent + _STEP)
            continue
        line = f"{name}: {flow(MISSING if one.meta.placeholder else one.default)}"
        if one.meta.origin == REFERENCE_5_1:
            # Today's reference refuses these keys; written out they would make the spec invalid there.
            yield f"{indent}# {line}"
            continue
        if one.type.kind in (Kind.SECTION, Kind.SECTIONS):
            each = "Keys of each entry:" if one.type.kind is Kind.SECTIONS else "Its keys:"
            yield from _comment(each, indent)
            yield from _keys_below(one.type.base, root, indent, _STEP)
        yield f"{indent}{line}"


def default_spec_text(subtask: str) -> str:
    """The complete default spec with a comment on every field.

    Args:
        subtask: ``"convert"`` for the convert spec, any other subtask for the experiment spec.

    Returns:
        YAML that loads back to the defaults; ``???`` stands where there is no sensible default.
    """
    if subtask == "convert":
        head = "Default spec of ddetr-mm convert."
    else:
        head = f"Default spec of an experiment; ddetr-mm {subtask} reads what it needs of it."
    head += " ??? marks values without a default: give them here or as key=value on the command line."
    root = root_of(subtask)
    lines = [*_comment(head, ""), *_section(root, root, "", "")]
    return "\n".join(lines) + "\n"
