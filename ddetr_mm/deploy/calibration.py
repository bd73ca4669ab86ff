"""Images for INT8 calibration, and the rules of its cache. Nothing here needs TensorRT."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddetr_mm.deploy.images import Normalisation, batches_of, load_batch
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import written_whole

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".JPEG", ".JPG", ".PNG")
WHERE = "gen_trt_engine.tensorrt.calibration"


def calibration_images(folders: Sequence[str | Path], *, at_least: int, seed: int = 0) -> list[Path]:
    """All images below the folders, in a shuffled order that repeats itself.

    Args:
        folders: searched to any depth.
        at_least: how many the calibration will take.
        seed: of the shuffling.

    Raises:
        DataError: for a missing or empty folder, or too few images.
    """
    where = f"{WHERE}.cal_image_dir"
    if not folders:
        raise DataError(
            Problem("is not given", where=where, mend="name folders of images like those of training")
        )
    found: set[Path] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(Problem("is no folder", file=folder, where=where))
        here = {path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
        if not here:
            raise DataError(Problem("holds no images", file=folder, where=where, allowed=SUFFIXES))
        found |= here
    if len(found) < at_least:
        raise DataError(
            Problem(
                "has fewer images than cal_batches * cal_batch_size",
                where=where,
                value=len(found),
                allowed=f"{at_least} or more",
            )
        )
    paths = sorted(found)
    random.Random(seed).shuffle(paths)  # noqa: S311 - an order, no secret
    return paths


@dataclass
class Calibration:
    """One calibration: which images in which batches, and the cache.

    Attributes:
        paths: shuffled image files.
        batch_size: images in a batch; a graph of fixed batch decides it.
        batches: how many.
        cache_file: where the result is kept, or None.
        size_hw: the graph's input.
        normalisation: that of the training.
    """

    paths: Sequence[Path]
    batch_size: int
    batches: int
    cache_file: Path | None
    size_hw: tuple[int, int]
    normalisation: Normalisation

    @property
    def uses_cache(self) -> bool:
        """Whether a cache is there, so that no image is read."""
        return self.cache_file is not None and self.cache_file.is_file()

    def arrays(self) -> Iterator[np.ndarray]:
        """The batches (B, 3, H, W), float32; none with a cache.

        Raises:
            DataError: when an image cannot be read.
        """
        if self.uses_cache:
            return
        for group in batches_of(self.paths, self.batch_size, self.batches):
            yield load_batch(group, self.size_hw, self.normalisation)

    def read_cache(self) -> bytes | None:
        """The cache's content, or None without one."""
        return self.cache_file.read_bytes() if self.cache_file is not None and self.uses_cache else None

    def write_cache(self, content: bytes) -> None:
        """Keep the result of the calibration; an existing cache stays as it is."""
        if self.cache_file is not None and not self.uses_cache:
            with written_whole(self.cache_file) as temporary:
                temporary.write_bytes(bytes(content))


def plan_calibration(
    folders: Sequence[str],
    *,
    batch_size: int,
    batches: int,
    cache_file: str | None,
    fixed_batch: int | None,
    size_hw: tuple[int, int],
    normalisation: Normalisation,
) -> Calibration:
    """Check everything a calibration needs; with a cache too, as the reference does.

    Args:
        folders: ``cal_image_dir``.
        batch_size: ``cal_batch_size``; ``fixed_batch`` goes before it.
        batches: ``cal_batches``.
        cache_file: ``cal_cache_file``.
        fixed_batch: the graph's batch, or None.
        size_hw: the graph's input.
        normalisation: that of the training.

    Raises:
        DataError: see :func:`calibration_images`; also for counts below 1.
    """
    for name, value in (("cal_batch_size", batch_size), ("cal_batches", batches)):
        if value < 1:
            raise DataError(Problem("must be at least 1", where=f"{WHERE}.{name}", value=value))
    size = fixed_batch or batch_size
    paths = calibration_images(folders, at_least=size * batches)
    return Calibration(paths, size, batches, Path(cache_file) if cache_file else None, size_hw, normalisation)
