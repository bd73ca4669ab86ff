"""Ground truth as predictions: through the dataloader, transforms, collation, post-processing and metric.

Every piece is built from the translated config, as evaluation builds it. Boxes are loaded before the resize,
so that the transforms move them. In place of the network's output, each object gets a confident query; the
network's own head turns these into detections in the original image, and the configured metric scores them.
A mistake in scales, axes, labels or ids anywhere between file and score lowers the AP.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from torch import Tensor

from ddetr_mm.datasets.coco import SerializedCocoDataset
from ddetr_mm.engine.progress import track
from ddetr_mm.evaluation.coco_eval import DetectionColumns, evaluate_boxes
from ddetr_mm.evaluation.metric import truth_of_table
from ddetr_mm.preflight.pictures import MOST_TILES, Tile, tiles_of_batch
from ddetr_mm.preflight.report import Section, fault, note, suspicion

CONFIDENT = 10.0
"""The logit of an object's class; every other class has its negative."""

EXACT = 0.9999
"""Boxes travel in single precision."""


@dataclass(frozen=True)
class RoundTrip:
    """Scores of the ground truth.

    Attributes:
        AP: through the whole pipeline; -1 without boxes.
        reachable_AP: of the visible boxes clipped to their images, scored directly: the most that a detector
            can reach on this data.
        num_images: images that went through.
        num_boxes: their boxes that count.
        most_objects: the largest number of objects in one image.
        tiles: the first images, as the network sees them.
        class_names: by label.
    """

    AP: float
    reachable_AP: float
    num_images: int
    num_boxes: int
    most_objects: int
    tiles: tuple[Tile, ...] = ()
    class_names: tuple[str, ...] = ()


def send_ground_truth(
    model: Any, dataloader_cfg: Mapping[str, Any], evaluator_cfg: Mapping[str, Any], rows: Sequence[int]
) -> RoundTrip:
    """Send the ground truth of some images through the pipeline.

    Args:
        model: the detector; its data preprocessor and the post-processing of its head are used.
        dataloader_cfg: of the evaluation, over a ``SerializedCocoDataset``.
        evaluator_cfg: its metric.
        rows: images to take, by position in the data set.

    Raises:
        DataError: an image cannot be read.
    """
    loader_cfg = copy.deepcopy(dict(dataloader_cfg))
    loader_cfg["dataset"]["pipeline"] = boxes_loaded_first(loader_cfg["dataset"]["pipeline"])
    loader_cfg["dataset"]["indices"] = [int(row) for row in rows]
    loader = Runner.build_dataloader(loader_cfg)
    dataset: SerializedCocoDataset = loader.dataset
    dataset.full_init()
    image_ids = dataset.table.image_ids[np.asarray(rows, dtype=np.int64)]
    quiet = dict(image_ids=image_ids.tolist(), classwise=False, per_source=False, results_dir=None)
    evaluator = Evaluator([dict(evaluator_cfg) | quiet])
    evaluator.dataset_meta = dataset.metainfo
    names = tuple(dataset.metainfo["classes"])
    model.eval()
    tiles: list[Tile] = []
    with torch.no_grad():
        for batch in track(loader, "ground truth through the pipeline", unit="batches"):
            prepared = model.data_preprocessor(batch, False)
            samples = prepared["data_samples"]
            if len(tiles) < MOST_TILES:
                tiles += tiles_of_batch(prepared["inputs"], samples, model.data_preprocessor, names)
            for sample, found in zip(samples, ideal_detections(model, samples), strict=True):
                sample.pred_instances = found
            evaluator.process(data_samples=samples, data_batch=batch)
    metrics = evaluator.evaluate(len(dataset))
    reachable, num_boxes, most = reachable_precision(dataset, rows, evaluator_cfg.get("eval_class_ids"))
    precision = next(value for key, value in metrics.items() if key.rsplit("/", 1)[-1] == "bbox_mAP")
    return RoundTrip(float(precision), reachable, len(rows), num_boxes, most, tuple(tiles), names)


