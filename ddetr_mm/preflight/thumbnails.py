"""Small copies of a sample of images, for checks that look at colours and content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ddetr_mm.preflight.split import Split

SIDE_PX = 192


@dataclass(frozen=True)
class Thumbnail:
    """One image made small, with its boxes.

    Attributes:
        row: the image row in the split's table.
        rgb: (h, w, 3) float32, 0..1, the longer side at most :data:`SIDE_PX` pixels.
        boxes_xyxy: (n, 4) visible boxes as fractions of the image, 0..1.
    """

    row: int
    rgb: npt.NDArray[np.float32]
    boxes_xyxy: npt.NDArray[np.float64]


def thumbnails(split: Split, most: int) -> list[Thumbnail]:
    """Small copies of at most so many images, evenly spread; unreadable ones are left out."""
    found = []
    for row in split.spread_rows(most).tolist():
        try:
            with Image.open(split.path(row)) as image:
                # For JPEG a decoder that may stop at an eighth of the size is many times faster.
                image.draft("RGB", (SIDE_PX, SIDE_PX))
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # told by the check of the images
        upright.thumbnail((SIDE_PX, SIDE_PX))
        rgb = np.asarray(upright, dtype=np.float32) / 255
        boxes = split.table.boxes_of(row)
        height, width = split.table.sizes_hw[row].tolist()
        xywh = split.table.boxes_xywh[boxes][split.table.visible[boxes] & ~split.table.crowd[boxes]]
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        found.append(Thumbnail(row, rgb, (corners / [width, height, width, height]).clip(0, 1)))
    return found
