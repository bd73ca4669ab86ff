from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_scenes import data_samples, random_scene, write_coco
from mmdet.evaluation.functional import bbox_overlaps
from mmdet.evaluation.functional.recall import _recalls
from mmdet.registry import DATASETS, METRICS
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from PIL import Image

import ddetr_mm.datasets.coco  # noqa: F401
from ddetr_mm.errors import DataError
from ddetr_mm.evaluation.coco_eval import (
    IOU_THRESHOLDS,
    METRIC_NAMES,
    DetectionColumns,
    GroundTruthColumns,
    evaluate_boxes,
)
from ddetr_mm.evaluation.metric import MMDET_NAMES, FastCocoMetric, class_table, source_table

LABELS = {3: 0, 6: 1, 9: 2, 12: 3}
META = {"classes": tuple(f"class {number}" for number in LABELS), "category_ids": tuple(LABELS)}


def run(metric, samples, meta=META, batch_size=3):
    metric.dataset_meta = meta
    for start in range(0, len(samples), batch_size):
        metric.process({}, samples[start : start + batch_size])
    return metric.evaluate(len(samples))


def as_float32(detections):
    """Detections with the precision that tensors carry."""
    corners = detections.boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    corners = corners.astype(np.float32).astype(np.float64)
    corners[:, 2:] -= corners[:, :2]
    return DetectionColumns(
        detections.image_ids, corners, detections.scores.astype(np.float32), detections.category_ids
    )


@pytest.mark.parametrize("seed", range(3))
def test_equals_mmdets_own_metric(scene_file, seed):
    (truth, detections), path = scene_file(seed)
    samples = data_samples(detections, LABELS, truth.image_ids)
    theirs = METRICS.build({"type": "CocoMetric", "ann_file": str(path), "metric": "bbox"})
    ours = METRICS.build(
        {"type": "FastCocoMetric", "ann_file": str(path), "metric": "bbox", "format_only": False}
    )
    meta = {"classes": META["classes"]}
    expected, found = run(theirs, samples, meta), run(ours, samples, meta)
    for key, value in expected.items():
        # mmdet rounds to three places; its AP counts 1000 detections an image, we have fewer than 100
        assert found[key] == pytest.approx(value, abs=0.00051), key
    assert set(found) == {f"coco/{name}" for name in MMDET_NAMES}


def both(options, path, samples):
    """mmdet's metrics and ours for the same arguments."""
    meta = {"classes": META["classes"]}
    # mmdet hands thresholds on as they are, and pycocotools understands arrays only.
    as_array = {"iou_thrs": np.atleast_1d(options["iou_thrs"])} if "iou_thrs" in options else {}
    theirs = METRICS.build({"type": "CocoMetric", "ann_file": str(path), **options, **as_array})
    ours = METRICS.build({"type": "FastCocoMetric", "ann_file": str(path), **options})
    return run(theirs, samples, meta), run(ours, samples, meta)


@pytest.mark.parametrize(
    "options",
    [
        {"classwise": True},
        {"metric_items": ["mAP", "mAP_50", "AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_l@1000"]},
        {"proposal_nums": (1, 10, 100), "metric_items": ["mAP", "AR@100", "AR@300", "AR@1000", "AR_m@1000"]},
        {"proposal_nums": (2, 5, 100), "iou_thrs": [0.5, 0.6]},
        {"iou_thrs": 0.75, "metric_items": ["mAP", "mAP_75", "mAP_50"]},
        {"iou_thrs": [0.3]},
        {"proposal_nums": (100, 1, 10)},
        {"metric": "proposal"},
        {"metric": "proposal", "proposal_nums": (1, 3, 100)},
        {"metric": "proposal", "metric_items": ["AR@300", "AR_s@1000"], "iou_thrs": [0.4, 0.5]},
        {"metric": ["bbox", "proposal"]},
        {"metric": ["bbox"], "sort_categories": True, "use_mp_eval": False, "backend_args": None},
    ],
    ids=str,
)
def test_arguments_of_mmdets_metric(scene_file, options):
    (truth, detections), path = scene_file(4, score_levels=10**6)
    expected, found = both(options, path, data_samples(detections, LABELS, truth.image_ids))
    for key in ("coco/AR@", "coco/bbox_AR@"):
        if f"{key}1000" in expected and options.get("proposal_nums", (100,))[0] == 1:
            # mmdet's names stand for the first, second and third limit; here 100 is the third
            expected[f"{key}100"] = expected[f"{key}1000"]
    if options.get("metric") == "proposal" and "proposal_nums" in options:
        expected = {key: expected[key] for key in ("coco/AR@100",)}
        assert set(found) == {f"coco/AR@{most}" for most in (1, 3, 100)} | {
            f"coco/AR_{size}@100" for size in "sml"
        }
    for key, value in expected.items():
        assert found[key] == pytest.approx(-1 if np.isnan(value) else value, abs=0.00051), key
    if "metric_items" in options:
        assert set(found) == set(expected)


