"""GCViT: the published sizes, and checkpoints of other layouts under the names and shapes of our backbone.

Two naming schemes occur. The paper's (``patch_embed``, ``levels.N``), which published classifiers, TAO
checkpoints and this package share, and timm's (``stem``, ``stages.N``). The network is
:mod:`ddetr_mm.models.gcvit`; nothing here needs it.

Licence: Apache-2.0. timm's layout is known from names and shapes in its files. Weights have their own
licence, see :mod:`ddetr_mm.models.gcvit`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_STAGES = 4


@dataclass(frozen=True)
class GCViTVariant:
    """The architecture of one published size; tuples have one entry for each stage."""

    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[int, ...]
    dim: int
    mlp_ratio: float
    layer_scale: float | None

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.dim * 2**stage for stage in range(NUM_STAGES))


_WINDOWS, _WINDOWS_384 = (7, 7, 14, 7), (12, 12, 24, 12)
_DEEP = (3, 4, 19, 5)
VARIANTS: dict[str, GCViTVariant] = {
    "xxtiny": GCViTVariant((2, 2, 6, 2), (2, 4, 8, 16), _WINDOWS, 64, 3.0, None),
    "xtiny": GCViTVariant((3, 4, 6, 5), (2, 4, 8, 16), _WINDOWS, 64, 3.0, None),
    "tiny": GCViTVariant(_DEEP, (2, 4, 8, 16), _WINDOWS, 64, 3.0, None),
    "small": GCViTVariant(_DEEP, (3, 6, 12, 24), _WINDOWS, 96, 2.0, 1e-5),
    "base": GCViTVariant(_DEEP, (4, 8, 16, 32), _WINDOWS, 128, 2.0, 1e-5),
    "large": GCViTVariant(_DEEP, (6, 12, 24, 48), _WINDOWS, 192, 2.0, 1e-5),
    "large_384": GCViTVariant(_DEEP, (6, 12, 24, 48), _WINDOWS_384, 192, 2.0, 1e-5),
}
"""The only table of the sizes; a spec's backbone is ``gc_vit_`` and a key of it."""

_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"

# timm's names to the paper's, applied in this order to the whole key.
_TIMM_RULES: tuple[tuple[str, str], ...] = (
    (r"^stem\.conv1\.", "patch_embed.proj."),
    (r"^stem\.down\.", "patch_embed.conv_down."),
    (r"^stages\.3\.norm\.", "norm."),
    (r"^stages\.(\d+)\.", r"levels.\1."),
    (r"\.global_block\.blocks\.conv(\d+)\.", r".q_global_gen.to_q_global.#\1.conv_block."),
    (r"\.conv_block\.conv_dw\.", ".conv.0."),
    (r"\.conv_block\.se\.fc1\.", ".conv.2.fc.0."),
    (r"\.conv_block\.se\.fc2\.", ".conv.2.fc.2."),
    (r"\.conv_block\.conv_pw\.", ".conv.3."),
    (r"\.attn\.rel_pos\.", ".attn."),
    (r"\.ls([12])\.gamma$", r".gamma\1"),
)


def is_gcvit(keys: Collection[str]) -> bool:
    """Return whether a backbone's own keys are those of our GCViT."""
    return "patch_embed.proj.weight" in keys and any(key.startswith("levels.0.q_global_gen.") for key in keys)


def variant_names(depths: tuple[int, ...], dim: int, window: int) -> list[str]:
    """Return the keys of :data:`VARIANTS` that begin with these stages.

    Args:
        depths: blocks of each stage; a backbone without its last stages may be of several variants.
        dim: channels of the first stage.
        window: side of its window in tokens.
    """
    return [
        name
        for name, variant in VARIANTS.items()
        if (variant.depths[: len(depths)], variant.dim, variant.windows[0]) == (depths, dim, window)
    ]


# --- Keys and shapes of a stage ---

_PYRAMID_BLOCKS = (3, 2, 1, 1)
"""Blocks of each stage's global query at a resolution of 224, in every variant."""


def stage_shapes(variant: GCViTVariant, stage: int) -> dict[str, tuple[int, ...]]:
    """Return the keys of a stage below the backbone's prefix → shapes, as TAO has them.

    ``relative_position_index`` is among them; the norm of the stage's output is not.

    Args:
        variant: the sizes.
        stage: 0..3.
    """
    channels, window = variant.channels[stage], variant.windows[stage]
    start = f"levels.{stage}"
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(variant.depths[stage]):
        name = f"{start}.blocks.{block}"
        shapes |= _affine(f"{name}.norm1", channels)
        shapes[f"{name}.attn.{_TABLE}"] = ((2 * window - 1) ** 2, variant.num_heads[stage])
        shapes[f"{name}.attn.{_INDEX}"] = (window**2, window**2)
        # Blocks with global queries compute keys and values only.
        shapes |= _affine(f"{name}.attn.qkv", channels * (2 if block % 2 else 3), channels)
        shapes |= _affine(f"{name}.attn.proj", channels, channels)
        shapes |= _affine(f"{name}.norm2", channels)
        hidden = int(channels * variant.mlp_ratio)
        shapes |= _affine(f"{name}.mlp.fc1", hidden, channels)
        shapes |= _affine(f"{name}.mlp.fc2", channels, hidden)
        if variant.layer_scale is not None:
            shapes |= {f"{name}.gamma1": (channels,), f"{name}.gamma2": (channels,)}
    if stage < NUM_STAGES - 1:
        shapes |= _convolutions(f"{start}.downsample", channels)
        shapes[f"{start}.downsample.reduction.weight"] = (2 * channels, channels, 3, 3)
        shapes |= _affine(f"{start}.downsample.norm2", 2 * channels)
        shapes |= _affine(f"{start}.downsample.norm1", channels)
    for block in range(_PYRAMID_BLOCKS[stage]):
        shapes |= _convolutions(f"{start}.q_global_gen.to_q_global.{block}", channels)
    return shapes


