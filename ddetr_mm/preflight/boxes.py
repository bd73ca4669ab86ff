"""Boxes that cannot be what they should be: corners, fractions, out of the image, tiny, doubled.

Boxes are read as COCO's (x, y, width, height) in pixels. A wrong format shows in where the boxes then
lie: read as widths and heights, corners reach far beyond their images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ddetr_mm.preflight.findings import Finding, Section, fault, note
from ddetr_mm.preflight.split import Split

LEAST_BOXES = 5
"""Fewer boxes prove no wrong format."""

BEYOND_PX = 1.0
"""Boxes may reach so far beyond the image before that is worth a word: labelling tools round."""

TINY_PX = 1.0


def check_boxes(split: Split) -> Section:
    """Everything about the boxes of one split."""
    section = Section(f"boxes of {split.name}")
    boxes = split.table.boxes_xywh
    if len(boxes) == 0:
        return section
    sides = np.sqrt(np.maximum(boxes[:, 2] * boxes[:, 3], 0))
    small, middle, large = np.percentile(sides, [5, 50, 95])
    section.lines.append(
        f"{len(boxes):,} boxes; side (root of area) of 5 % / half / 95 % below "
        f"{small:.0f} / {middle:.0f} / {large:.0f} px"
    )
    section.data["side_percentiles_px"] = [round(float(value), 2) for value in (small, middle, large)]
    format_faults = list(_wrong_format(split))
    section.findings += format_faults or _out_of_place(split)
    section.findings += _doubled(split)
    return section


def _wrong_format(split: Split) -> Iterator[Finding]:
    if are_fractions(split.table.boxes_xywh, split.box_sizes_wh):
        yield fault(
            "boxes-normalised",
            f"all {len(split.table.boxes_xywh)} boxes are fractions of the image (0 to 1), the first in "
            f"{split.box_example(0)}",
            where=split.where,
            allowed="pixels: bbox = [x, y, width, height]",
            mend="multiply x and width by the image's width, y and height by its height",
        )
    elif are_corners(split.table.boxes_xywh, split.box_sizes_wh):
        beyond = np.flatnonzero(reach_beyond(split.table.boxes_xywh, split.box_sizes_wh))
        yield fault(
            "boxes-are-corners",
            f"the boxes are corners (x1, y1, x2, y2): read as x, y, width, height {len(beyond)} of "
            f"{len(split.table.boxes_xywh)} reach beyond their image, the first in "
            f"{split.box_example(int(beyond[0]))}",
            where=split.where,
            allowed="bbox = [x, y, width, height]",
            mend="subtract: width = x2 - x1, height = y2 - y1",
        )


def are_fractions(boxes_xywh: npt.NDArray[np.float64], sizes_wh: npt.NDArray[np.float64]) -> bool:
    """Whether boxes (M, 4) lie within 0 to 1 where their images have many pixels."""
    if len(boxes_xywh) < LEAST_BOXES or (sizes_wh <= 16).any():
        return False
    return bool((np.abs(boxes_xywh) <= 1.01).all() and (boxes_xywh[:, 2:] > 0).any())


def are_corners(boxes_xywh: npt.NDArray[np.float64], sizes_wh: npt.NDArray[np.float64]) -> bool:
    """Whether boxes (M, 4) make sense as corners and not as x, y, width, height.

    Nearly every box must be ordered and inside its image when it is read as corners, and a tenth or more must
    reach beyond it otherwise. Honest boxes in the lower right half of their images are not ordered.
    """
    if len(boxes_xywh) < LEAST_BOXES:
        return False
    ordered = (boxes_xywh[:, 2:] > boxes_xywh[:, :2]).all(axis=1)
    inside = (boxes_xywh[:, 2:] <= sizes_wh + BEYOND_PX).all(axis=1)
    beyond = reach_beyond(boxes_xywh, sizes_wh)
    return bool((ordered & inside).mean() >= 0.98 and beyond.mean() >= 0.1)


def reach_beyond(
    boxes_xywh: npt.NDArray[np.float64], sizes_wh: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """(M,) which boxes reach more than :data:`BEYOND_PX` beyond their images."""
    ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    return np.asarray(((boxes_xywh[:, :2] < -BEYOND_PX) | (ends > sizes_wh + BEYOND_PX)).any(axis=1))


def _out_of_place(split: Split) -> Iterator[Finding]:
    table = split.table
    beyond = np.flatnonzero(reach_beyond(table.boxes_xywh, split.box_sizes_wh) & table.visible)
    if len(beyond):
        yield note(
            "boxes-beyond-image",
            f"{_of(beyond, split)} reach beyond their image and are clipped, the first in "
            f"{split.box_example(int(beyond[0]))}",
            where=split.where,
        )
    lost = np.flatnonzero(~table.visible)
    if len(lost):
        build = fault if len(lost) > table.num_boxes / 2 else note
        yield build(
            "boxes-outside-image",
            f"{_of(lost, split)} have no area inside their image and are not used, the first in "
            f"{split.box_example(int(lost[0]))}",
            where=split.where,
        )
    tiny = np.flatnonzero((table.boxes_xywh[:, 2:].min(axis=1) < TINY_PX) & table.visible)
    if len(tiny):
        yield note(
            "boxes-tiny",
            f"{_of(tiny, split)} are less than {TINY_PX:g} px wide or high, the first in "
            f"{split.box_example(int(tiny[0]))}",
            where=split.where,
        )


def _doubled(split: Split) -> Iterator[Finding]:
    table = split.table
    places = np.column_stack([split.box_rows, table.boxes_xywh])
    labelled = np.column_stack([places, table.category_ids])
    doubles = num_repeated(labelled)
    if doubles:
        yield note(
            "boxes-doubled",
            f"{doubles} boxes stand twice with one class in one image",
            where=split.where,
            mend="a detection can match one of them only",
        )
    two_classes = num_repeated(places) - doubles
    if two_classes > 0:
        yield note(
            "boxes-of-two-classes",
            f"{two_classes} boxes stand in one place with another class",
            where=split.where,
        )


def num_repeated(rows: npt.NDArray[np.float64]) -> int:
    """How many rows of a table (M, n) equal an earlier one.

    Sorting whole rows takes seconds for the boxes of COCO; so they are sorted by a number of 64 bits, and
    only rows that share theirs are compared.
    """
    bits = np.ascontiguousarray(rows + 0.0).view(np.uint64)  # one zero, not two
    keys = np.zeros(len(rows), dtype=np.uint64)
    for column in bits.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    order = np.argsort(keys)
    same = np.diff(keys[order]) == 0
    shared = np.zeros(len(rows), dtype=bool)
    shared[order[1:][same]] = shared[order[:-1][same]] = True
    candidates = rows[shared]
    return len(candidates) - len(np.unique(candidates, axis=0)) if len(candidates) else 0


def _of(boxes: npt.NDArray[np.int64], split: Split) -> str:
    return f"{len(boxes):,} of {split.table.num_boxes:,} boxes"
