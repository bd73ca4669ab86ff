"""A limit on the pixels of an image, so that a small file cannot claim gigabytes when it is decoded."""

from __future__ import annotations

import os

MAX_IMAGE_PIXELS = 178_956_970
"""Pixels that an image may have: where Pillow suspects an attack (its ``DecompressionBombError``). They take
0.5 GB of memory. OpenCV's own limit of 2**30 lets a file of a few kilobytes take 3 GB in every worker."""

OPENCV_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"


def limit_decoded_images() -> None:
    """Give OpenCV the same limit, unless the environment sets one; it is read when OpenCV is imported."""
    os.environ.setdefault(OPENCV_VARIABLE, str(MAX_IMAGE_PIXELS))


def size_refused(width: int, height: int) -> str | None:
    """What is wrong with an image of this size in pixels; None where it may be decoded."""
    if width * height <= MAX_IMAGE_PIXELS:
        return None
    return f"has {width} x {height} pixels, more than the {MAX_IMAGE_PIXELS:,} that are decoded"
