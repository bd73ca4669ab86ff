"""Whether the image files that annotations speak of are there and can be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
from mmengine import fileio

from ddetr_mm.data.coco_table import CocoTable
from ddetr_mm.data.sources import CocoSource
from ddetr_mm.errors import Problem


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
    if mmcv.imfrombytes(content) is None:
        return Problem("image file cannot be decoded", path, mend="write or copy it again")
    return None


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
