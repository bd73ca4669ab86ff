"""Name the network of a file that is no Deformable DETR, by signs of its structure.

The keys of other detectors share many names with a Deformable DETR's. :func:`other_network` names the network
whose own modules occur; :func:`refusal` offers its backbone where that can be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ddetr_mm.errors import Problem
from ddetr_mm.weights.checkpoint import backbone_kind
from ddetr_mm.weights.layouts import TRANSFORMER, Found, find_backbones
from ddetr_mm.weights.safe_read import short_names


@dataclass(frozen=True)
class _Sign:
    """A network and the names that only it has: all of ``names`` occur, none of ``without``."""

    network: str
    names: tuple[str, ...]
    without: tuple[str, ...] = ()


def _module(*names: str) -> str:
    """Return the expression of modules with these names, at any depth."""
    return rf"(?:^|.*\.)(?:{'|'.join(names)})(?:\..*)?$"


_HEAD_KEYS = 24  # of a projection head in contrastive pretraining, with its batch norms
_DEFORMABLE = _module("sampling_offsets")
_LAYERS = r".*(?:encoder|decoder)\.layers\.\d+\..+"

# In this order: the first that fits names the network.
_SIGNS: tuple[_Sign, ...] = (
    _Sign("RF-DETR", (r".*backbone\.0\.(?:encoder\.encoder|projector)\..+", _module("sampling_offsets"))),
    _Sign("RF-DETR", (_module("query_feat", "refpoint_embed"), r".*backbone.*register_tokens$")),
    _Sign("RF-DETR or LW-DETR", (_module("query_feat"), _DEFORMABLE)),
    _Sign("D-FINE or DEIM", (_module("lqe_layers", "pre_bbox_head", "dn_lqe_layers"),)),
    _Sign("OmDet-Turbo", (_module("task_encoder"), _module("encoder_vision_features"))),
    _Sign("RT-DETR", (_module("pan_blocks", "dec_score_head", "denoising_class_embed", "enc_score_head"),)),
    _Sign(
        "Grounding DINO",
        (
            _DEFORMABLE,
            _module(
                "bert", "language_model", "text_backbone", "text_feat_map", "fusion_layers", "fusion_layer"
            ),
        ),
    ),
    _Sign(
        "Mask2Former or another mask transformer",
        (_module("pixel_decoder", "sem_seg_head", "mask_embed", "pixel_level_module"),),
    ),
    _Sign("Co-DETR", (r"(?:.*\.)?query_head\..+", _DEFORMABLE)),
    _Sign(
        "DDQ DETR", (_module("dn_query_generator"), _module("query_map", "aux_cls_branches", "cache_dict"))
    ),
    _Sign("DINO", (_DEFORMABLE, _module("enc_out_class_embed", "enc_out_bbox_embed"))),
    _Sign("DINO", (_DEFORMABLE, _module("dn_query_generator", "label_enc", "label_embedding"))),
    _Sign(
        "DAB-Deformable-DETR", (_DEFORMABLE, _module("refpoint_embed", "refpoint_embeddings", "tgt_embed"))
    ),
    _Sign(
        "DAB-DETR",
        (_module("refpoint_embed", "query_refpoint_embeddings", "ref_anchor_head"),),
        (_DEFORMABLE,),
    ),
    _Sign(
        "Conditional DETR",
        (_module("ca_qcontent_proj", "qcontent_proj", "sa_qcontent_proj", "q_content_proj"),),
        (_DEFORMABLE,),
    ),
    _Sign("YOLOS", (r".*(?:det_token|detection_tokens).*",)),
    _Sign("Sparse R-CNN", (_module("init_proposal_bboxes", "init_proposal_features"),)),
    _Sign(
        "Faster R-CNN or another two-stage R-CNN",
        (r"(?:.*\.)?(?:rpn|rpn_head|roi_heads?|proposal_generator)\..+",),
    ),
    _Sign(
        "DETR (without deformable attention)",
        (_LAYERS, _module("query_embed", "query_embedding", "query_position_embeddings")),
        (_DEFORMABLE,),
    ),
    _Sign("YOLO", (r"(?:.*\.)?model\.\d+\.(?:conv|cv[1-4]|m|bn|attn|dfl)\..+",)),
    _Sign("YOLO", (_module("multi_level_cls_convs", "multi_level_conv_cls", "convs_pred"),)),
    _Sign("YOLO", (r"(?:.*\.)?backbone\.backbone\.(?:stem|dark\d)\..+",)),
    _Sign("RetinaNet", (_module("retina_cls"), _module("retina_reg"))),
    _Sign("RetinaNet", (_module("cls_subnet"), _module("bbox_subnet"))),
    _Sign("RetinaNet", (_module("cls_logits"), _module("regression_head")), (_module("bbox_ctrness"),)),
    _Sign(
        "a one-stage detector",
        (
            r"(?:.*\.)?(?:bbox_head|head)\.(?:cls_convs|cls_head|reg_convs|cls_logits|heatmap_head|tood_cls).*"
            r"|(?:.*\.)?classification_head\..+",
        ),
    ),
)


def other_network(keys: Mapping[str, str], found: Found | None) -> str | None:
    """Return the name of a network that is no Deformable DETR, None where there is no sign of one.

    Args:
        keys: key → the same without wrappers, of the dictionary's part that is to be read.
        found: the detector that was found there by its names.
    """
    names = list(keys.values())
    for sign in _SIGNS:
        wanted = all(_any_fits(expression, names) for expression in sign.names)
        if wanted and not any(_any_fits(expression, names) for expression in sign.without):
            return sign.network
    if found is None:
        return None
    inside = further_modules(keys, found)
    if inside:
        return f"a network with further modules in its transformer ({short_names(inside, 3)})"
    if not _any_fits(_DEFORMABLE, names):
        return "a network without deformable attention"
    usual = {name.removeprefix("model.").removeprefix("transformer.") for name in found.names}
    proposals = {"enc_output.weight", "memory_trans_fc.weight"} & usual
    if (
        proposals
        and {"query_embed.weight", "query_position_embeddings.weight", "query_embedding.weight"} & usual
    ):
        return "a two-stage network with learned queries beside the proposals (H-DETR, for example)"
    return None


def _any_fits(expression: str, names: list[str]) -> bool:
    pattern = re.compile(expression)
    return any(pattern.match(name) for name in names)


def further_modules(keys: Mapping[str, str], found: Found) -> list[str]:
    """Return the keys inside a detector's transformer for which a Deformable DETR has no name."""
    known = set(found.names.values())
    bare_model = not any(name.startswith("class_embed.") for name in found.names)
    inside: list[str] = []
    for key, bare in keys.items():
        if (
            key in known
            or not bare.startswith(found.prefix)
            or bare.endswith(("_extra_state", "num_batches_tracked"))
        ):
            continue
        name = bare[len(found.prefix) :]
        is_transformer = TRANSFORMER.fullmatch(name) or (
            bare_model and TRANSFORMER.fullmatch(f"model.{name}")
        )
        # A transformer of the other layouts has another first part.
        first = name.partition(".")[0]
        if is_transformer and any(usual.partition(".")[0] == first for usual in found.names):
            inside.append(key)
    return inside


