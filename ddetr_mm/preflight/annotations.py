"""Looking over annotation files and image folders: counts, and faults that would spoil a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddetr_mm.data.coco_table import CocoTable
from ddetr_mm.data.sources import CocoSource, read_coco_sources
from ddetr_mm.errors import Problem

IMAGE_SAMPLE = 200
"""How many images of a split are looked for on disk; evenly spread over the split."""


@dataclass
class SplitReport:
    """What one split (``train``, ``val``, ``test``) holds.

    Attributes:
        split: its name.
        num_images: images listed.
        num_images_without_objects: images without any box.
        num_boxes: boxes listed, crowds included.
        num_crowds: boxes marked as crowds.
        num_invisible: boxes of which nothing lies inside the image.
        boxes_by_class: class name → boxes.
        notes: remarks of the reader.
        problems: faults that make a run useless.
    """

    split: str
    num_images: int = 0
    num_images_without_objects: int = 0
    num_boxes: int = 0
    num_crowds: int = 0
    num_invisible: int = 0
    boxes_by_class: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``check.json``."""
        return asdict(self) | dict(problems=[str(problem) for problem in self.problems])


def look_over(
    split: str,
    sources: Sequence[Mapping[str, str]],
    num_classes: int,
    eval_class_ids: Sequence[int] | None = None,
) -> SplitReport:
    """Read a split's annotations and judge them.

    Args:
        split: its name, for messages.
        sources: ``{image_dir, json_file}`` each.
        num_classes: class columns of the network; category ids must lie below, and above 0.
        eval_class_ids: categories that evaluation is restricted to.

    Raises:
        DataError: when a file is missing or not COCO.
    """
    table = read_coco_sources(sources)
    report = SplitReport(
        split,
        num_images=table.num_images,
        num_images_without_objects=int((np.diff(table.box_starts) == 0).sum()),
        num_boxes=table.num_boxes,
        num_crowds=int(table.crowd.sum()),
        num_invisible=int((~table.visible).sum()),
        notes=list(table.notes),
    )
    ids, counts = np.unique(table.category_ids, return_counts=True)
    by_id = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    report.boxes_by_class = {
        name: by_id.get(category, 0) for category, name in sorted(table.category_names.items())
    }
    where = f"dataset.{split}_data_sources"
    report.problems += category_problems(table, by_id, num_classes, where)
    if eval_class_ids and not set(eval_class_ids) & set(table.category_names):
        report.problems.append(
            Problem(
                "no category of the data is among them",
                where="dataset.eval_class_ids",
                value=list(eval_class_ids),
                allowed=[f"{category} ({name})" for category, name in sorted(table.category_names.items())],
            )
        )
    report.problems += image_problems(table, sources, where)
    return report


def category_problems(
    table: CocoTable, boxes_by_id: Mapping[int, int], num_classes: int, where: str
) -> list[Problem]:
    """Categories that do not fit the class columns, or that nothing belongs to."""
    problems = []
    largest = max(table.category_names, default=0)
    if largest >= num_classes:
        problems.append(
            Problem(
                f"category ids of {where} do not fit",
                where="dataset.num_classes",
                value=num_classes,
                allowed=f"the largest category id plus one: {largest + 1} or more",
            )
        )
    if boxes_by_id.get(0):
        problems.append(
            Problem(
                f"{boxes_by_id[0]} boxes have category id 0, which stands for the background",
                where=where,
                mend="number the categories from 1",
            )
        )
    if table.num_images == 0:
        problems.append(Problem("lists no image", where=where))
    elif not boxes_by_id:
        problems.append(Problem("holds no box at all", where=where))
    return problems


def image_problems(table: CocoTable, sources: Sequence[Mapping[str, str]], where: str) -> list[Problem]:
    """Images that are not on disk, judged by an even sample; one problem per source."""
    folders = [Path(CocoSource.of(source).image_dir) for source in sources]
    rows = np.unique(np.linspace(0, table.num_images - 1, min(IMAGE_SAMPLE, table.num_images)).astype(int))
    missing: dict[int, list[Path]] = {}
    looked: dict[int, int] = {}
    for row in rows:
        source = int(table.source_indices[row])
        path = folders[source] / table.file_name(int(row))
        looked[source] = looked.get(source, 0) + 1
        if not path.is_file():
            missing.setdefault(source, []).append(path)
    return [
        Problem(
            f"{len(paths)} of {looked[source]} images looked for are not there, the first: {paths[0]}",
            where=f"{where}[{source}].image_dir",
            value=str(folders[source]),
            mend="file_name in the annotations must be relative to image_dir",
        )
        for source, paths in missing.items()
    ]
