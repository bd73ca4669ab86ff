"""Deformable sampling on a GPU from what the network computes: offsets and logits, not locations and weights.

The operator takes references, raw offsets and raw logits in the network's dtype. Locations and softmax are
computed inside, again in the backward pass, and never kept: neither written between the steps nor saved for
the gradients, which in half precision halves what is saved. With Triton this is one kernel in each direction;
mmcv's op and mmcv's PyTorch form get locations and weights made of the inputs.

Which candidate is used: :mod:`ddetr_mm.models.sampling_choice`. Shapes as in
:mod:`ddetr_mm.models.deformable_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddetr_mm.models import triton_attention
from ddetr_mm.models.sampling_choice import Candidate, choose, in_order, place_of, random_like
from ddetr_mm.models.triton_attention import Launch, judged_queries, kernels, on_device, power_of_two

FORWARD_LAUNCHES = (Launch(8, 1), Launch(32, 4), Launch(16, 4))
BACKWARD_LAUNCHES = (Launch(2, 1), Launch(8, 4), Launch(4, 1), Launch(8, 2), Launch(2, 1, merges=True))
"""In the order in which they are tried: few registers and no barriers first, as compiled for Hopper
(``benchmarks/attention_kernels.py``); no GPU has timed them."""

# --- From raw inputs to locations and weights, and their gradients back ---


def locations_and_weights(
    references: Tensor, offsets: Tensor, logits: Tensor, spatial_shapes: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what the unfused forms take, in float32.

    Args:
        references: (B or 1, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), 0..1, float32.
        offsets: (B, Q, M, L, P, 2), in cells, or in parts of the box.
        logits: (B, Q, M, L, P).
        spatial_shapes: (L, 2) as (height, width).

    Returns:
        Locations (B, Q, M, L, P, 2), 0..1, and weights (B, Q, M, L, P).
    """
    scale = _location_scale(references, spatial_shapes, logits.shape[-1])
    centers = references[:, :, None, :, None, :2]
    weights = logits.float().flatten(3).softmax(-1).view(logits.shape)
    return centers + offsets.float() * scale, weights


def _location_scale(references: Tensor, spatial_shapes: Tensor, points: int) -> Tensor:
    """Location per unit of offset, broadcast to (B, Q, M, L, P, 2)."""
    if references.shape[-1] == 4:
        return references[:, :, None, :, None, 2:] * (0.5 / points)
    return 1.0 / spatial_shapes.flip(-1).float()[:, None]


