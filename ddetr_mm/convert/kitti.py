"""KITTI labels: class names to categories, label files to boxes, and boxes to lines.

One line describes one object in 15 columns, or 16 with a score:
``class truncated occluded alpha x1 y1 x2 y2 height width length x y z rotation_y [score]``. Only the class
and the box (columns 4 to 7, pixels of the image as shown) are kept, but every column after the class has to
be a finite number: a line that breaks this rule is most often shifted by a column, and its box wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddetr_mm.errors import DataError, Problem

# --- Classes ---
# A mapping says which label class becomes which category, e.g. ``{"Rider": "person"}``. Several label classes
# may share a category. A label class that is mapped to None (``null``) is left out on purpose; one that the
# mapping lacks is left out and counted.

#: Category of a label class that is left out on purpose.
LEFT_OUT = -1

#: The mapping that applies when the user gives none (TAO 5.5 documentation, "Sharding the Data").
DEFAULT_CLASS_MAPPING: dict[str, str] = {
    "Person": "person",
    "Person Group": "person",
    "Rider": "person",
    "backpack": "bag",
    "face": "face",
    "large_bag": "bag",
    "person": "person",
    "person group": "person",
    "person_group": "person",
    "personal_bag": "bag",
    "rider": "person",
    "rolling_bag": "bag",
    "rollingbag": "bag",
    "largebag": "bag",
    "personalbag": "bag",
}

_FORM = 'a JSON object of names, e.g. {"Car": "vehicle", "Truck": "vehicle", "Misc": null}'


def load_class_mapping(path: str | Path) -> dict[str, str | None]:
    """Read a mapping file: one JSON object, label class → category, or null for a class to leave out.

    Raises:
        DataError: the file cannot be read, is not UTF-8 JSON, is not an object of non-empty strings,
            names no category, or gives one label class two categories.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            Problem(
                f"the class mapping cannot be read: {error.strerror}", file=path, hint="check mapping_path"
            )
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            Problem(
                "the class mapping is not UTF-8 text", file=path, where=f"byte {error.start}", allowed=_FORM
            )
        ) from error
    twice: list[str] = []

    def one_meaning(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, category in pairs:
            if name in found and found[name] != category:
                twice.append(name)
            found[name] = category
        return found

    try:
        mapping = json.loads(text, object_pairs_hook=one_meaning)
    except json.JSONDecodeError as error:
        raise DataError(
            Problem(
                f"the class mapping is not valid JSON: {error.msg}",
                file=path,
                where=f"line {error.lineno}, column {error.colno}",
                allowed=_FORM,
            )
        ) from error
    except RecursionError as error:
        raise DataError(
            Problem("the class mapping is nested too deeply", file=path, allowed=_FORM)
        ) from error
    DataError.collect(
        Problem("is mapped to two categories", file=path, where=name, hint="keep one of the two lines")
        for name in twice
    )
    return check_class_mapping(mapping, path)


def check_class_mapping(mapping: Any, source: str | Path | None = None) -> dict[str, str | None]:
    """Return ``mapping`` as a plain dict when it maps names to names or None.

    Args:
        mapping: what to check.
        source: the file it came from, for the message.

    Raises:
        DataError: not a mapping, without any category, or with a key or value that is not a non-empty
            string. All offending entries are shown.
    """
    if not isinstance(mapping, Mapping):
        raise DataError(
            Problem("the class mapping is not an object", file=source, value=mapping, allowed=_FORM)
        )
    if not mapping:
        raise DataError(Problem("the class mapping is empty", file=source, allowed=_FORM))
    DataError.collect(
        Problem(
            "the class mapping must map a name to a name",
            file=source,
            where=str(name),
            value=category,
            allowed="non-empty text on both sides, or null to leave the class out",
        )
        for name, category in mapping.items()
        if not (_is_name(name) and (category is None or _is_name(category)))
    )
    if all(category is None for category in mapping.values()):
        raise DataError(Problem("the class mapping leaves out every class", file=source, allowed=_FORM))
    return dict(mapping)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def category_ids(category_names: Iterable[str]) -> dict[str, int]:
    """Ids of the categories: the distinct names in reverse alphabetical order, counted from 1.

    So does TAO; id 0 is the background.

    >>> category_ids(["bag", "face", "person", "bag"])
    {'person': 1, 'face': 2, 'bag': 3}
    """
    return {name: number for number, name in enumerate(sorted(set(category_names), reverse=True), start=1)}


def coco_categories(ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """The ``categories`` list of a COCO file, in ascending order of id."""
    return [{"id": number, "name": name} for name, number in sorted(ids.items(), key=lambda item: item[1])]


# --- Label files to columns ---
# There may be millions of lines, so batches of files are split and converted together. Unusual files are read
# again line by line, which finds out what is wrong and where.

#: Columns of a line without and with a score.
NUM_COLUMNS = (15, 16)
_BOX_COLUMNS = slice(4, 8)
_BOX_FIELDS = slice(3, 7)  # the same, counted after the class
_NUM_FIRST_COLUMNS = 8  # up to the box

_FILES_AT_ONCE = 64  # few enough for the words to stay in the processor's cache
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_REMEMBERED_NAMES = 10_000


class LabelProblem(NamedTuple):
    """Something wrong in a label file.

    Attributes:
        file_index: which of the given texts.
        line: line number from 1; 0 when the whole file is meant.
        kind: ``not_utf8``, ``windows_line_ends``, ``empty_label``, ``wrong_column_count``,
            ``yolo_line``, ``eight_columns``, ``not_a_number``, ``not_finite`` or ``unknown_class``.
        detail: the offending value.
    """

    file_index: int
    line: int
    kind: str
    detail: str


@dataclass(frozen=True)
class LabelColumns:
    """The usable lines of a batch of label files, in the order of files and lines. n lines.

    Attributes:
        boxes_xyxy: ``(n, 4)`` float64 pixels, as written (not clipped, possibly reversed).
        category_ids: ``(n,)`` int32, from 1.
        file_index: ``(n,)`` int32, ascending: which of the given texts.
        line_numbers: ``(n,)`` int32, from 1.
    """

    boxes_xyxy: NDArray[np.float64]
    category_ids: NDArray[np.int32]
    file_index: NDArray[np.int32]
    line_numbers: NDArray[np.int32]


class ClassLookup(dict[bytes, int]):
    """Class name in a label file → category id, 0 for a class that is not mapped.

    The exact name comes first, then the lower-cased one.

    Args:
        category_of_class: label class → category id (from 1), or :data:`LEFT_OUT`.
    """

    def __init__(self, category_of_class: Mapping[str, int]) -> None:
        self.category_of_class = dict(category_of_class)
        super().__init__((name.encode(), number) for name, number in self.category_of_class.items())
        self.most_words = max((len(name.split()) for name in self.category_of_class), default=1)

    def __missing__(self, name: bytes) -> int:
        try:
            number = self.category_of_class.get(name.decode().lower(), 0)
        except UnicodeDecodeError:
            return 0
        if len(self) < _MAX_REMEMBERED_NAMES:
            self[name] = number
        return number


class _Irregular(Exception):
    """A batch has to be read line by line."""


def parse_labels(texts: Sequence[bytes], lookup: ClassLookup) -> tuple[LabelColumns, list[LabelProblem]]:
    """Read the contents of label files.

    Args:
        texts: one per file; UTF-8, any line ends, blank lines are skipped.
        lookup: which classes are wanted.

    Returns:
        The usable lines, and what is wrong with the others, both ordered by file and line. Nothing in
        ``texts`` makes it raise.
    """
    problems: list[LabelProblem] = []
    ended = [text if text.endswith(b"\n") else text + b"\n" for text in texts]
    plain = [member for member, text in enumerate(texts) if _is_plain(text)]
    parts = [
        part
        for start in range(0, len(plain), _FILES_AT_ONCE)
        for part in _read_regular(ended, plain[start : start + _FILES_AT_ONCE], lookup, problems)
    ]
    read = {member for part_members, _ in parts for member in part_members}
    columns = [part for _, part in parts]
    columns += [
        _read_lines(text, member, lookup, problems) for member, text in enumerate(texts) if member not in read
    ]
    problems.sort(key=lambda problem: problem[:2])
    return _joined(columns), problems


def _is_plain(text: bytes) -> bool:
    """Whether lines end plainly and class names are UTF-8."""
    if not text or b"\r" in text:
        return False
    return text.isascii() or (_is_utf8(text) and not text.startswith(_BYTE_ORDER_MARK))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _joined(parts: Sequence[LabelColumns]) -> LabelColumns:
    if not parts:
        empty = np.zeros(0, dtype=np.int32)
        return LabelColumns(np.zeros((0, 4)), empty, empty, empty)
    if len(parts) == 1:
        return parts[0]
    file_index = np.concatenate([part.file_index for part in parts])
    order = np.argsort(file_index, kind="stable")
    return LabelColumns(
        np.concatenate([part.boxes_xyxy for part in parts])[order],
        np.concatenate([part.category_ids for part in parts])[order],
        file_index[order],
        np.concatenate([part.line_numbers for part in parts])[order],
    )


def _read_regular(
    ended: Sequence[bytes], members: Sequence[int], lookup: ClassLookup, problems: list[LabelProblem]
) -> list[tuple[Sequence[int], LabelColumns]]:
    """Read all regular files together; irregular ones are found by halving.

    Returns:
        Pairs of files and their content, without the irregular files.
    """
    if not members:
        return []
    try:
        return [(members, _read_together(ended, members, lookup, problems))]
    except _Irregular:
        half = len(members) // 2
        if not half:
            return []
        return [
            *_read_regular(ended, members[:half], lookup, problems),
            *_read_regular(ended, members[half:], lookup, problems),
        ]


def _read_together(
    ended: Sequence[bytes], members: Sequence[int], lookup: ClassLookup, problems: list[LabelProblem]
) -> LabelColumns:
    """Read files whose lines are all regular, apart from unknown classes.

    Raises:
        _Irregular: some line is not.
    """
    own = [ended[member] for member in members]
    everything = b"".join(own)
    lines = everything.split(b"\n")
    lines.pop()
    try:
        columns = list(zip(*[line.split(None, _NUM_FIRST_COLUMNS) for line in lines], strict=True))
    except ValueError:
        raise _Irregular from None
    if len(columns) != _NUM_FIRST_COLUMNS + 1:
        raise _Irregular
    names, *unused_columns = columns[: _BOX_COLUMNS.start]
    unused = set().union(*unused_columns)
    for rest in set(columns[-1]):  # most tools fill the unused columns with zeros, so few differ
        fields = rest.split()
        if len(fields) + _NUM_FIRST_COLUMNS not in NUM_COLUMNS:
            raise _Irregular
        unused.update(fields)
    # float() takes "1_000" for a number; an underscore is fine in a class name only.
    if everything.count(b"_") != b"".join(names).count(b"_"):
        raise _Irregular
    boxes = np.empty((len(lines), 4))
    for edge, words in enumerate(columns[_BOX_COLUMNS]):
        boxes[:, edge] = _finite(words)
    _finite(unused)
    lines_per_file = np.fromiter((text.count(b"\n") for text in own), dtype=np.int64, count=len(own))
    file_index = np.repeat(np.asarray(members, dtype=np.int32), lines_per_file)
    first_line = np.repeat(np.cumsum(lines_per_file) - lines_per_file, lines_per_file)
    line_numbers = (np.arange(len(lines)) - first_line + 1).astype(np.int32)
    category_ids = np.fromiter(map(lookup.__getitem__, names), dtype=np.int32, count=len(lines))
    known = category_ids > 0
    if known.all():
        return LabelColumns(boxes, category_ids, file_index, line_numbers)
    problems.extend(
        LabelProblem(int(file_index[row]), int(line_numbers[row]), "unknown_class", names[row].decode())
        for row in np.flatnonzero(category_ids == 0)
    )
    return LabelColumns(boxes[known], category_ids[known], file_index[known], line_numbers[known])


def _finite(words: Collection[bytes]) -> NDArray[np.float64]:
    """Words as numbers.

    Raises:
        _Irregular: one is no finite number.
    """
    try:
        numbers = np.fromiter(map(float, words), dtype=np.float64, count=len(words))
    except ValueError:
        raise _Irregular from None
    if not np.isfinite(numbers).all():
        raise _Irregular
    return numbers


def _read_lines(
    text: bytes, file_index: int, lookup: ClassLookup, problems: list[LabelProblem]
) -> LabelColumns:
    """Read one file line by line, and say what is wrong with each line that cannot be used."""
    text = text.removeprefix(_BYTE_ORDER_MARK)
    if b"\r" in text:
        line = text[: text.index(b"\r")].count(b"\n") + 1
        problems.append(LabelProblem(file_index, line, "windows_line_ends", "carriage return"))
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    rows: list[tuple[list[float], int, int]] = []
    empty = True
    for number, line_text in enumerate(text.split(b"\n"), start=1):
        fields = line_text.split()
        if not fields:
            continue
        empty = False
        found = _read_line(line_text, fields, lookup)
        if isinstance(found[0], str):
            problems.append(LabelProblem(file_index, number, *found))
        elif found[1] != LEFT_OUT:
            rows.append((*found, number))
    if empty:
        problems.append(LabelProblem(file_index, 0, "empty_label", "no line"))
    return LabelColumns(
        np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row[1] for row in rows], dtype=np.int32),
        np.full(len(rows), file_index, dtype=np.int32),
        np.array([row[2] for row in rows], dtype=np.int32),
    )