@pytest.mark.parametrize("options", [{}, {"proposal_nums": (1, 2, 3), "iou_thrs": [0.5]}], ids=str)
def test_fast_recall_of_proposals_equals_mmdets_function(scene_file, options):
    """mmdet's metric itself fails with today's numpy (arrays of unequal lengths)."""
    (truth, detections), path = scene_file(4, score_levels=10**6)
    limits = np.array(options.get("proposal_nums", (100, 300, 1000)))
    thresholds = np.array(options.get("iou_thrs", IOU_THRESHOLDS))
    samples = data_samples(detections, LABELS, truth.image_ids)
    ious = np.empty(len(samples), dtype=object)
    for row, sample in enumerate(samples):
        boxes = truth.boxes_xywh[(truth.box_image_ids == sample["img_id"]) & ~truth.iscrowd].copy()
        boxes[:, 2:] += boxes[:, :2]
        ious[row] = bbox_overlaps(boxes, sample["pred_instances"]["bboxes"].numpy())
    expected = _recalls(ious, limits, thresholds).mean(axis=1)
    found = run(FastCocoMetric(ann_file=str(path), metric="proposal_fast", **options), samples)
    assert list(found) == [f"coco/AR@{most}" for most in limits]
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-6)
    assert 0 < expected[0] <= expected[1]
    assert expected[0] < expected[2] or not options


def test_average_precision_of_a_class_for_save_best(scene_file):
    (truth, detections), path = scene_file(2)
    content = json.loads(path.read_text())
    content["categories"].append({"id": 20, "name": "never seen"})
    path.write_text(json.dumps(content))
    meta = {"classes": (*META["classes"], "never seen"), "category_ids": (*LABELS, 20)}
    samples = data_samples(detections, LABELS, truth.image_ids)
    metric = FastCocoMetric(ann_file=str(path), classwise=True)
    found = run(metric, samples, meta)
    precisions = {key: value for key, value in found.items() if key.endswith("_precision")}
    assert precisions == {f"coco/{entry.name}_precision": entry.AP for entry in metric.result.per_class}
    assert precisions["coco/never seen_precision"] == -1
    assert len(precisions) == 5
    for classwise in (False, "table"):
        plain = run(FastCocoMetric(ann_file=str(path), classwise=classwise), samples, meta)
        assert plain == {key: value for key, value in found.items() if key not in precisions}


def test_empty_float_labels(scene_file):
    (truth, detections), path = scene_file(0)
    samples = data_samples(detections, LABELS, truth.image_ids)
    for sample in samples:
        predicted = sample["pred_instances"]
        predicted["labels"] = predicted["labels"].float()
    samples[0]["pred_instances"] = {
        "bboxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0),
    }
    metric = FastCocoMetric(ann_file=str(path))
    run(metric, samples)
    gone = int((detections.image_ids == truth.image_ids[0]).sum())
    assert metric.result.num_detections == len(detections) - gone


