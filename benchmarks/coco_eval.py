"""COCO evaluation of 5,000 images, 80 classes and 100 detections each: backends, and the whole metric.

All evaluators score the same generated boxes; their twelve figures are compared with pycocotools'. The
metric's cost in an epoch is ``process`` over all samples (tensors, as a detector gives them) and
``evaluate``; the annotation file is read in the first one only. Times are wall and processor seconds of one
call; other work on the machine shows in the first and not in the second.

Run: ``python benchmarks/coco_eval.py`` (``--images 500`` for a quick look; ``--record`` writes
``benchmarks/records/coco_eval.{json,md}``; ``--skip pycocotools`` leaves the slow reference out).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "coco_eval"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from environment import describe, heading, report  # noqa: E402

import ddetr_mm.register  # noqa: E402, F401
from ddetr_mm.evaluation import coco_eval  # noqa: E402
from ddetr_mm.evaluation.coco_eval import METRIC_NAMES, DetectionColumns, GroundTruthColumns, evaluate_boxes  # noqa: E402  # noqa: E402
from ddetr_mm.evaluation.metric import FastCocoMetric  # noqa: E402

BOXES_AN_IMAGE, DETECTIONS_AN_IMAGE, CLASSES = 7, 100, 80


def generate(num_images: int, seed: int = 0) -> tuple[GroundTruthColumns, DetectionColumns]:
    """Boxes like COCO's: some found with an error, some missed, most detections wrong."""
    rng = np.random.default_rng(seed)
    images = np.arange(1, num_images + 1)
    box_images = np.repeat(images, BOXES_AN_IMAGE)
    count = len(box_images)
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    boxes = np.concatenate([rng.uniform(0, 400, (count, 2)), sides], axis=1)
    classes = rng.integers(1, CLASSES + 1, count)
    truth = GroundTruthColumns(
        images,
        box_images,
        boxes,
        classes,
        rng.random(count) < 0.01,
        boxes[:, 2] * boxes[:, 3],
        {number: f"class {number}" for number in range(1, CLASSES + 1)},
    )
    near = boxes + rng.normal(0, 0.08, (count, 4)) * sides[:, [0, 1, 0, 1]]
    strays = (DETECTIONS_AN_IMAGE - BOXES_AN_IMAGE) * num_images
    stray_sides = np.exp(rng.uniform(np.log(8), np.log(300), (strays, 2)))
    found = DetectionColumns(
        np.concatenate([box_images, np.repeat(images, DETECTIONS_AN_IMAGE - BOXES_AN_IMAGE)]),
        np.concatenate([near, np.concatenate([rng.uniform(0, 400, (strays, 2)), stray_sides], axis=1)]),
        np.concatenate([rng.beta(5, 2, count), rng.beta(1, 8, strays)]),
        np.concatenate([classes, rng.integers(1, CLASSES + 1, strays)]),
    )
    return truth, found.rows(np.argsort(found.image_ids, kind="stable"))


