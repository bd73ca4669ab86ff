"""Decode one COCO annotation file into columns.

The JSON is decoded into typed records (msgspec) that hold only what detection needs: polygons, licences and
other fields never become Python objects. Errors name the file, the place in it and the value.

Format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from ddetr_mm.errors import DataError, Problem

_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_CategoryId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
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


class _Document(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation] | None = None


class _DocumentWithMasks(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_AnnotationWithMask] | None = None


class _RawDocument(msgspec.Struct):
    images: Any = None
    categories: Any = None
    annotations: list[msgspec.Raw] | None = None


@dataclass(frozen=True)
class JsonColumns:
    """The columns of one annotation file, in the file's order. N images, M annotations.

    Attributes:
        image_ids: (N,) int64, as written.
        sizes_hw: (N, 2) int32, pixels, as written.
        file_names: N names, relative to the image folder.
        annotation_ids: (M,) int64; annotations without an id hold ``-1`` and ``has_id`` False.
        has_id: (M,) bool.
        annotation_image_ids: (M,) int64.
        category_ids: (M,) int32.
        boxes_xywh: (M, 4) float64, pixels, top-left corner, width, height.
        areas: (M,) float64, pixels; width times height where the file has none.
        crowd, ignored: (M,) bool, the annotation's ``iscrowd`` and ``ignore``.
        segmentations: M JSON texts (empty where absent), or None when not asked for.
        categories: category id to name, in the file's order.
        annotated: whether the file has ``annotations`` at all (a test set may not).
    """

    image_ids: npt.NDArray[np.int64]
    sizes_hw: npt.NDArray[np.int32]
    file_names: list[str]
    annotation_ids: npt.NDArray[np.int64]
    has_id: npt.NDArray[np.bool_]
    annotation_image_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int32]
    boxes_xywh: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    segmentations: list[bytes] | None
    categories: dict[int, str]
    annotated: bool


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
        DataError: the file is not JSON, lacks a key, has a value of the wrong type or a box number that is
            not finite, or gives one category id two names.
    """
    document = _decode(content, path, with_masks)
    columns = _columns(document, path, with_masks)
    _check_finite(columns, path)
    return columns


def _decode(content: bytes | memoryview, path: Path, with_masks: bool) -> Any:
    if bytes(content[:3]) == b"\xef\xbb\xbf":  # a byte order mark, which some editors write
        content = memoryview(content)[3:]
    try:
        return msgspec.json.decode(content, type=_DocumentWithMasks if with_masks else _Document)
    except msgspec.ValidationError as error:
        raise DataError(_validation_problem(content, path, str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(_syntax_problem(content, path, str(error))) from None


def _syntax_problem(content: bytes | memoryview, path: Path, message: str) -> Problem:
    """Malformed JSON, with the byte offset and the text around it."""
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
        message = "numbers must be finite (NaN and Infinity are not JSON)"
    return Problem(
        f"is not valid JSON: {message}", path, f"byte {offset}", nearby, hint="correct the text there"
    )


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
        value: Any = msgspec.json.decode(content, type=_RawDocument)
        value = getattr(value, str(steps[0]))
        for step in steps[1:]:
            value = value[step]
            if isinstance(value, msgspec.Raw):
                value = msgspec.json.decode(value)
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
        category_ids=np.fromiter((item.category_id for item in annotations), np.int32, num_boxes),
        boxes_xywh=boxes_xywh,
        areas=areas,
        crowd=np.fromiter((bool(item.iscrowd) for item in annotations), np.bool_, num_boxes),
        ignored=np.fromiter((bool(item.ignore) for item in annotations), np.bool_, num_boxes),
        segmentations=[bytes(item.segmentation) for item in annotations] if with_masks else None,
        categories=_categories(document.categories, path),
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


def _check_finite(columns: JsonColumns, path: Path) -> None:
    """Box numbers must fit float32, the type that training uses."""
    largest = np.finfo(np.float32).max
    bad = np.flatnonzero(~(np.abs(columns.boxes_xywh) <= largest).all(axis=1))
    if bad.size:
        row = int(bad[0])
        what = "box numbers are not finite in single precision"
        if bad.size > 1:
            what += f" (in {bad.size} annotations)"
        where, box = f"annotations[{row}].bbox", columns.boxes_xywh[row].tolist()
        raise DataError(Problem(what, path, where, box, hint="correct the box"))
