"""What is image and what is padding, at every feature level (pure functions).

Shapes: B batch, H, W the padded input, h, w a feature level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .deformable_attention import SizesHW, host_to_device


def level_padding(
    valid_sizes_hw: SizesHW,
    input_size_hw: tuple[int, int],
    level_sizes_hw: SizesHW,
    device: torch.device | str,
) -> tuple[list[Tensor | None], Tensor]:
    """Padding masks and valid ratios of every level, for images padded at the right and the bottom.

    A level's mask is the input's mask at the nearest pixels (``F.interpolate``'s rule), as in the
    reference. Nothing is read back from ``device``.

    Args:
        valid_sizes_hw: unpadded height and width of each of the B images, in pixels, at least 1.
        input_size_hw: (H, W) of the padded batch.
        level_sizes_hw: (h, w) of every level.
        device: where the result goes.

    Returns:
        One mask (B, h, w) a level, True in the padding, or None for all levels when nothing is
        padded; and the valid share of each level (B, L, 2) as (x, y), 0..1, float32 (1, L, 2 when
        nothing is padded).
    """
    if all(tuple(size) == tuple(input_size_hw) for size in valid_sizes_hw):
        return [None] * len(level_sizes_hw), torch.ones(1, len(level_sizes_hw), 2, device=device)
    valid = host_to_device([tuple(size) for size in valid_sizes_hw], device, torch.int64)
    rows = _inside(valid[:, 0], input_size_hw[0])
    columns = _inside(valid[:, 1], input_size_hw[1])
    masks: list[Tensor | None] = []
    ratios: list[Tensor] = []
    for height, width in level_sizes_hw:
        level_rows = F.interpolate(rows, size=height)[:, 0]
        level_columns = F.interpolate(columns, size=width)[:, 0]
        masks.append((level_rows[:, :, None] * level_columns[:, None, :]) == 0)
        ratios.append(torch.stack([level_columns.mean(1), level_rows.mean(1)], -1))
    return masks, torch.stack(ratios, 1)


def _inside(valid: Tensor, size: int) -> Tensor:
    """(B, 1, size) float32: 1 at positions below ``valid`` (B,), else 0."""
    positions = torch.arange(size, device=valid.device)
    return (positions < valid[:, None]).float()[:, None]


def feature_sizes_hw(features: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Height and width of every feature map as Python integers."""
    return tuple((int(feature.shape[-2]), int(feature.shape[-1])) for feature in features)
