"""Matching at one IoU: true and false positives, crowds, the best threshold, the confusion matrix."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ddetr_mm.evaluation.coco_eval import DetectionColumns, GroundTruthColumns, evaluate_boxes
from ddetr_mm.evaluation.mistakes import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    DUPLICATE,
    ERROR_KINDS,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    LEAST_SCORE,
    LOCALISATION,
    LONG_SIDE_PX,
    MISSED,
    TRUE_POSITIVE,
    WRONG_CLASS,
    class_scores,
    confusion_matrix,
    error_costs,
    iou_matrix,
    match,
    picture_of,
    worst_images,
    worst_marks,
)

NAMES = {1: "cat", 2: "dog"}


def truth_of(boxes, categories, crowd=None, images=None) -> GroundTruthColumns:
    images = images or [7] * len(boxes)
    boxes = np.array(boxes, dtype=float)
    return GroundTruthColumns(
        sorted({*images, 9}),
        images,
        boxes,
        categories,
        crowd or [0] * len(boxes),
        boxes[:, 2:].prod(1),
        NAMES,
    )


def detections_of(boxes, scores, categories, images=None) -> DetectionColumns:
    return DetectionColumns(images or [7] * len(boxes), np.array(boxes, dtype=float), scores, categories)


def test_best_score_is_matched():
    truth = truth_of([[0, 0, 10, 10]], [1])
    matching = match(truth, detections_of([[0, 0, 10, 9], [0, 0, 10, 10]], [0.9, 0.8], [1, 1]))
    assert matching.truth_row_of.tolist() == [0, -1]
    assert matching.threshold == 0.9 and matching.precision == matching.recall == 1


def test_detections_on_crowds_count_neither_way():
    truth = truth_of([[0, 0, 100, 100], [200, 0, 10, 10]], [1, 1], crowd=[1, 0])
    detections = detections_of([[5, 5, 10, 10], [200, 0, 10, 10]], [0.9, 0.6], [1, 1])
    matching = match(truth, detections)
    assert matching.on_crowd.tolist() == [True, False] and matching.f1 == 1
    assert not matching.false_negatives.any()


def test_confusion_between_classes_is_counted():
    truth = truth_of([[0, 0, 10, 10], [50, 0, 10, 10], [90, 0, 10, 10]], [1, 2, 2])
    detections = detections_of([[0, 0, 10, 10], [50, 0, 10, 9], [150, 0, 10, 10]], [0.9, 0.9, 0.9], [1, 1, 2])
    matching = match(truth, detections)
    matrix = confusion_matrix(matching, np.array([1, 2]))
    assert matrix.counts.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert matrix.confused_with.tolist() == [-1, 1, -1]
    (worst,) = worst_images(matching, matrix, {7: "a.png"})
    assert (
        worst.num_false_negatives,
        worst.num_wrong_class,
        worst.num_false_positives,
        worst.num_true_positives,
    ) == (1, 1, 1, 1)
    assert worst.path == "a.png" and worst.image_id == 7


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_evaluator(make_scene, seed):
    """Recall at the lowest threshold is the evaluator's AR at one half for detections from LEAST_SCORE on."""
    truth, detections = make_scene(seed, num_images=20)
    matching = match(truth, detections)
    rows = detections.scores >= LEAST_SCORE
    result = evaluate_boxes(truth, detections.rows(rows), backend="pycocotools")
    for place, entry in enumerate(result.per_class):
        of_class = (truth.category_ids == entry.category_id) & ~truth.iscrowd
        matched = np.unique(matching.truth_row_of[matching.truth_row_of >= 0])
        recall = of_class[matched].sum() / max(of_class.sum(), 1)
        reached = (result.precision[0, :, place] > 0).sum()
        assert reached == pytest.approx(np.floor(recall * 100 + 1e-9) + 1, abs=1) or recall == 0


@pytest.mark.parametrize("seed", range(4))
def test_every_box_and_detection_is_counted_once(make_scene, seed):
    truth, detections = make_scene(seed)
    matching = match(truth, detections)
    matrix = confusion_matrix(matching, np.array(sorted(truth.category_names)))
    assert matrix.counts[:-1].sum() == (~truth.iscrowd).sum()
    assert matrix.counts[:, :-1].sum() == matching.counts.sum()
    worst = worst_images(matching, matrix, {}, most=1000)
    wrong = matrix.counts.sum() - np.trace(matrix.counts)
    assert sum(one.num_mistakes for one in worst) == wrong
    assert [one.num_mistakes for one in worst] == sorted((one.num_mistakes for one in worst), reverse=True)


def test_threshold_has_the_best_f1(make_scene):
    truth, detections = make_scene(3, num_images=30)
    matching = match(truth, detections)
    num_truth = (~truth.iscrowd).sum()
    for threshold in np.unique(matching.detections.scores):
        chosen = (matching.detections.scores >= threshold) & ~matching.on_crowd
        f1 = 2 * (matching.truth_row_of[chosen] >= 0).sum() / (chosen.sum() + num_truth)
        assert f1 <= matching.f1 + 1e-12
    assert matching.f1 == pytest.approx(
        2 * matching.true_positives.sum() / (matching.counts.sum() + num_truth)
    )


