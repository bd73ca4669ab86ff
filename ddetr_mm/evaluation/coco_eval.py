"""Computes COCO's twelve box metrics from columns of ground truth and detections.

Legend: I images, N ground-truth boxes, D detections, K classes, T = 10 IoU thresholds (0.50, 0.55 … 0.95),
R = 101 recall thresholds (0.00, 0.01 … 1.00), A = 4 area ranges (all, small < 32², medium, large > 96²
pixels), M = 3 limits of detections per image and class (1, 10, 100).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddetr_mm.errors import DataError, Problem, StackError
from ddetr_mm.files import write_text_whole

# --- ground truth and detections as columns ---
# Boxes are (x, y, width, height) in pixels of the original image; x, y is the top left corner.


def _column(values: object, dtype: type, shape: tuple[int, ...], name: str) -> np.ndarray:
    array: np.ndarray = np.asarray(values, dtype=dtype)
    if array.size == 0 and len(array) == 0:
        array = array.reshape(0, *shape[1:])
    if array.ndim != len(shape) or array.shape[1:] != shape[1:]:
        raise ValueError(f"{name} must have shape {('n', *shape[1:])}, not {array.shape}")
    return array


@dataclass(frozen=True)
class GroundTruthColumns:
    """The ground truth of a data set.

    Attributes:
        image_ids: (I,) every image, also those without boxes.
        box_image_ids: (N,) the image of each box.
        boxes_xywh: (N, 4) float64.
        category_ids: (N,) COCO category ids.
        iscrowd: (N,) bool; detections on a crowd region are neither true nor false positives.
        areas: (N,) float64 square pixels, for COCO's area ranges.
        category_names: category id → name, for every category, also those without boxes.
    """

    image_ids: np.ndarray
    box_image_ids: np.ndarray
    boxes_xywh: np.ndarray
    category_ids: np.ndarray
    iscrowd: np.ndarray
    areas: np.ndarray
    category_names: Mapping[int, str]

    def __post_init__(self) -> None:
        columns: dict[str, tuple[type, tuple[int, ...]]] = {
            "image_ids": (np.int64, (0,)),
            "box_image_ids": (np.int64, (0,)),
            "boxes_xywh": (np.float64, (0, 4)),
            "category_ids": (np.int64, (0,)),
            "iscrowd": (np.bool_, (0,)),
            "areas": (np.float64, (0,)),
        }
        for name, (dtype, shape) in columns.items():
            object.__setattr__(self, name, _column(getattr(self, name), dtype, shape, name))
        _check_lengths(self, [name for name in columns if name != "image_ids"])

    def __len__(self) -> int:
        return len(self.box_image_ids)

    def select(self, image_ids: np.ndarray, category_ids: np.ndarray) -> GroundTruthColumns:
        """The part within some images and classes; category names are kept whole."""
        keep = np.isin(self.box_image_ids, image_ids) & np.isin(self.category_ids, category_ids)
        return GroundTruthColumns(
            image_ids=self.image_ids[np.isin(self.image_ids, image_ids)],
            box_image_ids=self.box_image_ids[keep],
            boxes_xywh=self.boxes_xywh[keep],
            category_ids=self.category_ids[keep],
            iscrowd=self.iscrowd[keep],
            areas=self.areas[keep],
            category_names=self.category_names,
        )


@dataclass(frozen=True)
class DetectionColumns:
    """The detections in a data set.

    Attributes:
        image_ids: (D,) the image of each detection.
        boxes_xywh: (D, 4) float64.
        scores: (D,) float64; equal scores of one image rank in the given order.
        category_ids: (D,) COCO category ids.
    """

    image_ids: np.ndarray
    boxes_xywh: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray

    def __post_init__(self) -> None:
        columns: dict[str, tuple[type, tuple[int, ...]]] = {
            "image_ids": (np.int64, (0,)),
            "boxes_xywh": (np.float64, (0, 4)),
            "scores": (np.float64, (0,)),
            "category_ids": (np.int64, (0,)),
        }
        for name, (dtype, shape) in columns.items():
            object.__setattr__(self, name, _column(getattr(self, name), dtype, shape, name))
        _check_lengths(self, list(columns))

    def __len__(self) -> int:
        return len(self.image_ids)

    @classmethod
    def empty(cls) -> DetectionColumns:
        """No detections."""
        return cls(*(np.zeros(0) for _ in fields(cls)))

    def rows(self, keep: np.ndarray) -> DetectionColumns:
        """The rows of a boolean mask or of indices."""
        return DetectionColumns(*(getattr(self, column.name)[keep] for column in fields(self)))

    def finite_rows(self) -> np.ndarray:
        """(D,) bool: whether box and score are finite."""
        return np.isfinite(self.boxes_xywh).all(axis=1) & np.isfinite(self.scores)

    def select(self, image_ids: np.ndarray, category_ids: np.ndarray) -> DetectionColumns:
        """The part within some images and classes."""
        return self.rows(np.isin(self.image_ids, image_ids) & np.isin(self.category_ids, category_ids))


def xyxy_to_xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(n, 4) corners x1, y1, x2, y2 → x, y, width, height, as float64."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _check_lengths(columns: object, names: Sequence[str]) -> None:
    lengths = {name: len(getattr(columns, name)) for name in names}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns differ in length: {lengths}")


# --- backends: hotcoco and pycocotools match detections with ground truth ---
# Boxes get new ids from 1 on: pycocotools reads the annotation id 0 as "no match", and would lose a box of
# files numbered from 0.

BACKENDS = ("auto", "fast", "pycocotools")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Precision (T, R, K, A, M), recall (T, K, A, M), scores (T, R, K, A, M)."""


