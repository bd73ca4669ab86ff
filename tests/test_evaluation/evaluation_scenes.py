"""Random ground truth and detections, with everything COCO's rules treat specially."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddetr_mm.evaluation.coco_eval import DetectionColumns, GroundTruthColumns

Scene = tuple[GroundTruthColumns, DetectionColumns]


def random_scene(
    seed: int, num_images: int = 12, num_classes: int = 4, boxes_per_image: float = 4, score_levels: int = 20
) -> Scene:
    """Images with and without boxes, crowds, all sizes, near and far detections, many equal scores."""
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(10_000, size=num_images, replace=False)
    num_boxes = int(rng.poisson(boxes_per_image * num_images))
    box_image_ids = rng.choice(image_ids, size=num_boxes) if num_images else np.zeros(0)
    sizes = np.exp(rng.uniform(np.log(4), np.log(300), (num_boxes, 2)))
    boxes = np.concatenate([rng.uniform(0, 400, (num_boxes, 2)), sizes], axis=1)
    category_of = np.arange(1, num_classes + 1) * 3
    category_ids = rng.choice(category_of, size=num_boxes)
    truth = GroundTruthColumns(
        image_ids=image_ids,
        box_image_ids=box_image_ids,
        boxes_xywh=boxes,
        category_ids=category_ids,
        iscrowd=rng.random(num_boxes) < 0.08,
        areas=boxes[:, 2] * boxes[:, 3] * rng.uniform(0.5, 1, num_boxes),
        category_names={int(number): f"class {number}" for number in category_of},
    )
    near_rows = np.flatnonzero(rng.random(num_boxes) < 0.8)
    near_rows = (
        np.concatenate([near_rows, rng.choice(near_rows, size=len(near_rows) // 3)])
        if len(near_rows)
        else near_rows
    )
    near = boxes[near_rows] + rng.normal(0, 0.07, (len(near_rows), 4)) * boxes[near_rows, 2:][:, [0, 1, 0, 1]]
    num_random = int(rng.poisson(3 * num_images))
    random_boxes = np.concatenate(
        [rng.uniform(0, 400, (num_random, 2)), rng.uniform(2, 200, (num_random, 2))], axis=1
    )
    wrong = rng.random(len(near_rows)) < 0.15
    detections = DetectionColumns(
        image_ids=np.concatenate([box_image_ids[near_rows], rng.choice(image_ids, size=num_random)]),
        boxes_xywh=np.concatenate([near, random_boxes]),
        scores=rng.integers(1, score_levels, len(near_rows) + num_random) / score_levels,
        category_ids=np.concatenate(
            [
                np.where(wrong, rng.choice(category_of, len(near_rows)), category_ids[near_rows]),
                rng.choice(category_of, num_random),
            ]
        ),
    )
    return truth, detections


def write_coco(
    path: Path, truth: GroundTruthColumns, image_ids: dict[int, int] | None = None, first_id: int = 1
) -> Path:
    """Ground truth as a COCO file; ``image_ids`` renames images (and leaves out those it has not)."""
    renamed = image_ids or {int(number): int(number) for number in truth.image_ids}
    boxes = zip(
        truth.box_image_ids, truth.category_ids, truth.boxes_xywh, truth.areas, truth.iscrowd, strict=True
    )
    content = {
        "images": [
            {"id": new, "file_name": f"{old}.png", "width": 1000, "height": 1000}
            for old, new in renamed.items()
        ],
        "categories": [{"id": number, "name": name} for number, name in truth.category_names.items()],
        "annotations": [
            {
                "id": number,
                "image_id": renamed[int(image)],
                "category_id": int(category),
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }
            for number, (image, category, box, area, crowd) in enumerate(boxes, start=first_id)
            if int(image) in renamed
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def data_samples(
    detections: DetectionColumns, labels: dict[int, int], image_ids: Iterable[int]
) -> list[dict[str, Any]]:
    """Detections as the data samples a metric gets, one for each image; ``labels``: category id → label."""
    samples = []
    for image in map(int, image_ids):
        mine = np.flatnonzero(detections.image_ids == image)
        mine = mine[np.argsort(-detections.scores[mine], kind="stable")]
        corners = detections.boxes_xywh[mine].copy()
        corners[:, 2:] += corners[:, :2]
        predicted = {
            "bboxes": torch.from_numpy(corners).float(),
            "scores": torch.from_numpy(detections.scores[mine]).float(),
            "labels": torch.tensor([labels[int(number)] for number in detections.category_ids[mine]]).long(),
        }
        samples.append({"img_id": image, "pred_instances": predicted, "ori_shape": (1000, 1000)})
    return samples
