"""Sizes of images and objects against the resizing, cropping and padding that the spec asks for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ddetr_mm.preflight.findings import Finding, Section, note
from ddetr_mm.preflight.split import Split
from ddetr_mm.spec.schema.dataset import AugmentationConfig

SMALL_IN_NETWORK_PX = 8
"""An object of this side or less covers one cell of the finest common feature level (stride 8)."""


def check_fit(split: Split, augmentation: AugmentationConfig) -> Section:
    """What the spec's sizes make of one split's images and boxes."""
    section = Section(f"sizes of {split.name}")
    if split.table.num_images == 0:
        return section
    sizes_hw = split.table.sizes_hw
    short_side = augmentation.test_random_resize
    if split.name == "train":
        short_side = max(augmentation.scales)
    factors = resize_factors(sizes_hw, short_side, augmentation.random_resize_max_size)
    heights, widths = sizes_hw[:, 0], sizes_hw[:, 1]
    section.lines.append(
        f"images {widths.min()}x{heights.min()} to {widths.max()}x{heights.max()} (width x height), "
        f"aspect ratio {(widths / heights).min():.2f} to {(widths / heights).max():.2f}; "
        f"enlarged {np.median(factors):.2f} times at a short side of {short_side}"
    )
    section.data |= dict(median_enlargement=round(float(np.median(factors)), 3))
    section.findings += _enlarged(split, factors, short_side)
    section.findings += _capped(split, sizes_hw, short_side, augmentation.random_resize_max_size)
    section.findings += _small_objects(split, factors)
    if split.name == "train":
        section.findings += _crop(split, augmentation)
    return section


def resize_factors(sizes_hw: npt.NDArray[np.int32], short_side: int, longest: int) -> npt.NDArray[np.float64]:
    """(N,) how much each image is enlarged when its short side becomes ``short_side``, the long capped."""
    short, long = sizes_hw.min(axis=1), sizes_hw.max(axis=1)
    return np.minimum(short_side / short, longest / long)


def largest_padded_hw(
    sizes_hw: npt.NDArray[np.int32], augmentation: AugmentationConfig, divisor: int = 1
) -> tuple[int, int]:
    """Height and width of the largest batch that training can meet: every image at the largest scale."""
    if augmentation.fixed_random_crop:
        return augmentation.fixed_random_crop, augmentation.fixed_random_crop
    factors = resize_factors(sizes_hw, max(augmentation.scales), augmentation.random_resize_max_size)
    resized = np.ceil(sizes_hw * factors[:, None]).astype(int)
    height, width = resized.max(axis=0).tolist()
    if augmentation.fixed_padding:
        short, long = max(augmentation.scales), augmentation.random_resize_max_size
        standing = bool((sizes_hw[:, 0] > sizes_hw[:, 1]).any())
        lying = bool((sizes_hw[:, 0] <= sizes_hw[:, 1]).any())
        height, width = max(height, long if standing else short), max(width, long if lying else short)
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def _enlarged(split: Split, factors: np.ndarray, short_side: int) -> Iterator[Finding]:
    share = float((factors > 2).mean())
    if share > 0.5:
        yield note(
            "images-enlarged",
            f"{share:.0%} of the images are enlarged more than twice: time and memory without new detail",
            where="dataset.augmentation.scales"
            if split.name == "train"
            else "dataset.augmentation.test_random_resize",
            value=short_side,
            mend=f"half of the short sides are below {np.median(split.table.sizes_hw.min(axis=1)):.0f}",
        )


def _capped(split: Split, sizes_hw: np.ndarray, short_side: int, longest: int) -> Iterator[Finding]:
    short, long = sizes_hw.min(axis=1), sizes_hw.max(axis=1)
    share = float((long * short_side / short > longest * 1.01).mean())
    if share > 0.5:
        yield note(
            "images-capped",
            f"{share:.0%} of the images of {split.name} stay smaller than short side {short_side}, for "
            "their long side is capped",
            where="dataset.augmentation.random_resize_max_size",
            value=longest,
        )


def _small_objects(split: Split, factors: np.ndarray) -> Iterator[Finding]:
    if split.table.num_boxes == 0:
        return
    sides = split.table.boxes_xywh[:, 2:].min(axis=1) * factors[split.box_rows]
    share = float((sides < SMALL_IN_NETWORK_PX).mean())
    if share > 0.2:
        yield note(
            "objects-small",
            f"{share:.0%} of the boxes are less than {SMALL_IN_NETWORK_PX} px wide or high as the network "
            "sees them",
            where=split.where,
            mend="larger scales, or feature level 0 in model.return_interm_indices, help",
        )


def _crop(split: Split, augmentation: AugmentationConfig) -> Iterator[Finding]:
    if augmentation.fixed_random_crop or split.table.num_boxes == 0:
        return
    factors = resize_factors(split.table.sizes_hw, max(augmentation.train_random_resize), 10**9)
    sides = split.table.boxes_xywh[:, 2:].max(axis=1) * factors[split.box_rows]
    share = float((sides > augmentation.train_random_crop_max).mean())
    if share > 0.2:
        yield note(
            "objects-cropped",
            f"{share:.0%} of the boxes are larger than the largest random crop, and always cut by it",
            where="dataset.augmentation.train_random_crop_max",
            value=augmentation.train_random_crop_max,
        )
