"""Matches detections with the ground truth: errors by kind and class, confusion matrix, the worst images.

AP comes from :mod:`ddetr_mm.evaluation.coco_eval`; what each kind of error costs of AP50 is computed here.
Legend: N ground-truth boxes, D detections, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddetr_mm.datasets.images import read_image
from ddetr_mm.errors import DataError
from ddetr_mm.evaluation.coco_eval import RECALL_THRESHOLDS, DetectionColumns, GroundTruthColumns
from ddetr_mm.html_page import Mark

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
        detections: those with high enough scores.
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


def match(
    truth: GroundTruthColumns, detections: DetectionColumns, least_score: float = LEAST_SCORE
) -> Matching:
    """Match by COCO's rule at one IoU: best score first, each with the unmatched box of the highest IoU.

    Args:
        truth: the ground truth.
        detections: those that are not finite are left out.
        least_score: detections with lower scores are left out.
    """
    keep = detections.finite_rows()
    keep[keep] = detections.scores[keep] >= least_score
    chosen = detections.rows(keep)
    truth_row_of = np.full(len(chosen), -1, dtype=np.int64)
    on_crowd = np.zeros(len(chosen), dtype=bool)
    for truth_rows, rows in _by_image(truth, chosen):
        crowd = truth.iscrowd[truth_rows]
        ious = iou_matrix(chosen.boxes_xywh[rows], truth.boxes_xywh[truth_rows], crowd)
        same = chosen.category_ids[rows][:, None] == truth.category_ids[truth_rows][None]
        ious = np.where(same & (ious >= MATCH_IOU), ious, 0.0)
        unmatched = ~crowd
        order = np.argsort(-chosen.scores[rows], kind="stable")
        for place in order[ious[order].any(axis=1)]:
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


# --- precision, recall and F1 by class ---


@dataclass(frozen=True)
class ClassScores:
    """One class at the matching's score threshold.

    Attributes:
        true_positives, false_positives, false_negatives: numbers; detections on crowds count neither way.
        best_threshold: the score threshold with this class's own best F1; None without a match.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    best_threshold: float | None

    @property
    def precision(self) -> float | None:
        """Share of the detections that match; None without detections."""
        found = self.true_positives + self.false_positives
        return self.true_positives / found if found else None

    @property
    def recall(self) -> float | None:
        """Share of the ground truth that is matched; None without ground truth."""
        boxes = self.true_positives + self.false_negatives
        return self.true_positives / boxes if boxes else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None without detections and ground truth."""
        both = 2 * self.true_positives + self.false_positives + self.false_negatives
        return 2 * self.true_positives / both if both else None


def class_scores(matching: Matching, category_ids: npt.NDArray[np.int64]) -> list[ClassScores]:
    """The scores of every class, in the order of ``category_ids``."""
    truth, detections = matching.truth, matching.detections
    true, missed = matching.true_positives, matching.false_negatives
    false = matching.counts & ~true
    found = []
    for number in category_ids.tolist():
        of_truth, of_class = truth.category_ids == number, detections.category_ids == number
        own_truth = truth.select(truth.image_ids, np.array([number]))
        own = _best_threshold(
            own_truth, detections.rows(of_class), matching.truth_row_of[of_class], matching.on_crowd[of_class]
        )
        found.append(
            ClassScores(
                true_positives=int((true & of_class).sum()),
                false_positives=int((false & of_class).sum()),
                false_negatives=int((missed & of_truth).sum()),
                best_threshold=own[0] if own[3] else None,
            )
        )
    return found


# --- kinds of errors, and what they cost ---

CLASSIFICATION, LOCALISATION, BOTH = "classification", "localisation", "classification and localisation"
DUPLICATE, BACKGROUND, MISSED = "duplicate", "background", "missed"
ERROR_KINDS = {
    CLASSIFICATION: "IoU of 0.5 or more with a box of another class",
    LOCALISATION: "IoU of 0.1 to 0.5 with a box of its class",
    BOTH: "IoU of 0.1 to 0.5 with a box of another class",
    DUPLICATE: "a detection with a higher score has matched its box",
    BACKGROUND: "IoU below 0.1 with every box",
    MISSED: "a box without a match that no classification or localisation error is about",
}
"""The kinds of TIDE (Bolya et al., 2020), each with its definition."""

BACKGROUND_IOU = 0.1
MOST_DETECTIONS = 100
"""Detections of an image and class that count, as in COCO."""


@dataclass(frozen=True)
class ErrorCosts:
    """Errors by kind, as TIDE defines them.

    Attributes:
        AP50: average precision at IoU 0.5, computed here; COCO's AP50.
        counts: kind → number of errors among the detections that reach the matching's threshold.
        all_counts: kind → number of errors among all detections.
        dAP50: kind → how much AP50 rises when the errors of this kind alone are corrected.
    """

    AP50: float
    counts: dict[str, int]
    all_counts: dict[str, int]
    dAP50: dict[str, float]


def error_costs(
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    category_ids: npt.NDArray[np.int64],
    threshold: float,
) -> ErrorCosts:
    """Divide the errors into :data:`ERROR_KINDS`, and compute AP50 with each kind corrected.

    Corrected means: a classification error gets the class of its box, a localisation error its place; where
    the box is matched already, or by an error of the same kind with a higher score, the detection is removed.
    Duplicates, errors of both kinds and detections on background are removed. Missed boxes no longer count as
    ground truth.

    Args:
        truth: the ground truth.
        detections: all detections, of any score.
        category_ids: (K,) scored classes; AP50 is the mean over those with ground truth.
        threshold: the score from which errors are counted.
    """
    matching = match(truth, _best_of_image_and_class(detections), least_score=-np.inf)
    kinds, about = _kinds_of(matching)
    base = _Points.of(matching, category_ids)
    AP50 = base.mean_precision()
    fixed = {
        CLASSIFICATION: base.with_matches(*_corrected(matching, kinds == CLASSIFICATION, about), truth),
        LOCALISATION: base.with_matches(*_corrected(matching, kinds == LOCALISATION, about), truth),
        MISSED: base.without_truth(truth.category_ids[_missed(matching, kinds, about)]),
    }
    for kind in (BOTH, DUPLICATE, BACKGROUND):
        fixed[kind] = base.without(kinds == kind)
    high = matching.detections.scores >= threshold
    return ErrorCosts(
        AP50=AP50,
        counts={kind: _count(matching, kinds, about, kind, high) for kind in ERROR_KINDS},
        all_counts={kind: _count(matching, kinds, about, kind, None) for kind in ERROR_KINDS},
        dAP50={kind: fixed[kind].mean_precision() - AP50 for kind in ERROR_KINDS},
    )


def _best_of_image_and_class(detections: DetectionColumns) -> DetectionColumns:
    """The detections that COCO scores: of each image and class those with the highest scores."""
    detections = detections.rows(detections.finite_rows())
    order = np.lexsort((-detections.scores, detections.category_ids, detections.image_ids))
    images, classes = detections.image_ids[order], detections.category_ids[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (images[1:] != images[:-1]) | (classes[1:] != classes[:-1])
    starts = np.flatnonzero(new)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return detections.rows(np.sort(order[rank < MOST_DETECTIONS]))


def _kinds_of(matching: Matching) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """(D,) kind of error of each detection, empty for none; (D,) the box that it is about, -1 for none."""
    truth, detections = matching.truth, matching.detections
    wrong = (matching.truth_row_of < 0) & ~matching.on_crowd
    kinds = np.where(wrong, BACKGROUND, "").astype("<U40")
    about = np.full(len(detections), -1, dtype=np.int64)
    for truth_rows, rows in _by_image(truth, detections):
        truth_rows, rows = truth_rows[~truth.iscrowd[truth_rows]], rows[wrong[rows]]
        if not len(truth_rows) or not len(rows):
            continue
        ious = iou_matrix(
            detections.boxes_xywh[rows], truth.boxes_xywh[truth_rows], truth.iscrowd[truth_rows]
        )
        same = detections.category_ids[rows][:, None] == truth.category_ids[truth_rows][None]
        own, other = np.where(same, ious, 0.0), np.where(same, 0.0, ious)
        best_own, best_other = own.max(axis=1), other.max(axis=1)
        # The order decides where a detection overlaps several boxes.
        conditions = [
            (best_own >= BACKGROUND_IOU) & (best_own < MATCH_IOU),
            best_other >= MATCH_IOU,
            best_own >= MATCH_IOU,
            best_other >= BACKGROUND_IOU,
        ]
        kinds[rows] = np.select(conditions, [LOCALISATION, CLASSIFICATION, DUPLICATE, BOTH], BACKGROUND)
        boxes = np.where(conditions[0], own.argmax(axis=1), other.argmax(axis=1))
        with_box = conditions[0] | conditions[1]
        about[rows[with_box]] = truth_rows[boxes[with_box]]
    return kinds, about


def _missed(
    matching: Matching,
    kinds: npt.NDArray[np.str_],
    about: npt.NDArray[np.int64],
    counted: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """(N,) missed boxes, with the detections that count (all by default)."""
    rows = np.ones(len(kinds), dtype=bool) if counted is None else counted
    missed = ~matching.truth.iscrowd
    missed[matching.truth_row_of[rows & (matching.truth_row_of >= 0)]] = False
    missed[about[rows & (about >= 0)]] = False
    return missed


def _count(
    matching: Matching,
    kinds: npt.NDArray[np.str_],
    about: npt.NDArray[np.int64],
    kind: str,
    counted: npt.NDArray[np.bool_] | None,
) -> int:
    if kind == MISSED:
        return int(_missed(matching, kinds, about, counted).sum())
    return int(((kinds == kind) & (True if counted is None else counted)).sum())


def _corrected(
    matching: Matching, wrong: npt.NDArray[np.bool_], about: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Detections that become matches, the boxes they match, and (D,) those that are removed."""
    rows = np.flatnonzero(wrong)
    rows = rows[np.argsort(-matching.detections.scores[rows], kind="stable")]
    rows = rows[~np.isin(about[rows], matching.truth_row_of[matching.truth_row_of >= 0])]
    _, first = np.unique(about[rows], return_index=True)
    matches = rows[first]
    removed = wrong.copy()
    removed[matches] = False
    return matches, about[matches], removed