def refusal(
    path: Path, state_dict: Mapping[str, Tensor], keys: Mapping[str, str], network: str | None
) -> Problem:
    """Return the problem with a file that holds no Deformable DETR.

    Args:
        path: the file.
        state_dict: the dictionary that was looked at.
        keys: its keys → the same without wrappers.
        network: the name of its network, see :func:`other_network`; None where it is not known.
    """
    shown = short_names(list(state_dict), 3)
    backbone = backbone_name(state_dict, keys)
    usage = _usage(backbone)
    if network is None and usage and _is_more_than_a_classifier(keys):
        network = "another network"
    if network is not None:
        hint = f"its backbone ({backbone}) can be used: {usage}" if usage else _NO_BACKBONE
        return Problem(f"holds {network}, not a Deformable DETR (its keys: {shown})", file=path, hint=hint)
    if usage:
        what = f"holds a backbone ({backbone}), not a detector (its keys: {shown})"
        return Problem(what, file=path, hint=usage)
    if backbone is not None:
        what = f"holds a ResNet or GCViT of another kind, not a detector (its keys: {shown})"
        return Problem(what, file=path, hint=_NO_BACKBONE)
    return Problem(
        f"holds no Deformable DETR of any known format (its keys: {shown})",
        file=path,
        allowed="mmdet's, TAO's, the original authors' and Hugging Face's",
        hint=_NO_BACKBONE,
    )


_NO_BACKBONE = "it has no backbone that a spec can name: those are ResNet-18, 34, 50, 101, 152 and GCViT"


def _usage(backbone: str | None) -> str | None:
    """Return how a spec names a file with this backbone; None where it cannot."""
    if backbone is None or backbone == "unknown":
        return None
    named = f"model.backbone: {backbone}"
    if backbone.startswith("resnet_") and backbone != "resnet_50":
        depth = backbone.removeprefix("resnet_")
        named = f"ddetr_mm.backbone: {{type: ResNet, depth: {depth}, out_indices: [1, 2, 3]}}"
    return f"name the file as model.pretrained_backbone_path, with {named}"


def _is_more_than_a_classifier(keys: Mapping[str, str]) -> bool:
    """Return whether there is more beside the largest backbone than a classifier or projection head."""
    inside = set(find_backbones(keys)[0].names.values())
    return len(keys) - len(inside) > _HEAD_KEYS and len(find_backbones(keys)) == 1


def _has_further_modules(found: Found, keys: Mapping[str, str]) -> bool:
    """Return whether a backbone's blocks have modules that no ResNet or GCViT has (attention, offsets)."""
    known = set(found.names.values())
    bare = {keys[key][len(found.prefix) :] for key in known}
    blocks = {match[0] for name in bare if (match := _BLOCK.match(name))}
    return any(
        (match := _BLOCK.match(name)) and match[0] in blocks and not name.endswith("relative_position_index")
        for key, other in keys.items()
        if key not in known and other.startswith(found.prefix)
        for name in [other[len(found.prefix) :]]
    )


_BLOCK = re.compile(r"(?:.*\.)?(?:layers?|res|levels|stages|blocks)\.?\d+\.(?:blocks\.|layers\.)?\d+\.")


def backbone_name(state_dict: Mapping[str, Tensor], keys: Mapping[str, str]) -> str | None:
    """Return the kind of the largest ResNet or GCViT in a dictionary (``unknown`` too), None without one."""
    for found in find_backbones(keys):
        if _has_further_modules(found, keys):
            return "unknown"
        shapes = {f"backbone.{name}": tuple(state_dict[key].shape) for name, key in found.names.items()}
        return backbone_kind(shapes)[0]
    return None
