"""Golden checkpoints, small state dicts and small detectors for the tests of this folder."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import golden_files
import torch
from torch import Tensor

import ddetr_mm  # noqa: F401  first: it answers for mmcv's compiled ops
from ddetr_mm.weights.checkpoint import Architecture, expected_keys

# Built once a test run; no test changes the tensors.
golden_state_dict = functools.cache(golden_files.golden_state_dict)


def golden_file(name: str) -> Path:
    """A file of golden outputs."""
    return golden_files.GOLDEN / name


def write_golden(name: str, folder: Path) -> Path:
    """The golden weights as the file their own world would write.

    The folder gets a hard link to a file made once a test run.
    """
    path = folder / f"{name}.pth"
    made = _made_golden(name, folder.parent)
    os.link(made, path)
    return path


@functools.cache
def _made_golden(name: str, run_folder: Path) -> Path:
    path = run_folder / f"golden_{name}.pth"
    state_dict = golden_state_dict(name)
    if name.startswith("official"):
        arguments = argparse.Namespace(nheads=8, num_queries=20, lr=2e-4, output_dir="out")
        content: dict[str, Any] = {
            "model": state_dict,
            "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
            "lr_scheduler": {"step_size": 40},
            "epoch": 49,
            "args": arguments,
        }
    else:
        content = {
            "state_dict": state_dict,
            "epoch": 11,
            "global_step": 1200,
            "pytorch-lightning_version": "2.2.1",
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [],
            "lr_schedulers": [],
        }
    torch.save(content, path)
    return path


def small_canonical(
    *,
    enc_layers: int = 1,
    dec_layers: int = 2,
    stage_levels: int = 2,
    extra_levels: int = 1,
    with_box_refine: bool = True,
    two_stage: bool = False,
    neck_bias: bool = True,
    num_classes: int = 4,
    counters: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Canonical names of a whole network with tensors of a few values each.

    Layers, levels, queries (5), width (8), heads (8) and points (2) show in the shapes as in a real one.
    """
    generator = torch.Generator().manual_seed(seed)
    width, levels, points = 8, stage_levels + extra_levels, 2
    found = Architecture(
        neck_in_channels=(3,) * stage_levels,
        num_extra_levels=extra_levels,
        neck_bias=neck_bias,
        enc_layers=enc_layers,
        dec_layers=dec_layers,
        two_stage=two_stage,
    )
    shapes = {
        "level_embed": (levels, width),
        "query_embedding.weight": (5, 2 * width),
        "reference_points_fc": (2, width),
        "pos_trans_fc": (2 * width, 2 * width),
        "in_proj_weight": (3 * width, width),
        "in_proj_bias": (3 * width,),
        "sampling_offsets": (8 * levels * points * 2, width),
        "attention_weights": (8 * levels * points, width),
        "layers.0.0": (16, width),
        "layers.1": (width, 16),
    }
    state_dict: dict[str, Tensor] = {}
    for key in ["backbone.conv1.weight", "backbone.bn1.weight", *expected_keys(found)]:
        module, _, leaf = key.rpartition(".")
        if key in shapes:
            shape: tuple[int, ...] = shapes[key]
        elif leaf.startswith("in_proj"):
            shape = shapes[leaf]
        elif ".conv" in module and leaf == "weight":
            shape = (width, 3, 1, 1) if "neck.convs" in key else (width, 3, 3, 3)
        elif "cls_branches" in key:
            shape = (num_classes, width)
        elif "reg_branches" in key:
            shape = (4, width) if module.endswith(".4") else (width, width)
        else:
            ending = next((end for end in shapes if module.endswith(end)), None)
            shape = shapes[ending] if ending else (width, width)
        if leaf == "bias" or (leaf == "weight" and any(n in module for n in ("norm", ".gn", ".bn"))):
            shape = shape[:1]
        state_dict[key] = torch.randn(shape, generator=generator)
    if counters:
        state_dict["backbone.bn1.num_batches_tracked"] = torch.tensor(7)
    if not with_box_refine:
        for key in state_dict:
            kind, _, rest = key.partition("_branches.")
            if rest and not rest.startswith("0."):
                state_dict[key] = state_dict[f"{kind}_branches.0.{rest.split('.', 1)[1]}"]
    return state_dict


def write_mmdet(path: Path, state_dict: dict[str, Tensor], **meta: Any) -> Path:
    """A checkpoint as mmengine's runner writes it."""
    torch.save({"meta": meta, "state_dict": state_dict}, path)
    return path


