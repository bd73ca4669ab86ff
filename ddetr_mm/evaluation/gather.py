"""Results of many ranks brought together: packed into few arrays to travel, one entry an image after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class ImageResult:
    """Detections of one image, best first as the model gave them.

    Attributes:
        image_id: the dataset's id.
        boxes_xyxy: (n, 4) float32 pixels of the original image.
        scores: (n,) float32.
        labels: (n,) class numbers of the model.
        instances: the image's ground truth as mmdet's data samples carry it, where that is used.
        image_path: the image file, where pictures will be drawn.
    """

    image_id: int
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    instances: list[dict[str, Any]] | None = None
    image_path: str | None = None


@dataclass
class PackedResults:
    """Results of one rank as seven objects, however many images there are."""

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
    """All ranks' images, each once, ordered by id.

    A distributed sampler gives some images to two ranks to make their shares equal; both find the same.
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
