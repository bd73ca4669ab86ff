"""Multi-scale deformable attention by Triton: sampling and its gradients, without a build.

The kernels are in :mod:`ddetr_mm.models.triton_kernels`, loaded at the first call; importing this module
needs no Triton. Values may be float32, float16 or bfloat16, sums are float32, locations always are.

The gradient of the values has two forms. By atomic additions: every point adds to the cells around it; the
order is the hardware's, so the last bits differ from run to run. By a gather: points are sorted by cell,
stably, and every cell adds up its own in that order; always the same bits.

Shapes as in :mod:`ddetr_mm.models.deformable_attention`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

_INT32_LIMIT = 2**31 - 1
_GATHER_BLOCK = 32
"""Points that the gather adds up at once; a part of the summation order, so never tuned."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into programs.

    Attributes:
        queries: queries of one program, a power of two.
        warps: groups of 32 threads of one program, a power of two.
    """

    queries: int = 32
    warps: int = 4


LAUNCHES = (Launch(16, 2), Launch(16, 4), Launch(32, 4), Launch(64, 4), Launch(64, 8))
"""Cuts worth trying; which is quickest depends on the GPU, the number of queries and the dtype."""


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed (it is not loaded)."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton's interpreter is on (``TRITON_INTERPRET=1``): kernels then run on a CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on tensors of a device: NVIDIA and AMD GPUs, or a CPU by the interpreter."""
    return has_triton() and (device.type == "cuda" or (device.type == "cpu" and interprets()))


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("ddetr_mm.models.triton_kernels")


def _current(device: torch.device) -> AbstractContextManager:
    """A block in which a GPU is the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _check(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Tensor) -> None:
    """Refuse what the kernels would read or write out of range.

    Raises:
        ValueError: if shapes do not fit together, or locations are not float32.
    """
    batch, _, heads, _ = value.shape
    expected = (batch, locations.shape[1], heads, len(spatial_shapes), locations.shape[4])
    if locations.shape != (*expected, 2) or weights.shape != expected:
        raise ValueError(
            f"values {tuple(value.shape)}, locations {tuple(locations.shape)}, weights "
            f"{tuple(weights.shape)} and {len(spatial_shapes)} levels do not fit together"
        )
    if locations.dtype != torch.float32:
        raise ValueError(f"locations must be float32, not {locations.dtype}")


def sample_forward(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    launch: Launch = Launch(),
) -> Tensor:
    """Sample bilinearly and add up by weight.

    Args:
        value: (B, S, M, D), float32, float16 or bfloat16.
        locations: (B, Q, M, L, P, 2) as (x, y), 0..1, float32; outside counts as zero, NaN spreads.
        weights: (B, Q, M, L, P), any of the three dtypes.
        spatial_shapes: (L, 2) integers on the same device, as (height, width); they must add up to S.
        level_start_index: (L,) integers on the same device.
        launch: how the work is cut.

    Returns:
        (B, Q, M * D) in the dtype of ``value``, summed in float32.

    Raises:
        ValueError: if shapes do not fit together, or locations are not float32.
    """
    _check(value, locations, weights, spatial_shapes)
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, num_values, heads, channels = value.shape
    _, num_queries, _, levels, points = weights.shape
    output = value.new_empty(batch, num_queries, heads * channels)
    if output.numel():
        grid = (-(-num_queries // launch.queries), batch * heads)
        with _current(value.device):
            _kernels().forward_kernel[grid](
                value,
                locations,
                weights,
                spatial_shapes,
                level_start_index,
                output,
                num_queries,
                num_values,
                HEADS=heads,
                LEVELS=levels,
                POINTS=points,
                CHANNELS=channels,
                LANES=_power_of_two(channels),
                QUERIES=launch.queries,
                num_warps=launch.warps,
            )
    return output


def sample_backward(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    *,
    gather: bool,
    value_needs_grad: bool = True,
    launch: Launch = Launch(),
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of values, locations and weights.

    Args:
        grad_output: (B, Q, M * D).
        value: as in :func:`sample_forward`.
        locations: likewise.
        weights: likewise.
        spatial_shapes: likewise.
        level_start_index: likewise.
        gather: whether the values' gradient is gathered in a fixed order; else it is made by atomic
            additions. The gather needs some 20 bytes more memory a point.
        value_needs_grad: whether the values' gradient is wanted.
        launch: how the work is cut; not the gather, so that its results do not depend on it.

    Returns:
        The gradients in the dtypes of ``value``, ``locations`` and ``weights``; the first None if not
        wanted.
    """
    _check(value, locations, weights, spatial_shapes)
    tensors = (grad_output, value, locations, weights)
    given = (*(tensor.contiguous() for tensor in tensors), spatial_shapes, level_start_index)
    add = value_needs_grad and not gather
    with _current(value.device):
        grad_value, grad_locations, grad_weights = _point_gradients(*given, add=add, launch=launch)
        if value_needs_grad and gather:
            grad_value = _gathered_value_gradient(*given)
    return grad_value, grad_locations, grad_weights


