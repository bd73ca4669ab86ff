"""Deformable sampling on a GPU: mmcv's compiled op, Triton kernels, and the choice between them.

The Triton kernels are in :mod:`ddetr_mm.models.triton_kernels`, imported at the first call; importing this
module needs no Triton. Values may be float32, float16 or bfloat16; locations are float32 and so are sums.

The gradient of the values has two forms. By atomic additions, every point adds to the cells around it; the
order varies, so that the last bits differ from run to run. By a gather, points are sorted by cell, stably,
and every cell sums its own in that order: deterministic.

Which of them is used: :mod:`ddetr_mm.models.sampling_choice`.

Shapes as in :mod:`ddetr_mm.models.deformable_attention`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from torch import Tensor
from torch.nn import functional

from ddetr_mm.compat.mmcv_ops import INSTALL_COMMAND, has_compiled_ops
from ddetr_mm.errors import Problem, StackError
from ddetr_mm.models.sampling_choice import Candidate, choose, in_order, place_of

# --- Triton ---

_INT32_LIMIT = 2**31 - 1
_GATHER_BLOCK = 32
"""Points that the gather sums at once; it affects the order of summation, so it is never tuned."""


@dataclass(frozen=True)
class Launch:
    """How a kernel's work is divided into programs.

    Attributes:
        queries: queries of one program, a power of two.
        warps: groups of 32 threads of one program, a power of two.
        merges: whether the fused backward pass sums what points of a query add to the same cell before it
            adds to memory: fewer atomic additions, more instructions.
    """

    queries: int = 32
    warps: int = 4
    merges: bool = False


LAUNCHES = (Launch(32, 4), Launch(16, 4), Launch(16, 2), Launch(64, 4), Launch(64, 8))
"""In the order in which they are tried; smaller ones need fewer registers."""


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Return whether Triton's interpreter is on (``TRITON_INTERPRET=1``), which runs kernels on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def runs_on(device: torch.device) -> bool:
    """Return whether the kernels run on a device: NVIDIA and AMD GPUs, or a CPU with the interpreter."""
    return has_triton() and (device.type == "cuda" or (device.type == "cpu" and interprets()))


@functools.cache
def kernels() -> ModuleType:
    """Import Triton and the kernels."""
    return importlib.import_module("ddetr_mm.models.triton_kernels")


def on_device(device: torch.device) -> AbstractContextManager:
    """Return a context in which a GPU is the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _check(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Tensor) -> None:
    """Refuse arguments for which the kernels would read or write out of bounds.

    Raises:
        ValueError: shapes do not fit together, or locations are not float32.
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
    """Sample bilinearly and sum by weight, with Triton.

    Args:
        value: (B, S, M, D), float32, float16 or bfloat16.
        locations: (B, Q, M, L, P, 2) as (x, y), 0..1, float32; zero outside, NaN propagates.
        weights: (B, Q, M, L, P), any of the three dtypes.
        spatial_shapes: (L, 2) integers on the same device, as (height, width); they must add up to S.
        level_start_index: (L,) integers on the same device.
        launch: how the work is divided.

    Returns:
        (B, Q, M * D) in the dtype of ``value``, summed in float32.

    Raises:
        ValueError: shapes do not fit together, or locations are not float32.
    """
    _check(value, locations, weights, spatial_shapes)
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, num_values, heads, channels = value.shape
    _, num_queries, _, levels, points = weights.shape
    output = value.new_empty(batch, num_queries, heads * channels)
    if output.numel():
        grid = (-(-num_queries // launch.queries), batch * heads)
        with on_device(value.device):
            kernels().forward_kernel[grid](
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
                LANES=power_of_two(channels),
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
    """Compute the gradients of values, locations and weights, with Triton.

    Args:
        grad_output: (B, Q, M * D).
        value: as in :func:`sample_forward`.
        locations: likewise.
        weights: likewise.
        spatial_shapes: likewise.
        level_start_index: likewise.
        gather: whether the values' gradient is gathered in a fixed order instead of added atomically. It
            needs some 20 bytes more memory a point.
        value_needs_grad: whether to compute the values' gradient.
        launch: how the work is divided, except the gather's, whose results would depend on it.

    Returns:
        The gradients in the dtypes of ``value``, ``locations`` and ``weights``; the first None if not
        needed.
    """
    _check(value, locations, weights, spatial_shapes)
    tensors = (grad_output, value, locations, weights)
    given = (*(tensor.contiguous() for tensor in tensors), spatial_shapes, level_start_index)
    add = value_needs_grad and not gather
    with on_device(value.device):
        grad_value, grad_locations, grad_weights = _point_gradients(*given, add=add, launch=launch)
        if value_needs_grad and gather:
            grad_value = gathered_value_gradient(*given)
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
    """Return the gradients of values (by atomic additions if ``add``, else None), locations and weights."""
    batch, num_values, heads, channels = value.shape
    _, num_queries, _, levels, points = weights.shape
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    grad_value = torch.zeros_like(value, dtype=torch.float32) if add else None
    if grad_output.numel():
        grid = (-(-num_queries // launch.queries), batch * heads)
        kernels().backward_kernel[grid](
            value,
            locations,
            weights,
            spatial_shapes,
            level_start_index,
            grad_output,
            grad_value if add else grad_output,  # not written if not add
            grad_locations,
            grad_weights,
            num_queries,
            num_values,
            HEADS=heads,
            LEVELS=levels,
            POINTS=points,
            CHANNELS=channels,
            LANES=power_of_two(channels),
            ADD_TO_VALUE=add,
            QUERIES=launch.queries,
            num_warps=launch.warps,
        )
    return None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights


def gathered_value_gradient(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
) -> Tensor:
    """Return the values' gradient, every cell's points summed in the order of the points."""
    batch, num_values, heads, channels = value.shape
    _, num_queries, _, levels, points = weights.shape
    num_points = weights.numel()
    if not num_points:
        return torch.zeros_like(value)
    # A level has (H + 1) * (W + 1) bins. The sum over levels is bounded without reading the sizes back:
    # (H + 1) * (W + 1) <= 4 * H * W; the exact number would synchronise with the host.
    level_bins = (spatial_shapes + 1).prod(-1)
    bin_starts = level_bins.cumsum(0) - level_bins
    bins_per_head = 4 * num_values
    num_bins = batch * heads * bins_per_head
    index_type = torch.int32 if num_bins < _INT32_LIMIT else torch.int64
    bins = torch.empty(num_points, dtype=index_type, device=value.device)
    block = 256
    kernels().bin_kernel[(-(-num_points // block),)](
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
    kernels().gather_value_gradient_kernel[(num_values, batch * heads)](
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
        LANES=power_of_two(channels),
        BLOCK=_GATHER_BLOCK,
        num_warps=1,
    )
    return grad_value


# --- Candidates ---

IMPLEMENTATIONS = ("auto", "mmcv", "triton", "torch")
"""Values of a config; ``torch`` is mmcv's PyTorch form."""


