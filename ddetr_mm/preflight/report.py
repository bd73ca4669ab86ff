"""Findings of ``ddetr-mm check``: weights, sections, and the report on screen and as ``check.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddetr_mm.errors import Problem, printable
from ddetr_mm.files import write_text_whole

FAULT, SUSPICION, NOTE = "fault", "suspicion", "note"
"""A fact that makes a run useless; a fact that is a mistake in most cases, which fails ``check`` until it is
accepted by name and is only reported by ``train``; something a user should know."""

MISSING_IMAGE_KINDS = ("images-missing", "images-broken", "annotations-stale")
"""Findings that are notes where a run may replace images that cannot be read."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found.

    Attributes:
        kind: its name, words joined by hyphens, e.g. ``"boxes-are-corners"``.
        problem: what, where, and what to do about it.
        weight: :data:`FAULT`, :data:`SUSPICION` or :data:`NOTE`.
    """

    kind: str
    problem: Problem
    weight: str = FAULT

    def to_dict(self) -> dict[str, str]:
        """Plain data for ``check.json``."""
        return dict(kind=self.kind, weight=self.weight, text=str(self.problem))


def fault(kind: str, what: str, **details: Any) -> Finding:
    """A :data:`FAULT`; ``details`` are those of :class:`~ddetr_mm.errors.Problem`."""
    return Finding(kind, Problem(what, **details), FAULT)


def suspicion(kind: str, what: str, **details: Any) -> Finding:
    """A :data:`SUSPICION`."""
    return Finding(kind, Problem(what, **details), SUSPICION)


def note(kind: str, what: str, **details: Any) -> Finding:
    """A :data:`NOTE`."""
    return Finding(kind, Problem(what, **details), NOTE)


def tolerated(findings: Iterable[Finding], kinds: Sequence[str]) -> list[Finding]:
    """The findings; those of the given kinds become notes, whatever they weigh."""
    return [replace(one, weight=NOTE) if one.kind in kinds else one for one in findings]


def accepted(findings: Iterable[Finding], kinds: Sequence[str]) -> list[Finding]:
    """The findings; suspicions of the given kinds become notes."""
    return [
        replace(one, weight=NOTE) if one.weight == SUSPICION and one.kind in kinds else one
        for one in findings
    ]


@dataclass
class Section:
    """One part of a check.

    Attributes:
        title: e.g. ``"images of train"``.
        lines: facts for the reader, e.g. ``"200 of 5,000 image files read"``.
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


_MARKS = {FAULT: "[red]✗[/red]", SUSPICION: "[red]?[/red]", NOTE: "[yellow]![/yellow]"}  # worst first
_SOUND = "[green]✓[/green]"


@dataclass
class Report:
    """All sections of a check, and the verdict.

    Attributes:
        subtask: what will be run.
        sections: in the order of the checks.
        not_done: what was left out, and why.
        accept: kinds of suspicions that the user accepts.
        tolerate: kinds of findings that the spec allows.
    """

    subtask: str
    sections: list[Section] = field(default_factory=list)
    not_done: list[str] = field(default_factory=list)
    accept: Sequence[str] = ()
    tolerate: Sequence[str] = ()

    def add(self, section: Section) -> None:
        """Append a section, its findings weighed by what is accepted and tolerated."""
        section.findings = accepted(tolerated(section.findings, self.tolerate), self.accept)
        self.sections.append(section)

    @property
    def findings(self) -> list[Finding]:
        """All findings."""
        return [finding for section in self.sections for finding in section.findings]

    @property
    def failing(self) -> list[Finding]:
        """The findings that stop the run: faults, and suspicions that were not accepted."""
        return [finding for finding in self.findings if finding.weight != NOTE]

    @property
    def passed(self) -> bool:
        """Whether the run can start."""
        return not self.failing

    def write(self, path: Path, counts_by_split: Mapping[str, object] | None = None) -> Path:
        """Write ``check.json``, whole or not at all; ``counts_by_split`` goes under ``splits``."""
        content = dict(
            subtask=self.subtask,
            passed=self.passed,
            problems=[str(finding.problem) for finding in self.failing],
            findings=[finding.to_dict() for finding in self.findings],
            not_done=self.not_done,
            splits=dict(counts_by_split or {}),
            sections=[section.to_dict() for section in self.sections],
        )
        return write_text_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def show(self, console: Console, first: int = 0) -> None:
        """Print the sections from number ``first`` on."""
        for section in self.sections[first:]:
            weights = {finding.weight for finding in section.findings}
            mark = next((mark for weight, mark in _MARKS.items() if weight in weights), _SOUND)
            console.print(f"{mark} {escape(printable(section.title))}", highlight=False)
            for line in section.lines:
                console.print(f"    {escape(printable(line))}", highlight=False, soft_wrap=True)
            for finding in section.findings:
                text = escape(f"{finding.kind}: {finding.problem}")
                console.print(f"  {_MARKS[finding.weight]} {text}", highlight=False, soft_wrap=True)


def overview(counts_by_split: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of images and boxes with a column for each split.

    Args:
        counts_by_split: see :meth:`~ddetr_mm.preflight.inputs.Split.counts`.
    """
    table = Table(title="annotations")
    table.add_column("")
    for name in counts_by_split:
        table.add_column(name, justify="right")
    for label, values in _overview_rows(list(counts_by_split.values())):
        table.add_row(escape(printable(label)), *values)
    return table


def _overview_rows(all_counts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    for key in (
        "num_images",
        "num_images_without_objects",
        "num_boxes",
        "num_crowds",
        "num_ignored",
        "num_invisible",
    ):
        yield key.removeprefix("num_").replace("_", " "), [f"{one[key]:,}" for one in all_counts]
    classes = [one["boxes_by_class"] for one in all_counts]
    for name in dict.fromkeys(name for one in classes for name in one):
        yield f"class {name}", [f"{one.get(name, 0):,}" for one in classes]