def detector(
    *,
    kind: str = "DeformableDETR",
    num_classes: int = 5,
    width: int = 64,
    layers: int = 2,
    feedforward: int = 64,
    num_queries: int = 12,
    num_levels: int = 4,
    with_box_refine: bool = True,
    as_two_stage: bool = False,
    backbone: str | dict[str, Any] = "thin",
    in_channels: tuple[int, ...] | None = None,
    neck_bias: bool = True,
    bbox_head_options: dict[str, Any] | None = None,
    seed: int | None = 0,
    **options: Any,
) -> torch.nn.Module:
    """A detector in evaluation mode with random weights; by default stock mmdet's on a thin ResNet-18.

    The names in ``BACKBONES`` stand for a backbone and the channels of its last three stages.
    """
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    import ddetr_mm.models  # noqa: F401  registers ours

    register_all_modules()
    if isinstance(backbone, str):
        backbone, usual_channels = BACKBONES[backbone]()
        in_channels = in_channels or usual_channels
    attention = dict(embed_dims=width, num_heads=8, num_levels=num_levels, num_points=4, batch_first=True)
    ffn = dict(embed_dims=width, feedforward_channels=feedforward)
    config = dict(
        type=kind,
        num_queries=num_queries,
        num_feature_levels=num_levels,
        with_box_refine=with_box_refine,
        as_two_stage=as_two_stage,
        backbone=backbone,
        neck=dict(
            type="ChannelMapper",
            in_channels=list(in_channels),
            kernel_size=1,
            out_channels=width,
            bias=neck_bias,
            act_cfg=None,
            norm_cfg=dict(type="GN", num_groups=32),
            num_outs=num_levels,
        ),
        encoder=dict(num_layers=layers, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
        decoder=dict(
            num_layers=layers,
            return_intermediate=True,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=width, num_heads=8, batch_first=True),
                cross_attn_cfg=attention,
                ffn_cfg=ffn,
            ),
            post_norm_cfg=None,
        ),
        positional_encoding=dict(num_feats=width // 2, normalize=True, offset=-0.5),
        bbox_head=dict(
            type="DeformableDETRHead",
            num_classes=num_classes,
            embed_dims=width,
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        )
        | (bbox_head_options or {}),
        test_cfg=dict(max_per_img=100),
        **options,
    )
    model = MODELS.build(config).eval()
    if seed is None:
        torch.nn.init.normal_(model.level_embed)  # mmdet leaves it as the memory was
        return model
    # Random values everywhere: the usual initialisation leaves many tensors equal or zero.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.02 if name.startswith("backbone") else 0.2
            value.copy_(torch.randn(value.shape, generator=generator) * scale + (value.dim() == 1))
    return model


def resnet(depth: int, out_indices: tuple[int, ...] = (1, 2, 3), base_channels: int = 64) -> dict[str, Any]:
    """Config of an mmdet ResNet with frozen batch norm."""
    return dict(
        type="ResNet",
        depth=depth,
        base_channels=base_channels,
        num_stages=4,
        out_indices=out_indices,
        norm_cfg=dict(type="BN", requires_grad=False),
        norm_eval=True,
        style="pytorch",
    )


BACKBONES = {
    "thin": lambda: (resnet(18, base_channels=8), (16, 32, 64)),
    "resnet_18": lambda: (resnet(18), (128, 256, 512)),
    "resnet_50": lambda: (resnet(50), (512, 1024, 2048)),
    "gc_vit_xxtiny": lambda: (dict(type="GCViT", variant="xxtiny", out_indices=(1, 2, 3)), (128, 256, 512)),
}


def padded_batch(seed: int = 3) -> tuple[Tensor, list[tuple[int, int]]]:
    """Two images (2, 3, 96, 128), zero in the padding, and their unpadded (height, width)."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(seed))
    images[1, :, 80:] = 0
    images[1, :, :, 100:] = 0
    return images, [(96, 128), (80, 100)]


def predict(model: torch.nn.Module, images: Tensor, sizes_hw: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Logits and boxes of every decoder layer of an mmdet detector."""
    from mmdet.structures import DetDataSample

    shape = tuple(images.shape[-2:])
    samples = [DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=shape)) for size in sizes_hw]
    with torch.no_grad():
        return model(images, samples, mode="tensor")


def pixel_mask(images: Tensor, sizes_hw: list[tuple[int, int]]) -> Tensor:
    """Hugging Face's mask: 1 where an image is, 0 in its padding."""
    mask = torch.zeros(images.shape[0], *images.shape[-2:], dtype=torch.long)
    for index, (height, width) in enumerate(sizes_hw):
        mask[index, :height, :width] = 1
    return mask