@functools.cache
def has_compiled_cuda_op() -> bool:
    """Return whether the installed mmcv has its deformable attention compiled for CUDA.

    False with mmcv-lite, and where mmcv was built for the CPU only.
    """
    if not has_compiled_ops():
        return False
    return importlib.import_module("mmcv._ext").get_compiling_cuda_version() != "not available"


GPU_HAS_ITS_OWN = has_compiled_cuda_op() or has_triton()
"""Whether a GPU has more than mmcv's PyTorch form; a constant for torch.compile."""


def offers_mmcv(device: torch.device, implementation: str) -> bool:
    """Return whether mmcv's op is a candidate for a device and a choice of :data:`IMPLEMENTATIONS`."""
    return implementation in ("auto", "mmcv") and device.type == "cuda" and has_compiled_cuda_op()


def offers_triton(device: torch.device, implementation: str) -> bool:
    """Return whether Triton's kernels are candidates for a device and a choice of :data:`IMPLEMENTATIONS`."""
    return implementation in ("auto", "triton") and runs_on(device)


def _op_step(batch: int, im2col_step: int) -> int:
    """Return how many images mmcv's op handles at once; the batch must be a multiple of it."""
    return batch if batch <= im2col_step else math.gcd(batch, im2col_step)


def mmcv_forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor, starts: Tensor, *, im2col_step: int
) -> tuple[Tensor]:
    """Sample with mmcv's compiled op in float32; (B, Q, M * D) in the dtype of ``value``."""
    op = importlib.import_module("mmcv._ext").ms_deform_attn_forward
    step = _op_step(len(value), im2col_step)
    tensors = (value.float().contiguous(), shapes, starts, locations.contiguous(), weights.contiguous())
    return (op(*tensors, im2col_step=step).to(value.dtype),)


