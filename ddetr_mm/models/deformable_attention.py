"""Multi-scale deformable attention: mmcv's module, sampled in float32 and without host reads.

Source: Zhu et al., "Deformable DETR", arXiv 2010.04159, section 4.1. Weights, names and
initialisation are those of :class:`mmcv.ops.MultiScaleDeformableAttention`; what differs is said at
:class:`DeformableAttention`.

Shapes: B batch, Q queries, S sum of all levels' H*W, C channels, M heads, D = C / M,
L levels, P points per level and head.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from torch import Tensor

from ddetr_mm.models.bag_sampling import sample_values_by_bags
from ddetr_mm.stack.mmcv_ops import has_compiled_ops

SizesHW = Sequence[tuple[int, int]]


@functools.cache
def has_compiled_cuda_op() -> bool:
    """Whether the installed mmcv brings its deformable attention compiled for CUDA.

    False where ``mmcv._ext`` is our stand-in (mmcv-lite) or was built for the CPU only.
    """
    if not has_compiled_ops():
        return False
    return importlib.import_module("mmcv._ext").get_compiling_cuda_version() != "not available"


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block in which tensors keep their dtype, also on devices that know no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def host_to_device(values: Sequence, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A small tensor built on the host and sent to ``device`` without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def level_layout(level_sizes_hw: SizesHW, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The level geometry as the tensors that mmdet's interfaces and mmcv's op expect.

    Args:
        level_sizes_hw: height and width of every level, in cells.
        device: where the tensors go.

    Returns:
        ``spatial_shapes`` (L, 2) as (height, width) and ``level_start_index`` (L,), both int64.
    """
    starts = [0]
    for height, width in level_sizes_hw[:-1]:
        starts.append(starts[-1] + height * width)
    layout = host_to_device([*level_sizes_hw, *zip(starts, starts, strict=True)], device, torch.int64)
    count = len(level_sizes_hw)
    return layout[:count].contiguous(), layout[count:, 0].contiguous()


def sample_values(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    level_sizes_hw: SizesHW,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """Sample values bilinearly and add them up by weight: the one place that picks an implementation.

    On a CUDA tensor mmcv's compiled op where it is installed; on a CPU, for as many queries as an encoder
    has, :func:`~ddetr_mm.models.bag_sampling.sample_values_by_bags`; else, and while a graph is traced,
    mmcv's PyTorch form, which runs everywhere and is the reference. All run in float32, whatever autocast
    says: a location in bfloat16 is off by up to 1/256 of the image.

    Args:
        value: (B, S, M, D).
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0..1 over each level's padded map.
        attention_weights: (B, Q, M, L, P), summing to 1 over L and P.
        level_sizes_hw: height and width of each level; ``S`` is the sum of their products.
        spatial_shapes: the same as an int64 tensor (L, 2).
        level_start_index: int64 (L,), where each level starts in S.
        im2col_step: largest number of images the compiled op handles at once.

    Returns:
        (B, Q, C) in the dtype of ``value``.
    """
    with no_autocast(value.device):
        value_f32 = value.float()
        locations, weights = sampling_locations.float(), attention_weights.float()
        if value.is_cuda and has_compiled_cuda_op():
            batch = value.size(0)
            # The op wants the batch to be a multiple of its step.
            step = batch if batch <= im2col_step else math.gcd(batch, im2col_step)
            sampled = MultiScaleDeformableAttnFunction.apply(
                value_f32.contiguous(),
                spatial_shapes,
                level_start_index,
                locations.contiguous(),
                weights.contiguous(),
                step,
            )
        elif value.device.type == "cpu" and _many_points(locations, value) and not torch.jit.is_tracing():
            sampled = sample_values_by_bags(value_f32, locations, weights, level_sizes_hw)
        else:
            sampled = multi_scale_deformable_attn_pytorch(value_f32, level_sizes_hw, locations, weights)
    return sampled.to(value.dtype)


def _many_points(locations: Tensor, value: Tensor) -> bool:
    """Whether sampling is more work than a pass over all values, as bags need one."""
    return math.prod(locations.shape[1:5]) >= 2 * math.prod(value.shape[1:3])


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's MultiScaleDeformableAttention with the same parameters and the same result.

    Differences from mmcv's ``forward``: level sizes may come as Python integers
    (``level_sizes_hw``), so that nothing is read back from a GPU; sampling runs in float32 under
    autocast; a GPU without the compiled op falls back to mmcv's PyTorch form. Tensors are always
    (batch, sequence, channels), as everywhere in mmdet's transformers.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        level_sizes_hw: SizesHW | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend from every query to a few points of every level.

        Args:
            query: (B, Q, C).
            key: not used; here because mmdet's layers pass it.
            value: (B, S, C); the query itself when None.
            identity: (B, Q, C) added to the result; the query when None.
            query_pos: (B or 1, Q, C) added to the query.
            key_padding_mask: (B, S), True where the value counts as 0; None = every value counts.
            reference_points: (B or 1, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), 0..1.
            spatial_shapes: (L, 2) as (height, width).
            level_start_index: (L,).
            level_sizes_hw: ``spatial_shapes`` as integers; read from the tensor when None.
            **kwargs: ignored, for mmdet's layers.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: if the levels do not add up to the values, or reference points have
                neither 2 nor 4 coordinates.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if level_sizes_hw is None:
            level_sizes_hw = [tuple(size) for size in spatial_shapes.tolist()]
        if sum(height * width for height, width in level_sizes_hw) != value.shape[1]:
            raise ValueError(f"levels of {list(level_sizes_hw)} do not add up to {value.shape[1]} values")

        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        batch, num_values, width = value.shape
        value = value.view(batch, num_values, self.num_heads, width // self.num_heads)
        locations, weights = self._locations_and_weights(query, reference_points, level_sizes_hw)
        output = sample_values(
            value, locations, weights, level_sizes_hw, spatial_shapes, level_start_index, self.im2col_step
        )
        return self.dropout(self.output_proj(output)) + identity

    def _locations_and_weights(
        self, query: Tensor, reference_points: Tensor, level_sizes_hw: SizesHW
    ) -> tuple[Tensor, Tensor]:
        """Where each query looks, (B, Q, M, L, P, 2), and how much each point counts, (B, Q, M, L, P)."""
        batch, num_queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        # view() with the traced batch size, not unflatten(), which an export would freeze.
        offsets = self.sampling_offsets(query).float().view(batch, num_queries, heads, levels, points, 2)
        weights = self.attention_weights(query).float().view(batch, num_queries, heads, levels * points)
        weights = weights.softmax(-1).view(batch, num_queries, heads, levels, points)
        centers = reference_points.float()[:, :, None, :, None, :]
        if reference_points.shape[-1] == 2:
            # Once per point: an operation that repeats an operand every two numbers runs without vectors.
            sizes_wh = host_to_device(
                [[(width, height)] * points for height, width in level_sizes_hw], query.device, torch.float32
            )
            centers = centers.expand(-1, -1, -1, -1, points, -1).contiguous()
            return centers + offsets / sizes_wh, weights
        if reference_points.shape[-1] == 4:
            return centers[..., :2] + offsets / self.num_points * centers[..., 2:] * 0.5, weights
        raise ValueError(f"reference points must have 2 or 4 coordinates, not {reference_points.shape[-1]}")
