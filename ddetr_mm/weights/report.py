"""The report of every key of a checkpoint that was converted or loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ddetr_mm.errors import printable

Shape = tuple[int, ...]

UNREAD = "a stage of the backbone that no feature level reads"
"""Why a key is not needed."""


@dataclass
class LoadReport:
    """Where every key went when weights were converted or loaded.

    Every key of the source is in exactly one of ``mapped`` (as a source), ``unexpected``, ``reshaped``,
    ``carried_over``, ``aliases`` and ``dropped``; every key of the target is in ``mapped`` (as a target),
    ``missing``, ``filled``, ``reshaped`` or ``carried_over``.

    Attributes:
        source: the file or folder read.
        target: the file written, or the model's class.
        source_format: ``mmdet``, ``tao``, ``official``, ``hf`` or the name of a backbone layout.
        target_format: as ``source_format``, or ``model``.
        mapped: source key → target keys with its values unchanged. One key has several where the target
            splits or repeats it; several keys have one where the target joins them.
        missing: target keys without a source; they keep their initial values.
        unexpected: source keys that the target does not have.
        reshaped: target key → (shape in the source, shape in the target); not loaded.
        carried_over: target key → which part of its values was loaded.
        aliases: source key → the key that it repeats.
        filled: target key → its value, where the source format has no such key.
        dropped: source key → why it is not needed in the target.
        notes: remarks for the user, one sentence each.
    """

    source: str
    target: str = ""
    source_format: str = ""
    target_format: str = ""
    mapped: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    carried_over: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether no key is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.reshaped)

    def summary(self) -> str:
        """Return a few lines: counts, then the first keys of every group that needs attention."""
        lines = [
            f"{self.source} ({self.source_format}) -> {self.target or self.target_format}"
            f" ({self.target_format}): {len(self.mapped)} keys loaded"
        ]
        lines += _listed("missing (initial values stay)", self.missing)
        lines += _listed("unexpected (not used)", self.unexpected)
        lines += _listed(
            "reshaped (not used)",
            [
                f"{key}: {list(file)} in the file, {list(here)} here"
                for key, (file, here) in self.reshaped.items()
            ],
        )
        lines += _listed("carried over in part", [f"{key}: {how}" for key, how in self.carried_over.items()])
        lines += _counted("repeat another key", self.aliases)
        lines += _counted("filled in", self.filled)
        lines += _counted("not needed", self.dropped)
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(map(printable, lines))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data, for JSON."""
        reshaped = {
            key: {"source_shape": list(there), "target_shape": list(here)}
            for key, (there, here) in self.reshaped.items()
        }
        return asdict(self) | {"complete": self.complete, "reshaped": reshaped}


def _listed(title: str, items: list[str], shown: int = 6) -> list[str]:
    if not items:
        return []
    rest = f" … and {len(items) - shown} more" if len(items) > shown else ""
    return [f"  {title}, {len(items)}: {'; '.join(items[:shown])}{rest}"]


def _counted(title: str, items: dict[str, str]) -> list[str]:
    if not items:
        return []
    reasons = dict.fromkeys(items.values())
    why = f": {'; '.join(reasons)}" if len(reasons) <= 2 else ""
    return [f"  {len(items)} keys {title}{why}"]
