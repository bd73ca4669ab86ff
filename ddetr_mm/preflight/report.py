"""Findings of `check`, on screen and as check.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddetr_mm.datasets.coco_table import CocoTable
from ddetr_mm.datasets.sources import CocoSource, read_coco_sources
from ddetr_mm.errors import Problem
from ddetr_mm.files import write_text_whole

# --- One split of the data as the checks see it: its name, its sources, and its annotations as columns ---


@dataclass(frozen=True)
class Split:
    """Legend: N images, M boxes.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        sources: where the data lies.
        table: the annotations of all sources.
    """

    name: str
    sources: tuple[CocoSource, ...]
    table: CocoTable

    @classmethod
    def read(cls, name: str, sources: Sequence[Mapping[str, str]], storage: str = "process") -> Split:
        """Read a split's annotation files.

        Args:
            name: ``train``, ``val`` or ``test``.
            sources: ``{image_dir, json_file}`` each.
            storage: see :func:`~ddetr_mm.datasets.sources.read_coco_sources`.

        Raises:
            DataError: a file is missing, unreadable or not COCO.
        """
        table = read_coco_sources(sources, storage=storage)
        return cls(name, tuple(CocoSource.of(source) for source in sources), table)

    @property
    def where(self) -> str:
        """The spec key that names the split, for messages."""
        return f"dataset.{self.name}_data_sources"

    @cached_property
    def box_rows(self) -> npt.NDArray[np.int64]:
        """(M,) the image row of every box."""
        return self.table.box_image_rows

    @cached_property
    def box_sizes_wh(self) -> npt.NDArray[np.float64]:
        """(M, 2) the recorded width and height of every box's image."""
        return self.table.sizes_hw[self.box_rows][:, ::-1].astype(np.float64)

    def path(self, row: int) -> Path:
        """The image file of an image row."""
        source = self.sources[int(self.table.source_indices[row])]
        return Path(source.image_path(self.table.file_name(row)))

    def spread_rows(self, most: int | None) -> npt.NDArray[np.int64]:
        """At most so many image rows, evenly spread over the split; all of them for None."""
        count = self.table.num_images
        if most is None or count <= most:
            return np.arange(count)
        return np.unique(np.linspace(0, count - 1, most).astype(np.int64))

    def box_example(self, box: int) -> str:
        """A box in words: its image, and its numbers as they stand in the file."""
        numbers = [round(float(value), 3) for value in self.table.boxes_xywh[box]]
        return f"{self.table.file_name(int(self.box_rows[box]))}: {numbers}"


# --- What a check finds, and how much each finding weighs ---

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


# --- The report of a check: all sections, the verdict, on screen and as JSON ---

_MARKS = {FAULT: "[red]✗[/red]", SUSPICION: "[red]?[/red]", NOTE: "[yellow]![/yellow]"}
"""The worst first."""
_SOUND = "[green]✓[/green]"


@dataclass
class Report:
    """What a check has found so far.

    Attributes:
        subtask: what will be run.
        sections: in the order in which they were looked at.
        not_done: what was left out, and why.
        accept: kinds of suspicions that the user takes responsibility for.
        tolerate: kinds of findings that the spec allows.
    """

    subtask: str
    sections: list[Section] = field(default_factory=list)
    not_done: list[str] = field(default_factory=list)
    accept: Sequence[str] = ()
    tolerate: Sequence[str] = ()

    def add(self, section: Section) -> None:
        """Take in a section."""
        section.findings = accepted(tolerated(section.findings, self.tolerate), self.accept)
        self.sections.append(section)

    @property
    def findings(self) -> list[Finding]:
        """All findings."""
        return [finding for section in self.sections for finding in section.findings]

    @property
    def failing(self) -> list[Finding]:
        """The findings that stand against the run: faults, and suspicions that were not accepted."""
        return [finding for finding in self.findings if finding.weight != NOTE]

    @property
    def passed(self) -> bool:
        """Whether the run can start."""
        return not self.failing

    def write(self, path: Path, splits: Sequence[Split] = ()) -> Path:
        """Write ``check.json``, whole or not at all."""
        content = dict(
            subtask=self.subtask,
            passed=self.passed,
            problems=[str(finding.problem) for finding in self.failing],
            findings=[finding.to_dict() for finding in self.findings],
            not_done=self.not_done,
            splits={split.name: counts(split) for split in splits},
            sections=[section.to_dict() for section in self.sections],
        )
        return write_text_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def show(self, console: Console, first: int = 0) -> None:
        """Print the sections from number ``first`` on."""
        for section in self.sections[first:]:
            worst = next(
                (w for w in (FAULT, SUSPICION, NOTE) if any(f.weight == w for f in section.findings)), None
            )
            console.print(
                f"{_MARKS.get(worst or '', '[green]✓[/green]')} {escape(section.title)}", highlight=False
            )
            for line in section.lines:
                console.print(f"    {escape(line)}", highlight=False, soft_wrap=True)
            for finding in section.findings:
                text = escape(f"{finding.kind}: {finding.problem}")
                console.print(f"  {_MARKS[finding.weight]} {text}", highlight=False, soft_wrap=True)


def counts(split: Split) -> dict[str, object]:
    """The figures of one split as plain data."""
    table = split.table
    by_class = {name: 0 for _, name in sorted(table.category_names.items())}
    for number in table.category_ids.tolist():
        by_class[table.category_names[number]] += 1
    return dict(
        num_images=table.num_images,
        num_images_without_objects=int((table.box_starts[1:] == table.box_starts[:-1]).sum()),
        num_boxes=table.num_boxes,
        num_crowds=int(table.crowd.sum()),
        num_invisible=int((~table.visible).sum()),
        boxes_by_class=by_class,
        notes=list(table.notes),
    )


def overview(splits: Sequence[Split]) -> Table:
    """Counts of all splits side by side."""
    table = Table(title="annotations")
    table.add_column("")
    for split in splits:
        table.add_column(split.name, justify="right")
    for label, values in _rows([counts(split) for split in splits]):
        table.add_row(escape(label), *values)
    return table


def _rows(all_counts: list[dict[str, object]]) -> Iterator[tuple[str, list[str]]]:
    for key in ("num_images", "num_images_without_objects", "num_boxes", "num_crowds", "num_invisible"):
        yield key.removeprefix("num_").replace("_", " "), [f"{one[key]:,}" for one in all_counts]
    classes = [one["boxes_by_class"] for one in all_counts]
    for name in dict.fromkeys(name for one in classes for name in one):  # type: ignore[attr-defined]
        yield f"class {name}", [f"{one.get(name, 0):,}" for one in classes]  # type: ignore[attr-defined]
