"""Deformable sampling on a CPU by ``torch.nn.functional.embedding_bag``, with gradients.

For one head, a query's output is a weighted sum of rows of the value: four corners for each of its L * P
points. ``embedding_bag`` computes weighted sums of table rows (as for a bag of words: indices, weights, one
sum for each group) and reads each row in place. mmcv's PyTorch form uses ``grid_sample``, which first writes
the sampled values of every point, many times the size of the output.

Each level gets a border of zero rows for samples outside the map, so that corners need no bounds checks. In
the backward pass the points are sorted by cell; the gradient of each row of the value is then a weighted sum
of rows of the output's gradient, computed by ``embedding_bag`` too.

Shapes as in :mod:`ddetr_mm.models.deformable_attention`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.nn import functional

SizesHW = Sequence[tuple[int, int]]
_INT32_ROWS = 2**31 - 1

PACKAGE = "torch_ms_deform_attn"
"""The package ``torch-ms-deform-attn``, compiled when it is installed: half the time of PyTorch's form for a
decoder, and a sixth of the memory of :func:`sample_values_on_cpu` for an encoder."""


@functools.cache
def package_sampling() -> Callable[..., Tensor] | None:
    """The sampling function of :data:`PACKAGE`, where it is installed and computes what ours does."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        sample: Callable[..., Tensor] = importlib.import_module(PACKAGE).ms_deform_attn
        generator = torch.Generator().manual_seed(0)
        sizes_hw = [(5, 7), (3, 4)]
        tensors = [
            torch.rand(shape, generator=generator).requires_grad_()
            for shape in ((1, 47, 2, 4), (1, 60, 2, 2, 3, 2), (1, 60, 2, 2, 3))
        ]
        shapes, starts = torch.tensor(sizes_hw), torch.tensor([0, 35])
        found = sample(tensors[0], shapes, starts, *tensors[1:])
        expected = sample_values_on_cpu(tensors[0], *tensors[1:], sizes_hw)
        pairs = [(found, expected)]
        gradients = (torch.autograd.grad(each.square().sum(), tensors) for each in (found, expected))
        pairs += zip(*gradients, strict=True)
        if all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in pairs):
            return sample
        reason = "its results differ"
    except Exception as error:  # whatever a package does that was built for another torch
        reason = str(error)
    print_log(f"{PACKAGE} is not used: {reason}", "current", logging.WARNING)
    return None


def sample_values_on_cpu(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, level_sizes_hw: SizesHW
) -> Tensor:
    """Sample bilinearly and sum by weight, with gradients.

    Args:
        value: (B, S, M, D), float32 or float64.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0..1 over each level's map; zero outside.
        attention_weights: (B, Q, M, L, P).
        level_sizes_hw: height and width of each level; ``S`` is the sum of their products.

    Returns:
        (B, Q, M * D), equal to ``mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch``.
    """
    result: Tensor = _SampleOnCpu.apply(
        value, sampling_locations, attention_weights, tuple(map(tuple, level_sizes_hw))
    )
    return result


class _Points(NamedTuple):
    """Positions of the sampling points.

    Attributes:
        first_row: (B, Q, M, L, P), row of each point's top left corner in the value with borders.
        fraction_xy: (B, Q, M, L, P, 2), distance from that corner, 0..1 cells; 0 if outside.
        inside: (B, Q, M, L, P), whether any corner is on the map.
    """

    first_row: Tensor
    fraction_xy: Tensor
    inside: Tensor