@dataclass(frozen=True)
class EvaluationLimits:
    """What COCO's evaluation is restricted to.

    Attributes:
        iou_thresholds: T thresholds, ascending.
        max_detections: M limits of detections per image and class, ascending.
    """

    iou_thresholds: tuple[float, ...]
    max_detections: tuple[int, ...]

    def threshold_row(self, iou: float) -> int | None:
        """The row of an IoU threshold; None where it is not among them."""
        rows = np.flatnonzero(np.isclose(self.iou_thresholds, iou))
        return int(rows[0]) if len(rows) else None


Runner = Callable[[GroundTruthColumns, DetectionColumns, np.ndarray, np.ndarray, EvaluationLimits], Arrays]


def choose_backend(name: str) -> tuple[str, Runner]:
    """The name and the function of a backend; ``auto`` takes hotcoco where it is installed.

    A fork of a process that has used hotcoco gets pycocotools: hotcoco's threads do not exist in the fork,
    which would wait for them forever.

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
                    "the fast COCO evaluator is not installed", value="hotcoco", hint="pip install hotcoco"
                )
            )
        return "pycocotools", _run_pycocotools
    if _hotcoco_processes - {os.getpid()}:
        return "pycocotools", _run_pycocotools
    return "hotcoco", _run_hotcoco


_hotcoco_processes: set[int] = set()
"""Ids of processes with hotcoco's threads: this one, and those that it was forked from."""