def coco_document(truth: GroundTruthColumns) -> dict[str, Any]:
    """The ground truth as the contents of a COCO file."""
    images = np.unique(truth.image_ids)
    records = [
        dict(id=n, image_id=int(i), category_id=int(c), bbox=b.tolist(), area=float(a), iscrowd=int(w))
        for n, (i, c, b, a, w) in enumerate(
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
    return dict(
        images=[dict(id=int(number), width=1, height=1, file_name="") for number in images],
        categories=[dict(id=number, name=name) for number, name in truth.category_names.items()],
        annotations=records,
    )


def faster_coco_eval(truth: GroundTruthColumns, found: DetectionColumns) -> dict[str, float]:
    """A contestant through its own interface."""
    from faster_coco_eval import COCO, COCOeval_faster

    document = coco_document(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(document)
        evaluator = COCOeval_faster(
            annotations,
            annotations.loadRes(coco_eval._result_table(found)),
            "bbox",
            print_function=lambda *_: None,
        )
        evaluator.run()
    return dict(zip(METRIC_NAMES, map(float, evaluator.stats[:12]), strict=True))


def ultrafast_pycocotools(truth: GroundTruthColumns, found: DetectionColumns) -> dict[str, float]:
    """A contestant through its own interface."""
    from ultrafast_pycocotools import COCO, COCOeval

    annotations = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        annotations.dataset = coco_document(truth)
        annotations.createIndex()
        evaluator = COCOeval(annotations, annotations.loadRes(coco_eval._result_table(found)), "bbox")
        evaluator.run()
    return dict(zip(METRIC_NAMES, map(float, evaluator.stats[:12]), strict=True))


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call gives, and its seconds."""
    began, cpu_began = time.perf_counter(), time.process_time()
    answer = work()
    return answer, dict(wall_s=time.perf_counter() - began, cpu_s=time.process_time() - cpu_began)


def samples_of(truth: GroundTruthColumns, found: DetectionColumns) -> list[dict[str, Any]]:
    """Detections as a detector gives them: one dict of tensors an image."""
    corners = found.boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    boxes, scores = torch.from_numpy(corners).float(), torch.from_numpy(found.scores).float()
    labels = torch.from_numpy(found.category_ids)
    starts = np.searchsorted(found.image_ids, truth.image_ids)
    ends = np.searchsorted(found.image_ids, truth.image_ids, side="right")
    return [
        dict(img_id=int(i), pred_instances=dict(bboxes=boxes[a:b], scores=scores[a:b], labels=labels[a:b]))
        for i, a, b in zip(truth.image_ids, starts, ends, strict=True)
    ]


def whole_metric(truth: GroundTruthColumns, found: DetectionColumns) -> dict[str, dict[str, float]]:
    """The registered metric over one epoch, in batches of 8, with its table of classes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        columns = (truth.box_image_ids, truth.category_ids, truth.boxes_xywh, truth.areas, truth.iscrowd)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        document = dict(
            images=[dict(id=int(i), file_name="a", width=1000, height=1000) for i in truth.image_ids],
            categories=[dict(id=number, name=name) for number, name in truth.category_names.items()],
            annotations=[
                dict(id=n, image_id=i, category_id=c, bbox=b, area=a, iscrowd=int(w))
                for n, (i, c, b, a, w) in enumerate(rows, start=1)
            ],
        )
        path.write_text(json.dumps(document))
        metric = FastCocoMetric(ann_file=str(path))
        names = ["background", *truth.category_names.values()]
        metric.dataset_meta = dict(classes=names, category_ids=[None, *truth.category_names])
        samples = samples_of(truth, found)
        times = {}
        for epoch in ("first epoch (reads the annotations)", "later epochs"):

            def process() -> None:
                for start in range(0, len(samples), 8):
                    metric.process(None, samples[start : start + 8])

            _, first = timed(process)
            _, second = timed(lambda: metric.evaluate(len(samples)))
            times[epoch] = {key: first[key] + second[key] for key in first}
    return times


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything once and compare the figures."""
    truth, found = generate(args.images)
    contestants: dict[str, Callable[[], Any]] = {
        "pycocotools": lambda: evaluate_boxes(truth, found, backend="pycocotools").metrics,
        "faster-coco-eval": lambda: faster_coco_eval(truth, found),
        "ultrafast-pycocotools": lambda: ultrafast_pycocotools(truth, found),
        "hotcoco (ours)": lambda: evaluate_boxes(truth, found, backend="fast").metrics,
    }
    modules = {
        "faster-coco-eval": "faster_coco_eval",
        "ultrafast-pycocotools": "ultrafast_pycocotools",
        "hotcoco (ours)": "hotcoco",
    }
    rows: dict[str, Any] = {}
    figures: dict[str, dict[str, float]] = {}
    for name, work in contestants.items():
        missing = name in modules and importlib.util.find_spec(modules[name]) is None
        if missing:
            print(f"{name}: left out, since {modules[name]} is not installed", flush=True)
        if name in args.skip or missing:
            continue
        figures[name], rows[name] = timed(work)
        print(name, {key: round(value, 2) for key, value in rows[name].items()}, flush=True)
    yardstick = figures.get("pycocotools")
    for name, values in figures.items():
        if yardstick:
            rows[name]["largest_difference"] = max(abs(values[key] - yardstick[key]) for key in METRIC_NAMES)
    return dict(num_images=args.images, backends=rows, metric=whole_metric(truth, found))


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("COCO evaluation", result["environment"])
    lines += [
        "",
        f"{result['num_images']:,} images, {CLASSES} classes, {DETECTIONS_AN_IMAGE} detections each.",
        "Seconds of one call, from columns of numbers to the twelve figures.",
        "",
        "| backend | wall | processor | largest difference from pycocotools |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["backends"].items():
        difference = row.get("largest_difference")
        told = "not compared" if difference is None else f"{difference:.1e}"
        lines.append(f"| {name} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} | {told} |")
    lines += [
        "",
        "The whole metric in an epoch (collecting all samples and scoring them, with the table of classes):",
        "",
        "| | wall | processor |",
        "| --- | --- | --- |",
        *(f"| {name} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} |" for name, row in result["metric"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--skip", nargs="*", default=[], help="backends to leave out")
    parser.add_argument("--record", action="store_true", help="write the record")
    args = parser.parse_args()
    environment = describe(
        "numpy", "torch", "pycocotools", "hotcoco", "faster-coco-eval", "ultrafast-pycocotools"
    )
    result = {"environment": environment, **measure(args)}
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
