from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ddetr_mm.errors import DataError, StackError
from ddetr_mm.evaluation.coco_eval import (
    METRIC_NAMES,
    DetectionColumns,
    EvaluationLimits,
    GroundTruthColumns,
    evaluate_boxes,
    write_results_json,
)


def pycocotools_stats(truth, detections, category_ids=None, image_ids=None):
    """The twelve numbers as pycocotools itself prints them, from plain dicts."""
    annotations = [
        {
            "id": number,
            "image_id": int(image),
            "category_id": int(category),
            "bbox": box.tolist(),
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for number, (image, category, box, area, crowd) in enumerate(
            zip(
                truth.box_image_ids,
                truth.category_ids,
                truth.boxes_xywh,
                truth.areas,
                truth.iscrowd,
                strict=True,
            ),
            start=1,
        )
    ]
    results = [
        {"image_id": int(image), "category_id": int(category), "bbox": box.tolist(), "score": float(score)}
        for image, category, box, score in zip(
            detections.image_ids,
            detections.category_ids,
            detections.boxes_xywh,
            detections.scores,
            strict=True,
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": int(number)} for number in truth.image_ids],
            "categories": [{"id": number, "name": name} for number, name in truth.category_names.items()],
            "annotations": annotations,
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        if category_ids is not None:
            evaluator.params.catIds = list(category_ids)
        if image_ids is not None:
            evaluator.params.imgIds = list(image_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
@pytest.mark.parametrize("seed", range(6))
def test_twelve_figures_equal_pycocotools(make_scene, backend, seed):
    truth, detections = make_scene(seed)
    expected = pycocotools_stats(truth, detections)
    result = evaluate_boxes(truth, detections, backend=backend)
    np.testing.assert_allclose([result[name] for name in METRIC_NAMES], expected.stats, atol=1e-6, rtol=0)
    np.testing.assert_allclose(result.precision, expected.eval["precision"][:, :, :, 0, 2], atol=1e-6, rtol=0)
    np.testing.assert_allclose(result.scores, expected.eval["scores"][:, :, :, 0, 2], atol=1e-6, rtol=0)
    assert 0 < result["AP"] < 1
    assert result.backend == {"fast": "hotcoco", "pycocotools": "pycocotools"}[backend]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 6),
    num_classes=st.integers(1, 5),
    boxes_per_image=st.floats(0, 5),
    score_levels=st.integers(2, 50),
)
def test_backends_agree_on_any_scene(
    make_scene, seed, num_images, num_classes, boxes_per_image, score_levels
):
    scene = make_scene(seed, num_images, num_classes, boxes_per_image, score_levels)
    fast, slow = (evaluate_boxes(*scene, backend=backend) for backend in ("fast", "pycocotools"))
    for name in METRIC_NAMES:
        assert fast[name] == pytest.approx(slow[name], abs=1e-6)
    np.testing.assert_allclose(fast.precision, slow.precision, atol=1e-6, rtol=0)
    assert [entry.num_boxes for entry in fast.per_class] == [entry.num_boxes for entry in slow.per_class]


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_chosen_classes_and_images(make_scene, backend):
    truth, detections = make_scene(3)
    classes, images = [3, 9], sorted(truth.image_ids)[:7]
    expected = pycocotools_stats(truth, detections, classes, images)
    result = evaluate_boxes(truth, detections, category_ids=classes, image_ids=images, backend=backend)
    np.testing.assert_allclose([result[name] for name in METRIC_NAMES], expected.stats, atol=1e-6, rtol=0)
    assert result.category_ids.tolist() == classes
    assert result.num_images == 7


def test_a_class_scores_as_if_it_were_alone(make_scene):
    truth, detections = make_scene(1)
    result = evaluate_boxes(truth, detections)
    for entry in result.per_class:
        alone = evaluate_boxes(truth, detections, category_ids=[entry.category_id])
        assert (entry.AP, entry.AP50, entry.APs, entry.AR) == pytest.approx(
            (alone["AP"], alone["AP50"], alone["APs"], alone["ARmax100"])
        )
        assert entry.name == f"class {entry.category_id}"
        assert entry.num_boxes == alone.num_boxes
    assert result["AP"] == pytest.approx(np.mean([entry.AP for entry in result.per_class if entry.AP >= 0]))


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_truth_as_detections_is_perfect_and_the_first_box_counts(backend):
    # pycocotools would lose the box whose annotation id is 0.
    truth = GroundTruthColumns(
        [5, 6], [5, 6], [[0, 0, 10, 10], [5, 5, 50, 50]], [1, 1], [0, 0], [100, 2500], {1: "a"}
    )
    detections = DetectionColumns(truth.box_image_ids, truth.boxes_xywh, [0.9, 0.8], truth.category_ids)
    assert evaluate_boxes(truth, detections, backend=backend)["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_no_detections_score_zero(make_scene, backend):
    truth, _ = make_scene(0)
    result = evaluate_boxes(truth, DetectionColumns.empty(), backend=backend)
    assert {result[name] for name in METRIC_NAMES} == {0.0}
    assert "no detections" in result.notes[0]


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_no_ground_truth_is_undefined(make_scene, backend):
    truth, detections = make_scene(0)
    keep = np.zeros(0, dtype=int)
    bare = dataclasses.replace(
        truth,
        **{
            name: getattr(truth, name)[keep]
            for name in ("box_image_ids", "boxes_xywh", "category_ids", "iscrowd", "areas")
        },
    )
    result = evaluate_boxes(bare, detections, backend=backend)
    assert {result[name] for name in METRIC_NAMES} == {-1.0}
    assert "no boxes" in result.notes[0]


def test_nothing_at_all_is_undefined():
    nothing = GroundTruthColumns([], [], [], [], [], [], {})
    result = evaluate_boxes(nothing, DetectionColumns.empty())
    assert result["AP"] == -1.0
    assert result.backend == "none"
    assert result.per_class == ()


def test_non_finite_detections_are_left_out_with_a_note(make_scene):
    truth, detections = make_scene(2)
    boxes, scores = detections.boxes_xywh.copy(), detections.scores.copy()
    boxes[0, 1], scores[3] = np.nan, np.inf
    rest = detections.rows(~np.isin(np.arange(len(detections)), [0, 3]))
    broken = dataclasses.replace(detections, boxes_xywh=boxes, scores=scores)
    result = evaluate_boxes(truth, broken)
    assert result.metrics == evaluate_boxes(truth, rest).metrics
    assert result.notes == ("2 detections with non-finite boxes or scores were left out.",)


def test_unknown_class_and_image_name_what_exists(make_scene):
    truth, detections = make_scene(0, num_classes=2)
    with pytest.raises(DataError, match=r"eval_class_ids.*\[7\].*3 \(class 3\), 6 \(class 6\)"):
        evaluate_boxes(truth, detections, category_ids=[3, 7])
    with pytest.raises(DataError, match="99999"):
        evaluate_boxes(truth, detections, image_ids=[99999])


def test_backend_names(make_scene, monkeypatch):
    scene = make_scene(0, num_images=2)
    with pytest.raises(ValueError, match="auto, fast, pycocotools"):
        evaluate_boxes(*scene, backend="slow")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(StackError, match="pip install hotcoco"):
        evaluate_boxes(*scene, backend="fast")
    assert evaluate_boxes(*scene, backend="auto").backend == "pycocotools"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_fork_scores_though_the_threads_of_hotcoco_are_not_in_it(make_scene):
    scene = make_scene(0, num_images=2)
    here = evaluate_boxes(*scene, backend="fast")
    assert here.backend == "hotcoco"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a fork that waits for ever
        result = evaluate_boxes(*scene, backend="fast")
        os.write(writer, json.dumps([result.backend, result["AP"]]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        backend, mean_precision = json.load(pipe)
    assert os.waitpid(child, 0)[1] == 0
    assert backend == "pycocotools" and mean_precision == pytest.approx(here["AP"])
    assert evaluate_boxes(*scene, backend="fast").backend == "hotcoco"


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        DetectionColumns([1, 2], [[0, 0, 1, 1]], [0.5], [1])
    with pytest.raises(ValueError, match="boxes_xywh must have shape"):
        DetectionColumns([1], [[0, 0, 1]], [0.5], [1])


def test_results_json_holds_the_twelve_names(make_scene, tmp_path):
    result = evaluate_boxes(*make_scene(4))
    path = write_results_json(tmp_path / "deep" / "results.json", result)
    written = json.loads(path.read_text())
    assert list(written) == list(METRIC_NAMES)
    assert written == result.metrics


# --- other limits, thresholds and ids ---


@pytest.mark.parametrize("backend", ["fast", "pycocotools"])
def test_ids_beyond_double_precision(make_scene, backend):
    """Neighbouring ids above 2^53 are one number as float64."""
    truth, detections = make_scene(3)
    expected = evaluate_boxes(truth, detections, backend=backend)
    images = {number: 2**62 + row for row, number in enumerate(sorted(truth.image_ids.tolist()))}
    classes = {number: 2**61 + row for row, number in enumerate(sorted(truth.category_names))}

    def renamed(values, names):
        return np.array([names[number] for number in values.tolist()], dtype=np.int64)

    large_truth = replace(
        truth,
        image_ids=renamed(truth.image_ids, images),
        box_image_ids=renamed(truth.box_image_ids, images),
        category_ids=renamed(truth.category_ids, classes),
        category_names={classes[number]: name for number, name in truth.category_names.items()},
    )
    large = replace(
        detections,
        image_ids=renamed(detections.image_ids, images),
        category_ids=renamed(detections.category_ids, classes),
    )
    found = evaluate_boxes(large_truth, large, backend=backend)
    assert found.metrics == expected.metrics
    assert found.category_ids.tolist() == list(classes.values())
    assert [entry.AP for entry in found.per_class] == [entry.AP for entry in expected.per_class]


@pytest.mark.parametrize("use_categories", [True, False])
def test_backends_agree_on_other_limits(make_scene, use_categories):
    truth, detections = make_scene(5, score_levels=10**6)
    limits = EvaluationLimits((0.5, 0.9), (2, 5))
    one, other = (
        evaluate_boxes(truth, detections, backend=name, limits=limits, use_categories=use_categories)
        for name in ("fast", "pycocotools")
    )
    assert one.metrics == pytest.approx(other.metrics, abs=1e-9)
    assert list(one.metrics) == [
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "ARmax2",
        "ARmax5",
        "ARs",
        "ARm",
        "ARl",
    ]
    assert one["AP75"] == -1
    assert 0 < one["AP"] < one["AP50"] < 1
    assert 0 < one["ARmax2"] < one["ARmax5"] < 1