def _run_hotcoco(
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    images: np.ndarray,
    categories: np.ndarray,
    limits: EvaluationLimits,
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
    evaluator = hotcoco.COCOeval(annotations, annotations.load_res(_result_table(detections)), "bbox")
    return _run_evaluator(evaluator, limits)


def _run_pycocotools(
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    images: np.ndarray,
    categories: np.ndarray,
    limits: EvaluationLimits,
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
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO()
        annotations.dataset = {
            "info": {},
            "images": _image_records(images),
            "categories": _category_records(truth, categories),
            "annotations": records,
        }
        annotations.createIndex()
        if len(detections):
            results = annotations.loadRes(_result_table(detections))
        else:
            # loadRes reads the first detection to choose the kind of results.
            results = COCO()
            results.dataset = {**annotations.dataset, "annotations": []}
            results.createIndex()
        return _run_evaluator(COCOeval(annotations, results, "bbox"), limits)


def _run_evaluator(evaluator: Any, limits: EvaluationLimits) -> Arrays:
    evaluator.params.iouThrs = np.array(limits.iou_thresholds)
    evaluator.params.maxDets = list(limits.max_detections)
    evaluator.evaluate()
    evaluator.accumulate()
    arrays = evaluator.eval
    return np.asarray(arrays["precision"]), np.asarray(arrays["recall"]), np.asarray(arrays["scores"])


def _image_records(images: np.ndarray) -> list[dict[str, Any]]:
    # Box evaluation reads neither sizes nor names.
    return [{"id": number, "width": 1, "height": 1, "file_name": ""} for number in images.tolist()]


def _category_records(truth: GroundTruthColumns, categories: np.ndarray) -> list[dict[str, Any]]:
    return [{"id": number, "name": truth.category_names[number]} for number in categories.tolist()]


def _result_table(detections: DetectionColumns) -> np.ndarray:
    """(D, 7): image id, x, y, width, height, score, category id, as ``loadRes`` of both backends takes."""
    columns = (
        detections.image_ids[:, None],
        detections.boxes_xywh,
        detections.scores[:, None],
        detections.category_ids[:, None],
    )
    return np.concatenate([column.astype(np.float64) for column in columns], axis=1)


# --- the twelve metrics ---

METRIC_NAMES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl",
)  # fmt: skip
"""The twelve metrics in COCO's order."""

MAX_DETECTIONS = (1, 10, 100)
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
COCO_LIMITS = EvaluationLimits(tuple(IOU_THRESHOLDS.tolist()), MAX_DETECTIONS)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
UNDEFINED = -1.0
"""COCO's value for a metric without ground truth."""

_ALL, _SMALL, _MEDIUM, _LARGE = range(4)


@dataclass(frozen=True)
class ClassResult:
    """Metrics of one class; -1 where the class has no ground truth of that size.

    Attributes:
        category_id: COCO category id.
        name: its name.
        AP, AP50, AP75, APs, APm, APl: average precision.
        AR: average recall at the largest limit of detections, 100.
        num_boxes: ground-truth boxes without crowds.
        num_detections: detections of this class.
    """

    category_id: int
    name: str
    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR: float
    num_boxes: int
    num_detections: int


@dataclass(frozen=True)
class CocoResult:
    """The result of an evaluation.

    Attributes:
        metrics: the metrics by :data:`METRIC_NAMES`, each in 0..1, or -1 if undefined. With other limits of
            detections n1, n2 … the recalls are ``ARmax<n1>``, ``ARmax<n2>`` …
        per_class: one entry per class, in the order of ``category_ids``.
        category_ids: (K,) scored classes, ascending.
        precision: (T, R, K) interpolated precision, all areas, 100 detections; -1 without ground truth.
        scores: (T, R, K) the score at which each recall is reached; 0 where it is not reached.
        num_images: scored images.
        num_boxes: ground-truth boxes without crowds.
        num_detections: scored detections.
        backend: ``"hotcoco"`` or ``"pycocotools"``, or ``"none"`` without classes or images.
        notes: warnings about the metrics, as sentences.
    """

    metrics: dict[str, float]
    per_class: tuple[ClassResult, ...]
    category_ids: np.ndarray
    precision: np.ndarray
    scores: np.ndarray
    num_images: int
    num_boxes: int
    num_detections: int
    backend: str
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]