class _SampleOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, sizes_hw: SizesHW) -> Tensor:
        points = _find_points(locations, sizes_hw)
        corner_rows, corner_weights = _corners(points, weights, sizes_hw)
        batch, _, heads, channels = value.shape
        rows = _with_border(value, sizes_hw).view(-1, channels)
        sums = functional.embedding_bag(corner_rows, rows, mode="sum", per_sample_weights=corner_weights)
        ctx.save_for_backward(value, weights, corner_rows, corner_weights, *points)
        ctx.sizes_hw = sizes_hw
        return sums.view(batch, locations.shape[1], heads * channels)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        value, weights, corner_rows, corner_weights, *saved = ctx.saved_tensors
        points = _Points(*saved)
        grad_rows = grad_output.reshape(-1, value.shape[-1])
        grad_value = grad_locations = grad_weights = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            rows = _with_border(value, ctx.sizes_hw).view(-1, value.shape[-1])
            products = _products(corner_rows, corner_weights, rows, grad_rows).view(*weights.shape, 4)
            grad_locations, grad_weights = _point_gradients(products, points, weights, ctx.sizes_hw)
        if ctx.needs_input_grad[0]:
            grad_value = _value_gradient(points, corner_weights, grad_rows, value.shape, ctx.sizes_hw)
        return grad_value, grad_locations, grad_weights, None


def _bordered_starts(sizes_hw: SizesHW) -> list[int]:
    """Return the start of each level with a border of one cell, and the total length."""
    return [0, *accumulate((height + 2) * (width + 2) for height, width in sizes_hw)]


def _with_border(value: Tensor, sizes_hw: SizesHW) -> Tensor:
    """Return the value with a border of zeros around each level, (B, S', M * D)."""
    batch, _, heads, channels = value.shape
    starts = _bordered_starts(sizes_hw)
    bordered = value.new_zeros(batch, starts[-1], heads * channels)
    levels = value.flatten(2).split([height * width for height, width in sizes_hw], dim=1)
    for start, end, level, (height, width) in zip(starts, starts[1:], levels, sizes_hw, strict=False):
        inner = bordered[:, start:end].view(batch, height + 2, width + 2, -1)[:, 1:-1, 1:-1]
        inner.copy_(level.view(batch, height, width, -1))
    return bordered


def _find_points(locations: Tensor, sizes_hw: SizesHW) -> _Points:
    # Constants are expanded to the inner dimensions: operands of one memory layout are vectorised, broadcast
    # ones with a short inner axis are not.
    batch, _, heads, levels, num_points, _ = locations.shape
    starts = _bordered_starts(sizes_hw)
    index_type = torch.int32 if batch * starts[-1] * heads <= _INT32_ROWS else torch.int64
    sizes_wh = torch.tensor([(width, height) for height, width in sizes_hw], dtype=locations.dtype)
    sizes_wh = sizes_wh[:, None].expand(heads, levels, num_points, 2).contiguous()
    cells_xy = torch.addcmul(locations.new_tensor(-0.5), locations, sizes_wh)
    whole_xy = cells_xy.floor()
    # A NaN location is not outside: its fraction propagates the NaN.
    inside = ((whole_xy < -1) | (whole_xy >= sizes_wh)).any(-1).logical_not_()
    # An infinite one is outside, and has no finite fraction.
    fraction_xy = cells_xy.sub_(whole_xy).masked_fill_(inside.logical_not()[..., None], 0.0)
    # Clamped as integers, so that rows are in range also for huge or undefined numbers.
    last_xy = sizes_wh.to(index_type) - 1
    cell_xy = torch.clamp(whole_xy.to(index_type), torch.full_like(last_xy, -1), last_xy)

    row_steps = torch.tensor([(width + 2) * heads for _, width in sizes_hw], dtype=index_type)
    origin = torch.tensor(starts[:-1], dtype=index_type) * heads + row_steps + heads
    origin = origin[:, None] + torch.arange(heads, dtype=index_type)[:, None, None]
    images = torch.arange(batch, dtype=index_type) * (starts[-1] * heads)
    steps = row_steps[:, None].expand(heads, levels, num_points).contiguous()
    first_row = (cell_xy[..., 1] * steps).add_(cell_xy[..., 0], alpha=heads)
    first_row += origin.expand(heads, levels, num_points).contiguous()
    first_row += images.view(-1, 1, 1, 1, 1)
    return _Points(first_row, fraction_xy, inside)


