"""Names of classes: comparing them, numbering them, and files that list them.

A class is known by its name; ids and columns only say where it is. Data, checkpoints, exported graphs and
class maps are compared here and nowhere else. Pure Python.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import parse_json

BACKGROUND, UNKNOWN = "background", "unknown"

FILLER_NAMES = frozenset({"", "n/a", "na", "background", "unknown", "__background__", "none"})
"""Names of columns without a class, lower case."""

BY_NAME_HINT = "set ddetr_mm.category_ids: by_name to number the classes by their names"
"""The hint of messages that refuse category ids."""

MERGE_HINT = "or set ddetr_mm.merge_categories: true (merge_categories=True in an mmdet config) to merge them"

MOST_SHOWN = 20
Columns = Sequence[str | None]
"""One entry a class column: its class, or None where it has none (background, gaps)."""

# --- Comparing ---


def is_filler(name: str) -> bool:
    """Return whether a column's name means that it has no class (``background``, ``N/A`` …)."""
    return name.strip().lower() in FILLER_NAMES


def named_columns(names: Columns, category_ids: Sequence[int | None] | None = None) -> tuple[str | None, ...]:
    """Return the class of every column, None for columns without one.

    Args:
        names: a name for every column; a list that has None for some is returned as it is.
        category_ids: the id of every column, None for background and gaps, where known: with it a class may
            be called ``unknown``. Without it names such as ``background`` and ``N/A`` mean that there is no
            class.
    """
    if None in names:
        return tuple(names)
    if category_ids is not None and len(category_ids) == len(names):
        return tuple(
            name if number is not None else None for name, number in zip(names, category_ids, strict=True)
        )
    return tuple(None if name is None or is_filler(name) else name for name in names)


def filled_columns(names: Columns, size: int | None = None) -> tuple[str, ...]:
    """Return a name for every column: ``background`` for column 0 without one, ``unknown`` for others.

    Args:
        names: from column 0.
        size: how many columns there are; None: as many as names.
    """
    padded = (*names, *(None,) * ((size or 0) - len(names)))
    return tuple(name or (UNKNOWN if column else BACKGROUND) for column, name in enumerate(padded))


def find_names(names: Columns, among: Columns) -> list[int | None]:
    """Return the position of each name among others; None where it is not there.

    Equal names are paired first. What is left is paired without regard to case, blanks, hyphens and
    underscores where that is unambiguous on both sides, so that ``A`` and ``a`` stay two classes.
    """
    exact: dict[str, int] = {}
    for position, name in enumerate(among):
        if name is not None:
            exact.setdefault(name, position)
    found = [None if name is None else exact.get(name) for name in names]
    taken = {position for position in found if position is not None}
    left = [position for position, name in enumerate(among) if name is not None and position not in taken]
    essences = Counter(_essence(among[position]) for position in left)
    lenient = {_essence(among[position]): position for position in left}
    asked = Counter(_essence(name) for name, position in zip(names, found, strict=True) if position is None)
    for index, name in enumerate(names):
        essence = _essence(name)
        if found[index] is None and essence and essences[essence] == asked[essence] == 1:
            found[index] = lenient[essence]
    return found


def _essence(name: str | None) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold() if name else ""


