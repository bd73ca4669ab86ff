"""Deformable sampling on a GPU as operators of PyTorch, with gradients, whoever computes them.

Being operators, they stay whole under ``torch.compile`` (mmcv's function would cut the graph there), and the
choice between implementations is made when they run, not when a graph is made.
"""

from typing import Any  # annotations stay objects here: PyTorch reads the operators' schemas from them

import torch
from torch import Tensor

from ddetr_mm.models.sampling_choice import (
    backward_candidates,
    check_available,
    choose,
    forward_candidates,
)


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
