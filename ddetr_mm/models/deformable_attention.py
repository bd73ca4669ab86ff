"""Multi-scale deformable attention: mmcv's module, sampled in float32 and without host reads.

Source: Zhu et al., "Deformable DETR", arXiv 2010.04159, section 4.1. Weights, names and initialisation are
those of :class:`mmcv.ops.MultiScaleDeformableAttention`; :class:`DeformableAttention` lists the differences.

Shapes: B batch, Q queries, S sum of all levels' H*W, C channels, M heads, D = C / M,
L levels, P points per level and head.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttention,
    multi_scale_deformable_attn_pytorch,
)
from torch import Tensor

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.models.cpu_sampling import package_sampling, sample_values_on_cpu
from ddetr_mm.models.fused_sampling import fused_sampling
from ddetr_mm.models.triton_attention import GPU_HAS_ITS_OWN, IMPLEMENTATIONS, deformable_sampling

SizesHW = Sequence[tuple[int, int]]
_WRONG_COORDINATES = "reference points must have 2 or 4 coordinates, not {}"


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast, also for devices that do not support it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def host_to_device(values: Sequence, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Build a small tensor on the host and copy it to ``device`` asynchronously."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def level_layout(level_sizes_hw: SizesHW, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return the level sizes as the tensors that mmdet's interfaces and mmcv's op expect.

    Args:
        level_sizes_hw: height and width of every level, in cells.
        device: of the tensors.

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
    implementation: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Sample values bilinearly and sum them by weight, with the implementation for the device.

    On a GPU mmcv's compiled op or the Triton kernels (:mod:`ddetr_mm.models.triton_attention`). On a CPU
    :func:`~ddetr_mm.models.cpu_sampling.package_sampling` where that package is installed, but for an encoder
    that is not trained; else, for as many queries as an encoder has,
    :func:`~ddetr_mm.models.cpu_sampling.sample_values_on_cpu`. Otherwise, and while a graph is traced, mmcv's
    PyTorch form. All sum in float32 and exclude the locations from autocast:
    in bfloat16 they are off by up to 1/256 of the image.

    Args:
        value: (B, S, M, D).
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0..1 over each level's padded map.
        attention_weights: (B, Q, M, L, P), summing to 1 over L and P.
        level_sizes_hw: height and width of each level; ``S`` is the sum of their products.
        spatial_shapes: the same as an int64 tensor (L, 2).
        level_start_index: int64 (L,), where each level starts in S.
        im2col_step: largest number of images the compiled op handles at once.
        implementation: of a GPU: ``auto``, ``mmcv`` or ``triton``; ``torch`` is mmcv's PyTorch form on
            every device.
        deterministic: whether equal inputs must give equal gradients, bit for bit; on a CPU they always do.

    Returns:
        (B, Q, C) in the dtype of ``value``.

    Raises:
        StackError: the implementation is not available for this GPU, or has no deterministic form.
    """
    device = value.device
    has_own = GPU_HAS_ITS_OWN or implementation != "auto"
    if deterministic and device.type == "cuda" and (implementation == "torch" or not has_own):
        hint = "install triton and set ddetr_mm.attention=auto, or set model.precise_msda=false"
        raise StackError(Problem("PyTorch's form of deformable attention is not deterministic", hint=hint))
    with no_autocast(value.device):
        locations, weights = sampling_locations.float(), attention_weights.float()
        if implementation == "torch" or torch.jit.is_tracing():
            return _sample_with_pytorch(value, locations, weights, level_sizes_hw)
        if device.type == "cuda" and has_own:
            # The kernels read half precision and sum in float32.
            return deformable_sampling(
                value,
                locations,
                weights,
                spatial_shapes,
                level_start_index,
                implementation,
                im2col_step,
                deterministic,
            )
        # torch.compile cannot trace the CPU functions, and fuses the PyTorch form.
        if device.type == "cpu" and not torch.compiler.is_compiling():
            many = _many_points(locations, value)
            trains = torch.is_grad_enabled() and any(one.requires_grad for one in (value, locations, weights))
            # Without gradients ours is as fast for an encoder or faster: benchmarks/records/attention_cpu.md.
            package = package_sampling() if implementation == "auto" and (trains or not many) else None
            if package is not None:
                sampled = package(value.float(), spatial_shapes, level_start_index, locations, weights)
                return sampled.to(value.dtype)
            if many:
                sampled = sample_values_on_cpu(value.float(), locations, weights, level_sizes_hw)
                return sampled.to(value.dtype)
        return _sample_with_pytorch(value, locations, weights, level_sizes_hw)


def _sample_with_pytorch(value: Tensor, locations: Tensor, weights: Tensor, sizes_hw: SizesHW) -> Tensor:
    """Sample with mmcv's PyTorch form in float32; the result has the dtype of ``value``."""
    return multi_scale_deformable_attn_pytorch(value.float(), sizes_hw, locations, weights).to(value.dtype)