def mmcv_backward(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Tensor,
    starts: Tensor,
    *,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients with mmcv's compiled op in float32."""
    op = importlib.import_module("mmcv._ext").ms_deform_attn_backward
    value_f32, locations, weights = value.float().contiguous(), locations.contiguous(), weights.contiguous()
    gradients = torch.zeros_like(value_f32), torch.zeros_like(locations), torch.zeros_like(weights)
    op(
        value_f32,
        shapes,
        starts,
        locations,
        weights,
        grad_output.float().contiguous(),
        *gradients,
        im2col_step=_op_step(len(value), im2col_step),
    )
    return gradients[0].to(value.dtype), gradients[1], gradients[2]


def _triton_forward(*tensors: Tensor, launch: Launch) -> tuple[Tensor]:
    return (sample_forward(*tensors, launch=launch),)


def forward_candidates(
    device: torch.device, implementation: str = "auto", im2col_step: int = 64
) -> list[Candidate]:
    """Return the candidates for sampling on a GPU, in order.

    Args:
        device: a GPU, or a CPU with Triton's interpreter.
        implementation: one of :data:`IMPLEMENTATIONS`; ``auto`` gives all.
        im2col_step: largest number of images mmcv's op handles at once.
    """
    found = []
    if offers_mmcv(device, implementation):
        found.append(Candidate("mmcv", functools.partial(mmcv_forward, im2col_step=im2col_step)))
    if offers_triton(device, implementation):
        found += [
            Candidate(
                f"triton {launch.queries}x{launch.warps}", functools.partial(_triton_forward, launch=launch)
            )
            for launch in LAUNCHES
        ]
    return in_order(found, device)


def backward_candidates(
    device: torch.device, implementation: str = "auto", im2col_step: int = 64
) -> list[Candidate]:
    """Return the candidates for the gradients on a GPU, in order; arguments as for the forward."""
    found = []
    if offers_mmcv(device, implementation):
        run = functools.partial(mmcv_backward, im2col_step=im2col_step)
        found.append(Candidate("mmcv", run, deterministic=False))
    if offers_triton(device, implementation):
        for gather in (False, True):
            found += [
                Candidate(
                    f"triton {'gather ' * gather}{launch.queries}x{launch.warps}",
                    functools.partial(sample_backward, gather=gather, launch=launch),
                    deterministic=gather,
                )
                for launch in LAUNCHES
            ]
    return in_order(found, device)


def check_available(implementation: str, device: torch.device) -> None:
    """Refuse an implementation that is not available for a device.

    Raises:
        StackError: says how to install it.
    """
    if implementation == "mmcv" and not has_compiled_cuda_op():
        hint = f"run `{INSTALL_COMMAND}`, or set ddetr_mm.attention=auto"
        raise StackError(Problem("mmcv has no compiled CUDA op for deformable attention here", hint=hint))
    if implementation == "triton" and not runs_on(device):
        hint = "install triton, which comes with PyTorch's CUDA builds, or set ddetr_mm.attention=auto"
        raise StackError(
            Problem(
                "the Triton kernels of deformable attention cannot run here", value=str(device), hint=hint
            )
        )


# --- What candidates are judged by ---

_JUDGED_QUERIES = 1024
"""Queries of one image on which candidates are compared, spread over all."""


def torch_forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor, *_: Tensor
) -> tuple[Tensor]:
    """Sample with mmcv's PyTorch form in float32; (B, Q, M * D) in the dtype of ``value``."""
    output = multi_scale_deformable_attn_pytorch(value.float(), shapes.tolist(), locations, weights.float())
    return (output.to(value.dtype),)


