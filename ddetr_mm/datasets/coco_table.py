"""Annotations of one or several COCO files as one table of columns: the table, merging, checks.

A table is a set of numpy arrays, grouped by image, so that any number of processes can read it from a mapped
file without a copy (:mod:`ddetr_mm.datasets.annotation_cache`). Dataset and metric read the same table and
therefore agree on the image ids.

File names come from files that others have made, so they are confined: a relative name never leaves the image
folder, and a name with the scheme of a URL is refused instead of fetched. An absolute name is taken as it is,
also where there is an image folder, as in TAO and mmdet: the file's author means just these places.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddetr_mm.classes import BY_NAME_HINT, MERGE_HINT, find_names, number_names
from ddetr_mm.datasets.coco_json import EXAMPLES_SHOWN, FileCategories, JsonColumns, Repair, refusal
from ddetr_mm.errors import DataError, Problem, shorten


@dataclass(frozen=True)
class CocoTable:
    """Images and boxes of one or several sources. N images, M boxes, grouped by image row.

    Attributes:
        image_ids: (N,) int64, unique. The files' own ids where those are numbers and unique over all
            sources, else the row numbers.
        original_image_ids: (N,) int64, as in the files; unique within one source. Of a text that is no
            number, a digest: :meth:`original_id` gives the id as written.
        source_indices: (N,) int32, position in the list of sources.
        shard_indices: (N,) int32, position in the list of all files of all sources.
        sizes_hw: (N, 2) int32, pixels, as recorded in the file; 0 where it has none and none was asked for.
        file_name_bytes: (F,) uint8, all names in UTF-8, one after the other; read by :meth:`file_name`.
        file_name_starts: (N + 1,) int64.
        box_starts: (N + 1,) int64: image row ``i`` owns the boxes ``box_starts[i]:box_starts[i + 1]``, in
            the file's order.
        boxes_xywh: (M, 4) float64, pixels, unclipped.
        areas: (M,) float64, pixels.
        category_ids: (M,) int64.
        crowd: (M,) bool, ``iscrowd``.
        ignored: (M,) bool, the annotation says ``ignore``: not for training.
        visible: (M,) bool, whether the box keeps an area when it is clipped to its image. Others are no
            training target.
        mask_bytes, mask_starts: (S,) uint8 and (M + 1,) int64, the ``segmentation`` of every box as JSON
            text; both empty unless they were asked for.
        id_text_bytes, id_text_starts: (T,) uint8 and (N + 1,) int64, image ids that are texts, empty for the
            others; both empty where all are numbers.
        annotated_shards: (number of files,) bool, whether the file has ``annotations`` at all.
        category_names: category id to name, in the order of the files.
        repairs: what deviated from the format and was put right or left out: a sentence a kind, with the
            number of cases and the first three.
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
    category_ids: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    visible: npt.NDArray[np.bool_]
    mask_bytes: npt.NDArray[np.uint8]
    mask_starts: npt.NDArray[np.int64]
    id_text_bytes: npt.NDArray[np.uint8]
    id_text_starts: npt.NDArray[np.int64]
    annotated_shards: npt.NDArray[np.bool_]
    category_names: Mapping[int, str]
    repairs: tuple[str, ...] = ()

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
        """Notes for the user: repairs, ids that were replaced, boxes that cannot be used."""
        notes = list(self.repairs)
        if not np.array_equal(self.image_ids, self.original_image_ids):
            reason = "are texts" if len(self.id_text_starts) else "repeat across sources"
            notes.append(f"image ids {reason}: images are numbered from 0 instead")
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

    def original_id(self, row: int) -> int | str:
        """The id of image ``row`` as its file has it."""
        if len(self.id_text_starts):
            start, end = self.id_text_starts[row : row + 2]
            if end > start:
                return self.id_text_bytes[start:end].tobytes().decode("utf-8", errors="surrogatepass")
        return int(self.original_image_ids[row])

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
        return [field.name for field in fields(cls) if field.name not in ("category_names", "repairs")]


