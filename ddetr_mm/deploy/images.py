"""Image files as the normalised arrays that an exported graph takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ddetr_mm.errors import DataError, Problem
from ddetr_mm.stack.image_limit import MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the colours red, green, blue, counted in 0..255."""

    mean_rgb: tuple[float, float, float]
    std_rgb: tuple[float, float, float]

    def apply(self, image_rgb: np.ndarray) -> np.ndarray:
        """An image (H, W, 3) of 0..255 as (3, H, W) float32."""
        mean, std = np.float32(self.mean_rgb), np.float32(self.std_rgb)
        return np.ascontiguousarray(((image_rgb.astype(np.float32) - mean) / std).transpose(2, 0, 1))


def read_rgb(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) RGB, uint8, turned as its EXIF tag says.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error:  # an image of absurd size
        image = None
    if image is None:
        allowed = f"images of at most {MAX_IMAGE_PIXELS:,} pixels"
        mend = "copy the file again, or leave it out"
        raise DataError(Problem("cannot be read as an image", path, allowed=allowed, mend=mend))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def stretched(image_rgb: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize to exactly this height and width, as the reference's deployment does (OpenCV, bilinear)."""
    return cv2.resize(image_rgb, size_hw[::-1], interpolation=cv2.INTER_LINEAR)


def load_batch(
    paths: Sequence[str | Path], size_hw: tuple[int, int], normalisation: Normalisation
) -> np.ndarray:
    """Image files as one array (B, 3, H, W), float32.

    Raises:
        DataError: when a file cannot be read.
    """
    return np.stack([normalisation.apply(stretched(read_rgb(path), size_hw)) for path in paths])


def cycling_source(
    paths: Sequence[str | Path], size_hw: tuple[int, int], normalisation: Normalisation
) -> Callable[[int], np.ndarray]:
    """A source of batches of any size: the files in order, again from the start when they run out."""

    def take(count: int) -> np.ndarray:
        return load_batch([paths[index % len(paths)] for index in range(count)], size_hw, normalisation)

    return take


def batches_of(paths: Sequence[Path], batch_size: int, batches: int) -> Iterator[list[Path]]:
    """The first ``batches`` groups of ``batch_size`` files."""
    for start in range(0, batches * batch_size, batch_size):
        yield list(paths[start : start + batch_size])