def test_repaired_annotations_are_scored(scene_file):
    """What the dataset repairs or leaves out is repaired or left out here: ids, flags, missing boxes."""
    (truth, detections), path = scene_file(3)
    samples = data_samples(detections, LABELS, truth.image_ids)
    expected = run(FastCocoMetric(ann_file=str(path)), samples)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = float(image["id"])
        del image["width"]
    for annotation in content["annotations"]:
        annotation.update(category_id=str(annotation["category_id"]), iscrowd=annotation["iscrowd"] or None)
    strange = {"id": "x", "image_id": 10**6, "category_id": 3, "bbox": [0, 0, 9, 9]}
    content["annotations"] += [strange, {"id": "y", "image_id": int(truth.image_ids[0]), "category_id": 3}]
    path.write_text(json.dumps(content))
    assert run(FastCocoMetric(ann_file=str(path)), samples) == expected
    with pytest.raises(DataError, match="strict_annotations"):
        run(FastCocoMetric(ann_file=str(path), strict_annotations=True), samples)


def test_predictions_have_the_ids_of_the_file(scene_file, tmp_path):
    (truth, detections), path = scene_file(3)
    content = json.loads(path.read_text())
    names = {image["id"]: f"frame {image['id']}" for image in content["images"]}
    order = {image["id"]: row for row, image in enumerate(content["images"])}
    expected = run(FastCocoMetric(ann_file=str(path)), data_samples(detections, LABELS, truth.image_ids))
    for image in content["images"]:
        image["id"] = names[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]]
    path.write_text(json.dumps(content))
    samples = data_samples(detections, LABELS, truth.image_ids)
    for sample in samples:
        sample["img_id"] = order[sample["img_id"]]  # as the dataset numbers them
    metric = FastCocoMetric(ann_file=str(path), outfile_prefix=str(tmp_path / "out"))
    assert run(metric, samples)["coco/bbox_mAP_50"] == pytest.approx(expected["coco/bbox_mAP_50"], abs=0.02)
    written = json.loads((tmp_path / "out.bbox.json").read_text())
    assert {entry["image_id"] for entry in written} <= set(names.values())
    assert len(written) == len(detections)


def test_gives_the_pure_functions_figures(scene_file):
    (truth, detections), path = scene_file(5)
    metric = FastCocoMetric(ann_file=str(path))
    metrics = run(metric, data_samples(detections, LABELS, truth.image_ids))
    expected = evaluate_boxes(truth, as_float32(detections))
    for key, name in MMDET_NAMES.items():
        assert metrics[f"coco/{key}"] == pytest.approx(expected[name], abs=1e-9)
    assert metric.result.metrics == pytest.approx(expected.metrics)


def test_labels_follow_category_ids_of_the_dataset(scene_file):
    (truth, detections), path = scene_file(1)
    # As with raw category ids for labels: label 0 is background, gaps are unknown.
    raw = {"classes": ("background",) * 13, "category_ids": [n if n in LABELS else None for n in range(13)]}
    samples = data_samples(detections, {number: number for number in LABELS}, truth.image_ids)
    plain = run(FastCocoMetric(ann_file=str(path)), samples, raw)
    samples[0]["pred_instances"]["labels"][:] = 0
    dropped = FastCocoMetric(ann_file=str(path))
    run(dropped, samples, raw)
    number = len(samples[0]["pred_instances"]["labels"])
    assert plain == run(FastCocoMetric(ann_file=str(path)), data_samples(detections, LABELS, truth.image_ids))
    assert number > 0
    assert dropped.result.num_detections == len(detections) - number


def test_without_category_ids_labels_follow_the_declared_names(scene_file):
    (truth, detections), path = scene_file(1)
    content = json.loads(path.read_text())
    content["categories"].reverse()
    path.write_text(json.dumps(content))
    subset = {"classes": ("class 3", "Class_9")}  # in the file: 12, 9, 6, 3
    keep = np.isin(detections.category_ids, [3, 9])
    samples = data_samples(detections.rows(keep), {3: 0, 9: 1}, truth.image_ids)
    metric = FastCocoMetric(ann_file=str(path))
    run(metric, samples, subset)
    expected = evaluate_boxes(truth, as_float32(detections), category_ids=[3, 9])
    assert metric.result.metrics == pytest.approx(expected.metrics)


