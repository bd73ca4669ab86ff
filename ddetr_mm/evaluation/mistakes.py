"""Matches detections with the ground truth, counts the errors by class, and draws the worst images.

For pictures and counts of errors at one score threshold; AP comes from :mod:`ddetr_mm.evaluation.coco_eval`.
Legend: N ground-truth boxes, D detections, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ddetr_mm.datasets.images import read_image
from ddetr_mm.errors import DataError
from ddetr_mm.evaluation.coco_eval import DetectionColumns, GroundTruthColumns
from ddetr_mm.fonts import label_font

# --- true positives, false positives and false negatives ---

MATCH_IOU = 0.5
"""Least IoU of a match."""
LEAST_SCORE = 0.05
"""Detections with lower scores are left out: they are many, and below any threshold in use."""


@dataclass(frozen=True)
class Matching:
    """The matches between detections and ground truth.

    Attributes:
        truth: the ground truth.
        detections: those with scores of :data:`LEAST_SCORE` or more.
        truth_row_of: (D,) the row in ``truth`` that a detection matches, of its own class; -1 for none.
        on_crowd: (D,) whether a detection without a match lies on a crowd region of its class.
        threshold: the score threshold with the best F1 over all classes; 0.5 where there is no match.
        precision, recall, f1: at that threshold, over all classes, 0..1.
    """

    truth: GroundTruthColumns
    detections: DetectionColumns
    truth_row_of: npt.NDArray[np.int64]
    on_crowd: npt.NDArray[np.bool_]
    threshold: float
    precision: float
    recall: float
    f1: float

    @property
    def counts(self) -> npt.NDArray[np.bool_]:
        """(D,) detections whose score reaches the threshold, without those on crowds."""
        return (self.detections.scores >= self.threshold) & ~self.on_crowd

    @property
    def true_positives(self) -> npt.NDArray[np.bool_]:
        """(D,) detections that count and match a box of their class."""
        return self.counts & (self.truth_row_of >= 0)

    @property
    def false_negatives(self) -> npt.NDArray[np.bool_]:
        """(N,) ground-truth boxes, without crowds, that no detection that counts matches."""
        unmatched = ~self.truth.iscrowd
        unmatched[self.truth_row_of[self.true_positives]] = False
        return unmatched


def match(truth: GroundTruthColumns, detections: DetectionColumns) -> Matching:
    """Match by COCO's rule at one IoU: best score first, each with the unmatched box of the highest IoU."""
    keep = detections.finite_rows()
    keep[keep] = detections.scores[keep] >= LEAST_SCORE
    chosen = detections.rows(keep)
    truth_row_of = np.full(len(chosen), -1, dtype=np.int64)
    on_crowd = np.zeros(len(chosen), dtype=bool)
    for truth_rows, rows in _by_image(truth, chosen):
        crowd = truth.iscrowd[truth_rows]
        ious = iou_matrix(chosen.boxes_xywh[rows], truth.boxes_xywh[truth_rows], crowd)
        same = chosen.category_ids[rows][:, None] == truth.category_ids[truth_rows][None]
        ious = np.where(same & (ious >= MATCH_IOU), ious, 0.0)
        unmatched = ~crowd
        for place in np.argsort(-chosen.scores[rows], kind="stable"):
            candidates = ious[place] * unmatched
            best = int(candidates.argmax())
            if candidates[best] > 0:
                truth_row_of[rows[place]] = truth_rows[best]
                unmatched[best] = False
            elif (ious[place] * crowd).any():
                on_crowd[rows[place]] = True
    best_threshold = _best_threshold(truth, chosen, truth_row_of, on_crowd)
    return Matching(truth, chosen, truth_row_of, on_crowd, *best_threshold)


def _by_image(
    truth: GroundTruthColumns, detections: DetectionColumns
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Ground-truth rows and detection rows of every image that has both."""
    truth_order = np.argsort(truth.box_image_ids, kind="stable")
    order = np.argsort(detections.image_ids, kind="stable")
    truth_ids, ids = truth.box_image_ids[truth_order], detections.image_ids[order]
    for image in np.intersect1d(truth_ids, ids):
        truth_rows = truth_order[slice(*np.searchsorted(truth_ids, [image, image + 1]))]
        yield truth_rows, order[slice(*np.searchsorted(ids, [image, image + 1]))]


def iou_matrix(
    boxes_xywh: npt.NDArray[np.float64], truth_xywh: npt.NDArray[np.float64], crowd: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(D, N) IoU of detections (D, 4) and ground truth (N, 4).

    For a crowd region (``crowd``, (N,)) it is the share of the detection inside it, as in COCO.
    """
    ends, truth_ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:], truth_xywh[:, :2] + truth_xywh[:, 2:]
    starts = np.maximum(boxes_xywh[:, None, :2], truth_xywh[None, :, :2])
    sides = np.minimum(ends[:, None], truth_ends[None]) - starts
    intersection = np.clip(sides, 0, None).prod(axis=2)
    areas = boxes_xywh[:, 2:].prod(axis=1)[:, None]
    union = np.where(crowd[None], areas, areas + truth_xywh[:, 2:].prod(axis=1)[None] - intersection)
    return intersection / np.maximum(union, 1e-12)


