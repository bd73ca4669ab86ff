"""Deformable sampling on the GPU: mmcv's op or our Triton kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import math
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from ddetr_mm.compat.mmcv_ops import INSTALL_COMMAND, has_compiled_ops
from ddetr_mm.errors import Problem, StackError

# --- Multi-scale deformable attention by Triton: sampling and its gradients, without a build ---
# The kernels are in :mod:`ddetr_mm.models.triton_kernels`, loaded at the first call; importing this module
# needs no Triton. Values may be float32, float16 or bfloat16, sums are float32, locations always are.
#
# The gradient of the values has two forms. By atomic additions: every point adds to the cells around it; the
# order is the hardware's, so the last bits differ from run to run. By a gather: points are sorted by cell,
# stably, and every cell adds up its own in that order; always the same bits.
#
# Shapes as in :mod:`ddetr_mm.models.deformable_attention`.

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


# --- Deformable sampling on a GPU: who can do it, and who does it ---
# mmcv's compiled op is the default where it is installed and the yardstick of the others; the Triton kernels
# need no build. With ``"auto"``, where there are several, all are run once on the first tensors of a kind,
# compared with the first, and timed; the fastest is kept for that kind, and the log says so. Nothing is
# measured where that would disturb: under deterministic algorithms and while a CUDA graph is captured.
#
# Forward and backward are chosen apart: both need nothing but the inputs.

IMPLEMENTATIONS = ("auto", "mmcv", "triton", "torch")
"""What a config may ask for; ``torch`` is mmcv's PyTorch form."""

Run = Callable[..., tuple[Tensor, ...]]


@functools.cache
def has_compiled_cuda_op() -> bool:
    """Whether the installed mmcv brings its deformable attention compiled for CUDA.

    False where ``mmcv._ext`` is our stand-in (mmcv-lite) or was built for the CPU only.
    """
    if not has_compiled_ops():
        return False
    return importlib.import_module("mmcv._ext").get_compiling_cuda_version() != "not available"


GPU_HAS_ITS_OWN = has_compiled_cuda_op() or has_triton()
"""Whether a GPU here has more than mmcv's PyTorch form; a constant, so that torch.compile sees one."""


@dataclass(frozen=True)
class Candidate:
    """One way to sample, or to compute the gradients.

    Attributes:
        name: for the log.
        run: takes the tensors, returns a tuple of tensors.
        deterministic: whether the same inputs give the same bits.
    """

    name: str
    run: Run
    deterministic: bool = True


def _op_step(batch: int, im2col_step: int) -> int:
    """How many images mmcv's op takes at once; the batch must be a multiple of it."""
    return batch if batch <= im2col_step else math.gcd(batch, im2col_step)


def mmcv_forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor, starts: Tensor, *, im2col_step: int
) -> tuple[Tensor]:
    """mmcv's compiled op in float32; (B, Q, M * D) in the dtype of ``value``."""
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
    """Gradients of values, locations and weights by mmcv's compiled op in float32."""
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
    """The ways to sample on a GPU, the default first.

    Args:
        device: a GPU (or a CPU, under Triton's interpreter).
        implementation: one of :data:`IMPLEMENTATIONS`; ``auto`` gives all.
        im2col_step: largest number of images mmcv's op handles at once.
    """
    found = []
    if implementation in ("auto", "mmcv") and device.type == "cuda" and has_compiled_cuda_op():
        found.append(Candidate("mmcv", functools.partial(mmcv_forward, im2col_step=im2col_step)))
    if implementation in ("auto", "triton") and runs_on(device):
        found += [
            Candidate(
                f"triton {launch.queries}x{launch.warps}", functools.partial(_triton_forward, launch=launch)
            )
            for launch in LAUNCHES
        ]
    return found


def backward_candidates(
    device: torch.device, implementation: str = "auto", im2col_step: int = 64
) -> list[Candidate]:
    """The ways to compute the gradients on a GPU, the default first; arguments as for the forward."""
    found = []
    if implementation in ("auto", "mmcv") and device.type == "cuda" and has_compiled_cuda_op():
        run = functools.partial(mmcv_backward, im2col_step=im2col_step)
        found.append(Candidate("mmcv", run, deterministic=False))
    if implementation in ("auto", "triton") and runs_on(device):
        for gather in (False, True):
            found += [
                Candidate(
                    f"triton {'gather ' * gather}{launch.queries}x{launch.warps}",
                    functools.partial(sample_backward, gather=gather, launch=launch),
                    deterministic=gather,
                )
                for launch in LAUNCHES
            ]
    return found


def check_available(implementation: str, device: torch.device) -> None:
    """Refuse an implementation that cannot run on a GPU as things are installed.

    Raises:
        StackError: if it cannot, with what to do about it.
    """
    if implementation == "mmcv" and not has_compiled_cuda_op():
        hint = f"run `{INSTALL_COMMAND}`, or leave the choice to `auto`"
        raise StackError(Problem("mmcv has no compiled CUDA op for deformable attention here", hint=hint))
    if implementation == "triton" and not runs_on(device):
        hint = "install triton, which comes with PyTorch's CUDA builds, or leave the choice to `auto`"
        raise StackError(
            Problem(
                "the Triton kernels of deformable attention cannot run here", value=str(device), hint=hint
            )
        )