@dataclass(frozen=True)
class _Points:
    """What average precision is computed from.

    Attributes:
        category_ids: (D,) class of each detection.
        scores: (D,).
        true: (D,) whether it is a true positive.
        positives: class → ground-truth boxes.
    """

    category_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    true: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    positives: dict[int, int]

    @classmethod
    def of(cls, matching: Matching, category_ids: npt.NDArray[np.int64]) -> _Points:
        truth = matching.truth
        numbers, counts = np.unique(truth.category_ids[~truth.iscrowd], return_counts=True)
        known = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        positives = {number: known[number] for number in category_ids.tolist() if number in known}
        detections = matching.detections
        return cls(
            detections.category_ids,
            detections.scores,
            matching.truth_row_of >= 0,
            ~matching.on_crowd,
            positives,
        )

    def without(self, removed: npt.NDArray[np.bool_]) -> _Points:
        return replace(self, kept=self.kept & ~removed)

    def without_truth(self, category_ids: npt.NDArray[np.int64]) -> _Points:
        left = dict(self.positives)
        for number in category_ids.tolist():
            if number in left:
                left[number] -= 1
        return replace(self, positives=left)

    def with_matches(
        self,
        rows: npt.NDArray[np.int64],
        truth_rows: npt.NDArray[np.int64],
        removed: npt.NDArray[np.bool_],
        truth: GroundTruthColumns,
    ) -> _Points:
        true, classes = self.true.copy(), self.category_ids.copy()
        true[rows], classes[rows] = True, truth.category_ids[truth_rows]
        return replace(self, true=true, category_ids=classes, kept=self.kept & ~removed)

    def mean_precision(self) -> float:
        """Mean over the classes with ground truth; one that has neither boxes nor detections is left out."""
        found = []
        for number, positives in self.positives.items():
            rows = np.flatnonzero(self.kept & (self.category_ids == number))
            if positives or len(rows):
                rows = rows[np.argsort(-self.scores[rows], kind="stable")]
                found.append(average_precision(self.true[rows], positives))
        return float(np.mean(found)) if found else 0.0