def test_classes_that_the_file_lacks_are_logged_or_refused(scene_file, monkeypatch):
    (truth, detections), path = scene_file(1)
    labels = {number: label for label, number in enumerate([12, 9, 6, 3])}
    samples = data_samples(detections, labels, truth.image_ids)
    classes = ("class 12", "class 9", "class 6", "class 3", "zebra")
    logged: list[str] = []
    monkeypatch.setattr(MMLogger, "warning", lambda self, text: logged.append(text))
    metrics = run(FastCocoMetric(ann_file=str(path)), samples, {"classes": classes})
    assert metrics == run(
        FastCocoMetric(ann_file=str(path)), data_samples(detections, LABELS, truth.image_ids)
    )
    assert logged == ["1 classes are not in the annotations and are not scored: zebra"]
    with pytest.raises(DataError, match="none of the dataset's classes"):
        run(FastCocoMetric(ann_file=str(path)), samples, {"classes": ("a", "b", "c", "d", "e")})


def test_files_numbered_from_zero_lose_no_box(scene_file):
    (truth, detections), path = scene_file(0)
    samples = data_samples(detections, LABELS, truth.image_ids)
    from_one = run(FastCocoMetric(ann_file=str(path)), samples)
    write_coco(path, truth, first_id=0)
    assert run(FastCocoMetric(ann_file=str(path)), samples) == from_one


def test_threshold_and_chosen_classes(scene_file):
    (truth, detections), path = scene_file(2)
    metric = FastCocoMetric(ann_file=str(path), conf_threshold=0.5, eval_class_ids=[6, 9])
    run(metric, data_samples(detections, LABELS, truth.image_ids))
    kept = as_float32(detections).rows(detections.scores >= 0.5)
    expected = evaluate_boxes(truth, kept, category_ids=[6, 9])
    assert metric.result.metrics == pytest.approx(expected.metrics)
    assert [entry.category_id for entry in metric.result.per_class] == [6, 9]


def test_sources_with_colliding_ids(tmp_path):
    # All scores differ: among equal ones the order of images would count, and their ids change here.
    scenes = [random_scene(seed, score_levels=10**6) for seed in (7, 8)]
    sources, samples, row = [], [], 0
    for number, (truth, detections) in enumerate(scenes):
        renamed = {int(image): position for position, image in enumerate(truth.image_ids)}
        path = write_coco(tmp_path / f"{number}.json", truth, renamed)
        sources.append({"image_dir": str(tmp_path), "json_file": str(path)})
        new_ids = np.array([renamed[int(image)] for image in detections.image_ids]) + row
        moved = DetectionColumns(new_ids, detections.boxes_xywh, detections.scores, detections.category_ids)
        samples += data_samples(moved, LABELS, range(row, row + len(renamed)))
        row += len(renamed)
    metric = FastCocoMetric(sources=sources, results_dir=str(tmp_path / "out"))
    run(metric, samples)
    for number, (truth, detections) in enumerate(scenes):
        alone = evaluate_boxes(truth, as_float32(detections))
        name = f"{number}: {sources[number]['json_file']}"
        assert metric.source_results[name].metrics == pytest.approx(alone.metrics)
    assert metric.result.num_images == 24
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {(entry["source"], entry["image_id"]) for entry in written} <= {
        (source, image) for source in (0, 1) for image in range(12)
    }
    second = [entry for entry in written if entry["source"] == 1]
    truth, detections = scenes[1]
    image = int(truth.image_ids[second[0]["image_id"]])
    detail = json.loads((tmp_path / "out" / "results_detail.json").read_text())
    assert {name: part["metrics"] for name, part in detail["sources"].items()} == {
        name: part.metrics for name, part in metric.source_results.items()
    }
    assert second[0]["file_name"] == f"{image}.png"
    assert len(second) == len(detections)


