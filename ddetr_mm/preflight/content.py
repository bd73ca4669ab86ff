"""Whether boxes lie on something: labels of other pictures lie on anything.

The inside of a box usually differs from what surrounds it. The measure for one picture is that contrast,
averaged over its boxes; it is compared with the same measure for boxes of other pictures of the sample,
laid over this one by relative position. Boxes that belong to their pictures win clearly; boxes of exchanged
ids, of an older version of the pictures or of another folder do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ddetr_mm.preflight.pictures import Thumbnail
from ddetr_mm.preflight.report import Section, Split, suspicion

LEAST_IMAGES = 20
"""Fewer images with boxes say nothing."""

CLEAR, ABSENT = 3.0, 1.0
"""Standard errors: from the first on boxes clearly fit, below the second there is no sign that they do."""

OTHERS = 8
"""How many other pictures' boxes are tried on each picture."""


def check_content(split: Split, images: Sequence[Thumbnail]) -> Section:
    """Compare the boxes' contrast with that of strange boxes."""
    section = Section(f"boxes of {split.name} on the pictures")
    with_boxes = [image for image in images if len(image.boxes_xyxy)]
    if len(with_boxes) < LEAST_IMAGES:
        section.lines.append(f"only {len(with_boxes)} pictures with boxes in the sample: too few to tell")
        return section
    errors, alike = fit_of_boxes(with_boxes)
    section.data |= dict(standard_errors=round(errors, 2), overlap_with_strange_boxes=round(alike, 3))
    section.lines.append(
        f"boxes stand out from their surroundings more than strange boxes do by {errors:.1f} standard errors"
        + (" (clear from 3)" if errors < CLEAR else "")
    )
    if errors < ABSENT and alike < 0.3:
        section.findings.append(
            suspicion(
                "boxes-not-on-objects",
                f"nothing shows that the boxes belong to these pictures: over {len(with_boxes)} pictures "
                f"they fit no better than boxes of other pictures ({errors:+.1f} standard errors)",
                where=split.where,
                hint="look at the pictures with their boxes: image ids may be exchanged, the annotations "
                "stale, or the folder holds other pictures of the same names",
            )
        )
    return section


def fit_of_boxes(images: Sequence[Thumbnail]) -> tuple[float, float]:
    """How clearly boxes fit their own pictures better than others do.

    Args:
        images: pictures with boxes, at least two.

    Returns:
        The mean difference of contrast in standard errors; and how alike the boxes of different pictures are
        (mean over boxes of the best overlap with a strange box), for boxes that are always in one place
        cannot be told from each other.
    """
    differences, overlaps = [], []
    step = max(1, len(images) // (OTHERS + 1))
    for number, image in enumerate(images):
        own = contrast(image.rgb, image.boxes_xyxy)
        others = [images[(number + step * turn) % len(images)] for turn in range(1, OTHERS + 1)]
        strange = [other.boxes_xyxy for other in others if other is not image]
        differences.append(own - np.mean([contrast(image.rgb, boxes) for boxes in strange]))
        overlaps.append(np.mean([_best_overlap(image.boxes_xyxy, boxes) for boxes in strange]))
    values = np.array(differences)
    error = values.std(ddof=1) / np.sqrt(len(values)) + 1e-9
    return float(values.mean() / error), float(np.mean(overlaps))


def contrast(rgb: npt.NDArray[np.float32], boxes_xyxy: npt.NDArray[np.float64]) -> float:
    """Mean difference of colour between boxes and the ring around each, relative to the picture's spread.

    Args:
        rgb: (h, w, 3), 0..1.
        boxes_xyxy: (n, 4) fractions of the picture.
    """
    height, width = rgb.shape[:2]
    sums = np.pad(rgb.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    spread = float(rgb.reshape(-1, 3).std(axis=0).mean()) + 1e-3
    scale = np.array([width, height, width, height])
    inner = _on_pixels(boxes_xyxy, scale)
    margin = 0.25 * (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2])
    outer = _on_pixels(
        np.concatenate([boxes_xyxy[:, :2] - margin, boxes_xyxy[:, 2:] + margin], axis=1), scale
    )
    inside, inner_area = _sum_and_area(sums, inner)
    whole, outer_area = _sum_and_area(sums, outer)
    ring_area = outer_area - inner_area
    sound = (inner_area > 0) & (ring_area > 0)
    if not sound.any():
        return 0.0
    mean_in = inside[sound] / inner_area[sound, None]
    mean_ring = (whole - inside)[sound] / ring_area[sound, None]
    return float(np.abs(mean_in - mean_ring).mean() / spread)


def _on_pixels(boxes_xyxy: np.ndarray, scale: np.ndarray) -> npt.NDArray[np.int64]:
    return np.rint(np.clip(boxes_xyxy, 0, 1) * scale).astype(np.int64)


def _sum_and_area(sums: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) sums of the pixels in boxes from a table of summed areas, and (n,) their numbers."""
    x1, y1, x2, y2 = boxes.T
    total = sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1]
    return total, ((x2 - x1) * (y2 - y1)).astype(np.float64)


def _best_overlap(boxes: np.ndarray, others: np.ndarray) -> float:
    """Mean over ``boxes`` of the best intersection over union with one of ``others``; corners."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None] + (others[:, 2:] - others[:, :2]).prod(axis=1)
    return float((common / np.maximum(areas - common, 1e-12)).max(axis=1).mean())