def average_precision(true: npt.NDArray[np.bool_], positives: int) -> float:
    """COCO's average precision at one IoU.

    Args:
        true: (D,) whether each detection is a true positive, best score first.
        positives: number of ground-truth boxes.
    """
    if not positives or not true.any():
        return 0.0
    num_true = np.cumsum(true)
    precision = num_true / np.arange(1, len(true) + 1)
    # The highest precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(num_true / positives, RECALL_THRESHOLDS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(places, len(precision))].mean())


# --- the images with the most mistakes ---

MOST_IMAGES = 50
LONG_SIDE_PX = 800

TRUE_POSITIVE, FALSE_NEGATIVE, WRONG_CLASS, FALSE_POSITIVE = (
    "true-positive",
    "missed",
    "wrong-class",
    "false-positive",
)
"""Kinds of boxes on a picture; a detection that matches a box of another class is of the wrong class."""


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


def picture_of(worst: WorstImage) -> tuple[bytes, tuple[int, int]] | None:
    """A JPEG of an image, at most :data:`LONG_SIDE_PX` wide and high, and the image's own size (w, h).

    None where the file cannot be read.
    """
    if worst.path is None:
        return None
    try:
        picture = Image.fromarray(read_image(worst.path))
    except DataError:
        return None  # the report is written without this picture
    size_wh = picture.size
    picture.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=82)
    return content.getvalue(), size_wh