def _corners(points: _Points, weights: Tensor, sizes_hw: SizesHW) -> tuple[Tensor, Tensor]:
    """Return rows and weights of all corners (top left, top right, bottom ...), (B * Q * M, L * P * 4)."""
    batch, num_queries, heads, _, num_points = weights.shape
    rows = points.first_row
    widths = [(width + 2) * heads for _, width in sizes_hw]
    offsets = torch.tensor([(0, heads, step, step + heads) for step in widths], dtype=rows.dtype)
    offsets = offsets[:, None].expand(-1, num_points, 4).contiguous()
    corner_rows = rows[..., None] + offsets

    right, bottom = points.fraction_xy.unbind(-1)
    weights = weights * points.inside
    right = weights * right
    left = weights - right
    bottom_right, bottom_left = right * bottom, left * bottom
    corner_weights = torch.stack((left - bottom_left, right - bottom_right, bottom_left, bottom_right), -1)
    shape = (batch * num_queries * heads, -1)
    return corner_rows.view(shape), corner_weights.view(shape)


def _products(corner_rows: Tensor, corner_weights: Tensor, rows: Tensor, grad_rows: Tensor) -> Tensor:
    """Return the gradients of the corner weights: each corner's row times its sum's gradient."""
    with torch.enable_grad():
        factors = corner_weights.detach().requires_grad_()
        sums = functional.embedding_bag(corner_rows, rows, mode="sum", per_sample_weights=factors)
    (products,) = torch.autograd.grad(sums, factors, grad_rows)
    return products


def _point_gradients(
    products: Tensor, points: _Points, weights: Tensor, sizes_hw: SizesHW
) -> tuple[Tensor, Tensor]:
    """Return the gradients of locations and attention weights, from those of the corner weights."""
    right, bottom = points.fraction_xy.unbind(-1)
    top_left, top_right, bottom_left, bottom_right = products.unbind(-1)
    upper = torch.lerp(top_left, top_right, right)
    lower = torch.lerp(bottom_left, bottom_right, right)
    grad_weights = torch.lerp(upper, lower, bottom) * points.inside
    weights = weights * points.inside
    grad_y = (lower - upper) * weights
    grad_x = torch.lerp(top_right - top_left, bottom_right - bottom_left, bottom) * weights
    heads, levels, num_points = weights.shape[2:]
    sizes_wh = torch.tensor([(width, height) for height, width in sizes_hw], dtype=weights.dtype)
    sizes_wh = sizes_wh[:, None].expand(heads, levels, num_points, 2).contiguous()
    return torch.stack((grad_x, grad_y), dim=-1).mul_(sizes_wh), grad_weights


def _value_gradient(
    points: _Points, corner_weights: Tensor, grad_rows: Tensor, value_shape: Sequence[int], sizes_hw: SizesHW
) -> Tensor:
    """Return the gradient of the value: for each corner a weighted sum over each cell's points."""
    batch, _, heads, channels = value_shape
    starts = _bordered_starts(sizes_hw)
    num_rows = batch * starts[-1] * heads
    sorted_rows, order = points.first_row.flatten().sort()
    row_starts = torch.searchsorted(sorted_rows, torch.arange(num_rows, dtype=sorted_rows.dtype))
    points_per_query = points.first_row.shape[3] * points.first_row.shape[4]
    sources = order.div(points_per_query, rounding_mode="floor")
    corners = [
        functional.embedding_bag(sources, grad_rows, row_starts, mode="sum", per_sample_weights=factors)
        for factors in corner_weights.view(-1, 4)[order].t().contiguous()
    ]
    levels = []
    for level, (height, width) in enumerate(sizes_hw):
        top_left, top_right, bottom_left, bottom_right = (
            corner.view(batch, -1, heads * channels)[:, starts[level] : starts[level + 1]].view(
                batch, height + 2, width + 2, heads * channels
            )
            for corner in corners
        )
        total = top_left[:, 1:-1, 1:-1] + top_right[:, 1:-1, :-2]
        total += bottom_left[:, :-2, 1:-1]
        total += bottom_right[:, :-2, :-2]
        levels.append(total.view(batch, height * width, heads, channels))
    return torch.cat(levels, dim=1)
