"""``FastCocoMetric``: COCO's box metrics for mmdet configs, with tables for the log and result files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import METRICS
from mmengine.dist import broadcast_object_list, gather_object, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.logging import MessageHub, MMLogger
from rich import box
from rich.console import Console
from rich.table import Table

from ddetr_mm.classes import find_names, some_of
from ddetr_mm.datasets.coco_table import CocoTable
from ddetr_mm.datasets.sources import mmdet_names, read_coco_sources
from ddetr_mm.errors import DataError, Problem, printable
from ddetr_mm.evaluation.coco_eval import (
    COCO_LIMITS,
    METRIC_NAMES,
    UNDEFINED,
    CocoResult,
    DetectionColumns,
    EvaluationLimits,
    GroundTruthColumns,
    evaluate_boxes,
    fast_recalls,
    xyxy_to_xywh,
)
from ddetr_mm.files import written_whole

# --- gathering the results of all ranks ---


@dataclass
class ImageResult:
    """Detections of one image, best first.

    Attributes:
        image_id: the dataset's id.
        boxes_xyxy: (n, 4) float32 pixels of the original image.
        scores: (n,) float32.
        labels: (n,) the model's class indices.
        instances: the image's ground truth from mmdet's data samples, where that is used.
        image_path: the image file, where pictures are drawn.
    """

    image_id: int
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    instances: list[dict[str, Any]] | None = None
    image_path: str | None = None


@dataclass
class PackedResults:
    """Results of one rank in a few arrays, which are gathered faster than an object per image."""

    image_ids: np.ndarray
    counts: np.ndarray
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    instances: list[list[dict[str, Any]] | None]
    image_paths: list[str | None]


def pack(results: Sequence[ImageResult]) -> PackedResults:
    """Join the arrays of many images."""
    return PackedResults(
        image_ids=np.array([result.image_id for result in results], dtype=np.int64),
        counts=np.array([len(result.scores) for result in results], dtype=np.int64),
        boxes_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *(result.boxes_xyxy for result in results)]),
        scores=np.concatenate([np.zeros(0, np.float32), *(result.scores for result in results)]),
        labels=np.concatenate([np.zeros(0, np.int64), *(result.labels for result in results)]),
        instances=[result.instances for result in results],
        image_paths=[result.image_path for result in results],
    )


def merge_ranks(parts: Sequence[PackedResults]) -> list[ImageResult]:
    """The images of all ranks, each once, ordered by id.

    A distributed sampler repeats some images so that all ranks get equally many.
    """
    merged: dict[int, ImageResult] = {}
    for part in parts:
        ends = np.cumsum(part.counts)
        for row, (image_id, start, end) in enumerate(
            zip(part.image_ids.tolist(), ends - part.counts, ends, strict=True)
        ):
            merged.setdefault(
                image_id,
                ImageResult(
                    image_id,
                    part.boxes_xyxy[start:end],
                    part.scores[start:end],
                    part.labels[start:end],
                    part.instances[row],
                    part.image_paths[row],
                ),
            )
    return [merged[image_id] for image_id in sorted(merged)]


# --- the metric ---

MMDET_NAMES = {
    "bbox_mAP": "AP",
    "bbox_mAP_50": "AP50",
    "bbox_mAP_75": "AP75",
    "bbox_mAP_s": "APs",
    "bbox_mAP_m": "APm",
    "bbox_mAP_l": "APl",
    "bbox_AR@1": "ARmax1",
    "bbox_AR@10": "ARmax10",
    "bbox_AR@100": "ARmax100",
    "bbox_AR_s@100": "ARs",
    "bbox_AR_m@100": "ARm",
    "bbox_AR_l@100": "ARl",
}
"""mmdet's metric keys → COCO's names."""


MMDET_PROPOSAL_NUMS = (100, 300, 1000)
"""mmdet's default limits of detections."""

_MMDET_RECALLS = ("AR@100", "AR@300", "AR@1000")
_MMDET_RECALLS_BY_SIZE = {"AR_s@1000": "ARs", "AR_m@1000": "ARm", "AR_l@1000": "ARl"}
METRICS_HONOURED = ("bbox", "proposal", "proposal_fast")