def boxes_loaded_first(pipeline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pipeline with its boxes loaded right after the image, so that every transform moves them."""
    steps = [dict(step) for step in pipeline if step["type"] != "LoadAnnotations"]
    after = next(number for number, step in enumerate(steps) if "LoadImage" in step["type"]) + 1
    return [*steps[:after], dict(type="LoadAnnotations", with_bbox=True), *steps[after:]]


def ideal_detections(model: Any, samples: Sequence[Any]) -> list[Any]:
    """Detections that the head makes of a perfect network's output.

    Args:
        model: a DETR whose ``bbox_head`` has ``predict_by_feat`` and ``num_classes``.
        samples: data samples with ``gt_instances`` in the network's frame, ``img_shape``, ``scale_factor``.
    """
    num_queries = max(int(model.num_queries), 1)
    logits = torch.full((len(samples), num_queries, model.bbox_head.num_classes), -CONFIDENT)
    boxes_cxcywh = torch.full((len(samples), num_queries, 4), 0.5)
    for row, sample in enumerate(samples):
        objects = sample.gt_instances
        count = min(len(objects), num_queries)
        logits[row, torch.arange(count), objects.labels[:count]] = CONFIDENT
        boxes_cxcywh[row, :count] = relative_boxes(_plain(objects.bboxes)[:count], sample.img_shape)
    metas = [sample.metainfo for sample in samples]
    return model.bbox_head.predict_by_feat(logits[None], boxes_cxcywh[None], metas, rescale=True)


def relative_boxes(boxes_xyxy: Tensor, size_hw: Sequence[int]) -> Tensor:
    """(n, 4) pixel corners as centre, width and height in 0..1 of an image of (height, width)."""
    height, width = size_hw[:2]
    corners = boxes_xyxy.float() / boxes_xyxy.new_tensor([width, height, width, height], dtype=torch.float32)
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)


def _plain(boxes: Any) -> Tensor:
    return boxes.tensor if hasattr(boxes, "tensor") else boxes


def reachable_precision(
    dataset: SerializedCocoDataset, rows: Sequence[int], eval_class_ids: Sequence[int] | None
) -> tuple[float, int, int]:
    """AP of visible, clipped boxes without any pipeline; how many boxes count; most objects in an image."""
    table = dataset.table
    chosen = np.isin(table.box_image_rows, np.asarray(rows))
    usable = chosen & table.visible & ~table.crowd & ~table.ignored
    image_rows = table.box_image_rows[usable]
    sizes_wh = table.sizes_hw[image_rows][:, ::-1].astype(np.float64)
    xywh = table.boxes_xywh[usable]
    top_left = np.clip(xywh[:, :2], 0, sizes_wh)
    bottom_right = np.clip(xywh[:, :2] + xywh[:, 2:], 0, sizes_wh)
    found = DetectionColumns(
        image_ids=table.image_ids[image_rows],
        boxes_xywh=np.concatenate([top_left, bottom_right - top_left], axis=1),
        scores=np.ones(len(image_rows)),
        category_ids=table.category_ids[usable],
    )
    known = {number for number in dataset.metainfo["category_ids"] if number is not None}
    classes = [number for number in table.category_names if number in (eval_class_ids or known)]
    result = evaluate_boxes(
        truth_of_table(table), found, category_ids=classes, image_ids=table.image_ids[np.asarray(rows)]
    )
    most = int(np.bincount(image_rows).max()) if len(image_rows) else 0
    return result["AP"], result.num_boxes, most


def judge(split_name: str, trip: RoundTrip, limit: int) -> Section:
    """Findings of a round trip.

    Args:
        split_name: for messages.
        trip: its scores.
        limit: most detections of an image: the least of queries, ``num_select`` and COCO's 100.
    """
    section = Section(f"ground truth of {split_name} through the pipeline")
    section.data = dict(AP=trip.AP, reachable_AP=trip.reachable_AP, num_images=trip.num_images)
    if trip.num_boxes == 0:
        section.lines.append("the sampled images have no box that counts")
        return section
    section.lines.append(
        f"AP {trip.AP:.4f} over {trip.num_images} images with {trip.num_boxes} boxes (perfect is 1)"
    )
    where = f"dataset.{split_name}_data_sources"
    if trip.most_objects > limit:
        section.findings.append(
            note(
                "objects-beyond-limit",
                f"an image has {trip.most_objects} objects, and at most {limit} can be detected",
                where="model.num_queries, model.num_select",
                value=limit,
            )
        )
    elif min(trip.reachable_AP, 1.0) - trip.AP > 1 - EXACT:
        section.findings.append(
            fault(
                "ground-truth-scores-low",
                f"the ground truth of {split_name} scores AP {trip.AP:.4f} when it goes through the "
                f"pipeline, and {trip.reachable_AP:.4f} when it is scored directly: something between file "
                "and score moves, drops or renames boxes",
                where=where,
                allowed="1.0",
                hint="look at the contact sheet; evaluation would count good predictions as wrong",
            )
        )
    if trip.reachable_AP < EXACT:
        build = suspicion if trip.reachable_AP < 0.9 else note
        section.findings.append(
            build(
                "perfect-score-unreachable",
                f"even perfect predictions score AP {trip.reachable_AP:.4f} on {split_name}: boxes reach "
                "beyond their images or lie outside",
                where=where,
            )
        )
    return section
