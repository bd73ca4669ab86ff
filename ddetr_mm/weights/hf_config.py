"""``config.json`` of a Hugging Face ``DeformableDetrForObjectDetection``, from a network's structure."""

from __future__ import annotations

from typing import Any, NoReturn

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.architecture import Architecture
from ddetr_mm.weights.checkpoint import Checkpoint

_TIMM_NAMES = {
    "resnet_18": "resnet18",
    "resnet_34": "resnet34",
    "resnet_50": "resnet50",
    "resnet_101": "resnet101",
    "resnet_152": "resnet152",
}
_DEFAULT_PROPOSALS = 300


def hf_config(checkpoint: Checkpoint, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration under which transformers builds this network without any download.

    Args:
        checkpoint: canonical weights with their structure.
        spec: the experiment spec as plain data, for what shapes do not tell (dropout, auxiliary losses).

    Raises:
        WeightsError: when Hugging Face's class cannot hold the network.
    """
    found, meta = checkpoint.architecture, checkpoint.meta
    model = (spec or {}).get("model") or {}
    _check(checkpoint)
    found_classes = found.num_classes or 0
    names = meta.class_names or tuple(f"LABEL_{column}" for column in range(found_classes))
    config: dict[str, Any] = {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "activation_function": "relu",
        "auxiliary_loss": bool(model.get("aux_loss", False)),
        "d_model": found.hidden_dim,
        "decoder_attention_heads": found.num_heads,
        "decoder_ffn_dim": found.dec_feedforward,
        "decoder_layers": found.dec_layers,
        "decoder_n_points": found.dec_points,
        "dilation": bool(meta.dilation),
        "disable_custom_kernels": True,
        "dropout": model.get("dropout_ratio", 0.1),
        "encoder_attention_heads": found.num_heads,
        "encoder_ffn_dim": found.enc_feedforward,
        "encoder_layers": found.enc_layers,
        "encoder_n_points": found.enc_points,
        "id2label": {str(column): name for column, name in enumerate(names)},
        "label2id": {name: column for column, name in reversed(list(enumerate(names)))},
        "is_encoder_decoder": True,
        "num_channels": 3,
        "num_feature_levels": found.num_feature_levels,
        "num_queries": meta.num_queries or _DEFAULT_PROPOSALS,
        "position_embedding_type": "sine",
        "return_intermediate": True,
        # Tied, transformers would put one layer's branches in place of all: right only without refinement.
        # With a single layer it looks for others to tie, and fails.
        "tie_word_embeddings": not found.with_box_refine and found.dec_layers > 1,
        "two_stage": found.two_stage,
        "two_stage_num_proposals": meta.num_queries or _DEFAULT_PROPOSALS,
        "with_box_refine": found.with_box_refine,
    }
    return config | _backbone_settings(found, config["dilation"])


def _backbone_settings(found: Architecture, dilation: bool) -> dict[str, Any]:
    """How the configuration names a ResNet of timm's and the stages that feed the neck."""
    backbone = _TIMM_NAMES[found.backbone]
    stages = [found.backbone_stage_channels.index(channels) + 1 for channels in found.neck_in_channels]
    if stages == ([2, 3, 4] if found.num_feature_levels > 1 else [4]):
        # The spelling of the published files, which every version of transformers reads.
        return {"backbone": backbone, "use_timm_backbone": True, "use_pretrained_backbone": False}
    settings = {
        "model_type": "timm_backbone",
        "backbone": backbone,
        "num_channels": 3,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": stages,
    }
    return {"backbone_config": settings | ({"output_stride": 16} if dilation else {})}


def _check(checkpoint: Checkpoint) -> None:
    """Refuse what Hugging Face's class cannot be built as."""
    found = checkpoint.architecture
    if found.backbone not in _TIMM_NAMES:
        _refuse(checkpoint, f"has the backbone {found.backbone}", "its Deformable DETR takes ResNets only")
    if found.two_stage and not found.with_box_refine:
        _refuse(checkpoint, "is two-stage without box refinement", "there it needs both")
    if found.num_classes is None:
        _refuse(checkpoint, "has no class head", "convert a whole detector")
    if found.enc_points is None or found.dec_points is None:
        _refuse(
            checkpoint, "has a number of attention heads that its shapes do not tell", "give its spec with -e"
        )


def _refuse(checkpoint: Checkpoint, what: str, why: str) -> NoReturn:
    raise WeightsError(Problem(f"cannot become a Hugging Face model: it {what}; {why}", file=checkpoint.path))
