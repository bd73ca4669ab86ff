"""Ground truth and detections as columns: what evaluation is computed from.

Legend: I images, N ground-truth boxes, D detections. Boxes are (x, y, width, height) in pixels of the
original image, x and y being the top left corner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np


def _column(values: object, dtype: type, shape: tuple[int, ...], name: str) -> np.ndarray:
    array: np.ndarray = np.asarray(values, dtype=dtype)
    if array.size == 0 and len(array) == 0:
        array = array.reshape(0, *shape[1:])
    if array.ndim != len(shape) or array.shape[1:] != shape[1:]:
        raise ValueError(f"{name} must have shape {('n', *shape[1:])}, not {array.shape}")
    return array


@dataclass(frozen=True)
class GroundTruthColumns:
    """What is really in the images.

    Attributes:
        image_ids: (I,) every image, those without boxes too.
        box_image_ids: (N,) the image a box is in.
        boxes_xywh: (N, 4) float64.
        category_ids: (N,) COCO category ids.
        iscrowd: (N,) bool; detections on a crowd region count neither for nor against.
        areas: (N,) float64 square pixels, by which COCO tells small from large.
        category_names: category id → name, for every category, those without boxes too.
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
    """What a detector found.

    Attributes:
        image_ids: (D,) the image a detection is in.
        boxes_xywh: (D, 4) float64.
        scores: (D,) float64; of equal scores in one image the first given ranks first.
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
        """No detections at all."""
        return cls(*(np.zeros(0) for _ in fields(cls)))

    def rows(self, keep: np.ndarray) -> DetectionColumns:
        """The rows of a boolean mask or of indices."""
        return DetectionColumns(*(getattr(self, column.name)[keep] for column in fields(self)))

    def finite_rows(self) -> np.ndarray:
        """(D,) bool: whether box and score are ordinary numbers."""
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
