"""Reading the schema itself: which fields there are, of which type, under which dotted path."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.schema.fields import FieldMeta, meta_of

SUBTASKS = ("convert", "train", "evaluate", "inference", "export", "gen_trt_engine")

_WORDS = {
    bool: ("true or false", "true/false values"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}


class Kind(Enum):
    """The shapes a field of the schema can have."""

    SCALAR = "scalar"
    SCALARS = "list of scalars"
    MAPPING = "mapping"
    SECTION = "section"
    SECTIONS = "list of sections"


@dataclass(frozen=True)
class FieldType:
    """Shape of a field, the type of what it holds (item or value type for containers), and nullness."""

    kind: Kind
    base: Any
    optional: bool

    def words(self) -> str:
        """The type in plain words, for messages and tables."""
        if self.kind is Kind.SCALAR:
            text = _WORDS[self.base][0]
        elif self.kind is Kind.SCALARS:
            text = f"a list of {_WORDS[self.base][1]}"
        elif self.kind is Kind.MAPPING:
            text = "a mapping of names to text" if self.base is str else "a mapping"
        elif self.kind is Kind.SECTION:
            text = "a section: " + ", ".join(fields_of(self.base))
        else:
            text = "a list of sections: " + ", ".join(fields_of(self.base))
        return text + (", or null" if self.optional else "")


@dataclass(frozen=True)
class SchemaField:
    """One declared field: name, type, documentation and default."""

    name: str
    type: FieldType
    meta: FieldMeta
    default: Any


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
    """

    path: str
    type: str
    default: Any
    bounds: str
    options: tuple[str | int, ...] | None
    doc: str
    origin: str
    kind: Kind


def _field_type(annotation: Any) -> FieldType:
    """Take an annotation of the schema apart."""
    optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        optional = len(inner) < len(get_args(annotation))
        (annotation,) = inner
    if get_origin(annotation) is list:
        (base,) = get_args(annotation)
        return FieldType(Kind.SECTIONS if is_dataclass(base) else Kind.SCALARS, base, optional)
    if get_origin(annotation) is dict:
        return FieldType(Kind.MAPPING, get_args(annotation)[1], optional)
    kind = Kind.SECTION if is_dataclass(annotation) else Kind.SCALAR
    return FieldType(kind, annotation, optional)


@cache
def fields_of(cls: type) -> dict[str, SchemaField]:
    """The declared fields of one dataclass of the schema, by name, in order."""
    hints = get_type_hints(cls)
    found = {}
    for declared in fields(cls):
        default = declared.default
        if declared.default_factory is not MISSING:
            default = declared.default_factory()
        found[declared.name] = SchemaField(
            declared.name, _field_type(hints[declared.name]), meta_of(declared), default
        )
    return found


def root_of(subtask: str | None) -> type[ExperimentSpec] | type[ConvertSpec]:
    """The root dataclass of a subtask's spec (an experiment for None)."""
    return ConvertSpec if subtask == "convert" else ExperimentSpec


def _iter(cls: type, prefix: str) -> Iterator[FieldInfo]:
    for name, one in fields_of(cls).items():
        path = prefix + name
        plain_section = one.type.kind is Kind.SECTION and not one.type.optional
        if not plain_section:
            yield FieldInfo(
                path=path,
                type=one.type.words(),
                default="???" if one.meta.placeholder else one.default,
                bounds=one.meta.bounds(),
                options=one.meta.options,
                doc=one.meta.doc,
                origin=one.meta.origin,
                kind=one.type.kind,
            )
        if one.type.kind is Kind.SECTION:
            yield from _iter(one.type.base, path + ".")
        elif one.type.kind is Kind.SECTIONS:
            yield from _iter(one.type.base, path + "[].")


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


@cache
def all_paths(cls: type) -> tuple[str, ...]:
    """All dotted paths below a root dataclass, sections included."""
    found: list[str] = []

    def collect(part: type, prefix: str) -> None:
        for name, one in fields_of(part).items():
            found.append(prefix + name)
            if one.type.kind is Kind.SECTION:
                collect(one.type.base, f"{prefix}{name}.")
            elif one.type.kind is Kind.SECTIONS:
                collect(one.type.base, f"{prefix}{name}[].")

    collect(cls, "")
    return tuple(found)