def worst_marks(
    worst: WorstImage, matching: Matching, matrix: ConfusionMatrix, size_wh: tuple[int, int]
) -> list[Mark]:
    """The boxes of an image at the threshold: true positives below, then missed ones and mistakes.

    Args:
        worst: the image.
        matching: from :func:`match`.
        matrix: from :func:`confusion_matrix`.
        size_wh: of the image, pixels.
    """
    truth, detections = matching.truth, matching.detections
    names = truth.category_names
    scale = 1 / np.array([*size_wh, *size_wh], dtype=float)
    of_image = detections.image_ids == worst.image_id
    false_negatives = matching.false_negatives & (truth.box_image_ids == worst.image_id)
    confused = matrix.confused_with >= 0
    false_negatives[matrix.confused_with[confused]] = False

    def mark(box_xywh: npt.NDArray[np.float64], kind: str, label: str) -> Mark:
        x1, y1, width, height = (box_xywh * scale).tolist()
        return Mark((x1, y1, x1 + width, y1 + height), kind, label)

    def named(row: np.intp) -> str:
        return f"{names.get(int(detections.category_ids[row]), '?')} {detections.scores[row]:.2f}"

    marks = [
        mark(detections.boxes_xywh[row], TRUE_POSITIVE, named(row))
        for row in np.flatnonzero(matching.true_positives & of_image)
    ]
    for row in np.flatnonzero(false_negatives):
        name = names[int(truth.category_ids[row])]
        marks.append(mark(truth.boxes_xywh[row], FALSE_NEGATIVE, f"missed: {name}"))
    for row in np.flatnonzero(matching.counts & ~matching.true_positives & of_image):
        box = detections.boxes_xywh[row]
        if confused[row]:
            truth_name = names[int(truth.category_ids[matrix.confused_with[row]])]
            marks.append(mark(box, WRONG_CLASS, f"{named(row)}, is {truth_name}"))
        else:
            marks.append(mark(box, FALSE_POSITIVE, named(row)))
    return marks