def _many_points(locations: Tensor, value: Tensor) -> bool:
    """Return whether sampling is more work than the copy of all values that the CPU function makes."""
    return math.prod(locations.shape[1:5]) >= 2 * math.prod(value.shape[1:3])


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's MultiScaleDeformableAttention with the same parameters and the same result.

    Differences from mmcv's ``forward``: level sizes may be given as Python integers (``level_sizes_hw``), so
    that nothing is read back from a GPU; sampling runs in float32 under autocast, by :func:`sample_values`,
    or on a GPU, together with softmax and offsets, by :func:`~ddetr_mm.models.fused_sampling.fused_sampling`.
    Tensors are always (batch, sequence, channels), as everywhere in mmdet's transformers.

    Args:
        implementation: one of :data:`~ddetr_mm.models.triton_attention.IMPLEMENTATIONS`.
        deterministic: whether gradients are equal bit for bit each time.
        **kwargs: mmcv's.

    Raises:
        ValueError: ``implementation`` is unknown.
    """

    def __init__(self, *args, implementation: str = "auto", deterministic: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.choose_implementation(implementation, deterministic)

    def choose_implementation(self, implementation: str, deterministic: bool = False) -> None:
        """Set the implementation, see the class.

        Raises:
            ValueError: it is unknown.
        """
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"attention must be one of {IMPLEMENTATIONS}, not {implementation!r}")
        self.implementation = implementation
        self.deterministic = deterministic

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
            key: not used; mmdet's layers pass it.
            value: (B, S, C); the query itself when None.
            identity: (B, Q, C) added to the result; the query when None.
            query_pos: (B or 1, Q, C) added to the query.
            key_padding_mask: (B, S), True where the value is set to 0; None for none.
            reference_points: (B or 1, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), 0..1.
            spatial_shapes: (L, 2) as (height, width).
            level_start_index: (L,).
            level_sizes_hw: ``spatial_shapes`` as integers; read from the tensor if None.
            **kwargs: ignored, for mmdet's layers.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: the levels do not add up to the values, or reference points have neither 2 nor 4
                coordinates.
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
        if self._samples_fused(value, reference_points):
            output = self._sample_fused(query, value, reference_points, spatial_shapes, level_start_index)
            return self.dropout(self.output_proj(output)) + identity
        locations, weights = self._locations_and_weights(
            query, reference_points, level_sizes_hw, spatial_shapes
        )
        output = sample_values(
            value,
            locations,
            weights,
            level_sizes_hw,
            spatial_shapes,
            level_start_index,
            self.im2col_step,
            self.implementation,
            self.deterministic,
        )
        return self.dropout(self.output_proj(output)) + identity

    def _samples_fused(self, value: Tensor, reference_points: Tensor) -> bool:
        """Whether softmax and offsets are part of the sampling: on a GPU, unless PyTorch is asked for."""
        if not value.is_cuda or self.implementation == "torch" or torch.jit.is_tracing():
            return False
        is_known = reference_points.shape[-1] == 2 or not reference_points.requires_grad
        return is_known and (GPU_HAS_ITS_OWN or self.implementation != "auto")

    def _sample_fused(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
    ) -> Tensor:
        """Return the sums (B, Q, C) by :func:`~ddetr_mm.models.fused_sampling.fused_sampling`."""
        shape = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        if reference_points.shape[-1] not in (2, 4):
            raise ValueError(_WRONG_COORDINATES.format(reference_points.shape[-1]))
        offsets, logits = self.sampling_offsets(query), self.attention_weights(query)
        with no_autocast(value.device):
            output, _ = fused_sampling(
                value,
                reference_points.float(),
                offsets.view(*shape, 2),
                logits.view(shape),
                spatial_shapes,
                level_start_index,
                self.implementation,
                self.im2col_step,
                self.deterministic,
            )
        return output

    def _locations_and_weights(
        self, query: Tensor, reference_points: Tensor, level_sizes_hw: SizesHW, spatial_shapes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return sampling locations (B, Q, M, L, P, 2) and attention weights (B, Q, M, L, P)."""
        batch, num_queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        # view() with the traced batch size, not unflatten(), which an export would freeze.
        offsets = self.sampling_offsets(query).float().view(batch, num_queries, heads, levels, points, 2)
        weights = self.attention_weights(query).float().view(batch, num_queries, heads, levels * points)
        weights = weights.softmax(-1).view(batch, num_queries, heads, levels, points)
        centers = reference_points.float()[:, :, None, :, None, :]
        if reference_points.shape[-1] == 2 and query.is_cuda and not torch.jit.is_tracing():
            # The sizes are on the GPU already; a copy from the host would prevent CUDA graphs.
            return centers + offsets / spatial_shapes.flip(-1).float()[:, None], weights
        if reference_points.shape[-1] == 2:
            # Expanded to every point: an operand that is broadcast along a short inner axis is not
            # vectorised.
            sizes_wh = host_to_device(
                [[(width, height)] * points for height, width in level_sizes_hw], query.device, torch.float32
            )
            centers = centers.expand(-1, -1, -1, -1, points, -1).contiguous()
            return centers + offsets / sizes_wh, weights
        if reference_points.shape[-1] == 4:
            return centers[..., :2] + offsets / self.num_points * centers[..., 2:] * 0.5, weights
        raise ValueError(_WRONG_COORDINATES.format(reference_points.shape[-1]))
