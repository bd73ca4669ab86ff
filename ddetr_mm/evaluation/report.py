"""Writes the report of an evaluation: JSON files, plots, and an HTML page with the worst images."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddetr_mm.evaluation.coco_eval import (
    IOU_THRESHOLDS,
    METRIC_NAMES,
    RECALL_THRESHOLDS,
    UNDEFINED,
    CocoResult,
    DetectionColumns,
    GroundTruthColumns,
    write_details_json,
    write_results_json,
)
from ddetr_mm.evaluation.mistakes import (
    ERROR_KINDS,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    LEAST_SCORE,
    TRUE_POSITIVE,
    WRONG_CLASS,
    ConfusionMatrix,
    ErrorCosts,
    Matching,
    WorstImage,
    class_scores,
    confusion_matrix,
    error_costs,
    match,
    picture_of,
    worst_images,
    worst_marks,
)
from ddetr_mm.files import garbage_collection_paused, write_text_whole, written_whole
from ddetr_mm.fonts import font_families
from ddetr_mm.html_page import (
    CHART_HELP,
    Cell,
    Chart,
    Html,
    Mark,
    Series,
    chart,
    facts,
    heading,
    legend,
    marked_picture,
    number,
    page,
    paragraph,
    scrolled,
    table,
    text,
    tiles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# --- matplotlib figures ---


@contextmanager
def freed_figures() -> Iterator[None]:
    """Free the figures made inside the block, or by the decorated function.

    A figure, its axes and its canvas form a reference cycle of about 8 MB, which a long run would keep until
    the next full garbage collection. With collection paused meanwhile, the figures stay in the youngest
    generation, which is collected at the end in milliseconds.
    """
    with garbage_collection_paused():
        try:
            yield
        finally:
            gc.collect(0)


def new_figure(width: float, height: float) -> Figure:
    """An empty matplotlib figure; sizes in inches. Matplotlib is imported by the first one."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save_png(path: str | Path, figure: Figure) -> Path:
    """Draw a figure into a PNG file, written whole or not at all.

    The figure gets its own canvas, since pyplot would keep every figure and choose a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with written_whole(path) as temporary:
        canvas.print_png(temporary)
    return Path(path)


# --- plots ---

MOST_NAMED_CLASSES = 10
MOST_BARS = 60
MOST_CONFUSED = 30


@freed_figures()
def draw_precision_recall(path: str | Path, result: CocoResult) -> Path:
    """Precision over recall: of all classes at four IoU thresholds, and by class at IoU 0.5.

    By class, the :data:`MOST_NAMED_CLASSES` with the most ground truth are drawn.

    Args:
        path: a PNG file, written whole or not at all.
        result: the evaluation; classes without ground truth are left out.
    """
    figure = new_figure(*(11, 6))
    by_iou, by_class = figure.subplots(1, 2, sharey=True)
    precision = np.where(result.precision > UNDEFINED, result.precision, np.nan)  # (T, R, K)
    with_truth = np.asarray(~np.isnan(precision).all(axis=(0, 1)))
    for iou in (0.5, 0.6, 0.75, 0.9):
        if with_truth.any():
            row = int(np.argmin(np.abs(IOU_THRESHOLDS - iou)))
            mean = np.nanmean(precision[row][:, with_truth], axis=1)
            by_iou.plot(RECALL_THRESHOLDS, mean, label=f"IoU {iou:.2f}: AP {np.mean(mean):.3f}")
    by_iou.set_title("all classes")
    columns = [column for column in range(len(result.per_class)) if with_truth[column]]
    columns.sort(key=lambda column: -result.per_class[column].num_boxes)
    for column in columns[:MOST_NAMED_CLASSES]:
        entry = result.per_class[column]
        label = f"{_short(entry.name)}: AP50 {entry.AP50:.3f}"
        by_class.plot(RECALL_THRESHOLDS, precision[0, :, column], label=label, linewidth=1.2)
    left_out = len(columns) - MOST_NAMED_CLASSES
    by_class.set_title("IoU 0.50" + (f" ({left_out} rarer classes not drawn)" if left_out > 0 else ""))
    for axes in (by_iou, by_class):
        axes.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(True, alpha=0.3)
        if axes.lines:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, ncols=2)
    by_iou.set_ylabel("precision")
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
    figure = new_figure(*(9, 1.5 + 0.25 * max(len(shown), 4)))
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    axes.barh(places, [max(entry.AP50, 0) for entry in shown], color="#c6dbef", label="AP50")
    axes.barh(places, [max(entry.AP, 0) for entry in shown], height=0.5, color="#2171b5", label="AP")
    axes.set_yticks(places, [f"{_short(entry.name)} ({entry.num_boxes})" for entry in shown], fontsize=8)
    axes.set(xlim=(0, 1), xlabel="average precision (in brackets: ground-truth boxes)")
    if len(entries) > len(shown):
        axes.set_title(f"the {len(shown)} worst of {len(entries)} classes")
    axes.grid(True, axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return save_png(path, figure)


@freed_figures()
def draw_confusion_matrix(
    path: str | Path, matrix: ConfusionMatrix, names: Mapping[int, str], threshold: float
) -> Path:
    """The confusion matrix: rows are the ground truth, columns the predicted class, shades the row's shares.

    With more than :data:`MOST_CONFUSED` classes, those with the most mistakes are drawn.

    Args:
        path: a PNG file, written whole or not at all.
        matrix: from :func:`ddetr_mm.evaluation.mistakes.confusion_matrix`.
        names: category id → name.
        threshold: the score threshold, for the title.
    """
    size = len(matrix.category_ids)
    wrong = matrix.counts.sum(axis=1) + matrix.counts.sum(axis=0) - 2 * np.diag(matrix.counts)
    chosen = np.sort(np.argsort(-wrong[:size], kind="stable")[:MOST_CONFUSED])
    places = np.append(chosen, size)
    counts = matrix.counts[np.ix_(places, places)]
    labels = [_short(names.get(int(number), str(number)), 18) for number in matrix.category_ids[chosen]]
    side = 3.2 + 0.42 * len(places)
    figure = new_figure(*(side + 0.8, side))
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the row", shrink=0.8)
    axes.set_xticks(range(len(places)), [*labels, "Background"], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(places)), [*labels, "Background"], fontsize=8)
    axes.set(xlabel="Predicted", ylabel="Ground truth")
    title = f"IoU 0.5, scores from {threshold:.2f}"
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
    """Histogram of the scores of true and false positives; detections on crowds are left out.

    Args:
        path: a PNG file, written whole or not at all.
        matching: from :func:`ddetr_mm.evaluation.mistakes.match`.
    """
    figure = new_figure(*(9, 4.2))
    axes = figure.add_subplot()
    scores = matching.detections.scores
    true = (matching.truth_row_of >= 0) & ~matching.on_crowd
    false = (matching.truth_row_of < 0) & ~matching.on_crowd
    parts = ((false, "false positives", "#c8384c"), (true, "true positives", "#23834a"))
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
    """A class name of bounded length, with ``$`` escaped, which would start a formula."""
    name = name.replace("$", r"\$")
    return name if len(name) <= limit else name[: limit - 1] + "…"


# --- the HTML page ---

MOST_IN_MATRIX = 30
MOST_CONFUSIONS = 10
NUM_BINS = 20
FIRST_IMAGES = 12
PR_IOUS = (0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation's page shows.

    Attributes:
        result: the metrics.
        sources: the metrics of each source, by name.
        matching: the matches at the best score threshold.
        matrix: the confusion matrix there.
        costs: the errors by kind.
        facts: what was evaluated, name → value.
        seconds_an_image: of network and data together; None where it was not measured.
        worst: images with mistakes, the worst first, each with picture and boxes; None: it cannot be read.
    """

    result: CocoResult
    sources: Mapping[str, CocoResult]
    matching: Matching
    matrix: ConfusionMatrix
    costs: ErrorCosts
    facts: Mapping[str, str]
    seconds_an_image: float | None = None
    worst: Sequence[tuple[WorstImage, tuple[bytes, list[Mark]] | None]] = field(default=())


