"""Encoder and decoder of Deformable DETR: mmdet's, with our attention and float32 box arithmetic.

Parameter names are mmdet's, so that mmdet checkpoints load unchanged. Differences from mmdet:

- attention is :class:`~ddetr_mm.models.deformable_attention.DeformableAttention`;
- level sizes are passed as Python integers beside the tensors, which saves a synchronisation with the GPU;
- boxes are refined in float32 under autocast (bfloat16 keeps 8 bits: two pixels of 1000) and outside the
  autograd graph, since the refined reference is detached anyway;
- activation checkpointing is torch's own (no further package) and covers the decoder too.

Shapes: B batch, Q queries, S sum of all levels' H*W, C channels, L levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from mmdet.models.layers import (
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerDecoderLayer,
    DeformableDetrTransformerEncoder,
    DeformableDetrTransformerEncoderLayer,
    inverse_sigmoid,
)
from mmengine.model import ModuleList
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddetr_mm.models.deformable_attention import DeformableAttention, SizesHW, no_autocast


class _Checkpointed(nn.Module):
    """Mixin for a layer that recomputes its activations in the backward pass.

    Attributes:
        activation_checkpoint: whether to do so in training. Gradients are equal: dropout's random state is
            restored.
    """

    activation_checkpoint: bool = False

    def forward(self, *args, **kwargs) -> Tensor:
        if self.activation_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


class DeformableEncoderLayer(_Checkpointed, DeformableDetrTransformerEncoderLayer):
    """mmdet's encoder layer built around :class:`DeformableAttention`."""

    def _init_layers(self) -> None:
        self.self_attn = DeformableAttention(**self.self_attn_cfg)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = FFN(**self.ffn_cfg)
        self.norms = ModuleList(build_norm_layer(self.norm_cfg, self.embed_dims)[1] for _ in range(2))


class DeformableDecoderLayer(_Checkpointed, DeformableDetrTransformerDecoderLayer):
    """mmdet's decoder layer built around :class:`DeformableAttention`."""

    def _init_layers(self) -> None:
        self.self_attn = MultiheadAttention(**self.self_attn_cfg)
        self.cross_attn = DeformableAttention(**self.cross_attn_cfg)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = FFN(**self.ffn_cfg)
        self.norms = ModuleList(build_norm_layer(self.norm_cfg, self.embed_dims)[1] for _ in range(3))


class DeformableEncoder(DeformableDetrTransformerEncoder):
    """mmdet's encoder with our layers; ``num_cp`` is the number of first layers to checkpoint."""

    def _init_layers(self) -> None:
        self.layers = ModuleList(DeformableEncoderLayer(**self.layer_cfg) for _ in range(self.num_layers))
        self.embed_dims = self.layers[0].embed_dims
        for layer in self.layers[: max(self.num_cp, 0)]:
            layer.activation_checkpoint = True

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
        level_sizes_hw: SizesHW | None = None,
        **kwargs,
    ) -> Tensor:
        """Encode the flattened levels.

        Args:
            query: (B, S, C).
            query_pos: (B or 1, S, C).
            key_padding_mask: (B, S), True where values count as 0, or None.
            spatial_shapes: (L, 2) as (height, width).
            level_start_index: (L,).
            valid_ratios: (B or 1, L, 2) as (x, y): the unpadded share of each level.
            level_sizes_hw: ``spatial_shapes`` as integers; read from the tensor when None.
            **kwargs: passed to every layer.

        Returns:
            The memory, (B, S, C).
        """
        if level_sizes_hw is None:
            level_sizes_hw = [tuple(size) for size in spatial_shapes.tolist()]
        reference_points = self.get_encoder_reference_points(level_sizes_hw, valid_ratios, query.device)
        for layer in self.layers:
            query = layer(
                query,
                query_pos=query_pos,
                key_padding_mask=key_padding_mask,
                spatial_shapes=spatial_shapes,
                level_start_index=level_start_index,
                valid_ratios=valid_ratios,
                reference_points=reference_points,
                level_sizes_hw=level_sizes_hw,
                **kwargs,
            )
        return query


class DeformableDecoder(DeformableDetrTransformerDecoder):
    """mmdet's decoder with our layers and float32 box refinement."""

    def _init_layers(self) -> None:
        if self.post_norm_cfg is not None:
            raise ValueError("the decoder of Deformable DETR has no norm at its end: set post_norm_cfg=None")
        self.layers = ModuleList(DeformableDecoderLayer(**self.layer_cfg) for _ in range(self.num_layers))
        self.embed_dims = self.layers[0].embed_dims

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
        reg_branches: nn.ModuleList | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Decode the queries against the memory.

        Args:
            query: (B, Q, C).
            query_pos: (B, Q, C).
            value: the memory, (B, S, C).
            key_padding_mask: (B, S), True where values count as 0, or None.
            reference_points: (B, Q, 2) as (cx, cy) or (B, Q, 4) as (cx, cy, w, h), 0..1 over the
                unpadded image.
            spatial_shapes: (L, 2) as (height, width).
            level_start_index: (L,).
            valid_ratios: (B or 1, L, 2) as (x, y).
            reg_branches: one box branch per layer to refine the references with, or None.
            **kwargs: passed to every layer.

        Returns:
            Hidden states (layers, B, Q, C) and the references after each layer
            (layers, B, Q, 2 or 4); with ``return_intermediate=False`` only the last of each.
        """
        states, references = [], []
        for layer_id, layer in enumerate(self.layers):
            ratios = valid_ratios if reference_points.shape[-1] == 2 else valid_ratios.repeat(1, 1, 2)
            query = layer(
                query,
                query_pos=query_pos,
                value=value,
                key_padding_mask=key_padding_mask,
                spatial_shapes=spatial_shapes,
                level_start_index=level_start_index,
                valid_ratios=valid_ratios,
                reference_points=reference_points[:, :, None] * ratios[:, None],
                **kwargs,
            )
            if reg_branches is not None:
                with torch.no_grad():
                    reference_points = place_boxes(reg_branches[layer_id], query, reference_points)
            states.append(query)
            references.append(reference_points)
        if not self.return_intermediate:
            return states[-1], references[-1]
        return torch.stack(states), torch.stack(references)


def place_boxes(branch: nn.Sequential, hidden_state: Tensor, reference_points: Tensor) -> Tensor:
    """Apply a box branch's corrections to reference points, in float32 also under autocast.

    Args:
        branch: layers from a hidden state to four unbounded numbers.
        hidden_state: (B, Q, C).
        reference_points: (B, Q, 2) as (cx, cy) or (B, Q, 4) as (cx, cy, w, h), 0..1.

    Returns:
        (B, Q, 4) as (cx, cy, w, h), 0..1 over the unpadded image, float32.
    """
    with no_autocast(hidden_state.device):
        deltas = branch(hidden_state.to(branch[0].weight.dtype)).float()
        anchors = inverse_sigmoid(reference_points.float())
        if anchors.shape[-1] == 2:
            anchors = F.pad(anchors, (0, 2))  # a point has no width and height
        return (deltas + anchors).sigmoid()