def evaluate_boxes(
    ground_truth: GroundTruthColumns,
    detections: DetectionColumns,
    *,
    category_ids: Sequence[int] | None = None,
    image_ids: Sequence[int] | np.ndarray | None = None,
    backend: str = "auto",
    limits: EvaluationLimits = COCO_LIMITS,
    use_categories: bool = True,
) -> CocoResult:
    """Compute COCO's metrics.

    Args:
        ground_truth: images, boxes and categories.
        detections: boxes with scores. Those of other images or classes are left out, and so are those with
            non-finite numbers, with a note.
        category_ids: classes to score; None for all categories of the ground truth.
        image_ids: images to score; None for all images of the ground truth.
        backend: one of :data:`BACKENDS`.
        limits: thresholds and limits other than COCO's. AP is then that of 100 detections where this is one
            of the limits, and all else is that of the last limit, as in pycocotools.
        use_categories: False: all boxes are of one class, ``object``, as for region proposals.

    Raises:
        DataError: a class or image is asked for that the ground truth does not have.
        StackError: the backend asked for is not installed.
        ValueError: an unknown backend.
    """
    categories = _chosen_categories(ground_truth, category_ids)
    images = _chosen_images(ground_truth, image_ids)
    truth = ground_truth.select(images, categories)
    finite = detections.finite_rows()
    detections = detections.rows(finite).select(images, categories)
    notes = _notes(truth, detections, num_non_finite=int(len(finite) - finite.sum()))
    if not use_categories:
        # pycocotools ranks the detections of an image by score, and equal ones by class.
        detections = detections.rows(np.argsort(detections.category_ids, kind="stable"))
        truth = replace(truth, category_ids=np.ones(len(truth)), category_names={1: "object"})
        detections = replace(detections, category_ids=np.ones(len(detections)))
        categories = np.ones(min(len(categories), 1), dtype=np.int64)
    if len(categories) == 0 or len(images) == 0:
        num_limits = len(limits.max_detections)
        shape = (len(limits.iou_thresholds), len(RECALL_THRESHOLDS), len(categories), 4, num_limits)
        precision, scores = np.full(shape, UNDEFINED), np.full(shape, UNDEFINED)
        recall = np.full((shape[0], *shape[2:]), UNDEFINED)
        name = "none"
    else:
        name, run = choose_backend(backend)
        dense_truth, dense_detections = _dense(truth, detections, images, categories)
        numbers = np.arange(1, len(images) + 1), np.arange(1, len(categories) + 1)
        precision, recall, scores = run(dense_truth, dense_detections, *numbers, limits)
    return CocoResult(
        metrics=_summary(precision, recall, limits),
        per_class=_per_class(truth, detections, categories, precision, recall, limits),
        category_ids=categories,
        precision=precision[:, :, :, _ALL, -1],
        scores=scores[:, :, :, _ALL, -1],
        num_images=len(images),
        num_boxes=int((~truth.iscrowd).sum()),
        num_detections=len(detections),
        backend=name,
        notes=tuple(notes),
    )


def write_results_json(path: str | Path, result: CocoResult) -> Path:
    """Write the twelve metrics as one JSON object, as TAO does; undefined ones are -1.

    The file is written whole or not at all.
    """
    metrics = {name: result.metrics[name] for name in METRIC_NAMES}
    return write_text_whole(path, json.dumps(metrics, indent=2) + "\n")


def write_details_json(
    path: str | Path, result: CocoResult, sources: Mapping[str, CocoResult] | None = None
) -> Path:
    """Write a result without its curves as JSON: metrics, classes, counts and notes, also of each source.

    The file is written whole or not at all.
    """

    def described(one: CocoResult) -> dict[str, Any]:
        return {
            "metrics": one.metrics,
            "num_images": one.num_images,
            "num_boxes": one.num_boxes,
            "num_detections": one.num_detections,
            "per_class": [asdict(entry) for entry in one.per_class],
            "backend": one.backend,
            "notes": list(one.notes),
        }

    content = described(result) | {"sources": {name: described(one) for name, one in (sources or {}).items()}}
    return write_text_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _chosen_categories(ground_truth: GroundTruthColumns, wanted: Sequence[int] | None) -> np.ndarray:
    known = sorted(ground_truth.category_names)
    if wanted is None:
        return np.array(known, dtype=np.int64)
    missing = sorted(set(wanted) - set(known))
    if missing:
        named = [f"{number} ({ground_truth.category_names[number]})" for number in known]
        raise DataError(
            Problem(
                "asks for category ids that the annotations do not have",
                where="eval_class_ids",
                value=missing,
                allowed=named,
            )
        )
    return np.unique(np.asarray(wanted, dtype=np.int64))