def metric_keys(limits: EvaluationLimits) -> dict[str, str]:
    """Item (``mAP``, ``AR@100`` …) → name in a :class:`CocoResult`; without ``bbox_``, for any limits."""
    most = limits.max_detections
    return {
        **{key.removeprefix("bbox_"): name for key, name in MMDET_NAMES.items() if "mAP" in key},
        **{f"AR@{limit}": f"ARmax{limit}" for limit in most},
        **{f"AR_{size}@{most[-1]}": f"AR{size}" for size in "sml"},
    }


def known_items(limits: EvaluationLimits) -> dict[str, str]:
    """:func:`metric_keys`, and mmdet's fixed names, which stand for the first, second and third limit."""
    by_place = zip(_MMDET_RECALLS, limits.max_detections, strict=False)
    fixed = {item: f"ARmax{limit}" for item, limit in by_place}
    return {**fixed, **_MMDET_RECALLS_BY_SIZE, **metric_keys(limits)}


@METRICS.register_module()
class FastCocoMetric(BaseMetric):
    """COCO's box metrics; replaces mmdet's ``CocoMetric``.

    Metrics are reported as ``coco/bbox_mAP``, ``coco/bbox_mAP_50`` … (:data:`MMDET_NAMES`), unrounded.
    After :meth:`evaluate` the first rank has the full result in :attr:`result` and that of each source in
    :attr:`source_results`. What :attr:`report_facts` says of the run (name → value) heads ``report.html``.

    The ground truth comes from ``sources`` or ``ann_file``, or with neither from ``instances`` in the data
    samples, as with ``CocoMetric``. All its images are scored, also those without a sample.

    A label becomes a category id by ``dataset_meta['category_ids']`` where the dataset has it (None:
    detections of this label are dropped). Without it label ``i`` is the category of the file with the name
    ``dataset_meta['classes'][i]``, whatever the order of the file's categories; detections of a class that
    the file lacks are dropped, which is logged. (mmdet's metric takes the ``i``-th category of the file among
    these names, which is another class where the file has another order.)

    Args:
        ann_file: COCO annotation file (or pattern, or folder of shards).
        sources: several ``dict(image_dir=…, json_file=…)``; exclusive with ``ann_file``.
        eval_class_ids: category ids to score; None for all.
        conf_threshold: detections below this score are dropped.
        classwise: ``"table"``: log a table of the metrics of each class; True: also report
            ``coco/<class>_precision`` (AP, -1 without ground truth) for each, for ``save_best``; False: none.
        per_source: with several sources, also score each alone.
        image_ids: images to score (the dataset's ids); None for all of the ground truth.
        results_dir: folder for ``results.json`` (the twelve metrics), ``results_detail.json`` (by class
            and source), ``predictions.json``, plots and ``report.html``.
        outfile_prefix: also write predictions as ``<prefix>.bbox.json``, as ``CocoMetric`` does.
        format_only: only write the predictions, for data without ground truth.
        backend: see :func:`ddetr_mm.evaluation.coco_eval.evaluate_boxes`.
        strict_annotations: as in :class:`~ddetr_mm.datasets.coco.SerializedCocoDataset`.
        numbered_names: likewise.
        merge_categories: likewise.
        metric: ``"bbox"``; ``"proposal"``, recall whatever the class, as ``coco/AR@100`` …; or
            ``"proposal_fast"``, the same by greedy pairs; or several of them. Masks
            (``"segm"``) are scored by ``CocoMetric``.
        proposal_nums: limits of detections per image and class, in any order. None: COCO's 1, 10, 100, and
            mmdet's 100, 300, 1000 for proposals or where ``metric_items`` names these.
        iou_thrs: IoU thresholds; None: 0.50, 0.55 … 0.95. ``bbox_mAP_50`` is -1 where 0.5 is not among them.
        metric_items: what to report, such as ``["mAP", "AR@100"]``; None: everything.
        sort_categories: order the file's categories by id.
        use_mp_eval: without effect: scoring uses all cores where hotcoco is installed.
        collect_device: without effect: results are gathered directly.
        backend_args: None or the local backend; annotation files are read from this machine.
        prefix: see ``BaseMetric``.

    Raises:
        ValueError: contradicting arguments, or one of ``CocoMetric`` that is not supported.
    """

    default_prefix = "coco"

    def __init__(
        self,
        ann_file: str | None = None,
        sources: Sequence[Mapping[str, Any]] | None = None,
        *,
        eval_class_ids: Sequence[int] | None = None,
        conf_threshold: float = 0.0,
        classwise: bool | str = "table",
        per_source: bool = True,
        image_ids: Sequence[int] | None = None,
        results_dir: str | None = None,
        outfile_prefix: str | None = None,
        format_only: bool = False,
        backend: str = "auto",
        strict_annotations: bool = False,
        numbered_names: Sequence[str | None] | None = None,
        merge_categories: bool = False,
        metric: str | Sequence[str] = "bbox",
        proposal_nums: Sequence[int] | None = None,
        iou_thrs: float | Sequence[float] | None = None,
        metric_items: Sequence[str] | None = None,
        sort_categories: bool = False,
        use_mp_eval: bool = False,
        collect_device: str = "cpu",
        file_client_args: None = None,
        backend_args: Mapping[str, Any] | None = None,
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if ann_file is not None and sources is not None:
            raise ValueError("give ann_file or sources, not both")
        if classwise not in (True, False, "table"):
            raise ValueError(f"classwise must be True, False or 'table', not {classwise!r}")
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        _check_mmdet_arguments(self.metrics, file_client_args, backend_args)
        if format_only and not (outfile_prefix or results_dir):
            raise ValueError("format_only needs outfile_prefix or results_dir to write to")
        self.limits, self.proposal_limits = _limits(proposal_nums, iou_thrs, metric_items)
        if results_dir is not None and (self.limits != COCO_LIMITS or "bbox" not in self.metrics):
            raise ValueError(
                "results_dir is for COCO's twelve metrics: score 'bbox', without proposal_nums and iou_thrs"
            )
        self.metric_items = None if metric_items is None else list(metric_items)
        self._check_items()
        self.sort_categories = sort_categories
        self.strict_annotations = strict_annotations
        self.numbered_names = None if numbered_names is None else list(numbered_names)
        self.merge_categories = merge_categories
        self.sources = [{"image_dir": "", "json_file": ann_file}] if ann_file is not None else sources
        self._has_ann_file = ann_file is not None
        self.eval_class_ids = None if eval_class_ids is None else list(eval_class_ids)
        self.conf_threshold = conf_threshold
        self.classwise = classwise
        self.per_source = per_source
        self.image_ids = None if image_ids is None else list(image_ids)
        self.results_dir = None if results_dir is None else Path(results_dir)
        self.outfile_prefix = outfile_prefix
        self.format_only = format_only
        self.backend = backend
        self.result: CocoResult | None = None
        self.source_results: dict[str, CocoResult] = {}
        self.report_facts: dict[str, str] = {}
        self._batch_size = 1
        self._table: CocoTable | None = None
        self._missing_classes: list[str] = []

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the detections of one batch above the threshold, as arrays."""
        self._batch_size = max(self._batch_size, len(data_samples))
        for sample in data_samples:
            predicted = sample["pred_instances"]
            scores = predicted["scores"].detach().cpu().float().numpy()
            # Not `scores >= threshold`: a NaN must pass, so that it is counted and reported.
            keep = ~(scores < self.conf_threshold)
            self.results.append(
                ImageResult(
                    image_id=int(sample["img_id"]),
                    boxes_xyxy=predicted["bboxes"].detach().cpu().float().numpy().reshape(-1, 4)[keep],
                    scores=scores[keep],
                    # Some heads give float labels where they have no detections.
                    labels=predicted["labels"].detach().cpu().numpy().astype(np.int64)[keep],
                    instances=None if self.sources is not None else sample.get("instances"),
                    image_path=sample.get("img_path") if self.results_dir is not None else None,
                )
            )

    def evaluate(self, size: int) -> dict[str, float]:
        """Gather the results of all ranks and score them on the first; all ranks return the metrics.

        Unlike ``BaseMetric.evaluate`` this exchanges no files and does not rely on the order of samples: an
        image that the sampler repeats is scored once.

        Args:
            size: number of images of the dataset.

        Raises:
            RuntimeError: scoring failed on the first rank, which raises its own error.
        """
        parts = gather_object(pack(self.results))
        self.results.clear()
        metrics_and_error: list[Any] = [None, None]
        failure: BaseException | None = None
        if is_main_process():
            try:
                metrics_and_error[0] = self.compute_metrics(merge_ranks(parts or []), expected=size)
            except Exception as error:
                # The other ranks wait for the broadcast; the error is raised after it.
                failure, metrics_and_error[1] = error, f"{type(error).__name__}: {error}"
        broadcast_object_list(metrics_and_error)
        if failure is not None:
            raise failure
        if metrics_and_error[1] is not None:
            raise RuntimeError(f"evaluation failed on the first rank: {metrics_and_error[1]}")
        return {
            f"{self.prefix}/{key}" if self.prefix else key: value
            for key, value in metrics_and_error[0].items()
        }

    def compute_metrics(self, results: list[ImageResult], expected: int | None = None) -> dict[str, float]:
        """Score the merged results of all ranks.

        Args:
            results: one entry per image.
            expected: number of images of the dataset; fewer results are logged as a warning.

        Returns:
            Keys of :data:`MMDET_NAMES`, and others by ``metric``, ``metric_items`` and ``classwise``, without
            the prefix; empty with ``format_only``.
        """
        logger = MMLogger.get_current_instance()
        if expected is not None and len(results) < expected:
            logger.warning(f"Only {len(results)} of {expected} images have been evaluated.")
        truth = self._ground_truth(results)
        detections = self._detections(results, truth)
        self._write_predictions(detections)
        if self.format_only:
            return {}
        proposals = self._proposal_metrics(truth, detections)
        if "bbox" not in self.metrics:
            return proposals
        classes = self._scored_classes(truth)
        self.result = evaluate_boxes(
            truth,
            detections,
            category_ids=classes,
            image_ids=self.image_ids,
            backend=self.backend,
            limits=self.limits,
        )
        self.source_results = self._score_sources(truth, detections)
        self._report(logger, self.result)
        if self.results_dir is not None:
            # Imports matplotlib, which validation during training does not need.
            from ddetr_mm.evaluation.report import write_report

            paths = {one.image_id: one.image_path for one in results if one.image_path}
            page = write_report(
                self.results_dir,
                self.result,
                self.source_results,
                truth,
                detections,
                paths,
                facts=self.report_facts,
                seconds_an_image=seconds_an_image(self._batch_size),
            )
            logger.info(f"Evaluation report: {page}")
        return {**proposals, **self._box_metrics(self.result)}

    def _box_metrics(self, result: CocoResult) -> dict[str, float]:
        """What is reported of a result, by mmdet's keys."""
        items = known_items(self.limits)
        wanted = metric_keys(self.limits) if self.metric_items is None else self.metric_items
        by_class = {f"{entry.name}_precision": entry.AP for entry in result.per_class}
        return {
            **(by_class if self.classwise is True else {}),
            **{f"bbox_{item}": result[items[item]] for item in wanted},
        }

    def _check_items(self) -> None:
        known = known_items(self.limits)
        unknown = [item for item in self.metric_items or () if item not in known]
        if unknown:
            raise ValueError(f"metric_items {unknown} are not known; known are {', '.join(known)}")

    def _proposal_metrics(self, truth: GroundTruthColumns, detections: DetectionColumns) -> dict[str, float]:
        """Recalls whatever the class, for ``metric`` 'proposal' and 'proposal_fast'."""
        found: dict[str, float] = {}
        limits = self.proposal_limits
        if "proposal" in self.metrics:
            result = evaluate_boxes(
                truth,
                detections,
                category_ids=self._scored_classes(truth),
                image_ids=self.image_ids,
                backend=self.backend,
                limits=limits,
                use_categories=False,
            )
            items = known_items(limits)
            items_of_recall = [item for item in metric_keys(limits) if item.startswith("AR")]
            wanted = items_of_recall if self.metric_items is None else self.metric_items
            found |= {item: result[items[item]] for item in wanted}
        if "proposal_fast" in self.metrics:
            recalls = fast_recalls(truth, detections, limits)
            found |= dict(zip((f"AR@{most}" for most in limits.max_detections), recalls, strict=True))
        return found

    def _ground_truth(self, results: list[ImageResult]) -> GroundTruthColumns:
        if self.sources is None:
            return _truth_of_samples(results, self._label_ids(None), self._class_names())
        if self._table is None:
            with mmdet_names(self._has_ann_file):
                self._table = read_coco_sources(
                    self.sources,
                    annotations_required=not self.format_only,
                    strict=self.strict_annotations,
                    sizes_required=False,
                    numbered_names=self.numbered_names,
                    merge_categories=self.merge_categories,
                )
        truth = truth_of_table(self._table)
        if self.sort_categories:
            return replace(truth, category_names=dict(sorted(truth.category_names.items())))
        return truth

    def _detections(self, results: list[ImageResult], truth: GroundTruthColumns) -> DetectionColumns:
        """Detections of all images, ordered by image id, with category ids instead of labels."""
        known = set(truth.image_ids.tolist())
        unknown = next((result.image_id for result in results if result.image_id not in known), None)
        if unknown is not None:
            raise DataError(
                Problem(
                    "a sample's image id is not in the annotations that it is evaluated with",
                    where="val_evaluator",
                    value=unknown,
                    hint="give the evaluator the same ann_file or sources as the dataset",
                )
            )
        if not results:
            return DetectionColumns.empty()
        ordered = sorted(results, key=lambda result: result.image_id)
        labels = np.concatenate([result.labels for result in ordered])
        label_ids = self._label_ids(truth)
        if len(labels) and (labels.max() >= len(label_ids) or labels.min() < 0):
            raise DataError(
                Problem(
                    "the model predicts labels that the dataset has no class for",
                    value=int(labels.max() if labels.max() >= len(label_ids) else labels.min()),
                    allowed=f"0 to {len(label_ids) - 1}",
                    hint="make the model's number of classes fit the dataset's",
                )
            )
        category_ids = label_ids[labels]
        detections = DetectionColumns(
            image_ids=np.repeat(
                [result.image_id for result in ordered], [len(result.scores) for result in ordered]
            ),
            boxes_xywh=xyxy_to_xywh(np.concatenate([result.boxes_xyxy for result in ordered])),
            scores=np.concatenate([result.scores for result in ordered]),
            category_ids=category_ids,
        )
        return detections.rows(category_ids >= 0)

    def _scored_classes(self, truth: GroundTruthColumns) -> list[int]:
        """``eval_class_ids``, by default the classes that the dataset has labels for."""
        if self.eval_class_ids is not None:
            return self.eval_class_ids
        labelled = set(self._label_ids(truth).tolist())
        return [number for number in truth.category_names if number in labelled]

    def _label_ids(self, truth: GroundTruthColumns | None) -> np.ndarray:
        """(labels,) int64 category id of each label; -1 for a label without a category."""
        meta = self.dataset_meta or {}
        if meta.get("category_ids") is not None:
            ids = [-1 if number is None else int(number) for number in meta["category_ids"]]
        elif truth is None:
            ids = list(range(len(self._class_names())))
        else:
            ids = self._ids_by_name(truth.category_names)
        return np.array(ids, dtype=np.int64)

    def _ids_by_name(self, category_names: Mapping[int, str]) -> list[int]:
        """The category id of each of the dataset's classes, -1 for those that the file lacks."""
        classes, numbers = self._class_names(), list(category_names)
        places = find_names(classes, list(category_names.values()))
        missing = [name for name, place in zip(classes, places, strict=True) if place is None]
        if classes and len(missing) == len(classes):
            raise DataError(
                Problem(
                    "the annotations have none of the dataset's classes",
                    where="val_evaluator",
                    value=some_of(list(category_names.values()), 20),
                    allowed=some_of(classes, 20),
                )
            )
        if missing and missing != self._missing_classes:
            self._missing_classes = missing
            MMLogger.get_current_instance().warning(
                f"{len(missing)} classes are not in the annotations and are not scored: {some_of(missing)}"
            )
        return [-1 if place is None else numbers[place] for place in places]

    def _class_names(self) -> list[str]:
        return list((self.dataset_meta or {}).get("classes") or ())

    def _write_predictions(self, detections: DetectionColumns) -> None:
        paths = [] if self.results_dir is None else [self.results_dir / "predictions.json"]
        if self.outfile_prefix is not None:
            paths.append(Path(f"{self.outfile_prefix}.bbox.json"))
        for path in paths:
            write_predictions_json(path, detections, self._table)

    def _score_sources(
        self, truth: GroundTruthColumns, detections: DetectionColumns
    ) -> dict[str, CocoResult]:
        if not self.per_source or self._table is None or self.sources is None or len(self.sources) < 2:
            return {}
        return {
            f"{number}: {source['json_file']}": evaluate_boxes(
                truth,
                detections,
                category_ids=self._scored_classes(truth),
                image_ids=self._table.image_ids[self._table.source_indices == number],
                backend=self.backend,
                limits=self.limits,
            )
            for number, source in enumerate(self.sources)
        }

    def _report(self, logger: MMLogger, result: CocoResult) -> None:
        for note in result.notes:
            logger.warning(note)
        if self.classwise:
            logger.info("\n" + class_table(result))
        if self.source_results:
            logger.info("\n" + source_table(self.source_results))


def seconds_an_image(batch_size: int) -> float | None:
    """Seconds of the running test loop for an image on one device, data included; None where unknown.

    The first batch, which warms up, is left out where there are others.
    """
    times = MessageHub.get_current_instance().log_scalars.get("test/time")
    if times is None or not len(times.data[0]):
        return None
    seconds = times.data[0]
    return float(np.mean(seconds[1:] if len(seconds) > 1 else seconds)) / batch_size


def _check_mmdet_arguments(
    metrics: Sequence[str], file_client_args: Any, backend_args: Mapping[str, Any] | None
) -> None:
    """Refuse arguments of ``CocoMetric`` that would have no effect.

    Raises:
        ValueError: one is given.
    """
    others = [name for name in metrics if name not in METRICS_HONOURED]
    if others or not metrics:
        raise ValueError(
            f"FastCocoMetric scores boxes: metric must be of {', '.join(METRICS_HONOURED)}, not {others}; "
            "masks ('segm') are scored by CocoMetric"
        )
    if file_client_args is not None:
        raise ValueError("file_client_args is gone from mmdet; use backend_args")
    if backend_args is not None and backend_args.get("backend") != "local":
        raise ValueError("FastCocoMetric reads files of this machine: backend_args must be None or local")


def _limits(
    proposal_nums: Sequence[int] | None,
    iou_thrs: float | Sequence[float] | None,
    metric_items: Sequence[str] | None,
) -> tuple[EvaluationLimits, EvaluationLimits]:
    """Thresholds and limits of boxes, and of proposals.

    Raises:
        ValueError: no thresholds or limits, or wrong ones.
    """
    if iou_thrs is None:
        thresholds = COCO_LIMITS.iou_thresholds
    else:
        given = [iou_thrs] if isinstance(iou_thrs, (int, float)) else list(iou_thrs)
        thresholds = tuple(float(value) for value in given)
    if not thresholds or not all(0 < value <= 1 for value in thresholds):
        raise ValueError(f"iou_thrs must lie between 0 and 1, not {iou_thrs!r}")
    if proposal_nums is not None:
        boxes = proposals = tuple(sorted({int(most) for most in proposal_nums}))
        if not boxes or boxes[0] < 1:
            raise ValueError(f"proposal_nums must be 1 or more, not {proposal_nums!r}")
    else:
        proposals = MMDET_PROPOSAL_NUMS
        names = {*_MMDET_RECALLS, *_MMDET_RECALLS_BY_SIZE} - {"AR@100"}
        boxes = proposals if names & set(metric_items or ()) else COCO_LIMITS.max_detections
    return EvaluationLimits(thresholds, boxes), EvaluationLimits(thresholds, proposals)


def truth_of_table(table: CocoTable) -> GroundTruthColumns:
    """The ground truth of sources, with the table's unique image ids."""
    return GroundTruthColumns(
        image_ids=table.image_ids,
        box_image_ids=table.image_ids[table.box_image_rows],
        boxes_xywh=table.boxes_xywh,
        category_ids=table.category_ids,
        iscrowd=table.crowd,
        areas=table.areas,
        category_names=table.category_names,
    )


def _truth_of_samples(
    results: list[ImageResult], label_ids: np.ndarray, class_names: list[str]
) -> GroundTruthColumns:
    """The ground truth in the data samples' instances; areas are those of the boxes."""
    rows: list[tuple[int, Sequence[float], int, bool]] = []
    for result in results:
        if result.instances is None:
            raise DataError(
                Problem(
                    "has no ground truth to compare detections with",
                    where="val_evaluator",
                    hint="give it ann_file or sources, or let PackDetInputs pass on 'instances'",
                )
            )
        rows += [
            (
                result.image_id,
                item["bbox"],
                int(label_ids[item["bbox_label"]]),
                bool(item.get("ignore_flag", 0)),
            )
            for item in result.instances
        ]
    rows = [row for row in rows if row[2] >= 0]
    boxes_xywh = xyxy_to_xywh(np.array([row[1] for row in rows], dtype=np.float64))
    return GroundTruthColumns(
        image_ids=np.array([result.image_id for result in results]),
        box_image_ids=np.array([row[0] for row in rows]),
        boxes_xywh=boxes_xywh,
        category_ids=np.array([row[2] for row in rows]),
        iscrowd=np.array([row[3] for row in rows]),
        areas=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        category_names={
            int(number): class_names[label] if label < len(class_names) else str(number)
            for label, number in enumerate(label_ids.tolist())
            if number >= 0
        },
    )


# --- detections as a COCO result file ---


def write_predictions_json(path: str | Path, detections: DetectionColumns, table: CocoTable | None) -> Path:
    """Write detections in COCO's result format: a list of image_id, category_id, bbox (xywh), score.

    Image ids are those of the annotation files. With several sources an id may occur twice, so each entry
    also has ``source`` (index in the list of sources) and ``file_name``, which readers of the format ignore.
    Detections with non-finite numbers, which JSON lacks, are left out.

    Args:
        path: the file, written whole or not at all.
        detections: with the table's unique image ids.
        table: the sources; None where the ids are those of the file already.
    """
    detections = detections.rows(detections.finite_rows())
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, record in enumerate(_records(detections, table)):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")
    return Path(path)


def _records(detections: DetectionColumns, table: CocoTable | None) -> Iterator[dict[str, Any]]:
    columns = zip(
        detections.image_ids.tolist(),
        detections.category_ids.tolist(),
        detections.boxes_xywh.tolist(),
        detections.scores.tolist(),
        strict=True,
    )
    if table is None:
        for image, category, box, score in columns:
            yield {"image_id": image, "category_id": category, "bbox": box, "score": score}
        return
    rows = dict(zip(table.image_ids.tolist(), range(table.num_images), strict=True))
    several = bool(np.any(table.source_indices != table.source_indices[0])) if table.num_images else False
    for image, category, box, score in columns:
        row = rows[image]
        record = {"image_id": table.original_id(row), "category_id": category, "bbox": box, "score": score}
        if several:
            record |= {"source": int(table.source_indices[row]), "file_name": table.file_name(row)}
        yield record


# --- results as tables for the log ---

_PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def class_table(result: CocoResult) -> str:
    """One line per class: id, name, ground-truth boxes, detections, average precisions and recall.

    Undefined metrics are shown as ``-``. The last line has the metrics over all classes.
    """
    rows: list[Sequence[str]] = [
        (
            str(entry.category_id),
            entry.name,
            str(entry.num_boxes),
            str(entry.num_detections),
            *(_metric_text(getattr(entry, name)) for name in _PRECISIONS),
            _metric_text(entry.AR),
        )
        for entry in result.per_class
    ]
    recalls = [name for name in result.metrics if name.startswith("ARmax")]
    totals = [_metric_text(result[name]) for name in (*_PRECISIONS, recalls[-1])]
    rows.append(("", "all", str(result.num_boxes), str(result.num_detections), *totals))
    return _render(("id", "class", "boxes", "detections", *_PRECISIONS, "AR"), rows)


def source_table(results: Mapping[str, CocoResult]) -> str:
    """One line per source, with its twelve metrics."""
    rows = [
        (name, str(result.num_images), *map(_metric_text, result.metrics.values()))
        for name, result in results.items()
    ]
    names = next(iter(results.values())).metrics if results else METRIC_NAMES
    return _render(("source", "images", *names), rows)


def _metric_text(value: float) -> str:
    return "-" if value == UNDEFINED else f"{value:.3f}"


def _render(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as text, as wide as its content."""
    table = Table(box=box.ASCII)
    for header in headers:
        is_text = header in ("class", "source")
        table.add_column(header, justify="left" if is_text else "right")
    lines = list(rows)
    for row in lines:
        # A class may be named "[bold]", which rich would read as markup.
        table.add_row(*(printable(cell).replace("[", r"\[") for cell in row))
    width = 10 + sum(
        3 + max(len(header), *(len(row[column]) for row in lines)) for column, header in enumerate(headers)
    )
    console = Console(
        force_jupyter=False,
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        highlight=False,
    )
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