def test_empty_input():
    matching = match(GroundTruthColumns([1], [], [], [], [], [], NAMES), DetectionColumns.empty())
    assert confusion_matrix(matching, np.array([1, 2])).counts.sum() == 0 and matching.f1 == 0


def test_iou_matrix():
    ious = iou_matrix(
        np.array([[0, 0, 10.0, 10]]), np.array([[0, 0, 10.0, 20], [0, 0, 10, 20]]), np.array([False, True])
    )
    np.testing.assert_allclose(ious, [[0.5, 1.0]])


# --- precision, recall and F1 by class ---


def test_scores_of_every_class():
    truth = truth_of([[0, 0, 10, 10], [50, 0, 10, 10], [90, 0, 10, 10]], [1, 2, 2])
    boxes = [[0, 0, 10, 10], [50, 0, 10, 9], [150, 0, 10, 10], [90, 0, 10, 10]]
    matching = match(truth, detections_of(boxes, [0.9, 0.8, 0.7, 0.3], [1, 2, 2, 2]))
    assert matching.threshold == 0.3  # 2 * 3 / (4 + 3), more than 2 * 2 / (2 + 3)
    cat, dog = class_scores(matching, np.array([1, 2]))
    assert (cat.true_positives, cat.false_positives, cat.false_negatives) == (1, 0, 0)
    assert (cat.precision, cat.recall, cat.f1, cat.best_threshold) == (1, 1, 1, 0.9)
    assert (dog.true_positives, dog.false_positives, dog.false_negatives) == (2, 1, 0)
    assert (dog.precision, dog.recall, dog.f1) == pytest.approx((2 / 3, 1, 0.8))
    assert dog.best_threshold == 0.3


def test_a_class_without_detections_has_no_precision():
    matching = match(truth_of([[0, 0, 10, 10]], [1]), detections_of([[0, 0, 10, 10]], [0.9], [1]))
    cat, dog = class_scores(matching, np.array([1, 2]))
    assert cat.f1 == 1 and (dog.precision, dog.recall, dog.f1, dog.best_threshold) == (None,) * 4


# --- kinds of errors, and what they cost ---

BOX = [0, 0, 10, 10]
FAR = [100, 0, 10, 10]
HALF = [0, 0, 10, 4]  # IoU 0.4 with BOX
NOWHERE = [300, 300, 10, 10]


# name: truth (boxes, classes), detections (boxes, scores, classes), AP50, kind: (number, dAP50)
CASES = {
    "nothing wrong": (([BOX], [1]), ([BOX], [0.9], [1]), 1.0, {}),
    "background before the match": (
        ([BOX], [1]),
        ([NOWHERE, BOX], [0.9, 0.8], [1, 1]),
        0.5,
        {BACKGROUND: (1, 0.5)},
    ),
    "background after the match": (
        ([BOX], [1]),
        ([BOX, NOWHERE], [0.9, 0.8], [1, 1]),
        1.0,
        {BACKGROUND: (1, 0.0)},
    ),
    # The first detection matches, the second is on the same box: 51 thresholds at 1, 50 at 2/3.
    "duplicate": (
        ([BOX, FAR], [1, 1]),
        ([BOX, [0, 0, 10, 9], FAR], [0.9, 0.8, 0.7], [1, 1, 1]),
        (51 + 50 * 2 / 3) / 101,
        {DUPLICATE: (1, 50 / 303)},
    ),
    # Its box is not counted as missed: the error is about it.
    "localisation": (([BOX], [1]), ([HALF], [0.9], [1]), 0.0, {LOCALISATION: (1, 1.0)}),
    "two at one place": (
        ([BOX], [1]),
        ([HALF, [0, 0, 10, 3]], [0.9, 0.8], [1, 1]),
        0.0,
        {LOCALISATION: (2, 1.0)},
    ),
    # AP is the mean of class 1 (0) and class 2 (1); corrected, both are 1.
    "classification": (
        ([BOX, FAR], [1, 2]),
        ([FAR, BOX], [0.9, 0.8], [2, 2]),
        0.5,
        {CLASSIFICATION: (1, 0.5)},
    ),
    # The box is matched already: the wrong detection is removed, and class 2 rises from 0.5 to 1.
    "classification of a matched box": (
        ([BOX, FAR], [1, 2]),
        ([BOX, BOX, FAR], [0.9, 0.8, 0.7], [1, 2, 2]),
        0.75,
        {CLASSIFICATION: (1, 0.25)},
    ),
    # Neither place nor class fits: it is removed, and its box stays missed.
    "both": (
        ([BOX, FAR], [1, 2]),
        ([HALF, FAR], [0.9, 0.8], [2, 2]),
        0.25,
        {BOTH: (1, 0.25), MISSED: (1, 0.25)},
    ),
    # One of two boxes is found: precision 1 up to recall 0.5. Without the other, AP is 1.
    "missed": (([BOX, FAR], [1, 1]), ([BOX], [0.9], [1]), 51 / 101, {MISSED: (1, 50 / 101)}),
}


