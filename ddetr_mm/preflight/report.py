"""The report of a check: all sections, the verdict, on screen and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddetr_mm.files import write_text_whole
from ddetr_mm.preflight.findings import FAULT, NOTE, SUSPICION, Finding, Section, accepted, tolerated
from ddetr_mm.preflight.split import Split

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
