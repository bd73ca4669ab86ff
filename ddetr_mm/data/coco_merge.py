"""Parsed annotation files of several sources merged into one :class:`~ddetr_mm.data.coco_table.CocoTable`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddetr_mm.data.coco_checks import (
    MAX_PROBLEMS_SHOWN,
    ParsedSource,
    check_categories,
    check_file_names,
    check_unique,
    merge_categories,
)
from ddetr_mm.data.coco_json import JsonColumns
from ddetr_mm.data.coco_table import CocoTable, visible_boxes
from ddetr_mm.errors import DataError, Problem


def build_table(sources: Sequence[ParsedSource], *, check_folders: Sequence[bool] = ()) -> CocoTable:
    """Merge parsed annotation files into one table.

    Args:
        sources: the sources in order; the files of one source share one space of image and annotation
            ids, different sources do not.
        check_folders: per source, whether a ``file_name`` must stay inside the image folder. Default:
            yes for all.

    Raises:
        DataError: duplicate ids within a source, annotations of unknown images or categories, names that
            leave the image folder, or sources that disagree on a category's name.
    """
    checks = list(check_folders) or [True] * len(sources)
    category_names = merge_categories(sources)
    parts = [_source_part(source, check) for source, check in zip(sources, checks, strict=True)]
    num_files = np.cumsum([0] + [len(source.paths) for source in sources])

    original_ids = np.concatenate([part.image_ids for part in parts])
    unique = len(parts) == 1 or len(np.unique(original_ids)) == len(original_ids)
    counts = np.concatenate([np.diff(part.box_starts) for part in parts])
    sizes_hw = np.concatenate([part.sizes_hw for part in parts])
    boxes_xywh = np.concatenate([part.boxes_xywh for part in parts])
    visible = visible_boxes(boxes_xywh, np.repeat(sizes_hw, counts, axis=0))
    ignored = np.concatenate([part.ignored for part in parts])
    return CocoTable(
        image_ids=original_ids if unique else np.arange(len(original_ids), dtype=np.int64),
        original_image_ids=original_ids,
        source_indices=_repeat_index([len(part.image_ids) for part in parts]),
        shard_indices=np.concatenate(
            [part.shard_indices + first for part, first in zip(parts, num_files[:-1], strict=True)]
        ).astype(np.int32),
        sizes_hw=sizes_hw,
        file_name_bytes=np.concatenate([part.file_name_bytes for part in parts]),
        file_name_starts=_starts(np.concatenate([part.file_name_lengths for part in parts])),
        box_starts=_starts(counts),
        boxes_xywh=boxes_xywh,
        areas=np.concatenate([part.areas for part in parts]),
        category_ids=np.concatenate([part.category_ids for part in parts]),
        crowd=np.concatenate([part.crowd for part in parts]),
        ignored=ignored,
        visible=visible,
        mask_bytes=np.concatenate([part.mask_bytes for part in parts]),
        mask_starts=_mask_starts(parts),
        annotated_shards=np.array([item.annotated for source in sources for item in source.columns], bool),
        category_names=category_names,
    )


@dataclass(frozen=True)
class _Part:
    """One source's share of the table, its boxes grouped by image."""

    image_ids: npt.NDArray[np.int64]
    shard_indices: npt.NDArray[np.int64]
    sizes_hw: npt.NDArray[np.int32]
    file_name_bytes: npt.NDArray[np.uint8]
    file_name_lengths: npt.NDArray[np.int64]
    box_starts: npt.NDArray[np.int64]
    boxes_xywh: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    category_ids: npt.NDArray[np.int32]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    mask_bytes: npt.NDArray[np.uint8]
    mask_lengths: npt.NDArray[np.int64] | None


def _source_part(source: ParsedSource, check_folder: bool) -> _Part:
    columns = source.columns
    known = {category for item in columns for category in item.categories}
    check_unique(source, "images", [item.image_ids for item in columns])
    check_unique(
        source,
        "annotations",
        [item.annotation_ids for item in columns],
        [item.has_id for item in columns],
    )
    check_categories(source, known)
    if check_folder:
        check_file_names(source)

    image_ids = np.concatenate([item.image_ids for item in columns])
    box_rows = _image_rows(source, image_ids)
    order = np.argsort(box_rows, kind="stable")
    names = [name.encode("utf-8", errors="surrogateescape") for item in columns for name in item.file_names]
    mask_bytes, mask_lengths = _mask_columns(columns, order)
    return _Part(
        image_ids=image_ids,
        shard_indices=_repeat_index([len(item.image_ids) for item in columns]).astype(np.int64),
        sizes_hw=np.concatenate([item.sizes_hw for item in columns]),
        file_name_bytes=np.frombuffer(b"".join(names), np.uint8),
        file_name_lengths=np.fromiter(map(len, names), np.int64, len(names)),
        box_starts=_starts(np.bincount(box_rows, minlength=len(image_ids))),
        boxes_xywh=np.concatenate([item.boxes_xywh for item in columns])[order],
        areas=np.concatenate([item.areas for item in columns])[order],
        category_ids=np.concatenate([item.category_ids for item in columns])[order],
        crowd=np.concatenate([item.crowd for item in columns])[order],
        ignored=np.concatenate([item.ignored for item in columns])[order],
        mask_bytes=mask_bytes,
        mask_lengths=mask_lengths,
    )


def _mask_columns(
    columns: Sequence[JsonColumns], order: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
    texts: list[bytes] = []
    for item in columns:
        if item.segmentations is None:
            return np.empty(0, np.uint8), None
        texts += item.segmentations
    texts = [texts[index] for index in order]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return np.frombuffer(b"".join(texts), np.uint8), lengths


def _mask_starts(parts: Sequence[_Part]) -> npt.NDArray[np.int64]:
    lengths = [part.mask_lengths for part in parts if part.mask_lengths is not None]
    return _starts(np.concatenate(lengths)) if lengths else np.empty(0, np.int64)


def _image_rows(source: ParsedSource, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(M,) the image row of every annotation, all files of the source taken together."""
    order = np.argsort(image_ids, kind="stable")
    ordered = image_ids[order]
    rows: list[npt.NDArray[np.int64]] = []
    problems = []
    for path, item in zip(source.paths, source.columns, strict=True):
        wanted = item.annotation_image_ids
        if not len(ordered):
            dangling = np.arange(len(wanted))
            rows.append(np.zeros(len(wanted), np.int64))
        else:
            places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
            dangling = np.flatnonzero(ordered[places] != wanted)
            rows.append(order[places])
        if dangling.size:
            first = int(dangling[0])
            what = "no image has this id" + (f" (nor {dangling.size - 1} more)" if dangling.size > 1 else "")
            where = f"annotations[{first}].image_id"
            mend = "add the images, or remove the annotations"
            problems.append(Problem(what, path, where, int(wanted[first]), mend=mend))
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])
    return np.concatenate(rows)


def _starts(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _repeat_index(counts: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)