@pytest.mark.parametrize("name", CASES)
def test_kinds_and_costs_of_errors_by_hand(name):
    (boxes, classes), found, AP50, expected = CASES[name]
    costs = error_costs(truth_of(boxes, classes), detections_of(*found), np.array([1, 2]), threshold=0.5)
    assert pytest.approx(AP50) == costs.AP50
    assert list(costs.dAP50) == list(ERROR_KINDS)
    for kind in ERROR_KINDS:
        number, dAP50 = expected.get(kind, (0, 0.0))
        assert costs.all_counts[kind] == costs.counts[kind] == number, kind
        assert costs.dAP50[kind] == pytest.approx(dAP50), kind


def test_errors_below_the_threshold_are_counted_apart():
    truth = truth_of([BOX], [1])
    costs = error_costs(truth, detections_of([NOWHERE, HALF], [0.9, 0.2], [1, 1]), np.array([1]), 0.5)
    assert costs.all_counts == {**dict.fromkeys(ERROR_KINDS, 0), BACKGROUND: 1, LOCALISATION: 1}
    # Without the detection of score 0.2, its box is a missed one.
    assert costs.counts == {**dict.fromkeys(ERROR_KINDS, 0), BACKGROUND: 1, MISSED: 1}


def test_detections_on_crowds_are_no_errors():
    truth = truth_of([[0, 0, 100, 100], FAR], [1, 1], crowd=[1, 0])
    costs = error_costs(truth, detections_of([[5, 5, 10, 10]], [0.9], [1]), np.array([1]), 0.5)
    assert costs.all_counts == {**dict.fromkeys(ERROR_KINDS, 0), MISSED: 1}


@pytest.mark.parametrize("seed", range(6))
def test_AP50_of_the_costs_is_the_evaluators(make_scene, seed):
    truth, detections = make_scene(seed, num_images=25, score_levels=10**6)
    result = evaluate_boxes(truth, detections, backend="pycocotools")
    costs = error_costs(truth, detections, result.category_ids, 0.5)
    assert pytest.approx(result["AP50"]) == costs.AP50
    matching = match(truth, detections, least_score=-np.inf)
    wrong = (matching.truth_row_of < 0) & ~matching.on_crowd
    assert sum(costs.all_counts[kind] for kind in ERROR_KINDS if kind != MISSED) == wrong.sum()


def test_only_the_hundred_best_of_an_image_and_class_count():
    truth = truth_of([BOX], [1])
    boxes = [NOWHERE] * 100 + [BOX]
    detections = detections_of(boxes, np.linspace(0.9, 0.1, 101).tolist(), [1] * 101)
    costs = error_costs(truth, detections, np.array([1]), 0.0)
    assert costs.AP50 == evaluate_boxes(truth, detections, backend="pycocotools")["AP50"] == 0
    assert costs.all_counts[BACKGROUND] == 100


def test_no_detections_and_no_ground_truth():
    costs = error_costs(truth_of([BOX], [1]), DetectionColumns.empty(), np.array([1]), 0.5)
    assert costs.all_counts[MISSED] == 1 and costs.AP50 == 0
    nothing = GroundTruthColumns([1], [], [], [], [], [], NAMES)
    costs = error_costs(nothing, detections_of([BOX], [0.9], [1], [1]), np.array([1]), 0.5)
    assert costs.AP50 == 0 and costs.all_counts == {**dict.fromkeys(ERROR_KINDS, 0), BACKGROUND: 1}


# --- pictures of the worst images ---


def test_boxes_of_a_worst_image(tmp_path):
    Image.new("RGB", (1600, 400), (10, 200, 30)).save(tmp_path / "a.png")
    truth = truth_of([BOX, FAR, [200, 0, 10, 10]], [1, 2, 2])
    found = detections_of([BOX, [100, 0, 10, 9], NOWHERE], [0.9, 0.8, 0.7], [1, 1, 2])
    matching = match(truth, found)
    matching = type(matching)(**{**vars(matching), "threshold": 0.5})
    matrix = confusion_matrix(matching, np.array([1, 2]))
    (worst,) = worst_images(matching, matrix, {7: str(tmp_path / "a.png")})
    content, size_wh = picture_of(worst)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (LONG_SIDE_PX, LONG_SIDE_PX // 4) and size_wh == (1600, 400)
    marks = worst_marks(worst, matching, matrix, size_wh)
    assert [(mark.kind, mark.label) for mark in marks] == [
        (TRUE_POSITIVE, "cat 0.90"),
        (FALSE_NEGATIVE, "missed: dog"),
        (WRONG_CLASS, "cat 0.80, is dog"),
        (FALSE_POSITIVE, "dog 0.70"),
    ]
    assert marks[2].box_xyxy == pytest.approx((100 / 1600, 0, 110 / 1600, 9 / 400))


def test_a_picture_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    matching = match(truth_of([BOX], [1]), detections_of([], [], []))
    (worst,) = worst_images(matching, confusion_matrix(matching, np.array([1])), {7: str(tmp_path / "a.png")})
    assert picture_of(worst) is None
