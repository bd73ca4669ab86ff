"""Which class label a COCO category becomes, and the class names that go with the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddetr_mm.data.coco_table import CocoTable
from ddetr_mm.errors import DataError, Problem

LABEL_MODES = ("contiguous", "category_id")
BACKGROUND, UNKNOWN = "background", "unknown"


@dataclass(frozen=True)
class LabelMap:
    """Labels of a dataset.

    Attributes:
        classes: class name of every label.
        category_ids: COCO category id of every label; None for labels that no category has (background
            and gaps).
        notes: what a user should know.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int | None, ...]
    notes: tuple[str, ...] = ()

    def lookup(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sorted category ids and the label of each, for :func:`labels_of`."""
        pairs = sorted(
            (category, label) for label, category in enumerate(self.category_ids) if category is not None
        )
        table = np.array(pairs, np.int64).reshape(-1, 2)
        return table[:, 0].copy(), table[:, 1].copy()


def labels_of(
    category_ids: npt.NDArray[np.int32], lookup: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
) -> npt.NDArray[np.int64]:
    """(M,) the label of every category id; -1 where it has none.

    Args:
        category_ids: (M,) any ids.
        lookup: from :meth:`LabelMap.lookup`.
    """
    known, labels = lookup
    if not len(known):
        return np.full(len(category_ids), -1, np.int64)
    places = np.minimum(np.searchsorted(known, category_ids), len(known) - 1)
    return np.where(known[places] == category_ids, labels[places], -1)


def build_label_map(
    table: CocoTable, label_mode: str, classes: Sequence[str] | None = None, num_classes: int | None = None
) -> LabelMap:
    """The labels of a dataset.

    Args:
        table: the annotations.
        label_mode: ``'contiguous'``: categories in the order of the files, numbered from 0, as mmdet does;
            ``'category_id'``: the label is the category id, label 0 is background.
        classes: names to use: with ``'contiguous'`` only categories of these names take part; with
            ``'category_id'`` they replace the files' names.
        num_classes: number of labels that the model has. With ``'category_id'`` it defaults to the
            largest category id plus one.

    Raises:
        DataError: a class is in no file, names repeat, or annotated categories do not fit in
            ``num_classes``.
        ValueError: no such label mode.
    """
    if label_mode == "category_id":
        return _by_category_id(table, classes, num_classes)
    if label_mode == "contiguous":
        return _contiguous(table.category_names, classes, num_classes)
    raise ValueError(f"label_mode must be one of {', '.join(LABEL_MODES)}, not {label_mode!r}")


def _contiguous(names: Mapping[int, str], classes: Sequence[str] | None, num_classes: int | None) -> LabelMap:
    wanted = set(names.values()) if classes is None else set(classes)
    chosen = {category: name for category, name in names.items() if name in wanted}
    found = tuple(chosen.values())
    notes: tuple[str, ...] = ()
    if len(set(found)) < len(found):
        repeated = sorted({name for name in found if found.count(name) > 1})
        raise DataError(Problem("several categories have one name", value=repeated, mend="rename them"))
    missing = sorted(wanted - set(found))
    if missing:
        raise DataError(
            Problem("classes that no annotation file has", value=missing, allowed=sorted(set(names.values())))
        )
    if num_classes is not None and len(found) > num_classes:
        raise DataError(
            Problem(
                f"{len(found)} classes, but num_classes is {num_classes}",
                mend=f"set num_classes to {len(found)}",
            )
        )
    if classes is not None and tuple(classes) != found:
        # mmdet labels in the order of the file whatever the order of `classes`; names must follow
        notes = (f"classes are put in the order of the annotation file: {', '.join(found)}",)
    return LabelMap(found, tuple(chosen), notes)


def _by_category_id(table: CocoTable, classes: Sequence[str] | None, num_classes: int | None) -> LabelMap:
    names = table.category_names
    size = num_classes if num_classes is not None else max(names, default=0) + 1
    annotated = set(np.unique(table.category_ids).tolist())
    too_large = sorted(category for category in annotated if category >= size)
    if too_large:
        mend = f"set num_classes to the largest category id plus one ({max(too_large) + 1})"
        what = f"annotated category ids do not fit in num_classes {size}"
        raise DataError(Problem(what, value=_named(too_large, names), allowed=f"1 to {size - 1}", mend=mend))
    if 0 in annotated:
        what = f"category id 0 ({names.get(0)!r}) is annotated, but label 0 is the background"
        raise DataError(Problem(what, allowed=f"1 to {size - 1}", mend="number the categories from 1"))
    unused = [category for category in names if category == 0 or category >= size]
    notes = (f"categories without annotations are left out: {_named(unused, names)}",) if unused else ()
    if classes is not None:
        if len(classes) != size:
            raise DataError(
                Problem(
                    f"{len(classes)} class names for {size} labels", mend="give one name a label, 0 included"
                )
            )
        shown = tuple(classes)
    else:
        fallback = {0: BACKGROUND}
        shown = tuple(names[i] if i in names and i else fallback.get(i, UNKNOWN) for i in range(size))
    ids = tuple(label if label and label in names else None for label in range(size))
    return LabelMap(shown, ids, notes)


def _named(categories: Sequence[int], names: Mapping[int, str]) -> str:
    return ", ".join(f"{category} ({names.get(category)})" for category in categories)