def _chosen_images(ground_truth: GroundTruthColumns, wanted: Sequence[int] | np.ndarray | None) -> np.ndarray:
    known = np.unique(ground_truth.image_ids)
    if wanted is None:
        return known
    chosen = np.unique(np.asarray(wanted, dtype=np.int64))
    unknown = chosen[~np.isin(chosen, known)]
    if len(unknown):
        raise DataError(
            Problem("is not an image of the annotations", where="image id", value=int(unknown[0]))
        )
    return chosen


def _notes(truth: GroundTruthColumns, detections: DetectionColumns, num_non_finite: int) -> list[str]:
    notes = []
    if num_non_finite:
        notes.append(f"{num_non_finite} detections with non-finite boxes or scores were left out.")
    if not (~truth.iscrowd).any():
        notes.append(
            "The ground truth has no boxes of the scored classes: every metric is undefined (-1). "
            "Check the annotation file and the scored class ids."
        )
    elif len(detections) == 0:
        notes.append("There are no detections of the scored classes: every metric is 0.")
    return notes


def _dense(
    truth: GroundTruthColumns, detections: DetectionColumns, images: np.ndarray, categories: np.ndarray
) -> tuple[GroundTruthColumns, DetectionColumns]:
    """The same with images and categories numbered from 1 in their order.

    The backends take detections as float64, which cannot hold ids above 2^53.
    """
    names = {number: truth.category_names[one] for number, one in enumerate(categories.tolist(), start=1)}
    new_truth = replace(
        truth,
        image_ids=np.arange(1, len(images) + 1),
        box_image_ids=np.searchsorted(images, truth.box_image_ids) + 1,
        category_ids=np.searchsorted(categories, truth.category_ids) + 1,
        category_names=names,
    )
    new_detections = replace(
        detections,
        image_ids=np.searchsorted(images, detections.image_ids) + 1,
        category_ids=np.searchsorted(categories, detections.category_ids) + 1,
    )
    return new_truth, new_detections


def _mean(values: np.ndarray) -> float:
    """Mean of the defined values, or -1."""
    defined = values[values > UNDEFINED]
    return float(defined.mean()) if defined.size else UNDEFINED


