"""Dividing images so that every part gets like shares of every class.

Iterative stratification for images with several labels: the class with the fewest boxes left to divide
goes first, each of its images to the part that misses most of that class.
After: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data", 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def balanced_parts(
    image_index: NDArray[np.int64],
    class_index: NDArray[np.int64],
    num_images: int,
    fractions: Sequence[float],
    seed: int = 0,
) -> NDArray[np.int64]:
    """Divide images into parts by the boxes they hold.

    Args:
        image_index: ``(m,)`` image of each box, from 0.
        class_index: ``(m,)`` class of each box, from 0.
        num_images: images in all, those without boxes included.
        fractions: share of each part; they sum to 1.
        seed: decides between images that are equal in all that counts.

    Returns:
        ``(num_images,)``: the part of each image.
    """
    parts = np.full(num_images, -1, dtype=np.int64)
    # One row for each class that an image has: image, class, number of boxes.
    num_classes = int(class_index.max()) + 1 if len(class_index) else 0
    pairs, boxes = np.unique(image_index * max(num_classes, 1) + class_index, return_counts=True)
    images, classes = np.divmod(pairs, max(num_classes, 1))
    first_row = np.searchsorted(images, np.arange(num_images + 1))
    left = np.bincount(classes, weights=boxes, minlength=num_classes)
    share = np.asarray(fractions, dtype=np.float64)
    missing_boxes = share[:, None] * left[None, :]
    missing_images = share * num_images
    order = np.random.default_rng(seed).permutation(num_images)
    rank = np.empty(num_images, dtype=np.int64)
    rank[order] = np.arange(num_images)
    for _ in range(num_classes):
        rarest = int(np.argmin(np.where(left > 0, left, np.inf)))
        if not left[rarest] > 0:
            break
        rows = np.flatnonzero((classes == rarest) & (parts[images] < 0))
        # Images with many boxes of the class first: the later ones even out what they upset.
        for row in rows[np.lexsort((rank[images[rows]], -boxes[rows]))]:
            image = images[row]
            part = _neediest(missing_boxes[:, rarest], missing_images)
            parts[image] = part
            own = slice(first_row[image], first_row[image + 1])
            missing_boxes[part, classes[own]] -= boxes[own]
            left[classes[own]] -= boxes[own]
            missing_images[part] -= 1
    for image in order[parts[order] < 0]:
        part = int(np.argmax(missing_images))
        parts[image] = part
        missing_images[part] -= 1
    return parts


def _neediest(missing_boxes: NDArray[np.float64], missing_images: NDArray[np.float64]) -> int:
    """The part that misses most boxes; of equal ones that which misses most images."""
    candidates = np.flatnonzero(missing_boxes == missing_boxes.max())
    return int(candidates[np.argmax(missing_images[candidates])])
