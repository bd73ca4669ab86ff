"""Pictures of an evaluation: precision over recall, and the precision of every class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddetr_mm.evaluation.coco_eval import IOU_THRESHOLDS, RECALL_THRESHOLDS, UNDEFINED, CocoResult
from ddetr_mm.files import written_whole

MOST_NAMED_CLASSES = 10
MOST_BARS = 60


def draw_precision_recall(path: str | Path, result: CocoResult) -> Path:
    """Precision over recall: over all classes at four overlaps, and by class at an overlap of 0.5.

    With many classes only the :data:`MOST_NAMED_CLASSES` with most ground truth are drawn by themselves.

    Args:
        path: a PNG file, written whole or not at all.
        result: the evaluation; classes without ground truth are left out.
    """
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    by_overlap, by_class = figure.subplots(1, 2, sharey=True)
    precision = np.where(result.precision > UNDEFINED, result.precision, np.nan)  # (T, R, K)
    with_truth = np.asarray(~np.isnan(precision).all(axis=(0, 1)))
    for overlap in (0.5, 0.6, 0.75, 0.9):
        if with_truth.any():
            row = int(np.argmin(np.abs(IOU_THRESHOLDS - overlap)))
            mean = np.nanmean(precision[row][:, with_truth], axis=1)
            by_overlap.plot(RECALL_THRESHOLDS, mean, label=f"overlap {overlap:.2f}: AP {np.mean(mean):.3f}")
    by_overlap.set_title("all classes")
    columns = [column for column in range(len(result.per_class)) if with_truth[column]]
    columns.sort(key=lambda column: -result.per_class[column].num_boxes)
    for column in columns[:MOST_NAMED_CLASSES]:
        entry = result.per_class[column]
        label = f"{_short(entry.name)}: AP50 {entry.AP50:.3f}"
        by_class.plot(RECALL_THRESHOLDS, precision[0, :, column], label=label, linewidth=1.2)
    left_out = len(columns) - MOST_NAMED_CLASSES
    by_class.set_title("overlap 0.50" + (f" ({left_out} rarer classes not drawn)" if left_out > 0 else ""))
    for axes in (by_overlap, by_class):
        axes.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(True, alpha=0.3)
        if axes.lines:
            axes.legend(loc="lower left", fontsize=8)
    by_overlap.set_ylabel("precision")
    return _save(path, figure)


def draw_class_precision(path: str | Path, result: CocoResult) -> Path:
    """AP and AP50 of every class as bars, worst at the bottom.

    With more than :data:`MOST_BARS` classes the worst are drawn.

    Args:
        path: a PNG file, written whole or not at all.
        result: the evaluation; classes without ground truth are left out.
    """
    entries = sorted((entry for entry in result.per_class if entry.num_boxes), key=lambda entry: entry.AP)
    shown = entries[:MOST_BARS]
    figure = Figure(figsize=(9, 1.5 + 0.25 * max(len(shown), 4)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    axes.barh(places, [max(entry.AP50, 0) for entry in shown], color="#c6dbef", label="AP50")
    axes.barh(places, [max(entry.AP, 0) for entry in shown], height=0.5, color="#2171b5", label="AP")
    axes.set_yticks(places, [f"{_short(entry.name)} ({entry.num_boxes})" for entry in shown], fontsize=8)
    axes.set(xlim=(0, 1), xlabel="average precision (in brackets: boxes of the ground truth)")
    if len(entries) > len(shown):
        axes.set_title(f"the {len(shown)} worst of {len(entries)} classes")
    axes.grid(True, axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return _save(path, figure)


def _short(name: str, limit: int = 30) -> str:
    """A class name as plain text of bounded length; ``$`` would begin a formula."""
    name = name.replace("$", r"\$")
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _save(path: str | Path, figure: Figure) -> Path:
    canvas = FigureCanvasAgg(figure)
    with written_whole(path) as temporary:
        canvas.print_png(temporary)
    return Path(path)
