"""Class names of labels, the categories they become, and the ids of those categories.

A mapping says which label class becomes which category, e.g. ``{"Rider": "person"}``. Several label
classes may share a category; a label class that is not in the mapping is left out of the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddetr_mm.errors import DataError, Problem

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

_FORM = 'a JSON object of names, e.g. {"Car": "vehicle", "Truck": "vehicle"}'


def load_class_mapping(path: str | Path) -> dict[str, str]:
    """Read a mapping file: one JSON object, label class → category.

    Raises:
        DataError: the file cannot be read, is not UTF-8 JSON, is not an object of non-empty strings,
            or gives one label class two categories.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            Problem(
                f"the class mapping cannot be read: {error.strerror}", file=path, mend="check mapping_path"
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
        Problem("is mapped to two categories", file=path, where=name, mend="keep one of the two lines")
        for name in twice
    )
    return check_class_mapping(mapping, path)


def check_class_mapping(mapping: Any, source: str | Path | None = None) -> dict[str, str]:
    """Return ``mapping`` as a plain dict when it maps names to names.

    Args:
        mapping: what to check.
        source: the file it came from, for the message.

    Raises:
        DataError: not a mapping, empty, or with a key or value that is not a non-empty string. All
            offending entries are shown.
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
            allowed="non-empty text on both sides",
        )
        for name, category in mapping.items()
        if not (_is_name(name) and _is_name(category))
    )
    return dict(mapping)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def category_ids(category_names: Iterable[str]) -> dict[str, int]:
    """Ids of the categories: the distinct names in reverse alphabetical order, counted from 1.

    The reference counts so; id 0 stays free for the background.

    >>> category_ids(["bag", "face", "person", "bag"])
    {'person': 1, 'face': 2, 'bag': 3}
    """
    return {name: number for number, name in enumerate(sorted(set(category_names), reverse=True), start=1)}


def coco_categories(ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """The ``categories`` list of a COCO file, in ascending order of id."""
    return [{"id": number, "name": name} for name, number in sorted(ids.items(), key=lambda item: item[1])]