def visible_boxes(
    boxes_xywh: npt.NDArray[np.float64], sizes_hw: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Which boxes keep an area when clipped to their image.

    In single precision, as in TAO. An image that an EXIF tag rotates may be recorded with its sides swapped,
    so a box counts when it is visible in either orientation; transforms clip it exactly after decoding.

    Args:
        boxes_xywh: (M, 4) pixels.
        sizes_hw: (M, 2) the recorded size of each box's image; 0 where it is not known.

    Returns:
        (M,) bool.
    """
    corners = boxes_xywh.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    sizes_wh = np.where(sizes_hw == 0, np.inf, sizes_hw)[:, ::-1].astype(np.float32)
    left_top = np.maximum(corners[:, :2], 0)
    upright = (np.minimum(corners[:, 2:], sizes_wh) > left_top).all(axis=1)
    turned = (np.minimum(corners[:, 2:], sizes_wh[:, ::-1]) > left_top).all(axis=1)
    return np.asarray(upright | turned)


# --- Merging ---


@dataclass(frozen=True)
class ParsedSource:
    """The parsed files of one source, in order, with their paths for messages.

    Attributes:
        paths: the files.
        columns: their content.
        has_folder: whether the source has an image folder.
    """

    paths: tuple[Path, ...]
    columns: tuple[JsonColumns, ...]
    has_folder: bool = True


def build_table(
    sources: Sequence[ParsedSource],
    *,
    strict: bool = False,
    numbered_names: Sequence[str | None] | None = None,
    merge_repeated: bool = False,
) -> CocoTable:
    """Merge parsed annotation files into one table.

    Args:
        sources: the sources in order; the files of one source share one space of image and annotation
            ids, different sources do not.
        strict: annotations that have to be left out (of an image or a category that is not in the files,
            or without a box) are an error.
        numbered_names: see :func:`resolve_categories`.
        merge_repeated: likewise, as ``merge``.

    Raises:
        DataError: duplicate ids within a source, names that are not below the image folder, sources that
            disagree on a category's name, or, where ``strict``, annotations that have to be left out.
    """
    categories = resolve_categories(sources, numbered_names, merge_repeated)
    parts = [_source_part(*pair) for pair in zip(sources, categories.maps, strict=True)]
    repairs = merge_repairs(
        [repair for source in sources for item in source.columns for repair in item.repairs]
        + [repair for part in parts for repair in part.repairs]
        + categories.repairs
    )
    if strict:
        DataError.collect(
            refusal(
                repair.what.removesuffix(LEFT_OUT),
                repair.count,
                repair.cases,
                "correct the file, or set ddetr_mm.strict_annotations to false (strict_annotations of the "
                "dataset and the metric): they are then left out",
            )
            for repair in repairs
            if repair.drops
        )
    num_files = np.cumsum([0] + [len(source.paths) for source in sources])

    original_ids = np.concatenate([part.image_ids for part in parts])
    texts = [text for source in sources for item in source.columns for text in _id_texts(item)]
    has_texts = any(texts)
    unique = not has_texts and (len(parts) == 1 or len(np.unique(original_ids)) == len(original_ids))
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
        id_text_bytes=np.frombuffer(b"".join(texts), np.uint8),
        id_text_starts=_starts(list(map(len, texts))) if has_texts else np.empty(0, np.int64),
        annotated_shards=np.array([item.annotated for source in sources for item in source.columns], bool),
        category_names=categories.names,
        repairs=tuple(str(repair) for repair in repairs),
    )


def _id_texts(columns: JsonColumns) -> list[bytes]:
    """Every image's id as written where it is a text, else empty."""
    if not columns.image_id_texts:
        return [b""] * len(columns.image_ids)
    return [(text or "").encode("utf-8", errors="surrogatepass") for text in columns.image_id_texts]


# --- Repairs of all files ---

LEFT_OUT = ": left out"


@dataclass(frozen=True)
class MergedRepair:
    """One kind of deviation over all files.

    Attributes:
        what: the deviation and what was done about it.
        count: number of cases.
        cases: file, place and value of up to three of them.
        drops: whether the annotations concerned are left out.
    """

    what: str
    count: int
    cases: tuple[tuple[Path, str, Any], ...]
    drops: bool

    def __str__(self) -> str:
        shown, last = [], None
        for path, where, value in self.cases:
            place = where if path == last else f"{path}: {where}" if where else str(path)
            shown.append(place + ("" if value is None else f" ({shorten(value)})"))
            last = path
        text = f"{self.what}: {self.count}"
        return f"{text}, the first: {'; '.join(shown)}" if shown else text


def merge_repairs(repairs: Sequence[Repair]) -> list[MergedRepair]:
    """One entry a kind, in the order in which the kinds occur."""
    by_kind: dict[str, list[Repair]] = {}
    for repair in repairs:
        by_kind.setdefault(repair.what, []).append(repair)
    return [
        MergedRepair(
            what,
            sum(repair.count for repair in found),
            tuple((one.path, *case) for one in found for case in one.examples or (("", None),))[
                :EXAMPLES_SHOWN
            ],
            found[0].drops,
        )
        for what, found in by_kind.items()
    ]


# --- One source ---


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
    category_ids: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    mask_bytes: npt.NDArray[np.uint8]
    mask_lengths: npt.NDArray[np.int64] | None
    repairs: list[Repair]


def _source_part(source: ParsedSource, maps: Sequence[dict[int, int] | None]) -> _Part:
    columns = source.columns
    category_ids = [_mapped_ids(item.category_ids, one) for item, one in zip(columns, maps, strict=True)]
    check_unique(source, "images", [item.image_ids for item in columns])
    check_unique(
        source,
        "annotations",
        [item.annotation_ids for item in columns],
        [item.has_id for item in columns],
    )
    check_file_names(source)

    image_ids = np.concatenate([item.image_ids for item in columns])
    box_rows, has_image, repairs = _image_rows(source, image_ids)
    has_category, unlisted = _listed_categories(source, has_image)
    keep = np.flatnonzero(has_image & has_category)
    order = keep[np.argsort(box_rows[keep], kind="stable")]
    names = [name.encode("utf-8", errors="surrogateescape") for item in columns for name in item.file_names]
    mask_bytes, mask_lengths = _mask_columns(columns, order)
    return _Part(
        image_ids=image_ids,
        shard_indices=_repeat_index([len(item.image_ids) for item in columns]).astype(np.int64),
        sizes_hw=np.concatenate([item.sizes_hw for item in columns]),
        file_name_bytes=np.frombuffer(b"".join(names), np.uint8),
        file_name_lengths=np.fromiter(map(len, names), np.int64, len(names)),
        box_starts=_starts(np.bincount(box_rows[keep], minlength=len(image_ids))),
        boxes_xywh=np.concatenate([item.boxes_xywh for item in columns])[order],
        areas=np.concatenate([item.areas for item in columns])[order],
        category_ids=np.concatenate(category_ids)[order],
        crowd=np.concatenate([item.crowd for item in columns])[order],
        ignored=np.concatenate([item.ignored for item in columns])[order],
        mask_bytes=mask_bytes,
        mask_lengths=mask_lengths,
        repairs=[*repairs, *unlisted, *_absolute_names(source)],
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


def _image_rows(
    source: ParsedSource, image_ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], list[Repair]]:
    """The image row of every annotation of all files together, and which annotations have an image.

    Returns:
        (M,) rows, meaningless where there is no image; (M,) bool; the annotations without an image.
    """
    order = np.argsort(image_ids, kind="stable")
    ordered = image_ids[order]
    rows: list[npt.NDArray[np.int64]] = []
    known: list[npt.NDArray[np.bool_]] = []
    repairs = []
    for path, item in zip(source.paths, source.columns, strict=True):
        wanted = item.annotation_image_ids
        if len(ordered):
            places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
            rows.append(order[places])
            known.append(ordered[places] == wanted)
        else:
            rows.append(np.zeros(len(wanted), np.int64))
            known.append(np.zeros(len(wanted), bool))
        what = "annotations of images that are not in the file" + LEFT_OUT
        repairs += _left_out(what, path, item, ~known[-1], "image_id", wanted)
    return np.concatenate(rows), np.concatenate(known), repairs


def _listed_categories(
    source: ParsedSource, has_image: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], list[Repair]]:
    """(M,) which annotations have a category of their source; those with an image that have none."""
    listed = np.array(sorted({number for item in source.columns for number in item.categories}), np.int64)
    known: list[npt.NDArray[np.bool_]] = []
    repairs = []
    start = 0
    for path, item in zip(source.paths, source.columns, strict=True):
        known.append(np.isin(item.category_ids, listed))
        unknown = ~known[-1] & has_image[start : start + len(item.category_ids)]
        what = "annotations of categories that are not in the file" + LEFT_OUT
        repairs += _left_out(what, path, item, unknown, "category_id", item.category_ids)
        start += len(item.category_ids)
    return np.concatenate(known), repairs


