"""Annotations of one or several COCO files as one table of columns: the table, merging, checks.

A table is a set of numpy arrays, grouped by image, so that any number of processes can read it from a mapped
file without a copy (:mod:`ddetr_mm.datasets.annotation_cache`). Dataset and metric read the same table and
therefore agree on the image ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddetr_mm.datasets.coco_json import JsonColumns
from ddetr_mm.errors import DataError, Problem


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
        visible: (M,) bool, whether the box keeps an area when it is clipped to its image. Others are no
            training target.
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
        """Notes for the user: ids that were replaced, boxes that cannot be used."""
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
        return self  # a table never changes: copies of a dataset share it

    @classmethod
    def array_names(cls) -> list[str]:
        """Names of the array columns, in order."""
        return [field.name for field in fields(cls) if field.name != "category_names"]


def visible_boxes(
    boxes_xywh: npt.NDArray[np.float64], sizes_hw: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Which boxes keep an area when clipped to their image.

    In single precision, as in TAO. An image that an EXIF tag rotates may be recorded with its sides swapped,
    so a box counts when it is visible in either orientation; transforms clip it exactly after decoding.

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


# --- Merging ---


@dataclass(frozen=True)
class ParsedSource:
    """The parsed files of one source, in order, with their paths for messages."""

    paths: tuple[Path, ...]
    columns: tuple[JsonColumns, ...]


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
            hint = "add the images, or remove the annotations"
            problems.append(Problem(what, path, where, int(wanted[first]), hint=hint))
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])
    return np.concatenate(rows)


def _starts(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _repeat_index(counts: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


# --- Checks of parsed files ---

MAX_PROBLEMS_SHOWN = 10


def check_unique(
    source: ParsedSource,
    kind: str,
    ids_by_file: Sequence[npt.NDArray[np.int64]],
    given_by_file: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> None:
    """Ids of one kind must not repeat within a source.

    Raises:
        DataError: an id repeats.
    """
    ids = np.concatenate(ids_by_file)
    if given_by_file is not None:
        ids = ids[np.concatenate(given_by_file)]
    if len(ids) < 2:
        return
    ordered = np.sort(ids)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not repeated.size:
        return
    example = int(repeated[0])
    places = []
    for index, (path, file_ids) in enumerate(zip(source.paths, ids_by_file, strict=True)):
        found = file_ids == example
        if given_by_file is not None:
            found = found & given_by_file[index]
        places += [(path, int(row)) for row in np.flatnonzero(found)]
    (path, first), (other_path, second) = places[:2]
    other = f"{kind}[{second}]" + ("" if other_path == path else f" of {other_path}")
    what = f"id {example} is here and in {other}"
    if repeated.size > 1:
        what += f"; {repeated.size} ids repeat in all"
    hint = "give every entry of a source its own id, or make the files separate sources"
    raise DataError(Problem(what, path, f"{kind}[{first}].id", example, hint=hint))


def check_categories(source: ParsedSource, known: set[int]) -> None:
    """Every annotation's category must be among the ``known`` ids of its source."""
    problems = []
    listed = np.fromiter(known, np.int64, len(known))
    for path, item in zip(source.paths, source.columns, strict=True):
        unknown = np.flatnonzero(~np.isin(item.category_ids, listed))
        if unknown.size:
            first = int(unknown[0])
            problems.append(
                Problem(
                    "is not among the file's categories"
                    + (f" ({unknown.size} annotations in all)" if unknown.size > 1 else ""),
                    path,
                    f"annotations[{first}].category_id",
                    int(item.category_ids[first]),
                    allowed=sorted(known)[:100],
                    hint="add the category",
                )
            )
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])


def check_file_names(source: ParsedSource) -> None:
    """Every ``file_name`` must be inside the source's image folder.

    Raises:
        DataError: one is not.
    """
    problems = []
    for path, item in zip(source.paths, source.columns, strict=True):
        for row, name in enumerate(item.file_names):
            if leaves_folder(name):
                problems.append(
                    Problem(
                        "names no file below the image folder",
                        path,
                        f"images[{row}].file_name",
                        name,
                        allowed="a relative path without '..'",
                        hint="write the name relative to image_dir",
                    )
                )
                if len(problems) == MAX_PROBLEMS_SHOWN:
                    raise DataError(*problems)
    DataError.collect(problems)


def leaves_folder(name: str) -> bool:
    """Whether a file name, joined to a folder, names something outside it, or nothing."""
    if name and name[0] not in "/\\" and ".." not in name and "\0" not in name and ":" not in name[:2]:
        return False  # the common case, without building a path
    slashed = name.replace("\\", "/")
    drive = len(name) > 1 and name[0].isalpha() and slashed[1:3] == ":/"
    return not name or "\0" in name or slashed[0] == "/" or ".." in slashed.split("/") or drive


def merge_categories(sources: Sequence[ParsedSource]) -> dict[int, str]:
    """One mapping of id to name; sources must agree on every id they share."""
    names: dict[int, str] = {}
    origin: dict[int, Path] = {}
    problems = []
    for path, item in _files(sources):
        for category, name in item.categories.items():
            if category in names and names[category] != name:
                what = (
                    f"category id {category} is {name!r} here and {names[category]!r} in {origin[category]}"
                )
                hint = "give one id one name in all sources"
                problems.append(Problem(what, path, "categories", hint=hint))
            names.setdefault(category, name)
            origin.setdefault(category, path)
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])
    return names


def _files(sources: Sequence[ParsedSource]) -> Iterator[tuple[Path, JsonColumns]]:
    for source in sources:
        yield from zip(source.paths, source.columns, strict=True)
