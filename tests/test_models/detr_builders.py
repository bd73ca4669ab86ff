"""Small Deformable DETR configs, batches and golden weights for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from golden_files import GOLDEN
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor


def golden(name: str) -> Path:
    """A file of golden outputs."""
    return GOLDEN / name


def detector_config(
    *,
    num_levels: int = 2,
    with_box_refine: bool = True,
    width: int = 32,
    num_heads: int = 4,
    num_points: int = 2,
    num_encoder_layers: int = 1,
    num_decoder_layers: int = 2,
    feedforward: int = 32,
    num_groups: int = 8,
    num_queries: int = 12,
    num_classes: int = 4,
    dropout: float = 0.0,
    backbone: dict | None = None,
    in_channels: Sequence[int] | None = None,
    head: dict | None = None,
    **detector: Any,
) -> dict:
    """A detector config; by default tiny: a thin ResNet-18, one encoder and two decoder layers."""
    stages = [3] if num_levels == 1 else list(range(max(0, 5 - num_levels), 4))
    base = 8
    in_channels = list(in_channels or [base * 2**stage for stage in stages])
    layers = _layer_configs(width, num_heads, num_levels, num_points, feedforward, dropout)
    return {
        "type": "TAODeformableDETR",
        "num_queries": num_queries,
        "num_feature_levels": num_levels,
        "with_box_refine": with_box_refine,
        "data_preprocessor": _preprocessor_config(),
        "backbone": backbone or _thin_resnet(base, stages),
        "neck": _neck_config(in_channels, width, num_groups, num_levels),
        "encoder": {"num_layers": num_encoder_layers, "layer_cfg": layers["encoder"]},
        "decoder": {
            "num_layers": num_decoder_layers,
            "return_intermediate": True,
            "post_norm_cfg": None,
            "layer_cfg": layers["decoder"],
        },
        "positional_encoding": {"num_feats": width // 2, "normalize": True, "offset": -0.5},
        "bbox_head": {**head_config(num_classes=num_classes, width=width), **(head or {})},
        "train_cfg": {"assigner": assigner_config()},
        "test_cfg": {"max_per_img": 100},
        **detector,
    }


def _thin_resnet(base: int, stages: Sequence[int]) -> dict:
    return {
        "type": "ResNet",
        "depth": 18,
        "base_channels": base,
        "out_indices": stages,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": False,
    }


def _preprocessor_config() -> dict:
    return {
        "type": "FixedPadDetDataPreprocessor",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True,
    }


def _neck_config(in_channels: list[int], width: int, num_groups: int, num_levels: int) -> dict:
    return {
        "type": "ChannelMapper",
        "in_channels": in_channels,
        "kernel_size": 1,
        "out_channels": width,
        "bias": True,
        "act_cfg": None,
        "norm_cfg": {"type": "GN", "num_groups": num_groups},
        "num_outs": num_levels,
    }


def _layer_configs(
    width: int, num_heads: int, num_levels: int, num_points: int, feedforward: int, dropout: float
) -> dict[str, dict]:
    """``layer_cfg`` of the encoder and of the decoder."""
    deformable = {
        "embed_dims": width,
        "num_heads": num_heads,
        "num_levels": num_levels,
        "num_points": num_points,
        "dropout": dropout,
        "batch_first": True,
    }
    self_attention = {
        "embed_dims": width,
        "num_heads": num_heads,
        "attn_drop": dropout,
        "dropout_layer": {"type": "Dropout", "drop_prob": dropout},
        "batch_first": True,
    }
    ffn = {"embed_dims": width, "feedforward_channels": feedforward, "ffn_drop": dropout}
    return {
        "encoder": {"self_attn_cfg": dict(deformable), "ffn_cfg": dict(ffn)},
        "decoder": {
            "self_attn_cfg": self_attention,
            "cross_attn_cfg": dict(deformable),
            "ffn_cfg": dict(ffn),
        },
    }


def head_config(num_classes: int = 4, width: int = 32) -> dict:
    """A prediction head with TAO's losses."""
    return {
        "type": "TAODeformableDETRHead",
        "num_classes": num_classes,
        "embed_dims": width,
        "sync_cls_avg_factor": True,
        "loss_cls": {
            "type": "FocalLoss",
            "use_sigmoid": True,
            "gamma": 2.0,
            "alpha": 0.25,
            "loss_weight": 2.0,
        },
        "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
        "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
    }


def assigner_config() -> dict:
    """TAO's matching costs."""
    return {
        "type": "HungarianAssigner",
        "match_costs": [
            {"type": "FocalLossCost", "weight": 2.0},
            {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
            {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
        ],
    }


def instances(labels: Sequence[int], boxes_xyxy: Sequence[Sequence[float]]) -> InstanceData:
    """Ground truth of one image, boxes in pixels."""
    return InstanceData(
        labels=torch.tensor(labels, dtype=torch.int64),
        bboxes=torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4),
    )


def sample(
    size_hw: tuple[int, int],
    batch_hw: tuple[int, int],
    gt: InstanceData | None = None,
    scale: float = 1.0,
    name: str = "a.jpg",
) -> DetDataSample:
    """A data sample of an image of ``size_hw`` in a batch padded to ``batch_hw``."""
    result = DetDataSample(
        metainfo={
            "img_shape": tuple(int(side) for side in size_hw),
            "ori_shape": tuple(round(side / scale) for side in size_hw),
            "scale_factor": (scale, scale),
            "batch_input_shape": tuple(int(side) for side in batch_hw),
            "img_path": name,
        }
    )
    result.gt_instances = gt if gt is not None else instances([], [])
    return result


def padded_batch(seed: int = 0) -> tuple[Tensor, list[DetDataSample]]:
    """Three random 64 x 96 images, the last two padded and one of them without objects."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 64, 96, generator=generator)
    images[1, :, 48:] = 0
    images[2, :, :, 70:] = 0
    truth = [
        instances([1, 3], [[4, 6, 40, 50], [50, 10, 90, 60]]),
        instances([], []),
        instances([2, 2, 0], [[1, 1, 20, 30], [30, 5, 66, 61], [10, 40, 60, 62]]),
    ]
    sizes = [(64, 96), (48, 96), (64, 70)]
    return images, [
        sample(size, (64, 96), gt, name=f"{index}.jpg")
        for index, (size, gt) in enumerate(zip(sizes, truth, strict=True))
    ]
