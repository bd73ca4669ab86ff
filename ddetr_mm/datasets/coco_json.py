"""Decode one COCO annotation file into columns.

The JSON is decoded into typed records (msgspec) that hold only what detection needs: polygons, licences and
other fields never become Python objects. A file that deviates from the format is decoded once more without
types: what has one meaning only is repaired and counted (:class:`Repair`), everything else is refused with
the number of cases and the first three of them.

Repaired are ids that are texts or floats, ``null`` flags, boxes that only polygons or RLE give, missing sizes
(left to :mod:`ddetr_mm.datasets.sources`), backslashes in ``file_name``, ``coco_url`` without ``file_name``
(LVIS), UTF-16, gzip, and ``NaN`` in fields that are not read.

Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np
import numpy.typing as npt

from ddetr_mm.datasets.geometry import box_around_segmentation
from ddetr_mm.errors import DataError, Problem, shorten

_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_CategoryId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class _Image(msgspec.Struct, gc=False):
    id: _Id
    file_name: str
    width: _Side
    height: _Side


class _Annotation(msgspec.Struct, gc=False):
    image_id: _Id
    category_id: _CategoryId
    bbox: tuple[float, float, float, float]
    id: _Id | None = None
    area: float | None = None
    iscrowd: int | bool = 0
    ignore: int | bool = 0


class _AnnotationWithMask(_Annotation, gc=False):
    segmentation: msgspec.Raw = msgspec.Raw(b"")


class _Category(msgspec.Struct):
    id: _CategoryId
    name: str
    supercategory: Any = None


class _Document(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation] | None = None


class _DocumentWithMasks(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_AnnotationWithMask] | None = None


class _CategoryOnly(msgspec.Struct, gc=False):
    category_id: _CategoryId


class _CategoryDocument(msgspec.Struct):
    categories: list[_Category]
    annotations: list[_CategoryOnly] | None = None


class _RawDocument(msgspec.Struct):
    images: Any = None
    categories: Any = None
    annotations: list[msgspec.Raw] | None = None


@dataclass(frozen=True)
class Repair:
    """One kind of deviation in one file that was put right.

    Attributes:
        what: the deviation and what was done about it.
        count: number of cases.
        path: the file.
        examples: place in the file and value of up to three cases.
        drops: whether the annotations concerned are left out.
    """

    what: str
    count: int
    path: Path
    examples: tuple[tuple[str, Any], ...]
    drops: bool = False


@dataclass(frozen=True)
class JsonColumns:
    """The columns of one annotation file, in the file's order. N images, M annotations.

    Attributes:
        image_ids: (N,) int64, as written; of a text that is no number, a digest (see ``id_texts``).
        sizes_hw: (N, 2) int32, pixels, as written; 0 where the file has none.
        file_names: N names, relative to the image folder, with ``/``.
        annotation_ids: (M,) int64; annotations without an id hold ``-1`` and ``has_id`` False.
        has_id: (M,) bool.
        annotation_image_ids: (M,) int64.
        category_ids: (M,) int64.
        boxes_xywh: (M, 4) float64, pixels, top-left corner, width, height.
        areas: (M,) float64, pixels; width times height where the file has none.
        crowd, ignored: (M,) bool, the annotation's ``iscrowd`` and ``ignore``.
        segmentations: M JSON texts (empty where absent), or None when not asked for.
        categories: category id to name, in the file's order.
        supercategory_ids: ids of categories whose name is the ``supercategory`` of all others.
        annotated: whether the file has ``annotations`` at all (a test set may not).
        image_id_texts: N ids as written where they are texts, None for the others; empty where all ids are
            numbers.
        id_texts: number to what is written, for every id of images, annotations and categories that has no
            number of its own.
        annotation_rows: (M,) int64, place of each annotation in the file's list; None where none is left out.
        repairs: what was put right.
    """

    image_ids: npt.NDArray[np.int64]
    sizes_hw: npt.NDArray[np.int32]
    file_names: list[str]
    annotation_ids: npt.NDArray[np.int64]
    has_id: npt.NDArray[np.bool_]
    annotation_image_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    boxes_xywh: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    segmentations: list[bytes] | None
    categories: dict[int, str]
    annotated: bool
    image_id_texts: list[str | None] = field(default_factory=list)
    id_texts: dict[int, str | int] = field(default_factory=dict)
    annotation_rows: npt.NDArray[np.int64] | None = None
    repairs: list[Repair] = field(default_factory=list)
    supercategory_ids: frozenset[int] = frozenset()

    def place(self, annotation: int) -> int:
        """Position of a column's row in the file's ``annotations``, for messages."""
        return annotation if self.annotation_rows is None else int(self.annotation_rows[annotation])


def parse_coco_json(
    content: bytes | memoryview,
    path: Path,
    *,
    with_masks: bool = False,
) -> JsonColumns:
    """Decode one COCO annotation file.

    Args:
        content: the bytes of the file; any buffer, such as a memory map.
        path: the file's name, for messages.
        with_masks: keep every annotation's ``segmentation`` as JSON text.

    Returns:
        The file's columns. Ids are not checked against each other here.

    Raises:
        DataError: the file is not JSON, lacks a key, has a value that cannot be read or a box number that is
            not finite, or gives one category id two names.
    """
    content, repairs = _as_utf8(content, path)
    try:
        document = _decode(content, type=_DocumentWithMasks if with_masks else _Document)
        columns = _columns(document, path, with_masks)
    except msgspec.ValidationError:
        columns = _repaired_columns(content, path, with_masks)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        columns = _columns_despite_nan(content, path, with_masks, _syntax_problem(content, path, str(error)))
    _check_finite(columns, path)
    repairs += [*columns.repairs, *_slashed(columns, path)]
    return replace(columns, repairs=repairs) if repairs else columns


def _decode(content: Any, **options: Any) -> Any:
    """``msgspec.json.decode``, for which values that are nested too deep are malformed JSON as well.

    Raises:
        msgspec.DecodeError: the content is not JSON, or too deep.
        msgspec.ValidationError: it is not of the given type.
    """
    try:
        return msgspec.json.decode(content, **options)
    except RecursionError:
        raise msgspec.DecodeError("JSON is malformed: values are nested too deep") from None


# --- Bytes to UTF-8 ---

_NO_JSON: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (b"<", "HTML or XML", "download or export the annotations as COCO JSON"),
    (b"\x80", "a pickle", "export the annotations as COCO JSON"),
)
"""First bytes, what such a file is, and what the user can do."""


def _as_utf8(content: bytes | memoryview, path: Path) -> tuple[bytes | memoryview, list[Repair]]:
    """The file's text in UTF-8, unpacked.

    Raises:
        DataError: a damaged gzip or UTF-16 file, or a file of another kind.
    """
    if bytes(content[:2]) == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                Problem(f"is a damaged gzip file: {error}", path, hint="write or copy it again")
            ) from None
    head = bytes(content[:32])
    if head.startswith(codecs.BOM_UTF8):  # some editors write it
        return memoryview(content)[3:], []
    encoding = _wide_encoding(head)
    if encoding:
        try:
            text = str(content, encoding).encode()
        except UnicodeError as error:
            raise DataError(Problem(f"is damaged {encoding.upper()} text: {error}", path)) from None
        return text, [Repair(f"{encoding.upper()} text instead of UTF-8 is read", 1, path, ())]
    for start, kind, hint in _NO_JSON:
        if head.lstrip().startswith(start):
            raise DataError(Problem(f"is {kind}, not JSON", path, hint=hint))
    return content, []


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its byte order mark, or by the zeros beside the first brace."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return {b"{\0": "utf-16-le", b"\0{": "utf-16-be"}.get(head[:2])


# --- Errors of the decoder ---


def _syntax_problem(content: bytes | memoryview, path: Path, message: str) -> Problem:
    """Malformed JSON, with the byte offset and the text around it."""
    wrong_encoding = _encoding_problem(content, path)
    if wrong_encoding:
        return wrong_encoding
    message = message.removeprefix("JSON is malformed: ")
    match = re.search(r"\(byte (\d+)\)", message)
    if match is None:  # the decoder reached the end of the file
        where = f"byte {len(content)}"
        hint = "the file ends too early: write or copy it again"
        return Problem(f"is not valid JSON: {message}", path, where, hint=hint)
    offset = int(match.group(1))
    message = message.replace(match.group(0), "").strip()
    nearby = bytes(content[max(0, offset - 40) : offset + 20]).decode("utf-8", errors="replace")
    token = bytes(content[max(0, offset - 1) : offset + 9])
    if re.search(rb"NaN|nan|Infinity|inf", token):
        message = _NOT_FINITE
    return Problem(
        f"is not valid JSON: {message}", path, f"byte {offset}", nearby, hint="correct the text there"
    )


_NOT_FINITE = "numbers must be finite (NaN and Infinity are not JSON)"


def _encoding_problem(content: bytes | memoryview, path: Path) -> Problem | None:
    """The first byte that is not UTF-8; which other encoding a file is in cannot be known."""
    try:
        str(content, "utf-8")
    except UnicodeDecodeError as error:
        start = max(error.start - 20, 0)
        nearby = bytes(content[start : error.start + 20]).decode("latin-1")
        what = f"is not UTF-8 text: invalid character {content[error.start]:#04x}"
        hint = (
            "convert it, for example from Latin-1: iconv -f LATIN1 -t UTF-8 old.json > new.json "
            "(CP1252 for most files of Windows)"
        )
        return Problem(what, path, f"byte {error.start}", nearby, hint=hint)
    return None


def _columns_despite_nan(
    content: bytes | memoryview, path: Path, with_masks: bool, problem: Problem
) -> JsonColumns:
    """The columns of a file whose only fault is ``NaN`` or ``Infinity`` where nothing is read.

    Raises:
        DataError: ``problem``, for any other fault.
    """
    if _NOT_FINITE not in problem.what:
        raise DataError(problem)
    count = 0

    def constant(name: str) -> str:
        nonlocal count
        count += 1
        return name  # a text: refused wherever a number is needed

    try:
        document = json.loads(bytes(content), parse_constant=constant)
        columns = _repaired_columns(msgspec.json.encode(document), path, with_masks)
    except (ValueError, RecursionError, DataError):
        raise DataError(problem) from None
    what = "NaN or Infinity in fields that are not read"
    return replace(columns, repairs=[Repair(what, count, path, ()), *columns.repairs])


def _validation_problem(content: bytes | memoryview, path: Path, message: str) -> Problem:
    """A missing key or a wrong type, with its place and value."""
    what, _, place = message.partition(" - at `$")
    where = place.rstrip("`").lstrip(".")
    what = what.replace("`", "'")
    what = what[:1].lower() + what[1:]
    if not where:
        return Problem(f"is not a COCO annotation file: {what}", path, hint="give a COCO JSON object")
    value = _value_at(content, where)
    if value is None and "null" not in what:
        return Problem(what, path, where)
    return Problem(what, path, where, value)


def _value_at(content: bytes | memoryview, where: str) -> Any:
    """The JSON value at a path such as ``annotations[3].bbox[1]``; None where there is none."""
    steps = [int(index) if index else name for name, index in re.findall(r"([A-Za-z_]+)|\[(\d+)\]", where)]
    try:
        value: Any = _decode(content, type=_RawDocument)
        value = getattr(value, str(steps[0]))
        for step in steps[1:]:
            value = value[step]
            if isinstance(value, msgspec.Raw):
                value = _decode(value)
    except (msgspec.DecodeError, AttributeError, LookupError, TypeError):
        return None  # the message is raised without it
    return value


def _columns(document: Any, path: Path, with_masks: bool) -> JsonColumns:
    images, annotations = document.images, document.annotations or []
    num_images, num_boxes = len(images), len(annotations)
    sizes_hw = np.empty((num_images, 2), np.int32)
    sizes_hw[:, 0] = np.fromiter((image.height for image in images), np.int32, num_images)
    sizes_hw[:, 1] = np.fromiter((image.width for image in images), np.int32, num_images)
    boxes = np.fromiter((v for item in annotations for v in item.bbox), np.float64, 4 * num_boxes)
    boxes_xywh = boxes.reshape(-1, 4)
    areas = np.fromiter(
        (np.nan if item.area is None else item.area for item in annotations), np.float64, num_boxes
    )
    areas = np.where(np.isnan(areas), boxes_xywh[:, 2] * boxes_xywh[:, 3], areas)
    has_id = np.fromiter((item.id is not None for item in annotations), np.bool_, num_boxes)
    ids = (-1 if item.id is None else item.id for item in annotations)
    return JsonColumns(
        image_ids=np.fromiter((image.id for image in images), np.int64, num_images),
        sizes_hw=sizes_hw,
        file_names=[image.file_name for image in images],
        annotation_ids=np.fromiter(ids, np.int64, num_boxes),
        has_id=has_id,
        annotation_image_ids=np.fromiter((item.image_id for item in annotations), np.int64, num_boxes),
        category_ids=np.fromiter((item.category_id for item in annotations), np.int64, num_boxes),
        boxes_xywh=boxes_xywh,
        areas=areas,
        crowd=np.fromiter((bool(item.iscrowd) for item in annotations), np.bool_, num_boxes),
        ignored=np.fromiter((bool(item.ignore) for item in annotations), np.bool_, num_boxes),
        segmentations=[bytes(item.segmentation) for item in annotations] if with_masks else None,
        categories=_categories(document.categories, path),
        supercategory_ids=_supercategories(document.categories),
        annotated=document.annotations is not None,
    )


def _categories(categories: list[_Category], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, category in enumerate(categories):
        if category.id in names and names[category.id] != category.name:
            what = f"category id {category.id} has two names, {names[category.id]!r} and {category.name!r}"
            raise DataError(
                Problem(what, path, f"categories[{index}]", hint="give every category its own id")
            )
        names[category.id] = category.name
    return names


def _supercategories(categories: list[_Category]) -> frozenset[int]:
    """Ids of categories that are the ``supercategory`` of all others and have none of their own."""
    named = {category.supercategory for category in categories if isinstance(category.supercategory, str)}
    return frozenset(
        category.id
        for category in categories
        if len(categories) > 1
        and category.name in named
        and category.supercategory in (None, "", "none", "None", category.name)
        and all(other.supercategory == category.name for other in categories if other.id != category.id)
    )


@dataclass(frozen=True)
class FileCategories:
    """The categories of one file.

    Attributes:
        names: id to name, in the file's order.
        annotated_ids: ids that annotations use.
        supercategory_ids: see :class:`JsonColumns`.
    """

    names: dict[int, str]
    annotated_ids: frozenset[int]
    supercategory_ids: frozenset[int]

    @classmethod
    def of(cls, columns: JsonColumns) -> FileCategories:
        """Those of a parsed file."""
        annotated = frozenset(np.unique(columns.category_ids).tolist())
        return cls(columns.categories, annotated, columns.supercategory_ids)


def parse_categories(content: bytes | memoryview, path: Path) -> FileCategories:
    """Decode the categories of a COCO file, where it is as the format says without decoding the rest.

    Raises:
        DataError: see :func:`parse_coco_json`.
    """
    try:
        document = _decode(content, type=_CategoryDocument)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError):
        return FileCategories.of(parse_coco_json(content, path))
    annotated = frozenset(item.category_id for item in document.annotations or [])
    return FileCategories(
        _categories(document.categories, path), annotated, _supercategories(document.categories)
    )


def _check_finite(columns: JsonColumns, path: Path) -> None:
    """Box numbers must fit float32, the type that training uses."""
    largest = np.finfo(np.float32).max
    bad = np.flatnonzero(~(np.abs(columns.boxes_xywh) <= largest).all(axis=1))
    if bad.size:
        row = int(bad[0])
        what = "box numbers are not finite in single precision"
        if bad.size > 1:
            what += f" (in {bad.size} annotations)"
        where, box = f"annotations[{columns.place(row)}].bbox", columns.boxes_xywh[row].tolist()
        raise DataError(Problem(what, path, where, box, hint="correct the box"))


# --- Files that deviate from the format ---


class _LooseImage(msgspec.Struct, gc=False):
    id: Any = None
    file_name: Any = None
    coco_url: Any = None
    width: Any = None
    height: Any = None


class _LooseAnnotation(msgspec.Struct, gc=False):
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    id: Any = None
    area: Any = None
    iscrowd: Any = 0
    ignore: Any = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"")


class _LooseCategory(msgspec.Struct):
    id: Any = None
    name: Any = None
    supercategory: Any = None


class _LooseDocument(msgspec.Struct):
    images: list[_LooseImage]
    categories: list[_LooseCategory] | None = None
    annotations: list[_LooseAnnotation] | None = None


EXAMPLES_SHOWN = 3

_ID_HINT = "give an integer or a text"
_INTEGER_TEXT = re.compile(r"\s*([+-]?\d{1,19})(?:\.0*)?\s*", re.ASCII)


class _Deviations:
    """What one file has that the format has not: repaired, or refused, each kind with its cases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id_texts: dict[int, str | int] = {}
        self._repaired: dict[str, list[tuple[str, Any]]] = {}
        self._counts: dict[str, int] = {}
        self._dropping: set[str] = set()
        self._refused: dict[str, str] = {}

    def _add(self, what: str, where: str, value: Any) -> None:
        cases = self._repaired.setdefault(what, [])
        self._counts[what] = self._counts.get(what, 0) + 1
        if len(cases) < EXAMPLES_SHOWN:
            cases.append((where, value))

    def repaired(self, what: str, where: str, value: Any, *, drops: bool = False) -> None:
        """Count one case that was put right."""
        self._add(what, where, value)
        if drops:
            self._dropping.add(what)

    def refused(self, what: str, where: str, value: Any, hint: str) -> None:
        """Count one case that cannot be read."""
        self._add(what, where, value)
        self._refused[what] = hint

    def repairs(self) -> list[Repair]:
        """All kinds that were put right.

        Raises:
            DataError: something was refused: one problem a kind.
        """
        DataError.collect(
            refusal(what, self._counts[what], [(self.path, *case) for case in self._repaired[what]], hint)
            for what, hint in self._refused.items()
        )
        return [
            Repair(what, self._counts[what], self.path, tuple(cases), what in self._dropping)
            for what, cases in self._repaired.items()
        ]

    def id_of(self, value: Any, name: str, index: int, key: str) -> int:
        """The number of an id: as written, or a digest of a text that is no number; 0 where it is refused."""
        if type(value) is int and -(2**63) <= value < 2**63:
            return value
        number = _number_of(value)
        where = f"{name}[{index}].{key}"
        if number is None:
            kind = f"{name} whose {key} is neither an integer of 64 bits nor a text"
            self.refused(kind, where, value, _ID_HINT)
            return 0
        self.repaired(f"{name} whose {key} is no integer: read as number or text", where, value)
        if isinstance(value, str) and not _INTEGER_TEXT.fullmatch(value):
            self.id_texts[number] = value
        return number

    def category_id_of(self, value: Any, name: str, index: int, key: str) -> int:
        """As :meth:`id_of`; integers below 0 or beyond 64 bits count as texts: only names can number them."""
        if type(value) is not int or 0 <= value < 2**63:
            return self.id_of(value, name, index, key)
        number = _digest(str(value))
        self.repaired(
            f"{name} whose {key} is below 0 or beyond 64 bits: read as text", f"{name}[{index}].{key}", value
        )
        self.id_texts[number] = value
        return number

    def flag_of(self, value: Any, index: int, key: str) -> bool:
        """``iscrowd`` or ``ignore``."""
        if type(value) in (int, bool):
            return bool(value)
        where = f"annotations[{index}].{key}"
        if value is None:
            self.repaired(f"annotations whose {key} is null: read as 0", where, value)
            return False
        if value in (0.0, 1.0, "0", "1", "", "0.0", "1.0"):
            self.repaired(f"annotations whose {key} is no integer: read as 0 or 1", where, value)
            return value in (1.0, "1", "1.0")
        self.refused(f"annotations whose {key} is neither 0 nor 1", where, value, "give 0 or 1")
        return False

    def side_of(self, value: Any, index: int, key: str) -> int:
        """``width`` or ``height``; 0 where the file has none."""
        if type(value) is int and 0 < value < 2**31:
            return value
        if value is None or value == 0:
            return 0  # counted where it is read from the image
        where = f"images[{index}].{key}"
        number = _number_of(value) if not isinstance(value, bool) else None
        if number is None or not 0 < number < 2**31 or number in self.id_texts:
            hint = "give pixels, or leave it out: it is then read from the image"
            self.refused(f"images whose {key} is no whole number >= 1", where, value, hint)
            return 0
        self.repaired(f"images whose {key} is no integer: read as the number", where, value)
        return number

    def name_of(self, image: _LooseImage, index: int) -> str:
        """``file_name``, or the path in ``coco_url``."""
        if isinstance(image.file_name, str):
            return image.file_name
        if image.file_name is None and isinstance(image.coco_url, str):
            name = unquote(urlsplit(image.coco_url).path).lstrip("/")
            self.repaired(
                "images with coco_url and no file_name: its path is taken", f"images[{index}].coco_url", name
            )
            return name
        hint = "name the file, relative to image_dir"
        self.refused("images whose file_name is no text", f"images[{index}].file_name", image.file_name, hint)
        return ""

    def area_of(self, value: Any, index: int) -> float | None:
        """``area``; None where the box gives it."""
        if value is None or (type(value) in (int, float) and math.isfinite(value)):
            return value
        self.repaired(
            "annotations whose area is no number: width times height", f"annotations[{index}].area", value
        )
        return None

    def box_of(self, annotation: _LooseAnnotation, index: int) -> tuple[float, float, float, float] | None:
        """``bbox``, or the box around the segmentation; None where the annotation has neither."""
        value, where = annotation.bbox, f"annotations[{index}].bbox"
        if value is None or value == []:
            box = _box_of_segmentation(annotation.segmentation)
            if box is None:
                what = "annotations without bbox, polygon and RLE: left out"
                self.repaired(what, f"annotations[{index}]", value, drops=True)
            else:
                self.repaired("annotations without bbox: the box around the segmentation", where, list(box))
            return box
        if isinstance(value, list) and len(value) == 4 and all(type(one) in (int, float) for one in value):
            return value[0], value[1], value[2], value[3]
        self.refused(
            "annotations whose bbox is no list of length 4 of int or float",
            where,
            value,
            "give x, y, width, height",
        )
        return 0.0, 0.0, 0.0, 0.0