def _left_out(
    what: str,
    path: Path,
    item: JsonColumns,
    marked: npt.NDArray[np.bool_],
    key: str,
    ids: npt.NDArray[np.int64],
) -> list[Repair]:
    rows = np.flatnonzero(marked)
    if not rows.size:
        return []
    examples = tuple(
        (f"annotations[{item.place(row)}].{key}", item.id_texts.get(int(ids[row]), int(ids[row])))
        for row in rows[:EXAMPLES_SHOWN].tolist()
    )
    return [Repair(what, int(rows.size), path, examples, drops=True)]


def _starts(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    counts = np.asarray(counts, np.int64)
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


def check_file_names(source: ParsedSource) -> None:
    """Every ``file_name`` must be a path below the source's image folder, or an absolute path.

    Raises:
        DataError: one is not; with their number and the first three.
    """
    found: dict[str, list[tuple[Path, str, Any]]] = {}
    hints: dict[str, str] = {}
    for path, item in zip(source.paths, source.columns, strict=True):
        for row, name in enumerate(item.file_names):
            fault = name_fault(name)
            if fault:
                found.setdefault(fault[0], []).append((path, f"images[{row}].file_name", name))
                hints[fault[0]] = fault[1]
    DataError.collect(refusal(what, len(cases), cases, hints[what]) for what, cases in found.items())


_SCHEME = re.compile(
    r"(https?|ftps?|s3|s3a|gs|gcs|az|abfss?|hdfs|oss|file|data|lmdb|petrel|ceph|memcached|sftp|ssh)\s*:", re.I
)


def name_fault(name: str) -> tuple[str, str] | None:
    """What is wrong with a ``file_name``, and what to do; None where it can be used."""
    if name and "\\" not in name and ".." not in name and ":" not in name and "\0" not in name:
        return None  # the common case
    if not name or "\0" in name:
        return "file names that name no file", "give the file's name, relative to image_dir"
    if "://" in name or _SCHEME.match(name):
        return (
            "file names that are URLs, which are not fetched",
            "download the images and give their names relative to image_dir",
        )
    slashed = name.replace("\\", "/")
    if name[0] == "\\" or re.match(r"[A-Za-z]:/", slashed):
        return "file names that are paths of Windows", "give them relative to image_dir"
    if slashed[0] != "/" and ".." in slashed.split("/"):
        return "file names that leave the image folder", "write them relative to image_dir, without '..'"
    return None


def _absolute_names(source: ParsedSource) -> list[Repair]:
    """Names that are taken as they are, although there is an image folder."""
    if not source.has_folder:
        return []
    repairs = []
    for path, item in zip(source.paths, source.columns, strict=True):
        names = [(row, name) for row, name in enumerate(item.file_names) if name[:1] == "/"]
        if names:
            examples = tuple((f"images[{row}].file_name", name) for row, name in names[:EXAMPLES_SHOWN])
            repairs.append(Repair("absolute file names: image_dir is not used", len(names), path, examples))
    return repairs


# --- Categories of all files ---


@dataclass(frozen=True)
class Categories:
    """The categories of all sources.

    Attributes:
        names: id to name.
        maps: for each file of each source, id in the file to id in the table, or None where all ids stay.
        repairs: categories that were left out or merged.
    """

    names: dict[int, str]
    maps: tuple[tuple[dict[int, int] | None, ...], ...]
    repairs: list[Repair]


def resolve_categories(
    sources: Sequence[ParsedSource],
    numbered_names: Sequence[str | None] | None = None,
    merge: bool = False,
) -> Categories:
    """Bring the categories of all files together.

    Args:
        sources: all sources.
        numbered_names: number the classes by their names: the class at position ``i`` of this list gets the
            id ``i + 1``, whatever its id in the files; classes that are not in it are numbered after them.
            None: ids are those of the files.
        merge: take categories of one name for one class.

    Raises:
        DataError: an id has two names, or, without ``merge``, a name two ids, where ids are those of the
            files in all of them together, else in one file.
    """
    files = [(path, FileCategories.of(item)) for path, item in _files(sources)]
    out, repairs = left_out_categories(files)
    if numbered_names is not None:
        return _numbered_categories(sources, numbered_names, merge, out, repairs)
    names = {number: name for number, name in merge_categories(sources).items() if (number, name) not in out}
    origin: dict[int, Path] = {}
    for path, item in files:
        for number in item.names:
            origin.setdefault(number, path)
    repeated = _repeated_names(list(names.items()))
    if not repeated:
        return Categories(names, _same_maps(sources), repairs)
    if not merge:
        raise DataError(*(_repeated_problem(name, ids, origin) for name, ids in repeated.items()))
    target = {number: min(ids) for ids in repeated.values() for number in ids}
    for name, ids in repeated.items():
        what = f"categories of one name are merged: {name!r} {ids}"
        repairs.append(Repair(what, len(ids), origin[ids[0]], ()))
    kept = {number: name for number, name in names.items() if target.get(number, number) == number}
    maps = tuple(tuple(dict(target) for _ in source.paths) for source in sources)
    return Categories(kept, maps, repairs)


def left_out_categories(
    files: Sequence[tuple[Path, FileCategories]],
) -> tuple[set[tuple[int, str]], list[Repair]]:
    """Categories (id, name) without annotations that are only the supercategory of all others."""
    candidates = {
        (number, item.names[number]): path for path, item in files for number in item.supercategory_ids
    }
    if not candidates:
        return set(), []
    union = {number: name for _, item in files for number, name in item.names.items()}
    used = {
        (number, item.names.get(number, union.get(number)))
        for _, item in files
        for number in item.annotated_ids
    }
    used |= {
        pair for _, item in files for pair in item.names.items() if pair[0] not in item.supercategory_ids
    }
    out = {pair for pair in candidates if pair not in used}
    what = "categories that are only the supercategory of the others" + LEFT_OUT
    return out, [
        Repair(what, 1, candidates[pair], (("categories", f"{pair[0]} ({pair[1]})"),)) for pair in sorted(out)
    ]


def _numbered_categories(
    sources: Sequence[ParsedSource],
    numbered_names: Sequence[str | None],
    merge: bool,
    out: set[tuple[int, str]],
    repairs: list[Repair],
) -> Categories:
    by_file = []
    problems = []
    for source in sources:
        # An annotation may be in another file than its category.
        union: dict[int, str] = {}
        for item in source.columns:
            union = {**item.categories, **union}
        for path, item in zip(source.paths, source.columns, strict=True):
            own = {number: name for number, name in item.categories.items() if (number, name) not in out}
            for name, ids in _repeated_names(list(own.items())).items():
                if not merge:
                    problems.append(_repeated_problem(name, ids, dict.fromkeys(ids, path)))
            rest = {number: name for number, name in union.items() if number not in item.categories}
            by_file.append(own | {number: name for number, name in rest.items() if (number, name) not in out})
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])
    known = [name or None for name in numbered_names]
    extra = number_names(
        [name for name, place in _places(names, known).items() if place is None] for names in by_file
    )
    known += extra
    maps = []
    for names in by_file:
        places = _places(names, known)
        found = ((number, places[name]) for number, name in names.items())
        maps.append({number: place + 1 for number, place in found if place is not None})
    listed = {place + 1: name for place, name in enumerate(known) if name is not None}
    remaining = iter(maps)
    grouped = tuple(tuple(next(remaining) for _ in source.paths) for source in sources)
    return Categories(listed, grouped, repairs)


