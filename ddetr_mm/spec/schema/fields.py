"""How one field of the schema is declared: its default together with everything a user may ask about it.

A field is an ordinary dataclass field. What the type cannot say (meaning, unit, sentinel, range,
options, where the field comes from) lives in a :class:`FieldMeta` under the metadata key
:data:`META_KEY`, so that one declaration feeds the checks, the commented default spec and the tables
of the documentation.
"""

from __future__ import annotations

import copy
from dataclasses import Field, dataclass, field
from typing import Any

META_KEY = "ddetr_mm"

REFERENCE = "TAO"
REFERENCE_5_1 = "TAO 5.1"
REFERENCE_7_3 = "TAO 7.3"
OURS = "ours"

FINITE = "a finite number"


@dataclass(frozen=True)
class FieldMeta:
    """What is known of a field beyond its type and default.

    Attributes:
        doc: meaning, unit and sentinel values, in full sentences.
        ge: smallest value accepted (for a list: of every item).
        gt: the value must be larger than this.
        le: largest value accepted.
        lt: the value must be smaller than this.
        options: the only values accepted (for a list: for every item).
        pattern: a regular expression the whole text must match.
        pattern_words: the same in words, for messages.
        origin: the release that has the field: :data:`REFERENCE`, a named other release, or
            :data:`OURS`.
        placeholder: the default spec shows ``???``: there is no sensible default.
        single: one item is accepted where a list of them is expected.
        secret: the value never appears in messages or written files.
    """

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    options: tuple[str | int, ...] | None = None
    pattern: str | None = None
    pattern_words: str | None = None
    origin: str = REFERENCE
    placeholder: bool = False
    single: bool = False
    secret: bool = False

    def bounds(self) -> str:
        """The range in words (``"at least 1, at most 5"``), empty when there is none."""
        parts = []
        if self.gt is not None:
            parts.append(f"more than {self.gt:g}")
        if self.ge is not None:
            parts.append(f"at least {self.ge:g}")
        if self.lt is not None:
            parts.append(f"less than {self.lt:g}")
        if self.le is not None:
            parts.append(f"at most {self.le:g}")
        return ", ".join(parts)

    def in_bounds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return not (
            (self.ge is not None and value < self.ge)
            or (self.gt is not None and value <= self.gt)
            or (self.le is not None and value > self.le)
            or (self.lt is not None and value >= self.lt)
        )


def spec_field(default: Any, *, doc: str, **known: Any) -> Any:
    """Declare a field of the schema.

    Args:
        default: the default; a list or dict is copied for every instance.
        doc: see :class:`FieldMeta`; line breaks and indentation are folded to single spaces.
        **known: further attributes of :class:`FieldMeta`.

    Returns:
        A dataclass field (typed ``Any``, as :func:`dataclasses.field` has to be).
    """
    metadata = {META_KEY: FieldMeta(doc=" ".join(doc.split()), **known)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, *, origin: str = REFERENCE) -> Any:
    """Declare a sub-section: a nested dataclass whose first docstring paragraph documents it."""
    doc = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return field(default_factory=kind, metadata={META_KEY: FieldMeta(doc=doc, origin=origin)})


def meta_of(declared: Field[Any]) -> FieldMeta:
    """The :class:`FieldMeta` of a field declared by :func:`spec_field` or :func:`section`."""
    meta: FieldMeta = declared.metadata[META_KEY]
    return meta
