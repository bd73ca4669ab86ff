"""Small COCO files and images for the tests of the data package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np


def image(image_id: int, name: str | None = None, *, width: int = 64, height: int = 48) -> dict[str, Any]:
    return {"id": image_id, "file_name": name or f"{image_id}.jpg", "width": width, "height": height}


def box(box_id: int, image_id: int, xywh: list[float], category: int = 1, **more: Any) -> dict[str, Any]:
    area = more.pop("area", xywh[2] * xywh[3])
    record = {"id": box_id, "image_id": image_id, "bbox": xywh, "category_id": category, "area": area}
    return {**record, "iscrowd": 0, **more}


def categories(*names: str, first: int = 1) -> list[dict[str, Any]]:
    return [{"id": first + index, "name": name} for index, name in enumerate(names)]


def coco(
    images: list[dict[str, Any]], boxes: list[dict[str, Any]], cats: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return {"images": images, "annotations": boxes, "categories": cats or categories("person", "face", "bag")}


def write_json(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def random_image(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth random picture (H, W, 3) uint8, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write_images(folder: Path, document: dict[str, Any]) -> None:
    """One JPEG for every image that a COCO document lists."""
    for record in document["images"]:
        path = folder / record["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), random_image(record["id"], record["height"], record["width"]))


def three_images() -> dict[str, Any]:
    """Image 7 with two objects and a crowd, 3 without any, 5 with one object."""
    images = [image(7), image(3, "sub/3.jpg", width=40, height=60), image(5)]
    boxes = [
        box(1, 7, [1, 2, 10, 20], 2),
        box(2, 5, [0, 0, 64, 48], 3),
        box(3, 7, [5.5, 6.25, 30, 20], 1),
        box(4, 7, [0, 0, 50, 40], 1, iscrowd=1),
    ]
    return coco(images, boxes)