def _places(names: Mapping[int, str], known: Sequence[str | None]) -> dict[str, int | None]:
    unique = list(dict.fromkeys(names.values()))
    return dict(zip(unique, find_names(unique, known), strict=True))


def _same_maps(sources: Sequence[ParsedSource]) -> tuple[tuple[None, ...], ...]:
    return tuple(tuple(None for _ in source.paths) for source in sources)


def _repeated_names(pairs: Sequence[tuple[int, str]]) -> dict[str, list[int]]:
    by_name: dict[str, list[int]] = {}
    for number, name in pairs:
        by_name.setdefault(name, []).append(number)
    return {name: ids for name, ids in by_name.items() if len(ids) > 1}


def _repeated_problem(name: str, ids: Sequence[int], origin: Mapping[int, Path]) -> Problem:
    first, second = ids[:2]
    what = f"categories {first} and {second} have one name, {name!r}"
    if len(ids) > 2:
        what += f" ({len(ids)} ids in all)"
    if origin[first] != origin[second]:
        what += f"; {first} is in {origin[first]}"
        hint = f"give one class one id in all files, {MERGE_HINT}; {BY_NAME_HINT}"
    else:
        hint = f"give one class one id, {MERGE_HINT}"
    return Problem(what, origin[second], "categories", [int(number) for number in ids], hint=hint)


