"""Classes: ids against the class columns and against names, within a split and between splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddetr_mm.preflight.findings import Finding, Section, fault, note, suspicion
from ddetr_mm.preflight.split import Split

LEAST_BOXES_FOR_SHAPE = 30
"""A class needs so many boxes in both splits before their shapes are compared."""


def check_split_classes(
    split: Split, num_classes: int, eval_class_ids: Sequence[int] | None = None
) -> Section:
    """Ids of one split against the class columns.

    Args:
        split: the data.
        num_classes: class columns of the network; category ids must lie below, and above 0.
        eval_class_ids: categories that evaluation is restricted to.
    """
    section = Section(f"classes of {split.name}")
    counts = boxes_by_id(split)
    names = split.table.category_names
    section.data["boxes_by_class"] = {names[number]: counts.get(number, 0) for number in sorted(names)}
    section.findings += _ids_against_columns(split, counts, num_classes)
    if split.table.num_images == 0:
        section.findings.append(fault("no-images", "lists no image", where=split.where))
    elif not counts:
        section.findings.append(fault("no-boxes", "holds no box at all", where=split.where))
    if eval_class_ids and split.name != "train" and not set(eval_class_ids) & set(names):
        section.findings.append(
            fault(
                "eval-classes-absent",
                f"no category of {split.name} is among them",
                where="dataset.eval_class_ids",
                value=list(eval_class_ids),
                allowed=[f"{number} ({name})" for number, name in sorted(names.items())],
            )
        )
    empty = [name for number, name in sorted(names.items()) if number and not counts.get(number)]
    if empty and counts:
        section.findings.append(
            note("classes-without-boxes", "classes without a box: " + _listed(empty), where=split.where)
        )
    return section


def boxes_by_id(split: Split) -> dict[int, int]:
    """Category id → number of boxes, crowds included."""
    ids, counts = np.unique(split.table.category_ids, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _ids_against_columns(split: Split, counts: dict[int, int], num_classes: int) -> Iterator[Finding]:
    names = split.table.category_names
    if counts.get(0):
        yield fault(
            "ids-from-zero",
            f"the categories are numbered from 0: {counts[0]} boxes have category id 0 "
            f"({names.get(0, '?')}), which stands for the background",
            where=split.where,
            mend=f"number the categories from 1, with dataset.num_classes={max(names, default=0) + 2}",
        )
    largest = max(names, default=0)
    if largest >= num_classes:
        yield fault(
            "ids-beyond-columns",
            f"category ids of {split.name} do not fit",
            where="dataset.num_classes",
            value=num_classes,
            allowed=f"the largest category id plus one: {largest + 1} or more",
        )
    elif names and num_classes > largest + 1:
        yield note(
            "columns-unused",
            f"{num_classes - largest - 1} class columns belong to no category: the largest id is {largest}",
            where="dataset.num_classes",
            value=num_classes,
        )


def check_between_splits(splits: Sequence[Split]) -> Section:
    """Whether ids mean the same class in all splits, and what is validated was trained."""
    section = Section("classes between splits")
    for first, second in combinations(splits, 2):
        section.findings += _names_differ(first, second)
        section.findings += _shapes_swapped(first, second)
    if len(splits) > 1 and splits[0].name == "train":
        trained = boxes_by_id(splits[0])
        for split in splits[1:]:
            names = split.table.category_names
            missing = [names[number] for number in boxes_by_id(split) if number and not trained.get(number)]
            if missing:
                section.findings.append(
                    note(
                        "classes-never-trained",
                        "classes without a training box, which nothing can learn: " + _listed(missing),
                        where=split.where,
                    )
                )
    return section


def _names_differ(first: Split, second: Split) -> Iterator[Finding]:
    one, other = first.table.category_names, second.table.category_names
    shared = [number for number in one if number in other and one[number] != other[number]]
    if not shared:
        return
    pairs = [
        f"{number}: {one[number]!r} in {first.name}, {other[number]!r} in {second.name}" for number in shared
    ]
    same_names = set(one.values()) == set(other.values())
    yield fault(
        "ids-swapped",
        ("the same classes have other ids" if same_names else "one id stands for two classes")
        + ": "
        + _listed(pairs),
        where=f"{first.where} and {second.where}",
        mend="give one name one id in all files; `ddetr-mm coco merge` does",
    )


def _shapes_swapped(first: Split, second: Split) -> Iterator[Finding]:
    """Pairs of classes whose boxes in one split look like the other class's boxes in the other split."""
    numbers = set(boxes_by_id(first)) & set(boxes_by_id(second))
    profiles = {}
    for number in numbers:
        pair = shape_profile(first, number), shape_profile(second, number)
        if min(profile.count for profile in pair) >= LEAST_BOXES_FOR_SHAPE:
            profiles[number] = pair
    for one, other in combinations(sorted(profiles), 2):
        (first_one, second_one), (first_other, second_other) = profiles[one], profiles[other]
        straight = min(distance(first_one, second_one), distance(first_other, second_other))
        crossed = max(distance(first_one, second_other), distance(first_other, second_one))
        if straight > 8 and crossed < straight / 3:
            names = second.table.category_names
            yield suspicion(
                "ids-swapped",
                f"category ids {one} ({names[one]}) and {other} ({names[other]}) look exchanged between "
                f"{first.name} and {second.name}: sizes and aspect ratios agree when they are swapped "
                f"(distance {crossed:.1f} standard errors) and not as they stand ({straight:.1f})",
                where=f"{first.where} and {second.where}",
                mend="compare the contact sheets of both splits",
            )


class ShapeProfile(NamedTuple):
    """What a class's boxes look like: of the logarithms of their areas, relative to the image, and of their
    aspect ratios.

    Attributes:
        count: boxes.
        mean: (2,).
        squared_error: (2,) of the mean.
    """

    count: int
    mean: npt.NDArray[np.float64]
    squared_error: npt.NDArray[np.float64]


def shape_profile(split: Split, category_id: int) -> ShapeProfile:
    """The profile of a class in a split, by its boxes with an area."""
    chosen = (split.table.category_ids == category_id) & split.table.visible
    boxes = split.table.boxes_xywh[chosen]
    sizes_wh = split.box_sizes_wh[chosen]
    sound = (boxes[:, 2:] > 0).all(axis=1)
    width, height = boxes[sound, 2], boxes[sound, 3]
    count = len(width)
    if count == 0:
        return ShapeProfile(0, np.zeros(2), np.zeros(2))
    rows = np.log(width * height / sizes_wh[sound].prod(axis=1)), np.log(width / height)
    mean, variance = (np.array([getattr(row, name)() for row in rows]) for name in ("mean", "var"))
    return ShapeProfile(count, mean, variance / count)


def distance(first: ShapeProfile, second: ShapeProfile) -> float:
    """How far two profiles' means lie apart: the larger over area and ratio, in standard errors."""
    spread = first.squared_error + second.squared_error
    apart = np.abs(first.mean - second.mean)
    return float((apart / np.sqrt(np.maximum(spread, 1e-12))).max())


def _listed(texts: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"