def _affine(name: str, *sizes: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": sizes, f"{name}.bias": sizes[:1]}


def _convolutions(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.conv.0.weight": (channels, 1, 3, 3),
        f"{name}.conv.2.fc.0.weight": (channels // 4, channels),
        f"{name}.conv.2.fc.2.weight": (channels, channels // 4),
        f"{name}.conv.3.weight": (channels, channels, 1, 1),
    }


def as_tao_has_it(keys: Collection[str], variant: GCViTVariant) -> dict[str, Tensor]:
    """Return what TAO's backbone has and a file of ours has not: stages that are not read, and indices.

    TAO builds all stages whatever it reads, and stores the index of every position table.

    Args:
        keys: the file's, without a prefix.
        variant: the sizes.

    Returns:
        Initial values for the stages, which change no prediction: nothing reads them.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for stage in range(NUM_STAGES):
        for key, shape in stage_shapes(variant, stage).items():
            if key in keys:
                continue
            leaf = key.rpartition(".")[2]
            if leaf == _INDEX:
                found[key] = relative_position_index(variant.windows[stage])
            elif leaf.startswith("gamma"):
                found[key] = torch.full(shape, variant.layer_scale or 1.0)
            elif len(shape) == 1:
                found[key] = torch.ones(shape) if ".norm" in key and leaf == "weight" else torch.zeros(shape)
            else:
                found[key] = torch.randn(shape, generator=generator) * 0.02
    return found


def relative_position_index(window: int) -> Tensor:
    """Return the row of the bias table for each pair of tokens of a window, (N, N) int64, as in Swin.

    The row is ``(dy + w - 1) * (2w - 1) + dx + w - 1`` for query minus key coordinates.
    """
    axis = torch.arange(window)
    y, x = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


# --- Names and shapes of files ---


def own_names(keys: Collection[str], target: Collection[str]) -> dict[str, str]:
    """Return our backbone's name for each key of a GCViT with the paper's names.

    A classifier's final ``norm`` is the norm of the last stage's output and becomes ``norm3`` where the file
    has none. ``relative_position_index``, which follows from the window, is left out.

    Args:
        keys: the file's, without a prefix, in the paper's spelling (:mod:`ddetr_mm.weights.layouts`).
        target: the backbone's own.
    """
    names = {key: key for key in keys if not key.endswith(_INDEX)}
    for leaf in ("weight", "bias"):
        if f"norm3.{leaf}" in target and f"norm3.{leaf}" not in names and f"norm.{leaf}" in names:
            names[f"norm.{leaf}"] = f"norm3.{leaf}"
    return names


def timm_to_paper(key: str) -> str:
    """Return the paper's name for one of timm's; keys without a counterpart are returned unchanged."""
    reduction = re.match(r"^stages\.(\d+)\.downsample\.(.*)$", key)
    if reduction:
        # timm numbers a reduction by the stage after it, the paper by the stage before.
        key = f"stages.{int(reduction[1]) - 1}.downsample.{reduction[2]}"
    for pattern, replacement in _TIMM_RULES:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"#(\d+)", lambda match: str(int(match[1]) - 1), key)


def fit(key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return a tensor in the backbone's shape, or None where it does not fit.

    Position tables of another window are resized; a 1x1 convolution becomes a linear layer.

    Args:
        key: the backbone's.
        tensor: the file's.
        shape: the backbone's.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.numel() == math.prod(shape) and tuple(tensor.shape[:2]) == shape[:2]:
        return tensor.reshape(shape)
    is_table = key.endswith(_TABLE) and tensor.ndim == len(shape) == 2 and tensor.shape[1] == shape[1]
    if is_table and _side(tensor.shape[0]) ** 2 == tensor.shape[0]:
        return resize_position_table(tensor, shape[0])
    return None


def resize_position_table(table: Tensor, rows: int) -> Tensor:
    """Resize a relative position bias table for another window.

    Args:
        table: ((2w - 1)**2, h).
        rows: (2v - 1)**2 of the new window v.

    Returns:
        (rows, h), interpolated bicubically over the grid of offsets, each head by itself.
    """
    old_side, new_side = _side(table.shape[0]), _side(rows)
    grid = table.float().t().reshape(1, -1, old_side, old_side)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return grid.reshape(-1, rows).t().contiguous().to(table.dtype)


def _side(rows: int) -> int:
    return round(rows**0.5)
