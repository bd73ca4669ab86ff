"""Prints specs: the commented default spec, a spec as YAML, and the table of all fields."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec.fields import PLACEHOLDER, TAO, TAO_5_1, Kind, SchemaField, Section, fields_of
from ddetr_mm.spec.notes import NO_EFFECT
from ddetr_mm.spec.rules import Requirement, requirements_of, results_dir_setting
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec, Spec, root_of
from ddetr_mm.spec.yaml_source import SpecDumper

_WIDTH = 100
_STEP = "  "


@dataclass(frozen=True)
class FieldInfo:
    """A row for tables of all fields.

    Attributes:
        path: dotted path; ``[]`` marks the items of a list.
        type: the type in words.
        default: the default value; ``"???"`` where the user has to give one.
        bounds: the range in words, or empty.
        options: the only values accepted, or None.
        doc: meaning, unit, sentinel.
        origin: the release that has the field, or ``"ours"``.
        kind: shape of the field.
        searched: what AutoML tries of it, in words; empty: it leaves the field as it is.
    """

    path: str
    type: str
    default: Any
    bounds: str
    options: tuple[str | int, ...] | None
    doc: str
    origin: str
    kind: Kind
    searched: str = ""


def _iter(cls: type[Section], prefix: str) -> Iterator[FieldInfo]:
    for name, one in fields_of(cls).items():
        path = prefix + name
        if not one.is_plain_section:
            yield FieldInfo(
                path=path,
                type=one.words(),
                default=PLACEHOLDER if one.placeholder else one.default,
                bounds=one.bounds(),
                options=one.options,
                doc=one.doc,
                origin=one.origin,
                kind=one.kind,
                searched=one.searched.words() if one.searched is not None else "",
            )
        if one.kind is Kind.SECTION:
            yield from _iter(one.base, path + ".")
        elif one.kind is Kind.SECTIONS:
            yield from _iter(one.base, path + "[].")


def iter_fields(subtask: str | None = None) -> Iterator[FieldInfo]:
    """Every field of the schema, in order; sections themselves are left out, their fields follow.

    Args:
        subtask: ``"convert"`` for the fields of a convert spec, another subtask for those of an
            experiment, None for all: then paths of the convert spec start with ``convert:``.
    """
    if subtask != "convert":
        yield from _iter(ExperimentSpec, "")
    if subtask in (None, "convert"):
        yield from _iter(ConvertSpec, "convert:" if subtask is None else "")


def aliases() -> dict[str, str]:
    """Second names of fields, as dotted paths → dotted paths of the fields."""
    return dict(_aliases(ExperimentSpec, "")) | dict(_aliases(ConvertSpec, "convert:"))


def _aliases(cls: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for name, one in fields_of(cls).items():
        if one.alias:
            yield prefix + one.alias, prefix + name
        if one.kind is Kind.SECTION:
            yield from _aliases(one.base, f"{prefix}{name}.")


# The default spec


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


def describe(one: SchemaField, path: str, root: type[Section]) -> str:
    """A field in one paragraph: meaning, type, range, options, where it is mandatory, effect, origin."""
    parts = [one.doc]
    if one.kind not in (Kind.SECTION, Kind.SECTIONS):
        words, bounds = one.words(), one.bounds()
        each = "each " if one.kind is Kind.SCALARS else ""
        parts.append(words[0].upper() + words[1:] + (f"; {each}{bounds}" if bounds else "") + ".")
    if one.options:
        parts.append("One of: " + ", ".join(map(str, one.options)) + ".")
    if one.form:
        parts.append(f"Form: {one.form}.")
    if one.searched is not None:
        parts.append(f"AutoML searches it: {one.searched.words()}.")
    needed = requirements_of(path, root)
    if needed:
        parts.append("Mandatory for " + ", ".join(map(_needed, needed)) + ".")
    if path in NO_EFFECT:
        parts.append(f"No effect: {NO_EFFECT[path]}.")
    if one.origin != TAO:
        parts.append(f"Origin: {one.origin}.")
    return " ".join(parts)


def _keys_below(cls: type[Section], root: type[Section], indent: str, inside: str) -> Iterator[str]:
    """The keys of an optional section, as comments above its null."""
    for name, one in fields_of(cls).items():
        if one.kind is Kind.SECTION:
            yield from _comment(f"{name}: {one.doc}", indent, inside)
            yield from _keys_below(one.base, root, indent, inside + _STEP)
        else:
            yield from _comment(f"{name}: {describe(one, name + '[]', root)}", indent, inside)


def _section(cls: type[Section], root: type[Section], prefix: str, indent: str) -> Iterator[str]:
    for name, one in fields_of(cls).items():
        path = prefix + name
        if indent == "":
            yield ""
        yield from _comment(describe(one, path, root), indent)
        if one.is_plain_section:
            yield f"{indent}{name}:"
            yield from _section(one.base, root, path + ".", indent + _STEP)
            continue
        line = f"{name}: {flow(PLACEHOLDER if one.placeholder else one.default)}"
        if one.origin == TAO_5_1:
            # Today's TAO rejects these keys: written out they would make the spec invalid there.
            yield f"{indent}# {line}"
            continue
        if one.kind in (Kind.SECTION, Kind.SECTIONS):
            each = "Keys of each entry:" if one.kind is Kind.SECTIONS else "Its keys:"
            yield from _comment(each, indent)
            yield from _keys_below(one.base, root, indent, _STEP)
        yield f"{indent}{line}"


def default_spec_text(subtask: str) -> str:
    """The complete default spec with a comment on every field.

    Args:
        subtask: ``"convert"`` for the convert spec, any other subtask for the experiment spec.

    Returns:
        YAML that loads back to the defaults; ``???`` marks fields without a sensible default.
    """
    if subtask == "convert":
        head = "Default spec of ddetr-mm convert."
    else:
        head = f"Default spec of an experiment; ddetr-mm {subtask} reads what it needs of it."
    head += " ??? marks values without a default: give them here or as key=value on the command line."
    root = root_of(subtask)
    lines = [*_comment(head, ""), *_section(root, root, "", "")]
    return "\n".join(lines) + "\n"


# A spec as YAML

_DOLLAR = re.compile(r"(?<!\\)(\\*)\$\{")


def _escape(text: str) -> str:
    """Text with its ``${`` escaped, so that it loads as it is."""
    return _DOLLAR.sub(lambda match: match.group(1) * 2 + r"\${", text)


def _plain(value: Any) -> Any:
    """A free value for YAML."""
    if isinstance(value, str):
        return _escape(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def to_plain(part: Section) -> dict[str, Any]:
    """A section as nested dicts and lists: secrets as null, mandatory fields that are not set as ``???``."""
    values: dict[str, Any] = {}
    for name, one in fields_of(part.__class__).items():
        value = getattr(part, name)
        if one.secret:
            values[name] = None
        elif one.placeholder and value == one.default:
            values[name] = PLACEHOLDER
        elif one.kind is Kind.SECTION and value is not None:
            values[name] = to_plain(value)
        elif one.kind is Kind.SECTIONS and value is not None:
            values[name] = [to_plain(item) for item in value]
        else:
            values[name] = _plain(value)
    return values


def dump(value: Any) -> str:
    """YAML text that loads back as ``value``; lists of single values on one line."""
    return yaml.dump(value, Dumper=SpecDumper, sort_keys=False, allow_unicode=True, width=100)


def spec_to_yaml(spec: Spec) -> str:
    """The complete spec as YAML that loads back to the same spec.

    ``encryption_key`` is always written as null.
    """
    return dump(to_plain(spec))


def task_results_dir(spec: Spec, subtask: str) -> Path:
    """The folder that a subtask writes its results to.

    Args:
        spec: a typed spec.
        subtask: its section's own ``results_dir`` comes before the spec's.

    Raises:
        SpecError: neither is given.
    """
    setting = results_dir_setting(spec, subtask)
    if not setting:
        where = "results_dir" if isinstance(spec, ConvertSpec) else f"{subtask}.results_dir and results_dir"
        hint = "name a folder for the results: results_dir=/path/to/results"
        raise SpecError(Problem("is empty: there is no place for the results", where=where, hint=hint))
    return Path(setting)
