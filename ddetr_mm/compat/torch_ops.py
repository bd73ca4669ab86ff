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


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Largest value in each bin of each region, into ``output``; without rounding, which torchvision's does.

    Args:
        input: (B, C, H, W).
        rois: (K, 5): index of the image, then the box, whose last pixels are inside.
        output: (K, C, pooled_height, pooled_width), written; 0 for an empty bin.
        argmax: of the same shape, int32, written: position in the flattened H x W; -1 for an empty bin.
        pooled_height: bins per region, vertically.
        pooled_width: bins per region, horizontally.
        spatial_scale: from the boxes' pixels to ``input``'s.
    """
    output.zero_()
    argmax.fill_(-1)
    height, width = input.shape[-2:]
    corners = torch.stack([rois[:, 1:3], rois[:, 3:5] + 1], dim=1) * spatial_scale
    columns = _pool_bins(corners[..., 0], pooled_width, width)
    rows = _pool_bins(corners[..., 1], pooled_height, height)
    for region, image in enumerate(rois[:, 0].long().tolist()):
        # By columns, then by rows: the position is the first of equal values, row by row, as in mmcv.
        spans = [(at, span) for at, span in enumerate(columns[region]) if span[0] < span[1]]
        found = [input[image, :, :, first:last].max(dim=-1) for _, (first, last) in spans]
        if not found:
            continue
        values = torch.stack([one.values for one in found], dim=-1)  # (C, H, bins)
        places = torch.stack([one.indices + span[0] for one, (_, span) in zip(found, spans, strict=True)], -1)
        at_columns = [at for at, _ in spans]
        for row, (first, last) in enumerate(rows[region]):
            if first >= last:
                continue
            best = values[:, first:last].max(dim=1)
            at_rows = best.indices + first
            output[region, :, row, at_columns] = best.values
            place = at_rows * width + places.gather(1, at_rows[:, None])[:, 0]
            argmax[region, :, row, at_columns] = place.to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of :func:`roi_pool_forward` by its input, added to ``grad_input`` (B, C, H, W)."""
    flat = grad_input.view(*grad_input.shape[:2], -1)
    images = rois[:, 0].long()[:, None, None].expand(-1, argmax.shape[1], pooled_height * pooled_width)
    channels = torch.arange(argmax.shape[1], device=argmax.device)[None, :, None].expand_as(images)
    places, gradient = argmax.flatten(2).long(), grad_output.flatten(2)
    kept = places >= 0
    flat.index_put_((images[kept], channels[kept], places[kept]), gradient[kept], accumulate=True)


def _pool_bins(ends: Tensor, bins: int, size: int) -> list[list[tuple[int, int]]]:
    """First pixel and the one after the last of every bin of every region, along one axis.

    Args:
        ends: (K, 2): where the regions begin and end, pixels.
        bins: in each region.
        size: of the image along the axis; bins are clipped to it.
    """
    begin, length = ends[:, :1], ends[:, 1:] - ends[:, :1]
    step = length / bins
    index = torch.arange(bins + 1, device=ends.device, dtype=ends.dtype)
    first = (index[:-1] * step + begin).floor().clamp(0, size)
    last = torch.where(length > 0, (index[1:] * step + begin).ceil().clamp(0, size), first)
    pairs = torch.stack([first, last], dim=-1).long().tolist()
    return [[(pair[0], pair[1]) for pair in region] for region in pairs]


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Deformable convolution, into ``output``.

    Args:
        input: (B, C, H, W).
        weight: (outputs, C / groups, kernel height, kernel width).
        offset: (B, deformable groups * kernel height * kernel width * 2, H out, W out): y, x.
        output: (B, outputs, H out, W out), written.
        columns: unused.
        ones: unused.
        geometry: ``dH``, ``dW`` (stride), ``padH``, ``padW``, ``dilationH``, ``dilationW``; the rest shows in
            the shapes.
    """
    output.copy_(_deform_conv(input, offset, weight, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Gradients of :func:`deform_conv_forward`, into ``grad_input`` and ``grad_offset``."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (input, offset)]
        result = _deform_conv(inputs[0], inputs[1], weight.detach(), geometry)
        gradients = torch.autograd.grad(result, inputs, grad_output)
    grad_input.copy_(gradients[0])
    grad_offset.copy_(gradients[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **geometry: int,
) -> None:
    """Gradient of :func:`deform_conv_forward` by its weight, times ``scale``, into ``grad_weight``."""
    with torch.enable_grad():
        # The op is linear in its weight, so its gradient is the same for every weight.
        zeros = torch.zeros_like(grad_weight, requires_grad=True)
        result = _deform_conv(input.detach(), offset.detach(), zeros, geometry)
        (gradient,) = torch.autograd.grad(result, zeros, grad_output)
    grad_weight.copy_(gradient * scale)


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    geometry: dict[str, int],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """torchvision's op with mmcv's names of stride, padding and dilation: other names with a mask."""
    plain = {"stride": ("dH", "dW"), "padding": ("padH", "padW"), "dilation": ("dilationH", "dilationW")}
    modulated = {
        "stride": ("stride_h", "stride_w"),
        "padding": ("pad_h", "pad_w"),
        "dilation": ("dilation_h", "dilation_w"),
    }
    names = plain if mask is None else modulated
    pairs = {name: (geometry[height], geometry[width]) for name, (height, width) in names.items()}
    return _torchvision_ops().deform_conv2d(input, offset, weight, bias, mask=mask, **pairs)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Deformable convolution whose samples have a weight each, into ``output``.

    Args:
        input: (B, C, H, W).
        weight: (outputs, C / groups, kernel height, kernel width).
        bias: (outputs,); unused without ``with_bias``.
        ones: unused.
        offset: (B, deformable groups * kernel height * kernel width * 2, H out, W out): y, x.
        mask: (B, deformable groups * kernel height * kernel width, H out, W out): factor of every sample.
        output: (B, outputs, H out, W out), written.
        columns: unused.
        with_bias: whether there is a bias.
        geometry: ``stride_h``, ``stride_w``, ``pad_h``, ``pad_w``, ``dilation_h``, ``dilation_w``.
    """
    output.copy_(_deform_conv(input, offset, weight, geometry, bias if with_bias else None, mask))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Gradients of :func:`modulated_deform_conv_forward`, into ``grad_input`` and the four after it."""
    destinations = [grad_input, grad_offset, grad_mask, grad_weight, *([grad_bias] if with_bias else [])]
    with torch.enable_grad():
        tensors = (input, offset, mask, weight, *((bias,) if with_bias else ()))
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        image, shift, factor, kernel = inputs[:4]
        result = _deform_conv(image, shift, kernel, geometry, inputs[4] if with_bias else None, factor)
        gradients = torch.autograd.grad(result, inputs, grad_output)
    for destination, gradient in zip(destinations, gradients, strict=True):
        destination.copy_(gradient)


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
    roi_pool_forward,
    roi_pool_backward,
    deform_conv_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    modulated_deform_conv_forward,
    modulated_deform_conv_backward,
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
