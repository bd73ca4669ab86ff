"""A configuration on its way: named sections, each with the spec fields it came from.

A :class:`ConfigDraft` is plain data. :mod:`ddetr_mm.translate.write` turns it into readable Python,
:func:`ConfigDraft.to_dict` into what ``mmengine.Config`` takes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reference:
    """Stands for the value of another section, and is written as that section's name."""

    name: str


@dataclass(frozen=True)
class Section:
    """One top-level name of an mmengine config.

    Attributes:
        name: the variable, e.g. ``"model"``.
        value: plain Python data (dicts, lists, tuples, strings, numbers, booleans, None), and references
            to earlier sections.
        source_keys: dotted paths of the spec fields that shaped it, in reading order.
        remark: one or more lines for the reader, written as a comment above the section.
    """

    name: str
    value: Any
    source_keys: tuple[str, ...] = ()
    remark: str = ""


@dataclass
class ConfigDraft:
    """The sections of one config, in the order they are written."""

    sections: list[Section] = field(default_factory=list)

    def add(self, name: str, value: Any, source_keys: tuple[str, ...] = (), remark: str = "") -> None:
        """Append a section; a name may appear once.

        Raises:
            ValueError: when the name is taken already (a defect of the translation).
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
    """A copy of ``value`` with references replaced by copies of what they stand for."""
    if isinstance(value, Reference):
        return copy.deepcopy(known[value.name])
    if isinstance(value, dict):
        return {key: _resolved(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolved(item, known) for item in value)
    return value
