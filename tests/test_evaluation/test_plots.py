from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from ddetr_mm.evaluation.coco_eval import evaluate_boxes
from ddetr_mm.evaluation.columns import DetectionColumns, GroundTruthColumns
from ddetr_mm.evaluation.plots import draw_class_precision, draw_precision_recall


def num_colors(path):
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 22))


@pytest.mark.parametrize("draw", [draw_precision_recall, draw_class_precision])
def test_pictures_follow_the_result(make_scene, tmp_path, draw):
    truth, detections = make_scene(0)
    good = draw(tmp_path / "deep" / "good.png", evaluate_boxes(truth, detections))
    none = draw(tmp_path / "none.png", evaluate_boxes(truth, DetectionColumns.empty()))
    assert num_colors(good) > 20
    assert not np.array_equal(np.asarray(Image.open(good)), np.asarray(Image.open(none)))


@pytest.mark.parametrize("draw", [draw_precision_recall, draw_class_precision])
def test_nothing_to_draw_is_still_a_picture(tmp_path, draw):
    nothing = GroundTruthColumns([1], [], [], [], [], [], {1: "a"})
    path = draw(tmp_path / "empty.png", evaluate_boxes(nothing, DetectionColumns.empty()))
    assert num_colors(path) > 1


def test_many_classes_and_odd_names(make_scene, tmp_path):
    truth, detections = make_scene(1, num_images=60, num_classes=100)
    names = {number: f"$x_{number}$ <b>[odd]" * 3 for number in truth.category_names}
    result = evaluate_boxes(dataclasses.replace(truth, category_names=names), detections)
    draw_class_precision(tmp_path / "a.png", result)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[1] == pytest.approx(110 * (1.5 + 0.25 * 60), abs=2)
    assert num_colors(draw_precision_recall(tmp_path / "b.png", result)) > 20
