"""Problems in KITTI data: their kinds, and ``warnings.json``, which lists every case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

#: Kind of problem → what it means and what is done about it.
PROBLEM_KINDS: dict[str, str] = {
    "missing_label": "an image without a label file: the image is left out",
    "unreadable_label": "a label file that cannot be opened: the image is left out",
    "label_without_image": "a label file that belongs to no image: it is not used",
    "empty_label": "a label file without any line: the image is kept, without boxes",
    "duplicate_name": "an image whose name, but for the extension, an earlier one has: it is left out",
    "name_not_utf8": "a file name that is not UTF-8, which JSON cannot hold: the image is left out",
    "undecodable_image": "an image that cannot be read or decoded: it is left out",
    "truncated_image": "an image file that ends too early: it is left out",
    "no_images": "a sequence folder without any image",
    "not_utf8": "a line with bytes that are not UTF-8: the line is dropped",
    "windows_line_ends": "a file with carriage returns (the first one is listed): it is read all the same",
    "wrong_column_count": "a line that has neither 15 nor 16 columns: it is dropped",
    "eight_columns": "a line of 8 columns, up to the box: it is dropped; KITTI has 7 more (zeros will do)",
    "yolo_line": "a line in YOLO's format (class number, relative box): it is dropped; see docs/data.md",
    "not_a_number": "a line with a column that should be a number and is not: it is dropped",
    "not_finite": "a line with an infinite number or NaN: it is dropped",
    "unknown_class": "a line whose class is not in the class mapping: it is dropped",
    "all_lines_dropped": "a label file with lines, none of which could be used",
    "box_clipped": "a box that reaches beyond its image: it is cut to the image",
    "box_reversed": "a box whose right or bottom edge lies before the left or top one: it is dropped",
    "box_zero_area": "a box without width or height: it is dropped",
    "box_outside": "a box of which nothing lies inside the image: it is dropped",
}

#: Kinds that drop a line because of its format or class; a box without area is a fault of the box alone.
LINE_DROPPED = frozenset(
    {
        "not_utf8",
        "wrong_column_count",
        "eight_columns",
        "yolo_line",
        "not_a_number",
        "not_finite",
        "unknown_class",
    }
)


def most_frequent(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Names with their counts, the largest first, equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


class FoundProblem(NamedTuple):
    """Something wrong in the input.

    Attributes:
        kind: a key of :data:`PROBLEM_KINDS`.
        file: path beginning with the sequence's name.
        line: line number from 1; 0 when the whole file is meant.
        detail: the offending value or the reason.
    """

    kind: str
    file: str
    line: int
    detail: str


_MAX_UNKNOWN_CLASSES = 10_000
_encoder = msgspec.json.Encoder()


class ProblemList:
    """Counts problems and writes them to a JSON file, one by one.

    The file holds ``problems`` (``kind``, ``file``, ``line`` or null, ``detail``), ``counts`` by kind,
    ``meanings`` of the kinds found, and ``unknown_classes`` with the number of lines of each
    (of the first ten thousand names).

    Args:
        path: the file.
        max_listed: cases listed of each kind; more are only counted, under ``not_listed``.
    """

    def __init__(self, path: Path, max_listed: int = 1_000_000) -> None:
        self.counts: Counter[str] = Counter()
        self.unknown_classes: Counter[str] = Counter()
        self.max_listed = max_listed
        self._file = path.open("wb")
        self._file.write(b'{"problems":[')
        self._separator = b"\n"

    def extend(self, problems: Iterable[FoundProblem]) -> None:
        """Add problems in the order of the list."""
        for problem in problems:
            self.counts[problem.kind] += 1
            if problem.kind == "unknown_class":
                self._count_class(problem.detail)
            if self.counts[problem.kind] <= self.max_listed:
                row = {**problem._asdict(), "line": problem.line or None}
                self._file.write(self._separator + _encoder.encode(row))
                self._separator = b",\n"

    def _count_class(self, name: str) -> None:
        if name in self.unknown_classes or len(self.unknown_classes) < _MAX_UNKNOWN_CLASSES:
            self.unknown_classes[name] += 1

    def close(self) -> None:
        """Finish the file."""
        tail: dict[str, Any] = {
            "counts": dict(sorted(self.counts.items())),
            "meanings": {kind: PROBLEM_KINDS[kind] for kind in sorted(self.counts)},
            "unknown_classes": dict(sorted(self.unknown_classes.items())),
            "not_listed": {
                kind: number - self.max_listed
                for kind, number in sorted(self.counts.items())
                if number > self.max_listed
            },
        }
        self._file.write(b"\n]," + msgspec.json.format(_encoder.encode(tail), indent=1)[1:] + b"\n")
        self.discard()

    def discard(self) -> None:
        """Close the file without finishing it; harmless after :meth:`close`."""
        self._file.close()
