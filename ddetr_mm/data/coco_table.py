"""All annotations of a dataset as a table of columns, several sources merged.

A table is a handful of numpy arrays, grouped by image, so that it can lie in a mapped file and be read
by any number of processes without a copy (:mod:`ddetr_mm.data.column_file`). Dataset and metric read the
same table and therefore agree on the image ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CocoTable:
    """Images and boxes of one or several sources. N images, M boxes, grouped by image row.

    Attributes:
        image_ids: (N,) int64, unique. The files' own ids where those are unique over all sources, else
            the row numbers.
        original_image_ids: (N,) int64, as in the files; unique within one source.
        source_indices: (N,) int32, position in the list of sources.
        shard_indices: (N,) int32, position in the list of all files of all sources.
        sizes_hw: (N, 2) int32, pixels, as recorded in the file.
        file_name_bytes: (F,) uint8, all names in UTF-8, one after the other; read by :meth:`file_name`.
        file_name_starts: (N + 1,) int64.
        box_starts: (N + 1,) int64: image row ``i`` owns the boxes ``box_starts[i]:box_starts[i + 1]``, in
            the file's order.
        boxes_xywh: (M, 4) float64, pixels, unclipped.
        areas: (M,) float64, pixels.
        category_ids: (M,) int32.
        crowd: (M,) bool, ``iscrowd``.
        ignored: (M,) bool, the annotation says ``ignore``: not for training.
        visible: (M,) bool, something is left of the box when it is clipped to its image. Boxes that have
            no area, or lie outside, are not visible and no training target.
        mask_bytes, mask_starts: (S,) uint8 and (M + 1,) int64, the ``segmentation`` of every box as JSON
            text; both empty unless they were asked for.
        annotated_shards: (number of files,) bool, whether the file has ``annotations`` at all.
        category_names: category id to name, in the order of the files.
    """

    image_ids: npt.NDArray[np.int64]
    original_image_ids: npt.NDArray[np.int64]
    source_indices: npt.NDArray[np.int32]
    shard_indices: npt.NDArray[np.int32]
    sizes_hw: npt.NDArray[np.int32]
    file_name_bytes: npt.NDArray[np.uint8]
    file_name_starts: npt.NDArray[np.int64]
    box_starts: npt.NDArray[np.int64]
    boxes_xywh: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    category_ids: npt.NDArray[np.int32]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    visible: npt.NDArray[np.bool_]
    mask_bytes: npt.NDArray[np.uint8]
    mask_starts: npt.NDArray[np.int64]
    annotated_shards: npt.NDArray[np.bool_]
    category_names: Mapping[int, str]

    @property
    def num_images(self) -> int:
        """Number of images, N."""
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        """Number of boxes, M."""
        return len(self.category_ids)

    @property
    def box_image_rows(self) -> npt.NDArray[np.int64]:
        """(M,) int64, the image row of every box. Computed anew on each access."""
        return np.repeat(np.arange(self.num_images), np.diff(self.box_starts))

    @property
    def notes(self) -> list[str]:
        """What a user should know about the data: ids that were replaced, boxes that cannot be used."""
        notes = []
        if not np.array_equal(self.image_ids, self.original_image_ids):
            notes.append("image ids repeat across sources: images are numbered from 0 instead")
        lost = np.flatnonzero(~self.visible)
        rows = np.searchsorted(self.box_starts, lost, side="right") - 1
        sources, first, counts = np.unique(self.source_indices[rows], return_index=True, return_counts=True)
        for source, index, count in zip(sources.tolist(), first.tolist(), counts.tolist(), strict=True):
            notes.append(
                f"source {source}: {count} boxes have no area inside their image and are not used, the first "
                f"in {self.file_name(int(rows[index]))}: {self.boxes_xywh[lost[index]].tolist()}"
            )
        return notes

    def file_name(self, row: int) -> str:
        """The name of image ``row``, relative to its source's image folder."""
        start, end = self.file_name_starts[row : row + 2]
        return self.file_name_bytes[start:end].tobytes().decode("utf-8", errors="surrogateescape")

    def boxes_of(self, row: int) -> slice:
        """The slice of the box columns that belongs to image ``row``."""
        start, end = self.box_starts[row : row + 2]
        return slice(int(start), int(end))

    def segmentation(self, box: int) -> Any:
        """The ``segmentation`` of box ``box`` (polygons or RLE); None where there is none."""
        if len(self.mask_starts) < 2:
            return None
        start, end = self.mask_starts[box : box + 2]
        return json.loads(self.mask_bytes[start:end].tobytes()) if end > start else None

    def __deepcopy__(self, memo: dict[int, Any]) -> CocoTable:
        return self  # nothing changes a table: copies of a dataset share it

    @classmethod
    def array_names(cls) -> list[str]:
        """Names of the array columns, in order."""
        return [field.name for field in fields(cls) if field.name != "category_names"]


def visible_boxes(
    boxes_xywh: npt.NDArray[np.float64], sizes_hw: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Which boxes keep an area when clipped to their image.

    Computed in single precision like the reference. An image whose EXIF tag turns it on decoding may
    be recorded with its sides swapped, so that a box counts when it is visible in either orientation;
    the exact clipping happens after decoding (:mod:`ddetr_mm.data.transforms`).

    Args:
        boxes_xywh: (M, 4) pixels.
        sizes_hw: (M, 2) the recorded size of each box's image.

    Returns:
        (M,) bool.
    """
    corners = boxes_xywh.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    sizes_wh = sizes_hw[:, ::-1].astype(np.float32)
    left_top = np.maximum(corners[:, :2], 0)
    upright = (np.minimum(corners[:, 2:], sizes_wh) > left_top).all(axis=1)
    turned = (np.minimum(corners[:, 2:], sizes_wh[:, ::-1]) > left_top).all(axis=1)
    return np.asarray(upright | turned)
