"""What a check finds, and how much each finding weighs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ddetr_mm.errors import Problem

FAULT, SUSPICION, NOTE = "fault", "suspicion", "note"
"""A fault is a fact that makes a run useless. A suspicion rests on strong statistical evidence: it fails
``check`` until it is accepted by name, and is only told by ``train``. A note is good to know."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found.

    Attributes:
        kind: its name, in words joined by hyphens, e.g. ``"boxes-are-corners"``.
        problem: what, where, and what to do about it.
        weight: :data:`FAULT`, :data:`SUSPICION` or :data:`NOTE`.
    """

    kind: str
    problem: Problem
    weight: str = FAULT

    def to_dict(self) -> dict[str, str]:
        """Plain data for ``check.json``."""
        return dict(kind=self.kind, weight=self.weight, text=str(self.problem))


@dataclass
class Section:
    """One part of a check: what it looked at, in short lines, and what it found.

    Attributes:
        title: e.g. ``"images on disk"``.
        lines: facts for the reader, e.g. ``"200 of 5,000 looked at"``.
        findings: faults, suspicions and notes.
        data: the same facts as plain data for ``check.json``.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``check.json``."""
        findings = [finding.to_dict() for finding in self.findings]
        return dict(title=self.title, lines=list(self.lines), findings=findings, data=self.data)


def fault(kind: str, what: str, **details: Any) -> Finding:
    """A fact that makes a run useless; ``details`` are those of :class:`~ddetr_mm.errors.Problem`."""
    return Finding(kind, Problem(what, **details), FAULT)


def suspicion(kind: str, what: str, **details: Any) -> Finding:
    """Strong evidence of a mistake."""
    return Finding(kind, Problem(what, **details), SUSPICION)


def note(kind: str, what: str, **details: Any) -> Finding:
    """Something a user should know; no reason not to run."""
    return Finding(kind, Problem(what, **details), NOTE)


MISSING_IMAGE_KINDS = ("images-missing", "images-broken", "annotations-stale")
"""What a run that may replace images that cannot be read can live with."""


def tolerated(findings: Iterable[Finding], kinds: Sequence[str]) -> list[Finding]:
    """The findings, with those of the given kinds turned into notes, whatever they weigh."""
    return [replace(one, weight=NOTE) if one.kind in kinds else one for one in findings]


def accepted(findings: Iterable[Finding], kinds: Sequence[str]) -> list[Finding]:
    """The findings, with suspicions of the given kinds turned into notes: the user knows better."""
    return [
        replace(finding, weight=NOTE) if finding.weight == SUSPICION and finding.kind in kinds else finding
        for finding in findings
    ]
