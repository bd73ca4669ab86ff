"""What an evaluation leaves besides ``predictions.json``: figures, plots, and one page with all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ddetr_mm.evaluation.coco_eval import CocoResult, write_details_json, write_results_json
from ddetr_mm.evaluation.columns import DetectionColumns, GroundTruthColumns
from ddetr_mm.evaluation.html_report import Page, Picture, write_page
from ddetr_mm.evaluation.matching import confusions, match
from ddetr_mm.evaluation.plots import (
    draw_class_precision,
    draw_confusions,
    draw_precision_recall,
    draw_score_histogram,
)
from ddetr_mm.evaluation.worst_images import draw_worst_image, worst_images

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
        result: the figures.
        sources: those of single sources, by name.
        truth: the ground truth that was scored against.
        detections: what was scored.
        image_paths: image id → image file, for the pictures of the worst images.

    Returns:
        The page.
    """
    write_results_json(folder / "results.json", result)
    write_details_json(folder / "results_detail.json", result, sources)
    scored = truth.select(truth.image_ids, result.category_ids)
    matching = match(scored, detections.select(truth.image_ids, result.category_ids))
    mistaken = confusions(matching, result.category_ids)
    plots = [
        _picture(
            draw_precision_recall(folder / "precision_recall.png", result),
            "Precision over recall",
            "Going right, more objects are found at lower scores; high and flat is good.",
        ),
        _picture(draw_class_precision(folder / "class_precision.png", result), "Average precision by class"),
        _picture(
            draw_confusions(
                folder / "confusion_matrix.png", mistaken, truth.category_names, matching.threshold
            ),
            "Confusion matrix",
            "Rows are what is there, columns what was found. The last row counts detections where nothing "
            "is, the last column objects that were not found.",
        ),
        _picture(
            draw_score_histogram(folder / "score_histogram.png", matching),
            "Scores",
            "The better the two colours are apart, the easier it is to choose a score threshold.",
        ),
    ]
    worst = worst_images(matching, mistaken, image_paths)
    drawn = [(one, draw_worst_image(one, matching, mistaken)) for one in worst]
    return write_page(folder / PAGE_NAME, Page(result, sources, matching, plots, drawn))


def _picture(path: Path, title: str, text: str = "") -> Picture:
    return Picture(title, path.read_bytes(), text)
