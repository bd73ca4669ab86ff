"""One split of the data as the checks see it: its name, its sources, and its annotations as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddetr_mm.data.coco_table import CocoTable
from ddetr_mm.data.sources import CocoSource, read_coco_sources


@dataclass(frozen=True)
class Split:
    """Legend: N images, M boxes.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        sources: where the data lies.
        table: the annotations of all sources.
    """

    name: str
    sources: tuple[CocoSource, ...]
    table: CocoTable

    @classmethod
    def read(cls, name: str, sources: Sequence[Mapping[str, str]], storage: str = "process") -> Split:
        """Read a split's annotation files.

        Args:
            name: ``train``, ``val`` or ``test``.
            sources: ``{image_dir, json_file}`` each.
            storage: see :func:`~ddetr_mm.data.sources.read_coco_sources`.

        Raises:
            DataError: a file is missing, unreadable or not COCO.
        """
        table = read_coco_sources(sources, storage=storage)
        return cls(name, tuple(CocoSource.of(source) for source in sources), table)

    @property
    def where(self) -> str:
        """The spec key that names the split, for messages."""
        return f"dataset.{self.name}_data_sources"

    @cached_property
    def box_rows(self) -> npt.NDArray[np.int64]:
        """(M,) the image row of every box."""
        return self.table.box_image_rows

    @cached_property
    def box_sizes_wh(self) -> npt.NDArray[np.float64]:
        """(M, 2) the recorded width and height of every box's image."""
        return self.table.sizes_hw[self.box_rows][:, ::-1].astype(np.float64)

    def path(self, row: int) -> Path:
        """The image file of an image row."""
        source = self.sources[int(self.table.source_indices[row])]
        return Path(source.image_path(self.table.file_name(row)))

    def spread_rows(self, most: int | None) -> npt.NDArray[np.int64]:
        """At most so many image rows, evenly spread over the split; all of them for None."""
        count = self.table.num_images
        if most is None or count <= most:
            return np.arange(count)
        return np.unique(np.linspace(0, count - 1, most).astype(np.int64))

    def box_example(self, box: int) -> str:
        """A box in words: its image, and its numbers as they stand in the file."""
        numbers = [round(float(value), 3) for value in self.table.boxes_xywh[box]]
        return f"{self.table.file_name(int(self.box_rows[box]))}: {numbers}"