def _best_threshold(
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    truth_row_of: npt.NDArray[np.int64],
    on_crowd: npt.NDArray[np.bool_],
) -> tuple[float, float, float, float]:
    """The score threshold with the best F1, and precision, recall and F1 there."""
    num_truth = int((~truth.iscrowd).sum())
    counted = np.flatnonzero(~on_crowd)
    order = counted[np.argsort(-detections.scores[counted], kind="stable")]
    if not len(order) or not num_truth:
        return 0.5, 0.0, 0.0, 0.0
    num_true = np.cumsum(truth_row_of[order] >= 0)
    if not num_true[-1]:
        return 0.5, 0.0, 0.0, 0.0
    f1 = 2 * num_true / (np.arange(1, len(order) + 1) + num_truth)
    # A threshold lets detections of equal scores pass together.
    scores = detections.scores[order]
    last_of_score = np.append(scores[1:] < scores[:-1], True)
    best = int(np.where(last_of_score, f1, -1).argmax())
    return (
        float(scores[best]),
        float(num_true[best] / (best + 1)),
        float(num_true[best] / num_truth),
        float(f1[best]),
    )


# --- the confusion matrix ---


@dataclass(frozen=True)
class ConfusionMatrix:
    """The confusion matrix at the matching's score threshold.

    Attributes:
        category_ids: (K,) classes, ascending.
        counts: (K + 1, K + 1) rows are the ground truth, columns the predicted class; the last of both is
            background: false positives in the last row, false negatives in the last column.
        confused_with: (D,) for detections that count and match no box of their class: the row of the
            unmatched ground-truth box of another class that they match; -1 for the others.
    """

    category_ids: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    confused_with: npt.NDArray[np.int64]


def confusion_matrix(matching: Matching, category_ids: npt.NDArray[np.int64]) -> ConfusionMatrix:
    """Match what :func:`match` left unmatched across classes, and count."""
    truth, detections = matching.truth, matching.detections
    confused_with = np.full(len(detections), -1, dtype=np.int64)
    wrong = np.flatnonzero(matching.counts & ~matching.true_positives)
    missed = np.flatnonzero(matching.false_negatives)
    left_truth = GroundTruthColumns(
        image_ids=truth.image_ids,
        box_image_ids=truth.box_image_ids[missed],
        boxes_xywh=truth.boxes_xywh[missed],
        category_ids=truth.category_ids[missed],
        iscrowd=truth.iscrowd[missed],
        areas=truth.areas[missed],
        category_names=truth.category_names,
    )
    left = detections.rows(wrong)
    for truth_rows, rows in _by_image(left_truth, left):
        ious = iou_matrix(
            left.boxes_xywh[rows], left_truth.boxes_xywh[truth_rows], left_truth.iscrowd[truth_rows]
        )
        unmatched = np.ones(len(truth_rows), dtype=bool)
        for place in np.argsort(-left.scores[rows], kind="stable"):
            candidates = np.where(ious[place] >= MATCH_IOU, ious[place], 0) * unmatched
            best = int(candidates.argmax())
            if candidates[best] > 0:
                confused_with[wrong[rows[place]]] = missed[truth_rows[best]]
                unmatched[best] = False
    return ConfusionMatrix(category_ids, _counted(matching, category_ids, confused_with), confused_with)


