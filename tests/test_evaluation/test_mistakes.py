"""Matching at one IoU: true and false positives, crowds, the best threshold, the confusion matrix."""

from __future__ import annotations

import numpy as np
import pytest

from ddetr_mm.evaluation.coco_eval import DetectionColumns, GroundTruthColumns, evaluate_boxes
from ddetr_mm.evaluation.mistakes import LEAST_SCORE, confusion_matrix, iou_matrix, match, worst_images

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