def _mapped_ids(ids: npt.NDArray[np.int64], mapping: dict[int, int] | None) -> npt.NDArray[np.int64]:
    """(M,) ids of the table of ids of a file; ids without a category stay."""
    if mapping is None or not len(ids):
        return ids
    unique, places = np.unique(ids, return_inverse=True)
    return np.array([mapping.get(number, number) for number in unique.tolist()], np.int64)[places]


def merge_categories(sources: Sequence[ParsedSource]) -> dict[int, str]:
    """One mapping of id to name; sources must agree on every id they share.

    Raises:
        DataError: they do not.
    """
    names: dict[int, str] = {}
    origin: dict[int, Path] = {}
    problems = []
    for path, item in _files(sources):
        for category, name in item.categories.items():
            if category in names and names[category] != name:
                what = (
                    f"category id {category} is {name!r} here and {names[category]!r} in {origin[category]}"
                )
                hint = f"give one id one name in all sources, or {BY_NAME_HINT}"
                problems.append(Problem(what, path, "categories", hint=hint))
            names.setdefault(category, name)
            origin.setdefault(category, path)
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])
    return names


def _files(sources: Sequence[ParsedSource]) -> Iterator[tuple[Path, JsonColumns]]:
    for source in sources:
        yield from zip(source.paths, source.columns, strict=True)
