"""Multi-scale deformable attention over levels of known size, for export.

Shape legend: B batch · Q queries · C hidden dim · M heads · D = C / M · L levels · P points ·
S feature points of all levels together.

:class:`StandardAttention` samples with GridSample, whose layout is channels first. Three choices make it
fast on a CPU: projections are 1x1 convolutions, for which onnxruntime chooses the memory layout and fuses
bias and activation; each level is weighted and summed by itself, and so is each chunk of many queries
(:data:`POINTS_AT_ONCE`), so that the samples of all levels are never copied together; and the axis of points
precedes that of queries, so that weighting and summing run over long rows. :class:`PluginAttention` writes
one plugin node and keeps the plugin's order of axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor, nn

from ddetr_mm.deploy.plugin import level_tensors, plugin_attention

POINTS_AT_ONCE = 1 << 14
"""Largest number of sampling points of one GridSample node and head. onnxruntime computes 56 bytes for each
and reads them once for every channel: this many fit into a processor's L2 cache."""


class _AttentionOfKnownSizes(nn.Module):
    """Base of both forms: the offsets' weights, scaled to the sampling coordinates.

    Args:
        attention: the module whose weights are used.
        num_queries: Q. All sizes but the batch are constants, so that the graph has no shape arithmetic.
        sizes_hw: height and width of every level.
        box_references: whether references are boxes (offsets are relative to the box), or points (offsets are
            in pixels of the level).
        extent: length of the coordinate range of a level: 2 for -1..1, 1 for 0..1.
    """

    def __init__(
        self,
        attention: MultiScaleDeformableAttention,
        num_queries: int,
        sizes_hw: list[tuple[int, int]],
        box_references: bool,
        extent: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.num_queries = num_queries
        self.sizes_hw = sizes_hw
        heads, levels, points = attention.num_heads, attention.num_levels, attention.num_points
        scale = torch.ones(heads, levels, points, 2, device=attention.sampling_offsets.weight.device)
        if box_references:
            # mmcv: centre + offset / P * size * 0.5 in 0..1.
            scale *= extent * 0.5 / points
        else:
            for level, (height, width) in enumerate(sizes_hw):
                scale[:, level] *= torch.tensor([extent / width, extent / height], device=scale.device)
        scale = scale.flatten()
        self.register_buffer("offset_weight", (attention.sampling_offsets.weight * scale[:, None]).detach())
        self.register_buffer("offset_bias", (attention.sampling_offsets.bias * scale).detach())

    @property
    def num_values(self) -> int:
        """S."""
        return sum(height * width for height, width in self.sizes_hw)


class StandardAttention(_AttentionOfKnownSizes):
    """Deformable attention in standard operators, without its residual. Arguments: see the base class."""

    def __init__(
        self,
        attention: MultiScaleDeformableAttention,
        num_queries: int,
        sizes_hw: list[tuple[int, int]],
        box_references: bool,
    ) -> None:
        super().__init__(attention, num_queries, sizes_hw, box_references, extent=2.0)

    def forward(self, query: Tensor, value: Tensor, centres: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: (B, 1, Q, C) with positions added.
            value: (B, 1, S, C).
            centres: (B or 1, 1, Q, 2), as (x, y) in -1..1.
            sizes: (B, 1, Q, 2), width and height of box references in 0..1; None for points.

        Returns:
            (B, 1, Q, C).
        """
        module, num_queries, width = self.attention, self.num_queries, self.attention.embed_dims
        head_width, points = width // module.num_heads, module.num_points
        per_head = module.num_levels * points

        num_places = module.num_heads * per_head
        # One convolution for both: onnxruntime merges a transpose into a convolution that alone reads it.
        weight = torch.cat([self.offset_weight, module.attention_weights.weight])
        bias = torch.cat([self.offset_bias, module.attention_weights.bias])
        both = F.conv2d(query.permute(0, 3, 1, 2), weight[..., None, None], bias)
        offsets, weights = both.split([2 * num_places, num_places], dim=1)
        offsets = offsets.reshape(-1, num_places, 2, num_queries).transpose(2, 3)
        places = centres + (offsets if sizes is None else offsets * sizes)
        grids = places.reshape(-1, per_head, num_queries, 2)
        shares = weights.reshape(-1, 1, per_head, num_queries).softmax(2)

        values = pointwise_planes(module.value_proj, value.permute(0, 3, 1, 2))
        values = values.reshape(-1, head_width, self.num_values)
        levels = parts_of(values, [height * length for height, length in self.sizes_hw], 2)
        levels = [
            level.reshape(-1, head_width, *size_hw)
            for level, size_hw in zip(levels, self.sizes_hw, strict=True)
        ]
        sizes_of_parts = even_parts(num_queries, math.ceil(num_queries * points / POINTS_AT_ONCE))
        attended = [
            sampled_sum(levels, grid, share, points)
            for grid, share in zip(
                parts_of(grids, sizes_of_parts, 2), parts_of(shares, sizes_of_parts, 3), strict=True
            )
        ]
        planes = (attended[0] if len(attended) == 1 else torch.cat(attended, 2)).reshape(
            -1, width, 1, num_queries
        )
        return pointwise_planes(module.output_proj, planes).permute(0, 2, 3, 1)


def sampled_sum(levels: Sequence[Tensor], grids: Tensor, shares: Tensor, points: int) -> Tensor:
    """Sample all levels and return the weighted sum.

    Args:
        levels: L values (B * M, D, height, width).
        grids: (B * M, L * P, q, 2), as (x, y) in -1..1.
        shares: (B * M, 1, L * P, q), the weights.
        points: P.

    Returns:
        (B * M, D, q).
    """
    counts = [points] * len(levels)
    total = None
    for level, grid, share in zip(
        levels, parts_of(grids, counts, 1), parts_of(shares, counts, 2), strict=True
    ):
        sampled = F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        level_sum = (sampled * share).sum(2)
        total = level_sum if total is None else total + level_sum
    return total


def even_parts(count: int, parts: int) -> list[int]:
    """Split ``count`` into parts that differ by one at most."""
    return [count // parts + (index < count % parts) for index in range(parts)]


def parts_of(tensor: Tensor, sizes: list[int], dim: int) -> Sequence[Tensor]:
    """Split a tensor, without a node where there is only one part."""
    return [tensor] if len(sizes) == 1 else tensor.split(sizes, dim=dim)


class PluginAttention(_AttentionOfKnownSizes):
    """Deformable attention as one plugin node, without its residual.

    Args:
        attention: this and the next three as in the base class.
        num_queries: see there.
        sizes_hw: see there.
        box_references: see there.
        plugin: ``nvidia`` or ``mmdeploy``.
    """

    def __init__(
        self,
        attention: MultiScaleDeformableAttention,
        num_queries: int,
        sizes_hw: list[tuple[int, int]],
        box_references: bool,
        plugin: str,
    ) -> None:
        super().__init__(attention, num_queries, sizes_hw, box_references, extent=1.0)
        self.plugin = plugin
        shapes, starts = level_tensors(sizes_hw)
        self.register_buffer("spatial_shapes", shapes)
        self.register_buffer("level_start_index", starts)

    def forward(self, query: Tensor, value: Tensor, centres: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C) with positions added.
            value: (B, S, C).
            centres: (B or 1, Q, 1, 2), as (x, y) in 0..1.
            sizes: (B, Q, 1, 2), width and height of box references in 0..1; None for points.

        Returns:
            (B, Q, C).
        """
        module, num_queries, width = self.attention, self.num_queries, self.attention.embed_dims
        heads, levels, points = module.num_heads, module.num_levels, module.num_points
        offsets = F.linear(query, self.offset_weight, self.offset_bias)
        offsets = offsets.reshape(-1, num_queries, heads * levels * points, 2)
        places = centres + (offsets if sizes is None else offsets * sizes)
        weights = module.attention_weights(query).reshape(-1, num_queries, heads, levels * points).softmax(-1)
        attended = plugin_attention(
            module.value_proj(value).reshape(-1, self.num_values, heads, width // heads),
            self.spatial_shapes,
            self.level_start_index,
            places.reshape(-1, num_queries, heads, levels, points, 2),
            weights.reshape(-1, num_queries, heads, levels, points),
            self.plugin,
        )
        return module.output_proj(attended.reshape(-1, num_queries, width))


def pointwise(module: nn.Module, rows: Tensor) -> Tensor:
    """Apply linear layers and activations as 1x1 convolutions: (B, 1, n, C) → (B, 1, n, C').

    onnxruntime fuses the transposes, bias and activation into the convolution.

    Args:
        module: a linear layer, a sequence of such, or an elementwise function.
        rows: channels last.
    """
    return pointwise_planes(module, rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pointwise_planes(module: nn.Module, planes: Tensor) -> Tensor:
    """Apply the same with channels first: (B, C, 1, n) → (B, C', 1, n)."""
    if isinstance(module, nn.Linear):
        return F.conv2d(planes, module.weight[..., None, None], module.bias)
    if isinstance(module, nn.Sequential):
        for part in module:
            planes = pointwise_planes(part, planes)
        return planes
    return module(planes)
