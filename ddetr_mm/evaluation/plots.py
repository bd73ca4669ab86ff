"""Pictures of an evaluation: precision over recall, classes, confusions, scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ddetr_mm.evaluation.coco_eval import IOU_THRESHOLDS, RECALL_THRESHOLDS, UNDEFINED, CocoResult
from ddetr_mm.evaluation.figures import freed_figures, save_png
from ddetr_mm.evaluation.matching import LEAST_SCORE, Confusions, Matching

MOST_NAMED_CLASSES = 10
MOST_BARS = 60
MOST_CONFUSED = 30


@freed_figures()
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
    return save_png(path, figure)


@freed_figures()
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
    return save_png(path, figure)


@freed_figures()
def draw_confusions(
    path: str | Path, mistaken: Confusions, names: Mapping[int, str], threshold: float
) -> Path:
    """The confusion matrix: rows are what is there, columns what was found, shares of each row as shades.

    With more than :data:`MOST_CONFUSED` classes those with the most mistakes are drawn.

    Args:
        path: a PNG file, written whole or not at all.
        mistaken: from :func:`ddetr_mm.evaluation.matching.confusions`.
        names: category id → name.
        threshold: the score from which on detections count, for the title.
    """
    size = len(mistaken.category_ids)
    wrong = mistaken.counts.sum(axis=1) + mistaken.counts.sum(axis=0) - 2 * np.diag(mistaken.counts)
    chosen = np.sort(np.argsort(-wrong[:size], kind="stable")[:MOST_CONFUSED])
    places = np.append(chosen, size)
    counts = mistaken.counts[np.ix_(places, places)]
    labels = [_short(names.get(int(number), str(number)), 18) for number in mistaken.category_ids[chosen]]
    side = 3.2 + 0.42 * len(places)
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the row", shrink=0.8)
    axes.set_xticks(range(len(places)), [*labels, "not found"], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(places)), [*labels, "nothing there"], fontsize=8)
    axes.set(xlabel="found", ylabel="there")
    title = f"overlap 0.5, scores from {threshold:.2f}"
    axes.set_title(
        title if size <= MOST_CONFUSED else f"{title}; {MOST_CONFUSED} of {size} classes", fontsize=10
    )
    for row, column in np.argwhere(counts > 0):
        color = "white" if shares[row, column] > 0.55 else "black"
        text = f"{counts[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    return save_png(path, figure)


@freed_figures()
def draw_score_histogram(path: str | Path, matching: Matching) -> Path:
    """How scores of detections that hit an object differ from those that do not; detections on crowds aside.

    Args:
        path: a PNG file, written whole or not at all.
        matching: from :func:`ddetr_mm.evaluation.matching.match`.
    """
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    scores = matching.detections.scores
    right = (matching.object_of >= 0) & ~matching.on_crowd
    wrong = (matching.object_of < 0) & ~matching.on_crowd
    parts = ((wrong, "hit nothing", "#d62728"), (right, "hit an object", "#2ca02c"))
    counts, _, _ = axes.hist(
        [scores[rows] for rows, _, _ in parts],
        bins=np.linspace(0, 1, 26).tolist(),
        color=[color for _, _, color in parts],
        label=[f"{label}: {int(rows.sum()):,}" for rows, label, _ in parts],
    )
    if np.max(counts) > 50:
        axes.set_yscale("log")
    axes.axvline(matching.threshold, color="black", linestyle="--", linewidth=1)
    note = f" best F1 at {matching.threshold:.2f}"
    axes.text(matching.threshold, 0.97, note, transform=axes.get_xaxis_transform(), va="top", fontsize=9)
    axes.set(xlim=(0, 1), xlabel=f"score (from {LEAST_SCORE})", ylabel="detections")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)
    return save_png(path, figure)


def _short(name: str, limit: int = 30) -> str:
    """A class name as plain text of bounded length; ``$`` would begin a formula."""
    name = name.replace("$", r"\$")
    return name if len(name) <= limit else name[: limit - 1] + "…"
