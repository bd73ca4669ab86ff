"""Whether the image files that annotations speak of are there and can be read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import imagesize
import mmcv
from mmengine import fileio

from ddetr_mm.data.coco_table import CocoTable
from ddetr_mm.data.sources import CocoSource
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.stack.image_limit import size_refused


def unreadable_image(path: str, backend_args: Mapping[str, Any] | None = None) -> Problem | None:
    """What keeps an image from being read; None where it can be.

    Args:
        path: the image file, or a URL that mmengine's file backends know.
        backend_args: of the file backend.
    """
    mend = "put the file there, or leave the image out of the annotations"
    try:
        content = fileio.get(path, backend_args=dict(backend_args) if backend_args else None)
    except FileNotFoundError:
        return Problem("image file does not exist", path, mend=mend)
    except OSError as error:
        return Problem(f"image file cannot be read: {error.strerror or error}", path, mend=mend)
    width, height = imagesize.get(io.BytesIO(content))
    refused = size_refused(width, height)
    if refused:
        return Problem(f"image file {refused}", path, mend="make it smaller, or leave it out of the data")
    try:
        decoded = mmcv.imfrombytes(content)
    except cv2.error:  # an empty file, or a size that OpenCV refuses
        decoded = None
    if decoded is None:
        return Problem("image file cannot be decoded", path, mend="write or copy it again")
    return None


@contextmanager
def unreadable_told(path: str, backend_args: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn what image decoders raise on a bad file into one message.

    Args:
        path: the image file that the block reads.
        backend_args: of the file backend.

    Raises:
        DataError: the file is missing, broken, or too large to be decoded.
    """
    try:
        yield
    except (OSError, AssertionError, cv2.error) as error:
        problem = unreadable_image(path, backend_args)
        if problem is None:
            raise
        raise DataError(problem) from error


def missing_images(table: CocoTable, sources: Sequence[CocoSource]) -> Iterator[Problem]:
    """One problem per image that has no file, in the order of the table.

    Args:
        table: the annotations.
        sources: the sources that the table was read from.
    """
    for row in range(table.num_images):
        path = sources[int(table.source_indices[row])].image_path(table.file_name(row))
        if not Path(path).is_file():
            yield Problem("image file does not exist", path, f"image id {int(table.original_image_ids[row])}")
