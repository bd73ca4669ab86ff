"""The images with the most mistakes, drawn with what is there and what was found."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddetr_mm.evaluation.matching import Confusions, Matching

MOST_IMAGES = 50
LONG_SIDE_PX = 640

RIGHT, MISSED, WRONG_CLASS, NOTHING_THERE = "#2ca02c", "#e377c2", "#ff7f0e", "#d62728"
"""Colours: found; not found; found as another class; found where nothing is."""


@dataclass(frozen=True)
class WorstImage:
    """One image and its mistakes at the matching's threshold.

    Attributes:
        image_id: the dataset's id.
        path: the image file, or None where it is not known.
        num_missed: objects that were not found.
        num_wrong_class: objects that were found as another class.
        num_nothing_there: detections where nothing is.
        num_right: objects that were found.
    """

    image_id: int
    path: str | None
    num_missed: int
    num_wrong_class: int
    num_nothing_there: int
    num_right: int

    @property
    def num_mistakes(self) -> int:
        """All mistakes."""
        return self.num_missed + self.num_wrong_class + self.num_nothing_there


def worst_images(
    matching: Matching, mistaken: Confusions, paths: Mapping[int, str], most: int = MOST_IMAGES
) -> list[WorstImage]:
    """The images with the most mistakes, the worst first; images without a mistake are left out.

    Args:
        matching: from :func:`ddetr_mm.evaluation.matching.match`.
        mistaken: from :func:`ddetr_mm.evaluation.matching.confusions`.
        paths: image id → file.
        most: how many at most.
    """
    truth, found = matching.truth, matching.detections
    ids = truth.image_ids
    wrong_class = mistaken.confused_with >= 0
    missed = matching.missed
    missed[mistaken.confused_with[wrong_class]] = False
    nothing = matching.counts & ~matching.hits & ~wrong_class

    def per_image(image_ids: np.ndarray) -> np.ndarray:
        known, counts = np.unique(image_ids, return_counts=True)
        total = np.zeros(len(ids), dtype=np.int64)
        total[np.searchsorted(sorted_ids, known)] = counts
        return total

    sorted_ids = np.sort(ids)
    figures = np.stack(
        [
            per_image(truth.box_image_ids[missed]),
            per_image(found.image_ids[wrong_class]),
            per_image(found.image_ids[nothing]),
            per_image(found.image_ids[matching.hits]),
        ]
    )
    mistakes = figures[:3].sum(axis=0)
    share_right = figures[3] / np.maximum(mistakes + figures[3], 1)
    order = np.lexsort((sorted_ids, share_right, -mistakes))[:most]
    return [
        WorstImage(int(sorted_ids[row]), paths.get(int(sorted_ids[row])), *figures[:, row].tolist())
        for row in order
        if mistakes[row]
    ]


def draw_worst_image(worst: WorstImage, matching: Matching, mistaken: Confusions) -> bytes | None:
    """A JPEG of an image with its objects and detections; None where its file cannot be read."""
    if worst.path is None:
        return None
    try:
        with Image.open(worst.path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # evaluation is over: a picture less is no reason to fail
    scale = min(LONG_SIDE_PX / max(picture.size), 4.0)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    truth, found = matching.truth, matching.detections
    names = truth.category_names
    of_image = found.image_ids == worst.image_id
    missed = matching.missed & (truth.box_image_ids == worst.image_id)
    confused = mistaken.confused_with >= 0
    missed[mistaken.confused_with[confused]] = False
    for row in np.flatnonzero(matching.hits & of_image):
        _box(draw, found.boxes_xywh[row] * scale, RIGHT, "", width=1)
    for row in np.flatnonzero(missed):
        _box(draw, truth.boxes_xywh[row] * scale, MISSED, f"missed {names[int(truth.category_ids[row])]}")
    for row in np.flatnonzero(matching.counts & ~matching.hits & of_image):
        name = f"{names.get(int(found.category_ids[row]), '?')} {found.scores[row]:.2f}"
        if confused[row]:
            real = names[int(truth.category_ids[mistaken.confused_with[row]])]
            _box(draw, found.boxes_xywh[row] * scale, WRONG_CLASS, f"{name}, is {real}")
        else:
            _box(draw, found.boxes_xywh[row] * scale, NOTHING_THERE, name)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=82)
    return content.getvalue()


def _box(draw: ImageDraw.ImageDraw, box_xywh: np.ndarray, color: str, label: str, width: int = 2) -> None:
    x1, y1 = box_xywh[:2].tolist()
    x2, y2 = (box_xywh[:2] + np.maximum(box_xywh[2:], 1)).tolist()
    draw.rectangle((x1, y1, x2, y2), outline=color, width=width)
    if not label:
        return
    label = label if len(label) <= 40 else label[:39] + "…"
    font = ImageFont.load_default(12)
    place = (max(x1, 0), max(y1 - 15, 0))
    area = draw.textbbox(place, label, font=font)
    draw.rectangle((area[0] - 1, area[1] - 1, area[2] + 1, area[3] + 1), fill=color)
    draw.text(place, label, fill="white", font=font)
