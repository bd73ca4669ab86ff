"""Random ground truth and detections, with everything COCO's rules treat specially."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ddetr_mm.evaluation.columns import DetectionColumns, GroundTruthColumns

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
    hits = np.flatnonzero(rng.random(num_boxes) < 0.8)
    hits = np.concatenate([hits, rng.choice(hits, size=len(hits) // 3)]) if len(hits) else hits
    near = boxes[hits] + rng.normal(0, 0.07, (len(hits), 4)) * boxes[hits, 2:][:, [0, 1, 0, 1]]
    num_stray = int(rng.poisson(3 * num_images))
    stray = np.concatenate([rng.uniform(0, 400, (num_stray, 2)), rng.uniform(2, 200, (num_stray, 2))], axis=1)
    wrong = rng.random(len(hits)) < 0.15
    detections = DetectionColumns(
        image_ids=np.concatenate([box_image_ids[hits], rng.choice(image_ids, size=num_stray)]),
        boxes_xywh=np.concatenate([near, stray]),
        scores=rng.integers(1, score_levels, len(hits) + num_stray) / score_levels,
        category_ids=np.concatenate(
            [
                np.where(wrong, rng.choice(category_of, len(hits)), category_ids[hits]),
                rng.choice(category_of, num_stray),
            ]
        ),
    )
    return truth, detections


@pytest.fixture
def make_scene() -> Callable[..., Scene]:
    """The builder above."""
    return random_scene