def refusal(what: str, count: int, cases: Sequence[tuple[Path, str, Any]], hint: str) -> Problem:
    """A problem for ``count`` cases: the first is its place and value, up to two more are named."""
    path, where, value = cases[0]
    others = [
        f"{place} ({shorten(found)})" if other == path else f"{other}: {place} ({shorten(found)})"
        for other, place, found in cases[1:EXAMPLES_SHOWN]
    ]
    if count > 1:
        what += f" ({count} in all: also {', '.join(others)})" if others else f" ({count} in all)"
    return Problem(what, path, where, value, hint=hint)


def _number_of(value: Any) -> int | None:
    """The 63-bit number of an id or size; None where there is none."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**63 else None
    if not isinstance(value, str) or not value.strip():
        return value if type(value) is int and -(2**63) <= value < 2**63 else None
    match = _INTEGER_TEXT.fullmatch(value)
    if match and -(2**63) <= int(match.group(1)) < 2**63:
        return int(match.group(1))
    return _digest(value)


def _digest(text: str) -> int:
    """A 63-bit number, the same for a text in every file of a source."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _repaired_columns(content: bytes | memoryview, path: Path, with_masks: bool) -> JsonColumns:
    """The columns of a file that is not as the format says.

    Raises:
        DataError: something in it has no meaning.
    """
    try:
        loose = _decode(content, type=_LooseDocument)
    except msgspec.ValidationError as error:
        raise DataError(_validation_problem(content, path, str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # behind the value of a wrong type
        raise DataError(_syntax_problem(content, path, str(error))) from None
    if loose.categories is None and loose.annotations:
        what = "is not a COCO annotation file: object missing required field 'categories'"
        raise DataError(Problem(what, path, hint="give a COCO JSON object"))
    found = _Deviations(path)
    categories = [_repaired_category(found, index, item) for index, item in enumerate(loose.categories or [])]
    images = [
        _Image(
            id=found.id_of(image.id, "images", index, "id"),
            file_name=found.name_of(image, index),
            width=found.side_of(image.width, index, "width"),
            height=found.side_of(image.height, index, "height"),
        )
        for index, image in enumerate(loose.images)
    ]
    pairs = [
        (index, repaired)
        for index, item in enumerate(loose.annotations or [])
        if (repaired := _repaired_annotation(found, index, item)) is not None
    ]
    repairs = found.repairs()
    annotations = None if loose.annotations is None else [item for _, item in pairs]
    columns = _columns(_DocumentWithMasks(images, categories, annotations), path, with_masks)
    columns.sizes_hw[(columns.sizes_hw == 0).any(axis=1)] = 0
    texts = [image.id if isinstance(image.id, str) else None for image in loose.images]
    return replace(
        columns,
        image_id_texts=texts if any(text is not None for text in texts) else [],
        id_texts=found.id_texts,
        annotation_rows=np.array([index for index, _ in pairs], np.int64),
        repairs=repairs,
    )


def _repaired_category(found: _Deviations, index: int, category: _LooseCategory) -> _Category:
    number = found.category_id_of(category.id, "categories", index, "id")
    where = f"categories[{index}].name"
    if isinstance(category.name, str):
        return _Category(number, category.name, category.supercategory)
    if type(category.name) in (int, float):
        found.repaired("categories whose name is a number: read as text", where, category.name)
    else:
        found.refused("categories without a name", f"categories[{index}]", category.name, "give it a name")
    return _Category(number, str(category.name), category.supercategory)


def _repaired_annotation(
    found: _Deviations, index: int, annotation: _LooseAnnotation
) -> _AnnotationWithMask | None:
    """The annotation as the format has it; None where it is left out."""
    image_id = found.id_of(annotation.image_id, "annotations", index, "image_id")
    category_id = found.category_id_of(annotation.category_id, "annotations", index, "category_id")
    box = found.box_of(annotation, index)
    number = None if annotation.id is None else found.id_of(annotation.id, "annotations", index, "id")
    crowd = found.flag_of(annotation.iscrowd, index, "iscrowd")
    ignored = found.flag_of(annotation.ignore, index, "ignore")
    if box is None:
        return None
    return _AnnotationWithMask(
        image_id=image_id,
        category_id=category_id,
        bbox=box,
        id=number,
        area=found.area_of(annotation.area, index),
        iscrowd=crowd,
        ignore=ignored,
        segmentation=annotation.segmentation,
    )


def _slashed(columns: JsonColumns, path: Path) -> list[Repair]:
    """Put ``/`` for every backslash of relative file names, in place."""
    changed = []
    for row, name in enumerate(columns.file_names):
        if "\\" in name and not re.match(r"\\|[A-Za-z]:", name):  # not of a Windows path: that is refused
            changed.append((f"images[{row}].file_name", name))
            columns.file_names[row] = name.replace("\\", "/")
    if not changed:
        return []
    what = "file names with backslashes: read as '/'"
    return [Repair(what, len(changed), path, tuple(changed[:EXAMPLES_SHOWN]))]


def _box_of_segmentation(text: msgspec.Raw) -> tuple[float, float, float, float] | None:
    """The box around a ``segmentation`` in JSON; None where there is none."""
    try:
        return box_around_segmentation(_decode(text)) if bytes(text) else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # counted by the caller as an annotation without a box