@dataclass(frozen=True)
class Difference:
    """How the classes of two lists of columns differ.

    Attributes:
        shared: (column of the first, column of the second) of every class of both.
        only_first, only_second: names of one list alone.
        clashes: whether a column is one class here and another there, or a class is in another column.
    """

    shared: tuple[tuple[int, int], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    clashes: bool


def compare_columns(first: Columns, second: Columns) -> Difference:
    """Compare two lists of columns by the names of their classes."""
    found = find_names(second, first)
    shared = tuple((source, column) for column, source in enumerate(found) if source is not None)
    used = {source for source, _column in shared}
    both = list(zip(first, second, strict=False))
    pairs = set(shared)
    clashes = any(source != column for source, column in shared) or any(
        one is not None and other is not None and (column, column) not in pairs
        for column, (one, other) in enumerate(both)
    )
    return Difference(
        shared=shared,
        only_first=tuple(
            name for column, name in enumerate(first) if name is not None and column not in used
        ),
        only_second=tuple(
            name for name, source in zip(second, found, strict=True) if name is not None and source is None
        ),
        clashes=clashes,
    )


def list_columns(columns: Columns) -> str:
    """Return the classes with their columns for a message: ``1 cat, 2 dog``."""
    named = [f"{column} {name}" for column, name in enumerate(columns) if name is not None]
    return some_of(named, MOST_SHOWN)


def some_of(texts: Sequence[str], shown: int = 5) -> str:
    """Return the first texts with commas, and how many more there are."""
    rest = len(texts) - shown
    return ", ".join(texts[:shown]) + (f" … ({rest} more)" if rest > 0 else "")


# --- Numbering by name ---


def number_names(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return the union of several files' class names, sorted: class ``i`` of it gets the id ``i + 1``.

    The same names give the same numbers, whatever the order of files and categories. Names that differ in
    case, blanks, hyphens and underscores alone count once, unless one file has both; the first spelling is
    kept.
    """
    by_essence: dict[str, list[str]] = {}
    apart: set[str] = set()
    for names in lists:
        here: dict[str, str] = {}
        for name in names:
            essence = _essence(name)
            if here.setdefault(essence, name) != name or not essence:
                apart.add(essence)
            spellings = by_essence.setdefault(essence, [])
            if name not in spellings:
                spellings.append(name)
    kept = [
        name
        for essence, spellings in by_essence.items()
        for name in (spellings if essence in apart else spellings[:1])
    ]
    return tuple(sorted(kept))


# --- Class maps ---


def read_class_map(path: str | Path, *, where: str) -> tuple[str | None, ...]:
    """Read the class names of a file, by class column; column 0 is the background.

    Args:
        path: text with one name a line, where line 1 names category id 1 and a blank line keeps its id. A
            first line ``background``, as in our exported ``labels.txt``, is column 0 instead. Or JSON: a list
            of names
            (the same), ``{id: name}``, ``{name: id}``, or anything with COCO's ``categories``.
        where: the spec key that named it, for messages.

    Returns:
        One entry a column, None for the background and for columns without a name.

    Raises:
        DataError: the file cannot be read, is another kind of JSON, or gives a column two names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            Problem(
                f"the class names cannot be read: {error}",
                file=path,
                where=where,
                allowed="a text file of one class name a line; line 1 names category 1",
            )
        ) from error
    if Path(path).suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        return _json_class_map(text, path, where)
    return _columns_of_list([line.strip() for line in text.splitlines()])


def _columns_of_list(names: Sequence[str]) -> tuple[str | None, ...]:
    listed = list(names)
    while listed and not listed[-1]:
        listed.pop()
    if not listed or listed[0].lower() not in (BACKGROUND, "__background__"):
        return (None, *(name or None for name in listed))
    # Our labels.txt has a line for every column, `unknown` for those without a class.
    return tuple(None if is_filler(name) else name for name in listed)


def _json_class_map(text: str, path: str | Path, where: str) -> tuple[str | None, ...]:
    allowed = "a list of names, {id: name}, {name: id}, or COCO's categories"
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(Problem(f"is not valid JSON: {error}", path, where, allowed=allowed)) from None
    if isinstance(content, Mapping) and isinstance(content.get("categories"), list):
        content = content["categories"]
    elif isinstance(content, Mapping) and isinstance(content.get("category_ids"), Mapping):
        content = content["category_ids"]
    if isinstance(content, list) and content and all(isinstance(item, str) for item in content):
        return _columns_of_list([item.strip() for item in content])
    pairs: list[tuple[Any, Any]] = []
    if isinstance(content, list):
        pairs = [
            (item.get("id"), item.get("name")) if isinstance(item, Mapping) else (None, None)
            for item in content
        ]
    elif isinstance(content, Mapping):
        by_name = all(isinstance(value, int) for value in content.values())
        pairs = [(value, key) if by_name else (key, value) for key, value in content.items()]
    names: dict[int, str] = {}
    for number, name in pairs:
        if not isinstance(name, str) or not re.fullmatch(r"\d{1,9}", str(number)):
            raise DataError(
                Problem("lists no class names", path, where, {str(number): name}, allowed=allowed)
            )
        if names.setdefault(int(number), name.strip()) != name.strip():
            raise DataError(Problem(f"gives id {number} two names", path, where, [names[int(number)], name]))
    if not names:
        raise DataError(Problem("lists no class names", path, where, allowed=allowed))
    if 0 in names and not is_filler(names[0]):
        what = f"names id 0 {names[0]!r}, but id 0 is the background"
        raise DataError(Problem(what, path, where, hint="number the classes from 1"))
    return tuple(names.get(column) or None if column else None for column in range(max(names) + 1))


def require_same_names(listed: Columns, known: Columns, *, path: str | Path, where: str) -> None:
    """Refuse a class map that contradicts the names that a model carries.

    Fewer names than the model has classes are no contradiction.

    Args:
        listed: from :func:`read_class_map`.
        known: the model's, None for columns whose class is not known.
        path: the class map, for messages.
        where: the spec key that named it.

    Raises:
        DataError: an id has another name in the model, or there are more names than columns.
    """
    problems = []
    if len(listed) > len(known):
        problems.append(
            Problem(
                f"names {len(listed) - 1} classes, the model has {len(known) - 1}",
                path,
                where,
                allowed=f"at most {len(known) - 1} lines",
            )
        )
    both = list(zip(listed, known, strict=False))
    different = [
        column
        for column, (one, other) in enumerate(both)
        if one is not None and other is not None and one != other and _essence(one) != _essence(other)
    ]
    if different and any(name is not None for name in known):
        column = different[0]
        what = f"category {column} is {listed[column]!r} here and {known[column]!r} in the model"
        if len(different) > 1:
            what += f" ({len(different)} names differ)"
        problems.append(
            Problem(
                what,
                path,
                where,
                value=list_columns(listed),
                allowed=list_columns(known),
                hint="remove classmap to use the model's names, or correct the file",
            )
        )
    DataError.collect(problems)
