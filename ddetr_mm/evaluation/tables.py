"""Evaluation results as plain-text tables for a log."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ddetr_mm.evaluation.coco_eval import METRIC_NAMES, UNDEFINED, CocoResult

_PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def class_table(result: CocoResult) -> str:
    """One line a class: id, name, ground-truth boxes, detections, and its precisions and recall.

    A figure that is undefined is shown as ``-``. The last line holds the figures over all classes.
    """
    rows: list[Sequence[str]] = [
        (
            str(entry.category_id),
            entry.name,
            str(entry.num_boxes),
            str(entry.num_detections),
            *(_figure(getattr(entry, name)) for name in _PRECISIONS),
            _figure(entry.AR),
        )
        for entry in result.per_class
    ]
    totals = [_figure(result[name]) for name in (*_PRECISIONS, "ARmax100")]
    rows.append(("", "all", str(result.num_boxes), str(result.num_detections), *totals))
    return _render(("id", "class", "boxes", "found", *_PRECISIONS, "AR"), rows)


def source_table(results: Mapping[str, CocoResult]) -> str:
    """One line a source, with its twelve figures."""
    rows = [
        (name, str(result.num_images), *(_figure(result[metric]) for metric in METRIC_NAMES))
        for name, result in results.items()
    ]
    return _render(("source", "images", *METRIC_NAMES), rows)


def _figure(value: float) -> str:
    return "-" if value == UNDEFINED else f"{value:.3f}"


def _render(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as text, as wide as its content: a log has no width."""
    table = Table(box=box.ASCII)
    for header in headers:
        is_text = header in ("class", "source")
        table.add_column(header, justify="left" if is_text else "right")
    lines = list(rows)
    for row in lines:
        # A class may be called "[bold]": it is text, not markup.
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    width = 10 + sum(
        3 + max(len(header), *(len(row[column]) for row in lines)) for column, header in enumerate(headers)
    )
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False
    )
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