def time_on_gpu(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call in milliseconds, by CUDA events, after one call that does not count."""
    run()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results are equal but for rounding: 1e-4 of the largest in float32, 2e-2 in half precision.

    One element of a thousand may differ more: the gradient of a location jumps at a cell's edge, where
    rounding decides.
    """
    for one, other in zip(found, expected, strict=True):
        if not other.numel():
            continue
        tolerance = 1e-4 if other.dtype == torch.float32 else 2e-2
        limit = tolerance * other.float().abs().max()
        near = (one.float() - other.float()).abs() <= limit  # False for NaN
        if near.float().mean() < 0.999:
            return False
    return True


def measure(
    candidates: Sequence[Candidate],
    tensors: Sequence[Tensor],
    time_of: Callable[[Callable[[], object]], float],
    what: str,
) -> Candidate:
    """The fastest of the candidates that agree with the first, told in the log.

    Args:
        candidates: the default first; one that fails or disagrees is left out, and the log says why.
        tensors: what they run on.
        time_of: gives the time of a call, in milliseconds.
        what: what is being chosen, for the log.

    Raises:
        Exception: what the default raises.
    """
    expected = candidates[0].run(*tensors)
    times = {candidates[0]: time_of(lambda: candidates[0].run(*tensors))}
    for candidate in candidates[1:]:
        try:
            same = agree(candidate.run(*tensors), expected)
            if same:
                times[candidate] = time_of(lambda candidate=candidate: candidate.run(*tensors))
        except Exception as error:  # whatever a compiler or driver says: there is another way
            print_log(f"{what}: {candidate.name} is left out: {error!r}", "current", logging.WARNING)
            continue
        if not same:
            print_log(
                f"{what}: {candidate.name} is left out: its results differ from those of "
                f"{candidates[0].name}",
                "current",
                logging.WARNING,
            )
    best = min(times, key=lambda candidate: times[candidate])
    told = ", ".join(f"{candidate.name} {time:.3f}" for candidate, time in times.items())
    print_log(f"{what}: {best.name} (ms: {told})", "current")
    return best


_chosen: dict[tuple, Candidate] = {}


def forget_choices() -> None:
    """Measure anew at the next call."""
    _chosen.clear()


def choose(
    direction: str,
    candidates: Sequence[Candidate],
    tensors: Sequence[Tensor],
    value: Tensor,
    num_queries: int,
    time_of: Callable[[Callable[[], object]], float] = time_on_gpu,
) -> Candidate:
    """One of the candidates: measured once per device, dtype, direction and kind of attention.

    Args:
        direction: ``forward`` or ``backward``.
        candidates: of :func:`forward_candidates` or :func:`backward_candidates`, not empty.
        tensors: what they run on.
        value: (B, S, M, D); its device and dtype are part of the kind.
        num_queries: Q; as many as values (an encoder) or fewer (a decoder) are two kinds.
        time_of: see :func:`measure`.
    """
    if torch.are_deterministic_algorithms_enabled():
        steady = [candidate for candidate in candidates if candidate.deterministic]
        if not steady:
            _warn_once(f"deformable attention, {direction}: {candidates[0].name} is not deterministic")
        return (steady or list(candidates))[0]
    # A graph records what runs: neither two at once nor a clock.
    capturing = value.is_cuda and torch.cuda.is_current_stream_capturing()
    dense = num_queries >= value.shape[1]
    key = (direction, value.device, value.dtype, dense, candidates[0].name, len(candidates))
    if key not in _chosen:
        if len(candidates) == 1 or capturing:
            return candidates[0]
        what = (
            f"deformable attention, {direction}, {num_queries:,} queries, {len(value)} images, "
            f"{str(value.dtype).removeprefix('torch.')} on {value.device}"
        )
        _chosen[key] = measure(candidates, tensors, time_of, what)
    return _chosen[key]


@functools.cache
def _warn_once(message: str) -> None:
    print_log(message, "current", logging.WARNING)


# --- Deformable sampling on a GPU as operators of PyTorch, with gradients, whoever computes them ---
# Being operators, they stay whole under ``torch.compile`` (mmcv's function would cut the graph there), and the
# choice between implementations is made when they run, not when a graph is made.


@torch.library.custom_op("ddetr_mm::deformable_sampling", mutates_args=())
def deformable_sampling(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    implementation: str,
    im2col_step: int,
) -> Tensor:
    """Sample bilinearly and add up by weight, in float32, with gradients.

    Args:
        value: (B, S, M, D), float32, float16 or bfloat16.
        locations: (B, Q, M, L, P, 2) float32.
        weights: (B, Q, M, L, P) float32.
        spatial_shapes: (L, 2) int64.
        level_start_index: (L,) int64.
        implementation: ``auto``, ``mmcv`` or ``triton``.
        im2col_step: largest number of images mmcv's op handles at once.

    Returns:
        (B, Q, M * D) in the dtype of ``value``.

    Raises:
        StackError: if the implementation is not installed for this device.
    """
    check_available(implementation, value.device)
    candidates = forward_candidates(value.device, implementation, im2col_step)
    tensors = (value, locations, weights, spatial_shapes, level_start_index)
    return choose("forward", candidates, tensors, value, locations.shape[1]).run(*tensors)[0]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``locations`` and ``weights`` for one of the output, (B, Q, M * D)."""
    candidates = backward_candidates(value.device, implementation, im2col_step)
    tensors = (grad_output, value, locations, weights, spatial_shapes, level_start_index)
    gradients = choose("backward", candidates, tensors, value, locations.shape[1]).run(*tensors)
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
    *tensors, ctx.implementation, ctx.im2col_step = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    gradients = deformable_sampling_backward(
        grad_output, *ctx.saved_tensors, ctx.implementation, ctx.im2col_step
    )
    return (*gradients, None, None, None, None)


deformable_sampling.register_autograd(_backward, setup_context=_keep)