def page_text(given: Evaluation) -> str:
    """The page as HTML."""
    result = given.result
    name = given.facts.get("Checkpoint")
    title = f"Evaluation of {Path(name).name}" if name else "Evaluation"
    parts = [
        heading(title, 1),
        facts({**given.facts, **versions_and_date(), **_time_fact(given.seconds_an_image)}),
        tiles(_summary(result)),
        *(paragraph(sentence, "note") for sentence in result.notes),
        _threshold_sentence(given.matching),
        heading("Precision over recall"),
        paragraph("To the right the score threshold falls and recall rises; high and flat is good."),
        _precision_recall_charts(result),
        paragraph(CHART_HELP, "quiet"),
        heading("Errors, and what they cost"),
        *_error_section(given),
        heading("Classes"),
        *_class_section(given),
        heading("Confusion matrix"),
        *_matrix_section(given),
        heading("Scores"),
        paragraph("The further the two are apart, the easier it is to choose a score threshold."),
        score_chart(given.matching),
        *_worst_section(given),
        heading("COCO's metrics"),
        paragraph(f"Scored by {result.backend}.", "quiet"),
        _metric_table({"all": result, **given.sources} if given.sources else {"all": result}),
    ]
    return page(f"{title}: AP {_metric_text(result['AP'])}", parts)


