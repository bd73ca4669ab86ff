"""Writes the report of an evaluation: JSON files, plots, and an HTML page with the worst images."""

from __future__ import annotations

import base64
import gc
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    LEAST_SCORE,
    TRUE_POSITIVE,
    WRONG_CLASS,
    ConfusionMatrix,
    Matching,
    WorstImage,
    confusion_matrix,
    draw_worst_image,
    match,
    worst_images,
)
from ddetr_mm.files import garbage_collection_paused, write_text_whole, written_whole
from ddetr_mm.fonts import font_families

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


def save_png(path: str | Path, figure: Figure) -> Path:
    """Draw a figure into a PNG file, written whole or not at all.

    The figure gets its own canvas, since pyplot would keep every figure and choose a display.
    """
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
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
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
            axes.legend(loc="lower left", fontsize=8)
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
    figure = Figure(figsize=(9, 1.5 + 0.25 * max(len(shown), 4)), dpi=110, layout="constrained")
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
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the row", shrink=0.8)
    axes.set_xticks(range(len(places)), [*labels, "background"], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(places)), [*labels, "background"], fontsize=8)
    axes.set(xlabel="predicted", ylabel="ground truth")
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
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    scores = matching.detections.scores
    true = (matching.truth_row_of >= 0) & ~matching.on_crowd
    false = (matching.truth_row_of < 0) & ~matching.on_crowd
    parts = ((false, "false positives", FALSE_POSITIVE), (true, "true positives", TRUE_POSITIVE))
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


# --- the HTML page: one file with its pictures, without scripts, names escaped ---

# Class and file names come from outside, so the page may neither load nor run anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px;
       margin: 24px auto; padding: 0 16px }
