"""Sizes and boxes under resizing, cropping and padding: pure functions on numpy arrays.

Sizes are (height, width) in pixels, boxes (x1, y1, x2, y2) in pixels of their image, windows
(top, left, height, width) in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float32]
Keep = npt.NDArray[np.bool_]


def resize_size_hw(height: int, width: int, short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """Output size of a resize that brings the shorter side to ``short_side``.

    Where the longer side would exceed ``max_size``, the shorter side is lowered instead (to the nearest
    integer, so that the longer side may still exceed ``max_size`` by a few pixels for very elongated
    images, as in TAO). The longer side is rounded down.

    Args:
        height: pixels, at least 1.
        width: pixels, at least 1.
        short_side: target of the shorter side, pixels.
        max_size: bound of the longer side, pixels; None for no bound.

    Returns:
        (height, width), each at least 1.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(1, round(max_size * short / long))
    # multiplied before the division: the order decides the last unit in some cases
    new_long = int(short_side * long / short)
    return (short_side, new_long) if height <= width else (new_long, short_side)


def fit_size_hw(height: int, width: int, target: float) -> tuple[int, int]:
    """Output size of a resize that brings the longer side to ``target``, both sides rounded.

    Returns:
        (height, width), each at least 1.
    """
    ratio = target / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def fixed_pad_size_hw(height: int, width: int, short_long: tuple[int, int]) -> tuple[int, int]:
    """Padded size of an image: ``short_long`` turned so that its long side lies along the image's.

    A square image counts as landscape. A side that is longer already stays.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        short_long: (short, long) target, pixels.

    Returns:
        (height, width).
    """
    short, long = min(short_long), max(short_long)
    target_h, target_w = (long, short) if height > width else (short, long)
    return max(height, target_h), max(width, target_w)


def divisible_size_hw(height: int, width: int, divisor: int) -> tuple[int, int]:
    """The smallest (height, width) that holds the image and is divisible by ``divisor``."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def scale_boxes(
    boxes_xyxy: Boxes, scale_wh: tuple[float, float], size_hw: tuple[int, int]
) -> tuple[Boxes, Keep]:
    """Boxes in a resized image.

    Args:
        boxes_xyxy: (N, 4) in the image before.
        scale_wh: new width over old, new height over old.
        size_hw: size of the image after.

    Returns:
        All N boxes, scaled and clipped, and (N,) which of them keep an area.
    """
    scale = np.array([*scale_wh, *scale_wh], np.float32)
    return _clip(boxes_xyxy * scale, size_hw)


def crop_boxes(boxes_xyxy: Boxes, window: tuple[int, int, int, int]) -> tuple[Boxes, Keep]:
    """Boxes in a window of their image.

    Args:
        boxes_xyxy: (N, 4) in the image.
        window: (top, left, height, width).

    Returns:
        All N boxes relative to the window and clipped to it, and (N,) which of them keep an area.
    """
    top, left, height, width = window
    offset = np.array([left, top, left, top], np.float32)
    return _clip(boxes_xyxy - offset, (height, width))


def _clip(boxes_xyxy: Boxes, size_hw: tuple[int, int]) -> tuple[Boxes, Keep]:
    height, width = size_hw
    boxes = np.clip(boxes_xyxy, np.float32(0), np.array([width, height, width, height], np.float32))
    keep: Keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return boxes, keep


# --- Boxes around segmentations ---


def box_around_segmentation(value: Any) -> tuple[float, float, float, float] | None:
    """The box (x, y, width, height) in pixels around polygons or a run-length code.

    Args:
        value: a COCO ``segmentation``: a list of polygons ``[x1, y1, x2, y2, …]``, one such polygon, or
            ``{"size": [height, width], "counts": …}`` with counts as a list or as COCO's text.

    Returns:
        The box, or None where the segmentation covers nothing or cannot be read.
    """
    try:
        if isinstance(value, dict):
            return _box_of_runs(value)
        if not isinstance(value, list) or not value:
            return None
        polygons = value if isinstance(value[0], list) else [value]
        whole = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
        points = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in whole]
        if not points:
            return None
        corners = np.concatenate(points)
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    if not np.isfinite(corners).all():
        return None
    left_top, right_bottom = corners.min(axis=0), corners.max(axis=0)
    return (*left_top.tolist(), *(right_bottom - left_top).tolist())


def _box_of_runs(code: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """The box around the pixels of a run-length code, whose runs go down the columns, background first."""
    height, width = (int(side) for side in code["size"])
    counts = code["counts"]
    runs = np.asarray(_runs_of_text(counts) if isinstance(counts, str) else counts, np.int64)
    if height <= 0 or width <= 0 or (runs < 0).any() or runs.sum() != height * width:
        return None
    ends = np.cumsum(runs)
    starts, ends, lengths = (ends - runs)[1::2], ends[1::2], runs[1::2]
    starts, last = starts[lengths > 0], ends[lengths > 0] - 1
    if not len(starts):
        return None
    columns_of_start, columns_of_last = starts // height, last // height
    whole_column = columns_of_last > columns_of_start
    top = np.where(whole_column, 0, starts % height).min()
    bottom = np.where(whole_column, height - 1, last % height).max()
    left, right = columns_of_start.min(), columns_of_last.max()
    return float(left), float(top), float(right - left + 1), float(bottom - top + 1)


def _runs_of_text(text: str) -> list[int]:
    """COCO's text of run lengths: five bits a character; from the third on, differences to the last but one.

    Raises:
        ValueError: a character that the code has not, or a text that ends inside a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("no run-length code")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("a run-length code that is cut")
    return runs