def _counted(
    matching: Matching, category_ids: npt.NDArray[np.int64], confused_with: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The counts of :class:`ConfusionMatrix`."""
    size = len(category_ids)
    counts = np.zeros((size + 1, size + 1), dtype=np.int64)
    truth_places = np.searchsorted(category_ids, matching.truth.category_ids)
    places = np.searchsorted(category_ids, matching.detections.category_ids)
    np.add.at(counts, (places[matching.true_positives],) * 2, 1)
    confused = np.flatnonzero(confused_with >= 0)
    np.add.at(counts, (truth_places[confused_with[confused]], places[confused]), 1)
    background = matching.counts & ~matching.true_positives & (confused_with < 0)
    np.add.at(counts[size], places[background], 1)
    unmatched = matching.false_negatives
    unmatched[confused_with[confused]] = False
    np.add.at(counts[:, size], truth_places[unmatched], 1)
    return counts


# --- the images with the most mistakes ---

MOST_IMAGES = 50
LONG_SIDE_PX = 640

TRUE_POSITIVE, FALSE_NEGATIVE, WRONG_CLASS, FALSE_POSITIVE = "#2ca02c", "#e377c2", "#ff7f0e", "#d62728"
"""Colours of boxes; a detection that matches a box of another class is drawn as wrong class."""


@dataclass(frozen=True)
class WorstImage:
    """An image and its mistakes at the matching's score threshold.

    Attributes:
        image_id: the dataset's id.
        path: the image file; None where it is unknown.
        num_false_negatives: ground-truth boxes without a match.
        num_wrong_class: detections that match a box of another class.
        num_false_positives: detections on background.
        num_true_positives: detections that match a box of their class.
    """

    image_id: int
    path: str | None
    num_false_negatives: int
    num_wrong_class: int
    num_false_positives: int
    num_true_positives: int

    @property
    def num_mistakes(self) -> int:
        """The sum of all mistakes."""
        return self.num_false_negatives + self.num_wrong_class + self.num_false_positives


def worst_images(
    matching: Matching, matrix: ConfusionMatrix, paths: Mapping[int, str], most: int = MOST_IMAGES
) -> list[WorstImage]:
    """The images with the most mistakes, the worst first; images without a mistake are left out.

    Args:
        matching: from :func:`ddetr_mm.evaluation.mistakes.match`.
        matrix: from :func:`ddetr_mm.evaluation.mistakes.confusion_matrix`.
        paths: image id → file.
        most: the largest number of images.
    """
    truth, detections = matching.truth, matching.detections
    wrong_class = matrix.confused_with >= 0
    false_negatives = matching.false_negatives
    false_negatives[matrix.confused_with[wrong_class]] = False
    false_positives = matching.counts & ~matching.true_positives & ~wrong_class
    sorted_ids = np.sort(truth.image_ids)

    def per_image(image_ids: np.ndarray) -> np.ndarray:
        known, counts = np.unique(image_ids, return_counts=True)
        total = np.zeros(len(sorted_ids), dtype=np.int64)
        total[np.searchsorted(sorted_ids, known)] = counts
        return total

    figures = np.stack(
        [
            per_image(truth.box_image_ids[false_negatives]),
            per_image(detections.image_ids[wrong_class]),
            per_image(detections.image_ids[false_positives]),
            per_image(detections.image_ids[matching.true_positives]),
        ]
    )
    mistakes = figures[:3].sum(axis=0)
    share_true = figures[3] / np.maximum(mistakes + figures[3], 1)
    order = np.lexsort((sorted_ids, share_true, -mistakes))[:most]
    return [
        WorstImage(int(sorted_ids[row]), paths.get(int(sorted_ids[row])), *figures[:, row].tolist())
        for row in order
        if mistakes[row]
    ]


def draw_worst_image(worst: WorstImage, matching: Matching, matrix: ConfusionMatrix) -> bytes | None:
    """A JPEG of an image with its true positives and mistakes; None where the file cannot be read."""
    if worst.path is None:
        return None
    try:
        picture = Image.fromarray(read_image(worst.path))
    except DataError:
        return None  # the report is written without this picture
    scale = min(LONG_SIDE_PX / max(picture.size), 4.0)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    truth, detections = matching.truth, matching.detections
    names = truth.category_names
    of_image = detections.image_ids == worst.image_id
    false_negatives = matching.false_negatives & (truth.box_image_ids == worst.image_id)
    confused = matrix.confused_with >= 0
    false_negatives[matrix.confused_with[confused]] = False
    for row in np.flatnonzero(matching.true_positives & of_image):
        _box(draw, detections.boxes_xywh[row] * scale, TRUE_POSITIVE, "", width=1)
    for row in np.flatnonzero(false_negatives):
        name = names[int(truth.category_ids[row])]
        _box(draw, truth.boxes_xywh[row] * scale, FALSE_NEGATIVE, f"not detected: {name}")
    for row in np.flatnonzero(matching.counts & ~matching.true_positives & of_image):
        name = f"{names.get(int(detections.category_ids[row]), '?')} {detections.scores[row]:.2f}"
        if confused[row]:
            truth_name = names[int(truth.category_ids[matrix.confused_with[row]])]
            _box(draw, detections.boxes_xywh[row] * scale, WRONG_CLASS, f"{name}, is {truth_name}")
        else:
            _box(draw, detections.boxes_xywh[row] * scale, FALSE_POSITIVE, name)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=82)
    return content.getvalue()


def _box(draw: ImageDraw.ImageDraw, box_xywh: np.ndarray, color: str, label: str, width: int = 2) -> None:
    x1, y1 = box_xywh[:2].tolist()
    x2, y2 = (box_xywh[:2] + np.maximum(box_xywh[2:], 1)).tolist()
    draw.rectangle((x1, y1, x2, y2), outline=color, width=width)
    if not label:
        return
    label = label if len(label) <= 40 else label[:39] + "…"
    font, label = label_font(label, 12)
    place = (max(x1, 0), max(y1 - 15, 0))
    area = draw.textbbox(place, label, font=font)
    draw.rectangle((area[0] - 1, area[1] - 1, area[2] + 1, area[3] + 1), fill=color)
    draw.text(place, label, fill="white", font=font)
