"""The two evaluators that match detections to ground truth and give COCO's precision and recall arrays.

Legend: T overlap thresholds, R recall thresholds, K classes, A area ranges, M limits of detections.

Boxes get their own running ids, from 1. pycocotools takes the annotation id 0 for "no match", so files
numbered from 0 would otherwise lose one box.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.evaluation.columns import DetectionColumns, GroundTruthColumns

BACKENDS = ("auto", "fast", "pycocotools")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Precision (T, R, K, A, M), recall (T, K, A, M), scores (T, R, K, A, M)."""

Runner = Callable[[GroundTruthColumns, DetectionColumns, np.ndarray, np.ndarray], Arrays]


def choose_backend(name: str) -> tuple[str, Runner]:
    """The name and the function of the evaluator that one of :data:`BACKENDS` stands for.

    A fork of a process that has used hotcoco gets pycocotools whatever the name: hotcoco's threads are not
    in the fork, which would wait for them for ever.

    Raises:
        StackError: ``fast`` is asked for and hotcoco is not installed.
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "pycocotools":
        return "pycocotools", _run_pycocotools
    if importlib.util.find_spec("hotcoco") is None:
        if name == "fast":
            raise StackError(
                Problem(
                    "the fast COCO evaluator is not installed", value="hotcoco", mend="pip install hotcoco"
                )
            )
        return "pycocotools", _run_pycocotools
    if _hotcoco_processes - {os.getpid()}:
        return "pycocotools", _run_pycocotools
    return "hotcoco", _run_hotcoco


_hotcoco_processes: set[int] = set()
"""The processes, this one or those it was forked from, that have started hotcoco's threads."""


def _run_hotcoco(
    truth: GroundTruthColumns, found: DetectionColumns, images: np.ndarray, categories: np.ndarray
) -> Arrays:
    import hotcoco

    _hotcoco_processes.add(os.getpid())
    annotations = hotcoco.COCO.from_arrays(
        _image_records(images),
        _category_records(truth, categories),
        truth.box_image_ids,
        truth.category_ids,
        truth.boxes_xywh,
        ids=np.arange(1, len(truth) + 1),
        area=truth.areas,
        iscrowd=truth.iscrowd.astype(np.int64),
    )
    evaluator = hotcoco.COCOeval(annotations, annotations.load_res(_result_table(found)), "bbox")
    return _run_evaluator(evaluator)


def _run_pycocotools(
    truth: GroundTruthColumns, found: DetectionColumns, images: np.ndarray, categories: np.ndarray
) -> Arrays:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes = zip(
        truth.box_image_ids.tolist(),
        truth.category_ids.tolist(),
        truth.boxes_xywh.tolist(),
        truth.areas.tolist(),
        truth.iscrowd.tolist(),
        strict=True,
    )
    records = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, (image, category, box, area, crowd) in enumerate(boxes, start=1)
    ]
    # pycocotools reports its progress by print; the log already says what is going on.
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO()
        annotations.dataset = {
            "info": {},
            "images": _image_records(images),
            "categories": _category_records(truth, categories),
            "annotations": records,
        }
        annotations.createIndex()
        if len(found):
            results = annotations.loadRes(_result_table(found))
        else:
            # loadRes looks at the first detection to learn what kind it is.
            results = COCO()
            results.dataset = {**annotations.dataset, "annotations": []}
            results.createIndex()
        return _run_evaluator(COCOeval(annotations, results, "bbox"))


def _run_evaluator(evaluator: Any) -> Arrays:
    evaluator.evaluate()
    evaluator.accumulate()
    arrays = evaluator.eval
    return np.asarray(arrays["precision"]), np.asarray(arrays["recall"]), np.asarray(arrays["scores"])


def _image_records(images: np.ndarray) -> list[dict[str, Any]]:
    # Box evaluation never looks at sizes or names.
    return [{"id": number, "width": 1, "height": 1, "file_name": ""} for number in images.tolist()]


def _category_records(truth: GroundTruthColumns, categories: np.ndarray) -> list[dict[str, Any]]:
    return [{"id": number, "name": truth.category_names[number]} for number in categories.tolist()]


def _result_table(found: DetectionColumns) -> np.ndarray:
    """(D, 7): image id, x, y, width, height, score, category id, as ``loadRes`` of both backends takes."""
    columns = (found.image_ids[:, None], found.boxes_xywh, found.scores[:, None], found.category_ids[:, None])
    return np.concatenate([column.astype(np.float64) for column in columns], axis=1)