def test_writes_results_and_predictions(scene_file, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    (truth, detections), path = scene_file(3)
    metric = FastCocoMetric(
        ann_file=str(path), results_dir=str(tmp_path / "out"), outfile_prefix=str(tmp_path / "sub" / "val")
    )
    run(metric, data_samples(detections, LABELS, truth.image_ids))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == list(METRIC_NAMES)
    detail = json.loads((tmp_path / "out" / "results_detail.json").read_text())
    assert [entry["AP"] for entry in detail["per_class"]] == [entry.AP for entry in metric.result.per_class]
    for picture in ("precision_recall.png", "class_precision.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 5000
    predictions = tmp_path / "out" / "predictions.json"
    assert predictions.read_text() == (tmp_path / "sub" / "val.bbox.json").read_text()
    # The file scores the same when read by pycocotools.
    coco = COCO(str(path))
    evaluator = COCOeval(coco, coco.loadRes(str(predictions)), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    np.testing.assert_allclose(list(results.values()), evaluator.stats, atol=1e-6)
    assert set(json.loads(predictions.read_text())[0]) == {"image_id", "category_id", "bbox", "score"}


def test_format_only_needs_no_annotations(scene_file, tmp_path):
    (truth, detections), path = scene_file(4)
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    metric = FastCocoMetric(ann_file=str(path), format_only=True, outfile_prefix=str(tmp_path / "test"))
    assert run(metric, data_samples(detections, LABELS, truth.image_ids)) == {}
    assert len(json.loads((tmp_path / "test.bbox.json").read_text())) == len(detections)


def test_ground_truth_from_the_samples(scene_file):
    (truth, detections), path = scene_file(6)
    boxes = np.concatenate(
        [truth.boxes_xywh[:, :2], truth.boxes_xywh[:, :2] + truth.boxes_xywh[:, 2:]], axis=1
    )
    samples = data_samples(detections, LABELS, truth.image_ids)
    for sample in samples:
        sample["instances"] = [
            {
                "bbox": boxes[row].tolist(),
                "bbox_label": LABELS[int(truth.category_ids[row])],
                "ignore_flag": int(truth.iscrowd[row]),
            }
            for row in np.flatnonzero(truth.box_image_ids == sample["img_id"])
        ]
    from_samples = run(FastCocoMetric(), samples)
    from_file = run(FastCocoMetric(ann_file=str(path)), samples)
    # Areas differ (the file's are those of a shape inside the box), so only figures over all sizes agree.
    for name in ("bbox_mAP", "bbox_mAP_50", "bbox_AR@100"):
        assert from_samples[f"coco/{name}"] == pytest.approx(from_file[f"coco/{name}"], abs=1e-6)
    del samples[2]["instances"]
    with pytest.raises(DataError, match="ann_file or sources"):
        run(FastCocoMetric(), samples)


def test_no_detections_and_nan_are_reported(scene_file, caplog):
    (truth, detections), path = scene_file(0)
    nothing = data_samples(DetectionColumns.empty(), LABELS, truth.image_ids)
    metric = FastCocoMetric(ann_file=str(path))
    assert set(run(metric, nothing).values()) == {0.0}
    samples = data_samples(detections, LABELS, truth.image_ids)
    samples[1]["pred_instances"]["scores"][:] = float("nan")
    run(metric, samples)
    assert "non-finite" in metric.result.notes[0]


def test_an_image_given_twice_counts_once(scene_file):
    (truth, detections), path = scene_file(9)
    samples = data_samples(detections, LABELS, truth.image_ids)
    once = run(FastCocoMetric(ann_file=str(path)), samples)
    assert run(FastCocoMetric(ann_file=str(path)), samples + samples[:4]) == once


def test_wrong_image_ids_and_labels_are_named(scene_file):
    (truth, detections), path = scene_file(0)
    samples = data_samples(detections, LABELS, truth.image_ids)
    samples[0]["img_id"] = 123456
    with pytest.raises(DataError, match=r"123456.*same ann_file"):
        run(FastCocoMetric(ann_file=str(path)), samples)
    samples = data_samples(detections, LABELS, truth.image_ids)
    samples[0]["pred_instances"]["labels"][0] = 80
    with pytest.raises(DataError, match=r"\(got 80\); allowed: 0 to 3"):
        run(FastCocoMetric(ann_file=str(path)), samples)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ann_file": "a", "sources": []},
        {"ann_file": "a", "metric": ["bbox", "segm"]},
        {"ann_file": "a", "format_only": True},
        {"ann_file": "a", "backend_args": {"backend": "petrel"}},
        {"ann_file": "a", "file_client_args": {"backend": "disk"}},
        {"ann_file": "a", "metric": []},
        {"ann_file": "a", "metric_items": ["mAP", "mIoU"]},
        {"ann_file": "a", "proposal_nums": (0, 1)},
        {"ann_file": "a", "iou_thrs": 50},
        {"ann_file": "a", "classwise": "yes"},
        {"ann_file": "a", "iou_thrs": [0.5], "results_dir": "out"},
    ],
    ids=str,
)
def test_contradicting_arguments(arguments):
    names = (
        r"ann_file or sources|bbox|outfile_prefix|backend_args|metric_items|proposal_nums|iou_thrs|classwise"
    )
    with pytest.raises(ValueError, match=names):
        FastCocoMetric(**arguments)


TWO_RANKS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from evaluation_scenes import data_samples, random_scene
import ddetr_mm
import torch.distributed
from ddetr_mm.evaluation.metric import FastCocoMetric
rank = int(sys.argv[4])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
truth, detections = random_scene(9)
labels = {3: 0, 6: 1, 9: 2, 12: 3}
samples = data_samples(detections, labels, truth.image_ids)
metric = FastCocoMetric(ann_file=sys.argv[2])
metric.dataset_meta = {"category_ids": list(labels)}
# uneven and overlapping shares
metric.process({}, samples[:8] if rank == 0 else samples[7:])
print(f"RANK{rank}" + json.dumps(metric.evaluate(len(samples))), flush=True)
metric.sources = [{"image_dir": "", "json_file": "missing.json"}]
metric._table = None
try:
    metric.evaluate(1)
except Exception as error:
    print(f"ERROR{rank} {type(error).__name__}: {error}", flush=True)
torch.distributed.destroy_process_group()  # its threads would abort a process that ends with them
"""


def test_two_ranks_give_what_one_gives(scene_file, tmp_path):
    (truth, detections), path = scene_file(9)
    alone = run(FastCocoMetric(ann_file=str(path)), data_samples(detections, LABELS, truth.image_ids))
    arguments = [str(Path(__file__).parent), str(path), str(tmp_path / "meeting")]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, *arguments, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [worker.communicate(timeout=300) for worker in workers]
    for rank, (output, errors) in enumerate(answers):
        assert workers[rank].returncode == 0, errors
        found = json.loads(output.split(f"RANK{rank}")[1].splitlines()[0])
        assert found == pytest.approx(alone, abs=1e-12)
    assert "ERROR0 DataError" in answers[0][0]
    assert "ERROR1 RuntimeError: evaluation failed on the first rank: DataError" in answers[1][0]


# --- Dataset and metric read the same sources: ground truth, fed through both, must score perfectly ---


@pytest.fixture
def sources(tmp_path):
    """Two sources whose image ids collide and whose category ids have gaps; one image is empty."""
    rng = np.random.default_rng(0)
    found = []
    for name, category_ids in (("a", (2, 5)), ("b", (5, 9))):
        images, annotations = [], []
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (80, 60), (10, 20, 30)).save(tmp_path / name / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
            for _ in range(0 if number == 2 else 3):
                box = [*rng.integers(0, 30, 2).tolist(), *rng.integers(5, 30, 2).tolist()]
                category = int(rng.choice(category_ids))
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "category_id": category,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": number, "name": f"class {number}"} for number in (2, 5, 9)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        found.append({"image_dir": str(tmp_path / name), "json_file": str(path)})
    return found


@pytest.mark.parametrize("label_mode", ["category_id", "contiguous"])
def test_ground_truth_scores_one(sources, label_mode):
    init_default_scope("mmdet")
    dataset = DATASETS.build(
        {
            "type": "SerializedCocoDataset",
            "sources": sources,
            "label_mode": label_mode,
            "pipeline": [{"type": "LoadImageFromFile"}, {"type": "PackDetInputs", "meta_keys": ("img_id",)}],
            "test_mode": True,
            "storage": "process",
        }
    )
    metric = FastCocoMetric(sources=sources)
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]["data_samples"]
        instances = dataset.get_data_info(index)["instances"]
        found = {
            "bboxes": torch.tensor([item["bbox"] for item in instances]).float().reshape(-1, 4),
            "labels": torch.tensor([item["bbox_label"] for item in instances]).long(),
            "scores": torch.linspace(0.9, 0.5, len(instances)),
        }
        metric.process({}, [{"img_id": sample.img_id, "pred_instances": found}])
    metrics = metric.evaluate(len(dataset))
    assert metrics["coco/bbox_mAP"] == pytest.approx(1.0)
    assert metric.result.num_images == 8
    assert {entry.category_id for entry in metric.result.per_class} == {2, 5, 9}
    assert all(part["AP"] == pytest.approx(1.0) for part in metric.source_results.values())


@pytest.mark.parametrize("meta_of", ["SerializedCocoDataset", "CocoDataset"])
def test_perfect_predictions_score_one_whatever_the_order_of_the_file(tmp_path, meta_of):
    """A model whose label i is the declared class i, on a file with other ids in another order."""
    init_default_scope("mmdet")
    classes, ids = ("cat", "dog", "cow"), {"cow": 3, "cat": 8, "dog": 1}
    boxes = {"cat": [5, 5, 20, 30], "dog": [40, 8, 22, 18], "cow": [70, 60, 25, 30]}
    annotations = [
        {"id": number, "image_id": 1, "category_id": ids[name], "bbox": box, "iscrowd": 0}
        | {"area": box[2] * box[3]}
        for number, (name, box) in enumerate(boxes.items(), 1)
    ]
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100}],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document))
    dataset = DATASETS.build(
        dict(
            type=meta_of,
            ann_file=str(path),
            data_prefix=dict(img="x"),
            metainfo=dict(classes=classes),
            test_mode=True,
        )
    )
    corners = [[x, y, x + w, y + h] for x, y, w, h in (boxes[name] for name in classes)]
    found = {
        "bboxes": torch.tensor(corners, dtype=torch.float32),
        "labels": torch.arange(3),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    metric = FastCocoMetric(ann_file=str(path))
    metrics = run(metric, [{"img_id": 1, "pred_instances": found}], dataset.metainfo)
    assert metrics["coco/bbox_mAP"] == pytest.approx(1)
    if meta_of == "SerializedCocoDataset":
        labels = {item["bbox_label"]: item["bbox"] for item in dataset.get_data_info(0)["instances"]}
        assert labels == dict(enumerate(corners))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("in_notebook", [False, True])
def test_class_table_shows_every_class_and_the_total(in_notebook: bool, monkeypatch):
    # In a notebook rich would show a table as the output of the cell, and the log would lack it.
    monkeypatch.setattr("rich.console._is_jupyter", lambda: in_notebook)
    names = {1: "car", 2: "a very long name of a class that no terminal would hold " * 2, 7: "[bold]person"}
    truth = GroundTruthColumns(
        [1], [1, 1], [[0, 0, 50, 50], [60, 60, 9, 9]], [1, 7], [0, 0], [2500, 81], names
    )
    found = DetectionColumns([1, 1], [[0, 0, 50, 50], [200, 200, 5, 5]], [0.9, 0.8], [1, 7])
    lines = class_table(evaluate_boxes(truth, found)).splitlines()
    body = [cells(line) for line in lines if line.startswith("| ")]
    assert body[0] == ["id", "class", "boxes", "detections", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR"]
    assert body[1] == ["1", "car", "1", "1", "1.000", "1.000", "1.000", "-", "1.000", "-", "1.000"]
    assert body[2][1:4] == [names[2].strip(), "0", "0"]
    assert body[3][1:6] == ["[bold]person", "1", "1", "0.000", "0.000"]
    assert body[4][1:5] == ["all", "2", "2", "0.500"]
    assert len({len(line) for line in lines}) == 1


def test_source_table_has_the_twelve_figures(make_scene):
    text = source_table({"0: val/*.json": evaluate_boxes(*make_scene(0))})
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["source", "images", *METRIC_NAMES]
    assert rows[1][:2] == ["0: val/*.json", "12"]