def _read_line(
    line: bytes, fields: list[bytes], lookup: ClassLookup
) -> tuple[list[float], int] | tuple[str, str]:
    """``(box_xyxy, category id)``, or ``(kind of problem, offending value)``."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return "not_utf8", f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
    name, numbers = _split_off_class(fields, lookup)
    if len(numbers) + 1 not in NUM_COLUMNS:
        return _wrong_columns(fields)
    values = []
    for field in numbers:
        value = _number(field)
        if value is None:
            return "not_a_number", field.decode()
        if not math.isfinite(value):
            return "not_finite", field.decode()
        values.append(value)
    category_id = lookup[name]
    if category_id == 0:
        return "unknown_class", name.decode()
    return values[_BOX_FIELDS], category_id


def _split_off_class(fields: list[bytes], lookup: ClassLookup) -> tuple[bytes, list[bytes]]:
    """Class and numbers of a line.

    The class is one word unless several are a known class name, or several words come before 14 or 15
    columns.
    """
    if len(fields) > 1 and _number(fields[1]) is None:
        for num_words in range(lookup.most_words, 1, -1):
            name = b" ".join(fields[:num_words])
            if len(fields) - num_words + 1 in NUM_COLUMNS and lookup[name]:
                return name, fields[num_words:]
        num_words = _num_leading_words(fields)
        if len(fields) - num_words + 1 in NUM_COLUMNS:
            return b" ".join(fields[:num_words]), fields[num_words:]
    return fields[0], fields[1:]


def _num_leading_words(fields: list[bytes]) -> int:
    """Fields before the first that is no word; NaN, infinity and ``1,5`` are numbers here, if wrong ones."""
    return next(
        (
            index
            for index, field in enumerate(fields)
            if _number(field) is not None or field[:1].isdigit() or field[:1] in b"+-."
        ),
        len(fields),
    )


def _wrong_columns(fields: list[bytes]) -> tuple[str, str]:
    """Kind and detail of a line with a wrong number of columns, other common formats recognised."""
    detail = f"{len(fields)} columns"
    values = [_number(field) for field in fields]
    if (
        len(fields) == 5
        and fields[0].isdigit()
        and all(value is not None and 0 <= value <= 1 for value in values[1:])
    ):
        return "yolo_line", detail
    num_words = _num_leading_words(fields)
    if num_words and len(fields) - num_words == 7 and None not in values[num_words:]:
        return "eight_columns", detail
    return "wrong_column_count", detail


def _number(field: bytes) -> float | None:
    if b"_" in field:
        return None
    try:
        return float(field)
    except ValueError:
        return None


# --- Boxes ---

#: Verdicts of :func:`clip_boxes`; the text is the kind of problem.
BOX_VERDICTS = ("", "box_clipped", "box_reversed", "box_zero_area", "box_outside")
#: Verdicts below this number leave a usable box.
FIRST_DROPPED_VERDICT = 2


def clip_boxes(
    boxes_xyxy: NDArray[np.float64], sizes_wh: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Clip boxes to their images.

    Args:
        boxes_xyxy: ``(n, 4)`` pixels.
        sizes_wh: ``(n, 2)`` width and height of the image each box belongs to.

    Returns:
        The clipped boxes ``(n, 4)``, and for each a verdict ``(n,)``: an index into
        :data:`BOX_VERDICTS`; 0 means that nothing was wrong.
    """
    limits = np.concatenate([sizes_wh, sizes_wh], axis=1).astype(np.float64)
    clipped = np.minimum(np.maximum(boxes_xyxy, 0.0), limits)
    verdicts = (clipped != boxes_xyxy).any(axis=1).astype(np.int8)
    if not (clipped[:, :2] < clipped[:, 2:]).all() or not (boxes_xyxy[:, :2] < boxes_xyxy[:, 2:]).all():
        first, last = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
        verdicts[(clipped[:, :2] >= clipped[:, 2:]).any(axis=1)] = BOX_VERDICTS.index("box_outside")
        verdicts[(first == last).any(axis=1)] = BOX_VERDICTS.index("box_zero_area")
        verdicts[(first > last).any(axis=1)] = BOX_VERDICTS.index("box_reversed")
    return clipped, verdicts


def kitti_line(
    class_name: str, box_xyxy: Sequence[float] | NDArray[Any], score: float | None = None, decimals: int = 3
) -> str:
    """One object as a KITTI line, without the line's end: 15 columns, 16 with a score.

    Truncation, occlusion, angles, dimensions and location are zero: 2D detection does not know them.

    Args:
        class_name: white space becomes ``_``, since the format separates columns by spaces.
        box_xyxy: x1, y1, x2, y2 in pixels of the original image.
        score: confidence; None for ground truth.
        decimals: of the coordinates.

    Raises:
        ValueError: the name is empty.
    """
    word = "_".join(class_name.split())
    if not word:
        raise ValueError("a KITTI line needs a class name")
    box = " ".join(f"{float(value):.{decimals}f}" for value in box_xyxy)
    line = f"{word} 0.00 0 0.00 {box} 0.00 0.00 0.00 0.00 0.00 0.00 0.00"
    return line if score is None else f"{line} {float(score):.3f}"