h1 { font-size: 24px; margin-bottom: 4px } h2 { font-size: 19px; margin: 32px 0 8px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e4e4e4 }
th { font-weight: 600; background: #f6f6f6 }
.name { text-align: left; overflow-wrap: anywhere; max-width: 420px }
img { max-width: 100%; height: auto }
.note { background: #fff6dd; border-left: 4px solid #e6a700; padding: 6px 12px; margin: 6px 0 }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 18px }
figure { margin: 0 } figcaption { font-size: 13px; overflow-wrap: anywhere }
.key { display: inline-block; width: 12px; height: 12px; margin: 0 5px 0 14px; vertical-align: -1px }
.quiet { color: #666 }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        title: its heading.
        content: PNG or JPEG bytes.
        text: a sentence on how to read it.
    """

    title: str
    content: bytes
    text: str = ""


@dataclass(frozen=True)
class Page:
    """The content of an evaluation's page.

    Attributes:
        result: the metrics.
        sources: the metrics of each source, by name.
        matching: the matches at the best score threshold.
        plots: pictures of the whole evaluation.
        worst: images with mistakes, the worst first, each with its picture; None where it could not be drawn.
    """

    result: CocoResult
    sources: Mapping[str, CocoResult]
    matching: Matching
    plots: Sequence[Picture]
    worst: Sequence[tuple[WorstImage, bytes | None]] = field(default=())


def write_page(path: str | Path, page: Page) -> Path:
    """Write the page, whole or not at all."""
    return write_text_whole(path, page_text(page))


def page_text(page: Page) -> str:
    """The page as HTML."""
    result, matching = page.result, page.matching
    parts = [
        f"<h1>Evaluation: AP {_metric_text(result['AP'])}</h1>",
        f'<p class="quiet">{result.num_images:,} images, {result.num_boxes:,} ground-truth boxes, '
        f"{result.num_detections:,} detections; scored by {_text(result.backend)} with COCO's rules.</p>",
        *(f'<p class="note">{_text(sentence)}</p>' for sentence in result.notes),
        _table(METRIC_NAMES, [[_metric_text(result[name]) for name in METRIC_NAMES]]),
        _threshold_sentence(matching),
    ]
    for picture in page.plots:
        parts.append(f"<h2>{_text(picture.title)}</h2>")
        parts += [f"<p>{_text(picture.text)}</p>"] if picture.text else []
        parts.append(_image(picture.content, picture.title))
    parts += ["<h2>Classes</h2>", _class_table(result)]
    if page.sources:
        parts += ["<h2>Sources</h2>", _source_table(page.sources)]
    parts += _worst_section(page)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Evaluation: AP {_metric_text(result['AP'])}</title>\n"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _threshold_sentence(matching: Matching) -> str:
    if not matching.f1:
        return "<p>No detection matches a ground-truth box of its class at IoU 0.5.</p>"
    return (
        f"<p>The score threshold with the best F1 at IoU 0.5 is <b>{matching.threshold:.2f}</b>: "
        f"precision {matching.precision:.3f}, recall {matching.recall:.3f}, F1 {matching.f1:.3f} "
        "over all classes.</p>"
    )


def _class_table(result: CocoResult) -> str:
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
    rows = [
        [
            str(entry.category_id),
            entry.name,
            f"{entry.num_boxes:,}",
            f"{entry.num_detections:,}",
            *(_metric_text(getattr(entry, name)) for name in columns),
        ]
        for entry in result.per_class
    ]
    return _table(("id", "class", "ground truth", "predicted", *columns), rows, name_column=1)


def _source_table(sources: Mapping[str, CocoResult]) -> str:
    rows = [
        [name, f"{one.num_images:,}", *(_metric_text(one[metric]) for metric in METRIC_NAMES)]
        for name, one in sources.items()
    ]
    return _table(("source", "images", *METRIC_NAMES), rows, name_column=0)


def _worst_section(page: Page) -> list[str]:
    if not page.worst:
        return ["<h2>Worst images</h2>", "<p>No image has a mistake at this threshold.</p>"]
    keys = (
        (TRUE_POSITIVE, "true positive"),
        (FALSE_NEGATIVE, "false negative"),
        (WRONG_CLASS, "wrong class"),
        (FALSE_POSITIVE, "false positive"),
    )
    legend = "".join(f'<span class="key" style="background:{color}"></span>{name}' for color, name in keys)
    figures = []
    for worst, content in page.worst:
        counts = (
            f"{worst.num_false_negatives} false negatives, {worst.num_wrong_class} wrong class, "
            f"{worst.num_false_positives} false positives, {worst.num_true_positives} true positives"
        )
        name = worst.path or f"image {worst.image_id}"
        shown = _image(content, name) if content else '<p class="quiet">the picture cannot be read</p>'
        figures.append(f"<figure>{shown}<figcaption>{_text(name)}<br>{counts}</figcaption></figure>")
    return [
        f"<h2>The {len(page.worst)} images with the most mistakes</h2>",
        f"<p>{legend}</p>",
        '<div class="worst">',
        *figures,
        "</div>",
    ]


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], name_column: int | None = None) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="name"' if column == name_column else ""
        return f"<{tag}{kind}>{_text(text)}</{tag}>"

    head = "".join(cell("th", column, text) for column, text in enumerate(headers))
    lines = ["".join(cell("td", column, text) for column, text in enumerate(row)) for row in rows]
    return f"<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(content: bytes, alt: str) -> str:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(content).decode("ascii")
    return f'<img alt="{_text(alt)}" src="data:image/{kind};base64,{data}">'


def _metric_text(value: float) -> str:
    return "–" if value == UNDEFINED else f"{value:.3f}"


def _text(text: str) -> str:
    """Escaped text; bytes that are not UTF-8 (in file names) become question marks."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


# --- all files of a report ---

PAGE_NAME = "report.html"


def write_report(
    folder: Path,
    result: CocoResult,
    sources: Mapping[str, CocoResult],
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    image_paths: Mapping[int, str],
) -> Path:
    """Write ``results.json``, ``results_detail.json``, four plots as PNG, and ``report.html``.

    Args:
        folder: the results folder.
        result: the metrics.
        sources: the metrics of each source, by name.
        truth: the ground truth.
        detections: the scored detections.
        image_paths: image id → image file, for the pictures of the worst images.

    Returns:
        The page.
    """
    write_results_json(folder / "results.json", result)
    write_details_json(folder / "results_detail.json", result, sources)
    scored = truth.select(truth.image_ids, result.category_ids)
    matching = match(scored, detections.select(truth.image_ids, result.category_ids))
    matrix = confusion_matrix(matching, result.category_ids)
    with rc_context({"font.family": font_families(truth.category_names.values())}):
        plots = [
            _picture(
                draw_precision_recall(folder / "precision_recall.png", result),
                "Precision over recall",
                "From left to right the score threshold falls and recall rises; high and flat is good.",
            ),
            _picture(
                draw_class_precision(folder / "class_precision.png", result), "Average precision by class"
            ),
            _picture(
                draw_confusion_matrix(
                    folder / "confusion_matrix.png", matrix, truth.category_names, matching.threshold
                ),
                "Confusion matrix",
                "Rows are the ground truth, columns the predicted class. The last row counts false "
                "positives, the last column false negatives.",
            ),
            _picture(
                draw_score_histogram(folder / "score_histogram.png", matching),
                "Scores",
                "The further the two colours are apart, the easier it is to choose a score threshold.",
            ),
        ]
    worst = worst_images(matching, matrix, image_paths)
    drawn = [(one, draw_worst_image(one, matching, matrix)) for one in worst]
    return write_page(folder / PAGE_NAME, Page(result, sources, matching, plots, drawn))


def _picture(path: Path, title: str, text: str = "") -> Picture:
    return Picture(title, path.read_bytes(), text)