def _point_gradients(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    *,
    add: bool,
    launch: Launch,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of values (by atomic additions if ``add``, else None), locations and weights."""
    batch, num_values, heads, channels = value.shape
    _, num_queries, _, levels, points = weights.shape
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    grad_value = torch.zeros_like(value, dtype=torch.float32) if add else None
    if grad_output.numel():
        grid = (-(-num_queries // launch.queries), batch * heads)
        _kernels().backward_kernel[grid](
            value,
            locations,
            weights,
            spatial_shapes,
            level_start_index,
            grad_output,
            grad_value if add else grad_output,  # not written to when nothing is added
            grad_locations,
            grad_weights,
            num_queries,
            num_values,
            HEADS=heads,
            LEVELS=levels,
            POINTS=points,
            CHANNELS=channels,
            LANES=_power_of_two(channels),
            ADD_TO_VALUE=add,
            QUERIES=launch.queries,
            num_warps=launch.warps,
        )
    return None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights


def _gathered_value_gradient(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
) -> Tensor:
    """The values' gradient, every cell's points added up in the order of the points."""
    batch, num_values, heads, channels = value.shape
    _, num_queries, _, levels, points = weights.shape
    num_points = weights.numel()
    if not num_points:
        return torch.zeros_like(value)
    # A level has (H + 1) * (W + 1) bins. The sum over levels is bounded without reading the sizes back:
    # (H + 1) * (W + 1) <= 4 * H * W; the exact number would make the host wait.
    level_bins = (spatial_shapes + 1).prod(-1)
    bin_starts = level_bins.cumsum(0) - level_bins
    bins_per_head = 4 * num_values
    num_bins = batch * heads * bins_per_head
    index_type = torch.int32 if num_bins < _INT32_LIMIT else torch.int64
    bins = torch.empty(num_points, dtype=index_type, device=value.device)
    block = 256
    _kernels().bin_kernel[(-(-num_points // block),)](
        locations,
        spatial_shapes,
        bin_starts,
        bins,
        num_points,
        num_queries,
        bins_per_head,
        num_bins,
        HEADS=heads,
        LEVELS=levels,
        POINTS=points,
        BLOCK=block,
    )
    ordered_bins, order = bins.sort(stable=True)
    numbers = torch.arange(num_bins + 1, dtype=index_type, device=value.device)
    bin_offsets = torch.searchsorted(ordered_bins, numbers)
    grad_value = torch.empty_like(value)
    _kernels().gather_value_gradient_kernel[(num_values, batch * heads)](
        locations,
        weights,
        spatial_shapes,
        level_start_index,
        bin_starts,
        order,
        bin_offsets,
        grad_output,
        grad_value,
        num_values,
        bins_per_head,
        HEADS=heads,
        LEVELS=levels,
        POINTS=points,
        CHANNELS=channels,
        LANES=_power_of_two(channels),
        BLOCK=_GATHER_BLOCK,
        num_warps=1,
    )
    return grad_value
