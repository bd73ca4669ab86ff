"""PyTorch and torchvision implementations of the mmcv ops that detectors need."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from ddetr_mm.compat.mmcv_ops import INSTALL_COMMAND
from ddetr_mm.errors import StackError

_MAX_POOLING = 0  # mmcv's number for it in roi_align; 1 is average pooling


def fill(module: ModuleType) -> None:
    """Add the ops of this file to ``module``; any other op raises :class:`StackError` when called."""
    for op in OPS:
        setattr(module, op.__name__, op)
    module.__getattr__ = _missing_op  # type: ignore[method-assign]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that greedy non-maximum suppression keeps, best score first.

    Args:
        boxes: (N, 4), x1, y1, x2, y2 in pixels.
        scores: (N,).
        iou_threshold: a box is removed when its IoU with a better one is above this.
        offset: 0, or 1 where x2 and y2 are the last pixels inside (width is then x2 - x1 + 1).
    """
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return _torchvision_ops().nms(boxes, scores, iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average of bilinear samples in each bin of each region, into ``output``.

    Args:
        input: (B, C, H, W).
        rois: (K, 5): index of the image, then the box.
        output: (K, C, aligned_height, aligned_width), written.
        argmax_y: used by max pooling only.
        argmax_x: used by max pooling only.
        aligned_height: bins per region, vertically.
        aligned_width: bins per region, horizontally.
        spatial_scale: from the boxes' pixels to ``input``'s.
        sampling_ratio: samples per bin and direction; 0 for one per pixel.
        pool_mode: 1 for the average.
        aligned: whether pixel centres are at .5.

    Raises:
        StackError: for max pooling, which torchvision lacks.
    """
    if pool_mode == _MAX_POOLING:
        _raise_missing("roi_align_forward (max pooling)")
    bins = (aligned_height, aligned_width)
    output.copy_(_torchvision_ops().roi_align(input, rois, bins, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` with respect to its input, into ``grad_input`` (B, C, H, W).

    Raises:
        StackError: for max pooling, which torchvision lacks.
    """
    if pool_mode == _MAX_POOLING:
        _raise_missing("roi_align_backward (max pooling)")
    bins = (aligned_height, aligned_width)
    with torch.enable_grad():
        # The op is linear in its input, so its gradient is the same for every input.
        zeros = torch.zeros_like(grad_input, requires_grad=True)
        pooled = _torchvision_ops().roi_align(zeros, rois, bins, spatial_scale, sampling_ratio, aligned)
        (gradient,) = torch.autograd.grad(pooled, zeros, grad_output)
    grad_input.copy_(gradient)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention by mmcv's PyTorch implementation.

    Args:
        value: (batch, keys of all levels, heads, channels per head).
        value_spatial_shapes: (levels, 2): height, width.
        value_level_start_index: unused.
        sampling_locations: (batch, queries, heads, levels, points, 2): x, y in [0, 1].
        attention_weights: (batch, queries, heads, levels, points).
        im2col_step: unused.

    Returns:
        (batch, queries, heads * channels per head).
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    # One transfer from the GPU instead of one per number.
    shapes_hw = value_spatial_shapes.tolist()
    return multi_scale_deformable_attn_pytorch(value, shapes_hw, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward`, into the three ``grad_`` arguments after the first."""
    with torch.enable_grad():
        inputs = [
            tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)
        ]
        output = ms_deform_attn_forward(
            inputs[0],
            value_spatial_shapes,
            value_level_start_index,
            inputs[1],
            inputs[2],
            im2col_step=im2col_step,
        )
        gradients = torch.autograd.grad(output, inputs, grad_output)
    for destination, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True
    ):
        destination.copy_(gradient)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss of each logit, into ``output``.

    Args:
        input: (N, C) logits.
        target: (N,) class indices; C, or any other number outside [0, C), is background.
        weight: (C,) factor by the target's class, or empty.
        output: (N, C), written.
        gamma: focusing exponent.
        alpha: weight of the positives; negatives have 1 - alpha.
    """
    probability, is_target, smallest = _focal_terms(input, target)
    positive = (1 - probability).pow(gamma) * probability.clamp(min=smallest).log()
    negative = probability.pow(gamma) * (1 - probability).clamp(min=smallest).log()
    loss = torch.where(is_target, -alpha * positive, -(1 - alpha) * negative)
    output.copy_(loss * _weight_of_target(target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` with respect to each logit, into ``grad_input``."""
    probability, is_target, smallest = _focal_terms(input, target)
    rest = 1 - probability
    positive = rest.pow(gamma) * (rest - gamma * probability * probability.clamp(min=smallest).log())
    negative = probability.pow(gamma) * (gamma * rest * rest.clamp(min=smallest).log() - probability)
    gradient = torch.where(is_target, -alpha * positive, -(1 - alpha) * negative)
    grad_input.copy_(gradient * _weight_of_target(target, weight))


def get_compiler_version() -> str:
    """The compiler in mmcv's environment report."""
    return f"none: no compiled ops (`{INSTALL_COMMAND}` installs them)"


def get_compiling_cuda_version() -> str:
    """The CUDA version in mmcv's environment report."""
    return "not available"


OPS: tuple[Callable[..., Any], ...] = (
    nms,
    roi_align_forward,
    roi_align_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)


def _focal_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    """Probabilities (N, C), mask of the target's class (N, C), smallest argument of log."""
    classes = torch.arange(input.size(1), device=target.device)
    # mmcv's kernel clamps to FLT_MIN for every dtype.
    return input.sigmoid(), target[:, None] == classes, torch.finfo(torch.float32).tiny


def _weight_of_target(target: Tensor, weight: Tensor) -> Tensor | float:
    """(N, 1) factors by the class of the target; 1 for background, which has no weight."""
    if weight.numel() == 0:
        return 1.0
    is_class = (target >= 0) & (target < weight.numel())
    factors = weight[target.clamp(0, weight.numel() - 1)]
    return torch.where(is_class, factors, torch.ones_like(factors))[:, None]


def _torchvision_ops() -> ModuleType:
    """``torchvision.ops``, imported on first use."""
    try:
        from torchvision import ops
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise StackError(
            f"torchvision cannot be imported ({error}); install the one that belongs to "
            f"torch {torch.__version__}, or run `{INSTALL_COMMAND}`"
        ) from error
    return ops


def _missing_op(name: str) -> Callable[..., NoReturn]:
    """The module's ``__getattr__``: a function for every missing op, which raises when called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        _raise_missing(name)

    missing.__name__ = missing.__qualname__ = name
    return missing


def _raise_missing(name: str) -> NoReturn:
    raise StackError(
        f"mmcv's op {name} is needed, but the installed mmcv has no compiled ops; run `{INSTALL_COMMAND}`"
    )