def versions_and_date() -> dict[str, str]:
    """The date, and the versions of what computed the results."""
    found = []
    for package in ("ddetr-mm", "mmdet", "mmengine", "mmcv", "mmcv-lite", "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # one of mmcv and mmcv-lite is installed
            continue
    now = datetime.now().strftime("%Y-%m-%d %H:%M")
    return {"Date": now, "Versions": ", ".join([*found, f"Python {platform.python_version()}"])}


def _time_fact(seconds: float | None) -> dict[str, str]:
    if seconds is None:
        return {}
    return {"Time an image": f"{seconds * 1000:.3g} ms ({1 / seconds:.3g} images/s), reading included"}


def _summary(result: CocoResult) -> dict[str, str]:
    return {
        **{name: _metric_text(result[name]) for name in ("AP", "AP50", "AP75")},
        "AR": _metric_text(result["ARmax100"]),
        "images": f"{result.num_images:,}",
        "objects": f"{result.num_boxes:,}",
    }


def _threshold_sentence(matching: Matching) -> Html:
    if not matching.f1:
        return paragraph("No detection matches a ground-truth box of its class at IoU 0.5.", "note")
    return paragraph(
        f"The score threshold with the best F1 at IoU 0.5 is {matching.threshold:.2f}: precision "
        f"{matching.precision:.3f}, recall {matching.recall:.3f}, F1 {matching.f1:.3f} over all classes."
    )


def _precision_recall_charts(result: CocoResult) -> Html:
    precision = np.where(result.precision > UNDEFINED, result.precision, np.nan)  # (T, R, K)
    with_truth = np.flatnonzero(~np.isnan(precision).all(axis=(0, 1)))
    recalls = RECALL_THRESHOLDS.tolist()
    by_iou = []
    for iou in PR_IOUS if len(with_truth) else ():
        row = int(np.argmin(np.abs(IOU_THRESHOLDS - iou)))
        mean = precision[row][:, with_truth].mean(axis=1)
        by_iou.append(Series(f"IoU {iou:.2f}: AP {mean.mean():.3f}", recalls, mean.tolist()))
    columns = sorted(with_truth.tolist(), key=lambda column: -result.per_class[column].num_boxes)
    by_class = [
        Series(
            f"{_cut(result.per_class[column].name, 40)}: AP50 {result.per_class[column].AP50:.3f}",
            recalls,
            precision[0, :, column].tolist(),
        )
        for column in columns[:MOST_NAMED_CLASSES]
    ]
    left_out = len(columns) - MOST_NAMED_CLASSES
    more = f", the {MOST_NAMED_CLASSES} most frequent of {len(columns)} classes" if left_out > 0 else ""
    charts = [("All classes", by_iou), (f"By class at IoU 0.50{more}", by_class)]
    whole = (0.0, 1.0)
    drawn = [
        (name, chart(Chart(name, "recall", "precision", series, x_range=whole, y_range=whole)))
        for name, series in charts
    ]
    figures = [f"<div>{heading(name, 3)}{shown}</div>" for name, shown in drawn]
    return Html(f'<div class="charts">{"".join(figures)}</div>')


def _error_section(given: Evaluation) -> list[Html]:
    costs, threshold = given.costs, given.matching.threshold
    kinds = sorted(ERROR_KINDS, key=lambda kind: -costs.dAP50[kind])
    rows: list[list[str | Cell]] = [
        [
            kind,
            number(costs.dAP50[kind], bar=True),
            number(costs.counts[kind]),
            number(costs.all_counts[kind]),
            ERROR_KINDS[kind],
        ]
        for kind in kinds
    ]
    headers = ("kind", "dAP50", f"number from score {threshold:.2f}", "number in all", "what it is")
    return [
        paragraph(
            f"dAP50 is how much AP50 ({_metric_text(costs.AP50)}) would rise if the errors of this kind "
            "alone were corrected, as TIDE defines it; the kinds do not add up."
        ),
        table(headers, rows, name="Errors by kind", names=(0, 4), sortable=True),
    ]


def _class_section(given: Evaluation) -> list[Html]:
    result, matching = given.result, given.matching
    scores = class_scores(matching, result.category_ids)
    rows: list[list[str | Cell]] = [
        [
            entry.name,
            number(entry.AP, bar=True),
            number(entry.AP50, bar=True),
            number(one.precision),
            number(one.recall),
            number(one.f1),
            number(one.best_threshold, 2),
            number(entry.num_boxes),
            number(one.true_positives + one.false_positives),
            number(one.true_positives),
            number(one.false_positives),
            number(one.false_negatives),
            *(number(getattr(entry, name)) for name in ("AP75", "APs", "APm", "APl", "AR")),
            str(entry.category_id),
        ]
        for entry, one in zip(result.per_class, scores, strict=True)
    ]
    headers = (
        *("class", "AP", "AP50", "precision", "recall", "F1", "own best threshold", "ground truth"),
        *("predicted", "true positives", "false positives", "missed"),
        *("AP75", "AP small", "AP medium", "AP large", "AR", "id"),
    )
    return [
        paragraph(
            f"Precision, recall, F1 and numbers are those of scores from {matching.threshold:.2f}, the "
            "threshold with the best F1 over all classes, at IoU 0.5. A click on a header sorts.",
            "quiet",
        ),
        table(headers, rows, name="Classes", sortable=True),
    ]


def _matrix_section(given: Evaluation) -> list[Html]:
    matrix, names = given.matrix, given.matching.truth.category_names
    size = len(matrix.category_ids)
    wrong = matrix.counts.sum(axis=1) + matrix.counts.sum(axis=0) - 2 * np.diag(matrix.counts)
    places = [*np.sort(np.argsort(-wrong[:size], kind="stable")[:MOST_IN_MATRIX]).tolist(), size]
    named = [names.get(int(one), str(one)) for one in matrix.category_ids] + ["Background"]
    part = f", the {MOST_IN_MATRIX} of {size} classes with the most errors" if size > MOST_IN_MATRIX else ""
    sentence = (
        f"IoU 0.5, scores from {given.matching.threshold:.2f}{part}. The shade is the share of the row. "
        "The last column counts missed boxes, the last row detections on background."
    )
    return [
        paragraph(sentence, "quiet"),
        _matrix_table(matrix.counts, places, named),
        *_confusions(matrix.counts, named),
    ]


def _matrix_table(counts: np.ndarray, places: Sequence[int], names: Sequence[str]) -> Html:
    """The matrix as a table: rows are the ground truth, columns the predicted class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    heads = "".join(
        f'<th scope="col" class="upright" title="{text(names[place])}">'
        f"<span>{text(_cut(names[place], 24))}</span></th>"
        for place in places
    )
    rows = []
    for row in places:
        cells = "".join(
            f"<td{' class=own' if row == column and row != places[-1] else ''} "
            f'style="--share:{shares[row, column] * 0.75:.3f}">{counts[row, column] or "":,}</td>'
            if counts[row, column]
            else "<td></td>"
            for column in places
        )
        title, shown = text(names[row]), text(_cut(names[row], 24))
        rows.append(f'<tr><th scope="row" title="{title}">{shown}</th>{cells}</tr>')
    return scrolled(
        '<table class="matrix"><thead>'
        f'<tr><th></th><th class="wide" colspan="{len(places)}">Predicted</th></tr>'
        f'<tr><th scope="col">Ground truth</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>',
        name="Confusion matrix",
    )


def _confusions(counts: np.ndarray, names: Sequence[str]) -> list[Html]:
    """The most frequent pairs of confused classes."""
    between = counts[:-1, :-1] * (1 - np.eye(len(counts) - 1, dtype=np.int64))
    pairs = np.argwhere(between > 0)
    if not len(pairs):
        return []
    pairs = pairs[np.argsort(-between[tuple(pairs.T)], kind="stable")][:MOST_CONFUSIONS]
    rows = [[names[row], names[column], number(int(between[row, column]))] for row, column in pairs]
    return [
        heading("Classes taken for others", 3),
        table(("ground truth", "predicted as", "number"), rows, name="Confused classes", names=(0, 1)),
    ]


def score_chart(matching: Matching) -> Html:
    """Histogram of the scores of true and false positives; detections on crowds are left out."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    true, counted = matching.truth_row_of >= 0, ~matching.on_crowd
    series, most = [], 0
    for name, rows in (("true positives", true & counted), ("false positives", ~true & counted)):
        counts = np.histogram(matching.detections.scores[rows], edges)[0].tolist()
        most = max(most, *counts)
        # A bin without detections has no bar.
        series.append(Series(f"{name} ({sum(counts):,})", centres, [count or None for count in counts]))
    return chart(
        Chart(
            "Scores",
            f"score (from {LEAST_SCORE})",
            "detections",
            series,
            log=most > 50,
            step=1 / NUM_BINS,
            x_range=(0.0, 1.0),
            marks=[(matching.threshold, f"best F1 at {matching.threshold:.2f}")] if matching.f1 else [],
        )
    )


def _worst_section(given: Evaluation) -> list[Html]:
    if not given.worst:
        return [heading("Worst images"), paragraph("No image has a mistake at this threshold.")]
    keys = (
        (TRUE_POSITIVE, "true positive"),
        (FALSE_NEGATIVE, "missed"),
        (WRONG_CLASS, "wrong class"),
        (FALSE_POSITIVE, "false positive"),
    )
    figures = []
    for worst, drawn in given.worst:
        counts = (
            f"{worst.num_false_negatives} missed, {worst.num_wrong_class} wrong class, "
            f"{worst.num_false_positives} false positives, {worst.num_true_positives} true positives"
        )
        path = worst.path or f"image {worst.image_id}"
        caption = Html(f'<span title="{text(path)}">{text(Path(path).name)}</span><br>{counts}')
        if drawn is None:
            reason = paragraph("the picture cannot be read", "quiet")
            figures.append(Html(f"<figure>{reason}<figcaption>{caption}</figcaption></figure>"))
        else:
            figures.append(marked_picture(drawn[0], Path(path).name, drawn[1], caption))
    first, others = figures[:FIRST_IMAGES], figures[FIRST_IMAGES:]
    parts = [
        heading(f"The {len(given.worst)} images with the most mistakes"),
        paragraph("A click, or Enter, enlarges a picture and shows its labels; Escape closes it.", "quiet"),
        legend(keys),
        Html(f'<div class="gallery">{"".join(first)}</div>'),
    ]
    if others:
        more = f'<summary>{len(others)} more</summary><div class="gallery">{"".join(others)}</div>'
        parts.append(Html(f"<details>{more}</details>"))
    return parts


def _metric_table(results: Mapping[str, CocoResult]) -> Html:
    rows: list[list[str | Cell]] = [
        [name, number(one.num_images), *(number(one[metric]) for metric in METRIC_NAMES)]
        for name, one in results.items()
    ]
    return table(("source", "images", *METRIC_NAMES), rows, name="COCO's metrics")


def _metric_text(value: float) -> str:
    return "–" if value == UNDEFINED else f"{value:.3f}"


def _cut(name: str, limit: int) -> str:
    """A name of bounded length."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


# --- all files of a report ---

PAGE_NAME = "report.html"


def write_report(
    folder: Path,
    result: CocoResult,
    sources: Mapping[str, CocoResult],
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    image_paths: Mapping[int, str],
    facts: Mapping[str, str] | None = None,
    seconds_an_image: float | None = None,
) -> Path:
    """Write ``results.json``, ``results_detail.json``, four plots as PNG, and ``report.html``.

    Args:
        folder: the results folder.
        result: the metrics.
        sources: the metrics of each source, by name.
        truth: the ground truth.
        detections: the scored detections.
        image_paths: image id → image file, for the pictures of the worst images.
        facts: what was evaluated, for the head of the page: name → value.
        seconds_an_image: likewise.

    Returns:
        The page.
    """
    write_results_json(folder / "results.json", result)
    write_details_json(folder / "results_detail.json", result, sources)
    scored = truth.select(truth.image_ids, result.category_ids)
    chosen = detections.select(truth.image_ids, result.category_ids)
    matching = match(scored, chosen)
    matrix = confusion_matrix(matching, result.category_ids)
    names = truth.category_names
    from matplotlib import rc_context

    with rc_context({"font.family": font_families(names.values())}):
        draw_precision_recall(folder / "precision_recall.png", result)
        draw_class_precision(folder / "class_precision.png", result)
        draw_confusion_matrix(folder / "confusion_matrix.png", matrix, names, matching.threshold)
        draw_score_histogram(folder / "score_histogram.png", matching)
    worst = []
    for one in worst_images(matching, matrix, image_paths):
        picture = picture_of(one)
        drawn = None if picture is None else (picture[0], worst_marks(one, matching, matrix, picture[1]))
        worst.append((one, drawn))
    given = Evaluation(
        result=result,
        sources=sources,
        matching=matching,
        matrix=matrix,
        costs=error_costs(scored, chosen, result.category_ids, matching.threshold),
        facts=facts or {},
        seconds_an_image=seconds_an_image,
        worst=worst,
    )
    return write_text_whole(folder / PAGE_NAME, page_text(given))
