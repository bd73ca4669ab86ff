"""How a field of the schema is declared, and how declarations are read back.

:func:`spec_field` wraps pydantic's ``Field`` with what the documentation needs beside the type: meaning,
origin, whether a value has to be given. :func:`fields_of` gives the declared fields of a section with their
types taken apart, for checks, messages and tables.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo as PydanticField

TAO = "TAO"
TAO_5_1 = "TAO 5.1"
TAO_7_3 = "TAO 7.3"
OURS = "ours"

PLACEHOLDER = "???"
MAX_INTEGER = 2**63 - 1

Steps = tuple[str | int, ...]
"""The path of a value: names of keys, and positions in lists."""


def _fits_64_bits(value: int) -> int:
    if abs(value) > MAX_INTEGER:
        raise ValueError("does not fit 64 bits")
    return value


Int = Annotated[int, AfterValidator(_fits_64_bits)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]


@dataclass(frozen=True)
class Searched:
    """The values of a field that AutoML tries by default, as TAO's schema marks them.

    Attributes:
        low: the smallest; with ``open_low`` the bound that values stay above.
        high: the largest; infinite where there is none.
        open_low: whether ``low`` itself is left out.
        start: the smallest value that is drawn where ``open_low``.
        log: whether values are drawn evenly over the orders of magnitude.
        at_most: a field whose value this one must not exceed.
        more_than: a field whose value this one must exceed.
        is_neutral: the field cannot change what a run learns, and is not searched unless it is asked for.
    """

    low: float
    high: float
    open_low: bool = False
    start: float = 0.0
    log: bool = False
    at_most: str | None = None
    more_than: str | None = None
    is_neutral: bool = False

    def words(self) -> str:
        """The values in words, for comments and tables."""
        parts = [f"{'more than' if self.open_low else 'at least'} {self.low:g}"]
        parts += [f"at most {self.high:g}"] if self.high != float("inf") else []
        parts += [f"at most {self.at_most}"] if self.at_most else []
        parts += [f"more than {self.more_than}"] if self.more_than else []
        parts += ["in log space"] if self.log else []
        parts += ["only where asked for: it cannot change the result"] if self.is_neutral else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Form:
    """What a pattern means, in words; comes after the pattern in an annotation."""

    words: str


class Section(BaseModel):
    """Base of all sections: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def spec_field(
    default: Any,
    *,
    doc: str,
    origin: str = TAO,
    alias: str | None = None,
    placeholder: bool = False,
    single: bool = False,
    secret: bool = False,
    filled: bool = False,
    searched: Searched | None = None,
    **bounds: Any,
) -> Any:
    """Declare a field of a section.

    Args:
        default: the default; a list or mapping is copied for every instance.
        doc: meaning, unit and special values, in full sentences; line breaks are folded to blanks.
        origin: the release of TAO that has the field, or :data:`OURS`.
        alias: a second name that TAO's documentation uses.
        placeholder: the default spec shows ``???``: there is no sensible default.
        single: one item is accepted where a list of them is expected.
        secret: the value never appears in messages or written files.
        filled: an empty list counts as not given.
        searched: what AutoML tries by default; None: it leaves the field as it is.
        **bounds: ``ge``, ``gt``, ``le`` or ``lt``, as in pydantic.

    Returns:
        A pydantic field (typed ``Any``, as pydantic's own ``Field`` is).
    """
    extra: dict[str, Any] = dict(
        origin=origin, alias=alias, placeholder=placeholder, single=single, secret=secret, filled=filled
    )
    if searched is not None:
        extra["searched"] = searched
    return Field(
        default,
        description=" ".join(doc.split()),
        json_schema_extra=extra,
        repr=not secret,
        **bounds,
    )


def section(kind: type[Section], *, origin: str = TAO) -> Any:
    """Declare a sub-section; the first paragraph of its docstring documents it."""
    doc = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return Field(default_factory=kind, description=doc, json_schema_extra=dict(origin=origin))


class Kind(Enum):
    """The shapes a field of the schema can have."""

    SCALAR = "scalar"
    SCALARS = "list of scalars"
    MAPPING = "mapping"
    SECTION = "section"
    SECTIONS = "list of sections"


