"""Deformable sampling on a GPU: who can do it, and who does it.

mmcv's compiled op is the default where it is installed and the yardstick of the others; the Triton kernels
need no build. With ``"auto"``, where there are several, all are run once on the first tensors of a kind,
compared with the first, and timed; the fastest is kept for that kind, and the log says so. Nothing is
measured where that would disturb: under deterministic algorithms and while a CUDA graph is captured.

Forward and backward are chosen apart: both need nothing but the inputs.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.models.triton_sampling import (
    LAUNCHES,
    Launch,
    has_triton,
    runs_on,
    sample_backward,
    sample_forward,
)
from ddetr_mm.stack.mmcv_ops import INSTALL_COMMAND, has_compiled_ops

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
        mend = f"run `{INSTALL_COMMAND}`, or leave the choice to `auto`"
        raise StackError(Problem("mmcv has no compiled CUDA op for deformable attention here", mend=mend))
    if implementation == "triton" and not runs_on(device):
        mend = "install triton, which comes with PyTorch's CUDA builds, or leave the choice to `auto`"
        raise StackError(
            Problem(
                "the Triton kernels of deformable attention cannot run here", value=str(device), mend=mend
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