def _precision_metrics(precision: np.ndarray, limits: EvaluationLimits) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl of a (T, R, K, A, M) array."""
    most = limits.max_detections
    at_100 = most.index(100) if 100 in most else -1

    def at(iou: float) -> float:
        row = limits.threshold_row(iou)
        return UNDEFINED if row is None else _mean(precision[row, :, :, _ALL, -1])

    return {
        "AP": _mean(precision[:, :, :, _ALL, at_100]),
        "AP50": at(0.5),
        "AP75": at(0.75),
        "APs": _mean(precision[:, :, :, _SMALL, -1]),
        "APm": _mean(precision[:, :, :, _MEDIUM, -1]),
        "APl": _mean(precision[:, :, :, _LARGE, -1]),
    }


def _summary(precision: np.ndarray, recall: np.ndarray, limits: EvaluationLimits) -> dict[str, float]:
    recalls = {
        f"ARmax{most}": _mean(recall[:, :, _ALL, place]) for place, most in enumerate(limits.max_detections)
    }
    return dict(
        **_precision_metrics(precision, limits),
        **recalls,
        ARs=_mean(recall[:, :, _SMALL, -1]),
        ARm=_mean(recall[:, :, _MEDIUM, -1]),
        ARl=_mean(recall[:, :, _LARGE, -1]),
    )


def _per_class(
    truth: GroundTruthColumns,
    detections: DetectionColumns,
    categories: np.ndarray,
    precision: np.ndarray,
    recall: np.ndarray,
    limits: EvaluationLimits,
) -> tuple[ClassResult, ...]:
    num_boxes = _counts(truth.category_ids[~truth.iscrowd])
    num_detections = _counts(detections.category_ids)
    return tuple(
        ClassResult(
            category_id=category,
            name=truth.category_names[category],
            **_precision_metrics(precision[:, :, column : column + 1], limits),
            AR=_mean(recall[:, column, _ALL, -1]),
            num_boxes=num_boxes.get(category, 0),
            num_detections=num_detections.get(category, 0),
        )
        for column, category in enumerate(categories.tolist())
    )


def _counts(values: np.ndarray) -> Mapping[int, int]:
    unique, counts = np.unique(values, return_counts=True)
    return dict(zip(unique.tolist(), counts.tolist(), strict=True))


# --- recall of region proposals, mmdet's way ---


def fast_recalls(
    truth: GroundTruthColumns, detections: DetectionColumns, limits: EvaluationLimits
) -> list[float]:
    """Average recall at each limit of detections, whatever the class, as mmdet's ``proposal_fast``.

    Boxes and detections of an image are paired greedily, the largest IoU first; crowds do not count. The
    recall at a threshold is the share of boxes whose partner has at least this IoU. 0 without any box.
    """
    finite = detections.rows(detections.finite_rows())
    paired: list[list[np.ndarray]] = [[] for _ in limits.max_detections]
    for image in truth.image_ids.tolist():
        boxes = _corners(truth.boxes_xywh[(truth.box_image_ids == image) & ~truth.iscrowd])
        mine = finite.rows(finite.image_ids == image)
        best_first = mine.rows(np.argsort(-mine.scores, kind="stable"))
        ious = pairwise_iou(boxes, _corners(best_first.boxes_xywh))
        for values, most in zip(paired, limits.max_detections, strict=True):
            values.append(greedy_ious(ious[:, :most]))
    joined = [np.concatenate([np.zeros(0), *values]) for values in paired]
    return [
        float(np.mean([(values >= iou).mean() for iou in limits.iou_thresholds])) if len(values) else 0.0
        for values in joined
    ]


def greedy_ious(ious: np.ndarray) -> np.ndarray:
    """(N,) IoUs of the greedy pairs of a (N, D) matrix, largest first; 0 for boxes without a partner."""
    left = ious.copy()
    pairs = np.zeros(len(left))
    for row in range(min(left.shape)):
        box, detection = np.unravel_index(int(left.argmax()), left.shape)
        pairs[row] = left[box, detection]
        left[box, :] = left[:, detection] = -1
    return pairs


def pairwise_iou(boxes_xyxy: np.ndarray, others_xyxy: np.ndarray) -> np.ndarray:
    """(N, D) IoUs of (N, 4) with (D, 4) boxes, as float32."""
    left_top = np.maximum(boxes_xyxy[:, None, :2], others_xyxy[None, :, :2])
    right_bottom = np.minimum(boxes_xyxy[:, None, 2:], others_xyxy[None, :, 2:])
    shared = np.prod(np.maximum(right_bottom - left_top, 0), axis=2)
    areas, other_areas = (np.prod(one[:, 2:] - one[:, :2], axis=1) for one in (boxes_xyxy, others_xyxy))
    union = np.maximum(areas[:, None] + other_areas - shared, 1e-6)
    return np.asarray(shared / union, dtype=np.float32)


def _corners(boxes_xywh: np.ndarray) -> np.ndarray:
    """(n, 4) x, y, width, height → corners, float32."""
    return np.concatenate(
        [boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1, dtype=np.float32
    )