def _raw_gradients(
    grad_locations: Tensor, grad_weights: Tensor, references: Tensor, offsets: Tensor, logits: Tensor,
    shapes: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of offsets and logits, from those of locations and weights."""
    scale = _location_scale(references, shapes, logits.shape[-1])
    mean = (weights * grad_weights).flatten(3).sum(-1)[..., None, None]
    return (grad_locations * scale).to(offsets.dtype), (weights * (grad_weights - mean)).to(logits.dtype)


def _composed_forward(
    value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor, shapes: Tensor, starts: Tensor,
    *, sample: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the output and the logits' log-sum-exp by an unfused form."""
    locations, weights = locations_and_weights(references, offsets, logits, shapes)
    (output,) = sample(value, locations, weights, shapes, starts)
    return output, logits.float().flatten(3).logsumexp(-1)


def _composed_backward(
    grad_output: Tensor, log_sums: Tensor, value: Tensor, references: Tensor,
    offsets: Tensor, logits: Tensor, shapes: Tensor, starts: Tensor,
    *, sample_backward: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of values, offsets and logits by an unfused form."""
    locations, weights = locations_and_weights(references, offsets, logits, shapes)
    grad_value, grad_locations, grad_weights = sample_backward(
        grad_output, value, locations, weights, shapes, starts
    )
    raw = _raw_gradients(grad_locations, grad_weights, references, offsets, logits, shapes, weights)
    return grad_value, *raw


# --- Triton ---


def _check(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor, shapes: Tensor) -> None:
    """Refuse arguments for which the kernels would read or write out of bounds.

    Raises:
        ValueError: shapes do not fit together, or references are not float32.
    """
    batch, queries, heads, levels, _ = logits.shape
    fits = (
        value.shape[0] == batch
        and value.shape[2] == heads
        and offsets.shape == (*logits.shape, 2)
        and references.shape[0] in (1, batch)
        and references.shape[1:] in ((queries, levels, 2), (queries, levels, 4))
        and len(shapes) == levels
    )
    if not fits:
        raise ValueError(
            f"values {tuple(value.shape)}, references {tuple(references.shape)}, offsets "
            f"{tuple(offsets.shape)}, logits {tuple(logits.shape)} and {len(shapes)} levels do not fit"
        )
    if references.dtype != torch.float32:
        raise ValueError(f"references must be float32, not {references.dtype}")


def _constants(value: Tensor, references: Tensor, logits: Tensor) -> dict[str, Any]:
    """Arguments that both kernels share."""
    _, num_queries, heads, levels, points = logits.shape
    channels = value.shape[3]
    return dict(
        num_queries=num_queries,
        num_values=value.shape[1],
        reference_stride=0 if len(references) == 1 else references[0].numel(),
        HEADS=heads,
        LEVELS=levels,
        POINTS=points,
        CHANNELS=channels,
        LANES=power_of_two(channels),
        BOXES=references.shape[-1] == 4,
    )


def triton_forward(
    value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor, shapes: Tensor, starts: Tensor,
    *, launch: Launch = FORWARD_LAUNCHES[0],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sample with one Triton kernel, see :func:`fused_sampling`.

    Returns:
        (B, Q, M * D) in the dtype of ``value``, and the logits' log-sum-exp (B, Q, M), float32.

    Raises:
        ValueError: shapes do not fit together, or references are not float32.
    """
    _check(value, references, offsets, logits, shapes)
    given = [one.contiguous() for one in (value, references, offsets, logits)]
    batch, num_queries, heads = logits.shape[:3]
    output = value.new_empty(batch, num_queries, heads * value.shape[3])
    log_sums = value.new_empty(batch, num_queries, heads, dtype=torch.float32)
    if output.numel():
        grid = (-(-num_queries // launch.queries), batch * heads)
        with on_device(value.device):
            kernels().fused_forward_kernel[grid](
                *given,
                shapes,
                starts,
                output,
                log_sums,
                **_constants(value, references, logits),
                QUERIES=launch.queries,
                num_warps=launch.warps,
            )
    return output, log_sums


def triton_backward(
    grad_output: Tensor, log_sums: Tensor, value: Tensor, references: Tensor,
    offsets: Tensor, logits: Tensor, shapes: Tensor, starts: Tensor,
    *, gather: bool, launch: Launch = BACKWARD_LAUNCHES[0],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of values, offsets and logits with Triton.

    Args:
        grad_output: (B, Q, M * D).
        log_sums: of :func:`triton_forward`.
        value: as in :func:`fused_sampling`, as are the following.
        references: likewise.
        offsets: likewise.
        logits: likewise.
        shapes: likewise.
        starts: likewise.
        gather: whether the values' gradient is gathered in a fixed order, from locations and weights that are
            made for it, instead of added atomically.
        launch: how the work is divided, except the gather's.

    Returns:
        The gradients in the dtypes of ``value``, ``offsets`` and ``logits``.
    """
    _check(value, references, offsets, logits, shapes)
    tensors = (value, references, offsets, logits, log_sums)
    given = [one.contiguous() for one in tensors]
    grad_output = grad_output.contiguous()
    grad_offsets = torch.empty_like(given[2])
    grad_logits = torch.empty_like(given[3])
    grad_value = grad_output if gather else torch.zeros_like(given[0], dtype=torch.float32)
    batch, num_queries, heads, levels, points = logits.shape
    if grad_output.numel():
        grid = (-(-num_queries // launch.queries), batch * heads)
        with on_device(value.device):
            kernels().fused_backward_kernel[grid](
                *given,
                shapes,
                starts,
                grad_output,
                grad_value,  # not written with gather
                grad_offsets,
                grad_logits,
                **_constants(value, references, logits),
                POINT_LANES=power_of_two(points),
                LEVEL_LANES=power_of_two(levels),
                ADD_TO_VALUE=not gather,
                MERGES=launch.merges,
                QUERIES=launch.queries,
                num_warps=launch.warps,
            )
    if not gather:
        return grad_value.to(value.dtype), grad_offsets, grad_logits
    places = locations_and_weights(references, offsets, logits, shapes)
    gathered = triton_attention.gathered_value_gradient(grad_output, given[0], *places, shapes, starts)
    return gathered, grad_offsets, grad_logits


# --- Candidates and choice ---


def forward_candidates(
    device: torch.device, implementation: str = "auto", im2col_step: int = 64
) -> list[Candidate]:
    """Return the candidates for sampling on a GPU, in order; see :mod:`.triton_attention` for arguments."""
    found = []
    if triton_attention.offers_mmcv(device, implementation):
        sample = functools.partial(triton_attention.mmcv_forward, im2col_step=im2col_step)
        found.append(Candidate("mmcv", functools.partial(_composed_forward, sample=sample)))
    if triton_attention.offers_triton(device, implementation):
        for launch in FORWARD_LAUNCHES:
            run = functools.partial(triton_forward, launch=launch)
            found.append(Candidate(f"triton fused {launch.queries}x{launch.warps}", run))
    return in_order(found, device)


def backward_candidates(
    device: torch.device, implementation: str = "auto", im2col_step: int = 64
) -> list[Candidate]:
    """Return the candidates for the gradients on a GPU, in order."""
    found = []
    if triton_attention.offers_mmcv(device, implementation):
        sample_backward = functools.partial(triton_attention.mmcv_backward, im2col_step=im2col_step)
        run = functools.partial(_composed_backward, sample_backward=sample_backward)
        found.append(Candidate("mmcv", run, deterministic=False))
    if triton_attention.offers_triton(device, implementation):
        for gather in (False, True):
            for launch in BACKWARD_LAUNCHES:
                if gather and launch.merges:  # adds nothing to memory
                    continue
                kind = "gather " * gather + "merged " * launch.merges
                name = f"triton fused {kind}{launch.queries}x{launch.warps}"
                run = functools.partial(triton_backward, gather=gather, launch=launch)
                found.append(Candidate(name, run, deterministic=gather))
    return in_order(found, device)


PYTORCH_FORM = {
    "forward": Candidate(
        "torch", functools.partial(_composed_forward, sample=triton_attention.torch_forward)
    ),
    "backward": Candidate(
        "torch",
        functools.partial(_composed_backward, sample_backward=triton_attention.torch_backward),
        deterministic=False,
    ),
}
"""The candidates' expected results, and the last choice of ``auto``."""


def _judged_part(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return one image and some queries of a candidate's arguments, so that a comparison is cheap."""
    *upstream, value, references, offsets, logits, shapes, starts = tensors
    some = judged_queries(logits.shape[1])
    per_query = [tensor[:1, some].contiguous() for tensor in (*upstream, references, offsets, logits)]
    return (*per_query[:-3], value[:1].contiguous(), *per_query[-3:], shapes, starts)


def _random_arguments(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Random arguments of a candidate; those of a backward pass belong to a forward pass."""
    found = random_like(tensors)
    if len(found) == 8:
        found[1] = PYTORCH_FORM["forward"].run(*found[2:])[1]
    return found


def _choose_for(
    direction: str, candidates: list[Candidate], tensors: tuple, implementation: str, deterministic: bool
) -> Candidate:
    value, references, _, logits = tensors[-6:-2]
    heads, levels, points = logits.shape[2:]
    dtype, of_network = (str(one.dtype).removeprefix("torch.") for one in (value, logits))
    mixed = "" if dtype == of_network else f" and {of_network}"
    return choose(
        direction,
        f"{dtype}{mixed}, {heads} heads, {levels} levels, {points} points, {value.shape[3]} channels, "
        + ("boxes" if references.shape[-1] == 4 else "centres"),
        candidates,
        functools.partial(_judged_part, *tensors),
        replaced=_random_arguments,
        last=PYTORCH_FORM[direction] if implementation == "auto" else None,
        expected=PYTORCH_FORM[direction],
        **place_of(value),
        deterministic=deterministic,
    )


# --- Operators ---


@torch.library.custom_op("ddetr_mm::fused_sampling", mutates_args=())
def fused_sampling(
    value: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    implementation: str,
    im2col_step: int,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend from each query to its points, with gradients of values, references, offsets and logits.

    Args:
        value: (B, S, M, D), float32, float16 or bfloat16.
        references: (B or 1, Q, L, 2) as (x, y), or (B, Q, L, 4) as (cx, cy, w, h) without gradient, 0..1,
            float32.
        offsets: (B, Q, M, L, P, 2): in cells, or of boxes in halves of the box over P.
        logits: (B, Q, M, L, P); the softmax is over L and P.
        spatial_shapes: (L, 2) int64 as (height, width).
        level_start_index: (L,) int64.
        implementation: ``auto``, ``mmcv`` or ``triton``.
        im2col_step: largest number of images mmcv's op handles at once.
        deterministic: whether equal inputs must give equal gradients, bit for bit.

    Returns:
        (B, Q, M * D) in the dtype of ``value``; and the logits' log-sum-exp (B, Q, M), float32, for the
        backward pass.

    Raises:
        StackError: the implementation is not available for this device, or has no deterministic form.
    """
    triton_attention.check_available(implementation, value.device)
    candidates = forward_candidates(value.device, implementation, im2col_step)
    tensors = (value, references, offsets, logits, spatial_shapes, level_start_index)
    output, log_sums = _choose_for("forward", candidates, tensors, implementation, deterministic).run(
        *tensors
    )
    return output, log_sums


@torch.library.custom_op("ddetr_mm::fused_sampling_backward", mutates_args=())
def fused_sampling_backward(
    grad_output: Tensor,
    log_sums: Tensor,
    value: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    implementation: str,
    im2col_step: int,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``value``, ``offsets`` and ``logits`` from the output's, (B, Q, M * D)."""
    candidates = backward_candidates(value.device, implementation, im2col_step)
    tensors = (
        *(grad_output, log_sums, value, references, offsets, logits),
        *(spatial_shapes, level_start_index),
    )
    chosen = _choose_for("backward", candidates, tensors, implementation, deterministic)
    grad_value, grad_offsets, grad_logits = chosen.run(*tensors)
    return grad_value, grad_offsets, grad_logits


@fused_sampling.register_fake
def _(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor, *_rest: Any) -> tuple:
    batch, num_queries, heads = logits.shape[:3]
    output = value.new_empty(batch, num_queries, heads * value.shape[3])
    return output, value.new_empty(batch, num_queries, heads, dtype=torch.float32)


@fused_sampling_backward.register_fake
def _(
    grad_output: Tensor, log_sums: Tensor, value: Tensor, references: Tensor,
    offsets: Tensor, logits: Tensor, *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(one.new_empty(one.shape) for one in (value, offsets, logits))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.implementation, ctx.im2col_step, ctx.deterministic = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_output: Tensor, _grad_log_sums: Tensor | None) -> tuple:
    references, spatial_shapes = ctx.saved_tensors[2], ctx.saved_tensors[5]
    grad_value, grad_offsets, grad_logits = fused_sampling_backward(
        grad_output, *ctx.saved_tensors, ctx.implementation, ctx.im2col_step, ctx.deterministic
    )
    grad_references = None
    if ctx.needs_input_grad[1]:
        if references.shape[-1] == 4:
            raise ValueError("fused_sampling has no gradient for reference boxes: detach them")
        # A centre moves all its points, by as many cells as the level is long.
        sizes_wh = spatial_shapes.flip(-1).to(references.dtype)
        grad_references = grad_offsets.float().sum((2, 4)) * sizes_wh
        if len(references) == 1:
            grad_references = grad_references.sum(0, keepdim=True)
    return grad_value, grad_references, grad_offsets, grad_logits, None, None, None, None, None


fused_sampling.register_autograd(_backward, setup_context=_keep)
