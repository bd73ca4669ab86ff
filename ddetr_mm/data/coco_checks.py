"""Checks of parsed annotation files: ids, categories and file names that cannot be right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddetr_mm.data.coco_json import JsonColumns
from ddetr_mm.errors import DataError, Problem

MAX_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class ParsedSource:
    """The parsed files of one source, in order, with their paths for messages."""

    paths: tuple[Path, ...]
    columns: tuple[JsonColumns, ...]


def check_unique(
    source: ParsedSource,
    kind: str,
    ids_by_file: Sequence[npt.NDArray[np.int64]],
    given_by_file: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> None:
    """Ids of one kind must not repeat within a source.

    Raises:
        DataError: an id stands twice.
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
    what = f"id {example} stands here and in {other}"
    if repeated.size > 1:
        what += f"; {repeated.size} ids repeat in all"
    mend = "give every entry of a source its own id, or make the files separate sources"
    raise DataError(Problem(what, path, f"{kind}[{first}].id", example, mend=mend))


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
                    mend="add the category",
                )
            )
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])


def check_file_names(source: ParsedSource) -> None:
    """No ``file_name`` may name something outside the source's image folder.

    Raises:
        DataError: one does.
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
                        mend="write the name relative to image_dir",
                    )
                )
                if len(problems) == MAX_PROBLEMS_SHOWN:
                    raise DataError(*problems)
    DataError.collect(problems)


def leaves_folder(name: str) -> bool:
    """Whether a file name, joined to a folder, could name something outside it, or nothing at all."""
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
                mend = "give one id one name in all sources"
                problems.append(Problem(what, path, "categories", mend=mend))
            names.setdefault(category, name)
            origin.setdefault(category, path)
    DataError.collect(problems[:MAX_PROBLEMS_SHOWN])
    return names


def _files(sources: Sequence[ParsedSource]) -> Iterator[tuple[Path, JsonColumns]]:
    for source in sources:
        yield from zip(source.paths, source.columns, strict=True)