_WORDS = {
    bool: ("true or false", "true/false values"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}


@dataclass(frozen=True)
class SchemaField:
    """One declared field with its type taken apart.

    Attributes:
        name: its name in the section.
        kind: its shape.
        base: type of the value, or of the items or values of a list or mapping; a section's class.
        optional: whether null is accepted.
        default: the default value.
        doc: meaning, unit and special values.
        options: the only values accepted (for a list: for every item), or None.
        ge: smallest value accepted (for a list: of every item).
        gt: the value must be larger than this.
        le: largest value accepted.
        lt: the value must be smaller than this.
        pattern: a regular expression that text must match.
        form: the pattern in words.
        origin: the release of TAO that has the field, or :data:`OURS`.
        alias: a second name.
        placeholder: there is no sensible default.
        single: one item is accepted where a list of them is expected.
        secret: the value never appears in messages or written files.
        filled: an empty list counts as not given.
        searched: what AutoML tries by default.
    """

    name: str
    kind: Kind
    base: Any
    optional: bool
    default: Any
    doc: str
    options: tuple[str | int, ...] | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    pattern: str | None = None
    form: str | None = None
    origin: str = TAO
    alias: str | None = None
    placeholder: bool = False
    single: bool = False
    secret: bool = False
    filled: bool = False
    searched: Searched | None = None

    @property
    def is_plain_section(self) -> bool:
        """Whether this is a section that is always present."""
        return self.kind is Kind.SECTION and not self.optional

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

    def value_words(self) -> str:
        """The type of the value itself, or of one item of a list, in plain words."""
        if self.kind is Kind.SECTIONS:
            return "a section: " + ", ".join(fields_of(self.base))
        if self.kind is Kind.SCALARS:
            return _WORDS[self.base][0]
        return "text" if self.kind is Kind.MAPPING else self.words()

    def bounds(self) -> str:
        """The range in words (``"at least 1, at most 5"``), empty when there is none."""
        limits = (
            ("more than", self.gt),
            ("at least", self.ge),
            ("less than", self.lt),
            ("at most", self.le),
        )
        return ", ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)


def _without_annotated(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without ``Annotated``, and the metadata that it carried."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    return annotation, metadata


def _constraints(metadata: Iterable[Any]) -> dict[str, Any]:
    """Range, pattern and form in the metadata of a field."""
    found: dict[str, Any] = {}
    for one in metadata:
        if isinstance(one, PydanticField):
            found |= _constraints(one.metadata)
        elif isinstance(one, Form):
            found["form"] = one.words
        else:
            known = ((name, getattr(one, name, None)) for name in ("ge", "gt", "le", "lt", "pattern"))
            found |= {name: value for name, value in known if value is not None}
    return found


def _schema_field(name: str, declared: PydanticField) -> SchemaField:
    """Take one pydantic field apart."""
    annotation, inner = _without_annotated(declared.annotation)
    metadata = [*declared.metadata, *inner]
    optional = get_origin(annotation) in (Union, types.UnionType)
    if optional:
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        annotation, inner = _without_annotated(annotation)
        metadata += inner
    container = get_origin(annotation)
    if container is list or container is dict:
        annotation, inner = _without_annotated(get_args(annotation)[-1])
        metadata += inner
    options = get_args(annotation) if get_origin(annotation) is Literal else None
    base = type(options[0]) if options else annotation
    is_section = isinstance(base, type) and issubclass(base, Section)
    if container is dict:
        kind = Kind.MAPPING
    elif container is list:
        kind = Kind.SECTIONS if is_section else Kind.SCALARS
    else:
        kind = Kind.SECTION if is_section else Kind.SCALAR
    extra = declared.json_schema_extra
    return SchemaField(
        name=name,
        kind=kind,
        base=base,
        optional=optional,
        default=declared.get_default(call_default_factory=True),
        doc=declared.description or "",
        options=options,
        **_constraints(metadata),
        **(extra if isinstance(extra, dict) else {}),  # type: ignore[arg-type] # JSON values
    )


@cache
def fields_of(cls: type[Section]) -> dict[str, SchemaField]:
    """The declared fields of a section, by name, in order."""
    return {name: _schema_field(name, declared) for name, declared in cls.model_fields.items()}


@cache
def field_names(cls: type[Section]) -> dict[str, str]:
    """Every key that a section accepts, aliases included → name of the field."""
    fields = fields_of(cls).values()
    return {one.name: one.name for one in fields} | {one.alias: one.name for one in fields if one.alias}


@cache
def all_paths(cls: type[Section]) -> tuple[str, ...]:
    """All dotted paths below a section, sub-sections included; ``[]`` marks the items of a list."""
    found: list[str] = []
    for name, one in fields_of(cls).items():
        found.append(name)
        if one.kind in (Kind.SECTION, Kind.SECTIONS):
            items = "[]" if one.kind is Kind.SECTIONS else ""
            found += [f"{name}{items}.{path}" for path in all_paths(one.base)]
    return tuple(found)


def canonical_option(value: Any, options: tuple[Any, ...]) -> Any:
    """The option that equals ``value`` but for upper and lower case; ``value`` itself otherwise."""
    matches = [option for option in options if str(option).lower() == str(value).lower()]
    return matches[0] if len(matches) == 1 else value


def dotted(path: Steps) -> str:
    """``("a", 0, "b")`` as ``a[0].b``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


_STEP = re.compile(r"[^.\[\]]+")


def get_field(spec: object, path: str) -> Any:
    """The value at ``a.b[0].c``.

    Args:
        spec: an experiment or convert spec.
        path: dotted path; list items by ``[index]``, entries of free mappings by name.

    Returns:
        The value. Below a section that is null everything is None.

    Raises:
        KeyError: there is no such field or entry.
    """
    value: Any = spec
    for step in _STEP.findall(path):
        if value is None:
            return None
        try:
            if isinstance(value, list):
                value = value[int(step)]
            elif isinstance(value, dict):
                value = value[step]
            elif isinstance(value, Section) and step in type(value).model_fields:
                value = getattr(value, step)
            else:
                raise KeyError(path)
        except (AttributeError, LookupError, ValueError):
            raise KeyError(path) from None
    return value


def nearest(word: str, choices: Iterable[object]) -> str | None:
    """The choice most like ``word``, ignoring case; None when nothing is near."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    found = get_close_matches(word.lower()[:100], by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None