def torch_backward(
    grad_output: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`torch_forward`, for use where autograd is off (inside an operator)."""
    batch, _, heads, channels = value.shape
    num_queries = weights.shape[1]
    sizes_hw = shapes.tolist()
    maps = value.float().split([height * width for height, width in sizes_hw], dim=1)
    # (B, Q, M, ...) → (B * M, ..., Q, P), as grid_sample takes them.
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    shares = weights.float().transpose(1, 2).flatten(0, 1)[:, None]
    upstream = grad_output.float().view(batch, num_queries, heads, channels).permute(0, 2, 3, 1).flatten(0, 1)
    upstream = upstream[..., None]
    grad_maps, grad_grids, grad_shares = [], [], []
    for level, (height, width) in enumerate(sizes_hw):
        plane = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid, share = grids[:, :, level].contiguous(), shares[:, :, :, level]
        sampled = functional.grid_sample(plane, grid, align_corners=False)
        grad_shares.append((sampled * upstream).sum(1))
        grad_plane, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            upstream * share, plane, grid, 0, 0, False, [True, True]
        )
        grad_maps.append(grad_plane.reshape(batch, heads, channels, -1).permute(0, 3, 1, 2))
        grad_grids.append(2 * grad_grid)

    def per_query(parts: list[Tensor]) -> Tensor:
        joined = torch.stack(parts, dim=2)  # (B * M, Q, L, P, ...)
        return joined.unflatten(0, (batch, heads)).transpose(1, 2)

    grad_value = torch.cat(grad_maps, dim=1).to(value.dtype)
    return grad_value, per_query(grad_grids), per_query(grad_shares).to(weights.dtype)


PYTORCH_FORM = {
    "forward": Candidate("torch", torch_forward),
    "backward": Candidate("torch", torch_backward, deterministic=False),
}
"""The candidates' expected results, and the last choice of ``auto``."""


def judged_queries(num_queries: int) -> slice:
    """Return which of so many queries candidates are judged on."""
    return slice(None, None, max(-(-num_queries // _JUDGED_QUERIES), 1))


def judged_part(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return one image and some queries of the arguments of a candidate, so that a comparison is cheap."""
    *upstream, value, locations, weights, shapes, starts = tensors
    some = judged_queries(locations.shape[1])
    per_query = [tensor[:1, some].contiguous() for tensor in (*upstream, locations, weights)]
    return (*per_query[:-2], value[:1].contiguous(), *per_query[-2:], shapes, starts)


def _choose_for(
    direction: str,
    candidates: Sequence[Candidate],
    tensors: tuple,
    implementation: str,
    deterministic: bool,
) -> Candidate:
    """Call :func:`choose` for the arguments of a candidate."""
    value, weights = tensors[-5], tensors[-3]
    sizes = dict(zip(("heads", "levels", "points"), weights.shape[2:], strict=True), channels=value.shape[3])
    dtype = str(value.dtype).removeprefix("torch.")
    return choose(
        direction,
        ", ".join((dtype, *(f"{count} {name}" for name, count in sizes.items()))),
        candidates,
        functools.partial(judged_part, *tensors),
        last=PYTORCH_FORM[direction] if implementation == "auto" else None,
        expected=PYTORCH_FORM[direction],
        **place_of(value),
        deterministic=deterministic,
    )


# --- Operators ---
# As operators of PyTorch they stay whole under torch.compile, and the choice is made when they run.


@torch.library.custom_op("ddetr_mm::deformable_sampling", mutates_args=())
def deformable_sampling(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    implementation: str,
    im2col_step: int,
    deterministic: bool = False,
) -> Tensor:
    """Sample bilinearly and sum by weight in float32, with gradients.

    Args:
        value: (B, S, M, D), float32, float16 or bfloat16.
        locations: (B, Q, M, L, P, 2) float32.
        weights: (B, Q, M, L, P) float32.
        spatial_shapes: (L, 2) int64.
        level_start_index: (L,) int64.
        implementation: ``auto``, ``mmcv`` or ``triton``.
        im2col_step: largest number of images mmcv's op handles at once.
        deterministic: whether equal inputs must give equal gradients, bit for bit.

    Returns:
        (B, Q, M * D) in the dtype of ``value``.

    Raises:
        StackError: the implementation is not available for this device, or has no deterministic form.
    """
    check_available(implementation, value.device)
    candidates = forward_candidates(value.device, implementation, im2col_step)
    tensors = (value, locations, weights, spatial_shapes, level_start_index)
    return _choose_for("forward", candidates, tensors, implementation, deterministic).run(*tensors)[0]


@torch.library.custom_op("ddetr_mm::deformable_sampling_backward", mutates_args=())
def deformable_sampling_backward(
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    implementation: str,
    im2col_step: int,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``value``, ``locations`` and ``weights`` from the output's, (B, Q, M * D)."""
    candidates = backward_candidates(value.device, implementation, im2col_step)
    tensors = (grad_output, value, locations, weights, spatial_shapes, level_start_index)
    gradients = _choose_for("backward", candidates, tensors, implementation, deterministic).run(*tensors)
    return gradients[0], gradients[1], gradients[2]


@deformable_sampling.register_fake
def _(value: Tensor, locations: Tensor, *_rest: Any) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@deformable_sampling_backward.register_fake
def _(
    grad_output: Tensor, value: Tensor, locations: Tensor, weights: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.implementation, ctx.im2col_step, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    gradients = deformable_sampling_backward(
        grad_output, *ctx.saved_tensors, ctx.implementation, ctx.im2col_step, ctx.deterministic
    )
    return (*gradients, None, None, None, None, None)


deformable_sampling.register_autograd(_backward, setup_context=_keep)
