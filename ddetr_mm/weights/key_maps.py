"""Which key of each format is which: the tables that all conversions read.

Our canonical names are those of mmdet's ``DeformableDETR`` (3.x). Each table pairs a canonical name with
the format's own. Placeholders: ``{i}``, ``{j}`` a number; ``{leaf}`` the last part of a name
(``weight``, ``bias`` …); ``{rest}`` anything; ``{level}`` a feature level fed by a backbone stage;
``{extra}`` a feature level made by one more convolution, which the canonical names count from 0 and the
other formats count on from the last ``{level}``.

A foreign side of several names means that the canonical tensor is their concatenation along axis 0.

The decoder's norms look twisted because the original numbers them by the order in which it made them
(cross attention first), mmdet by the order in which it applies them (self attention first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CheckpointFormat = Literal["mmdet", "tao", "official", "hf"]


@dataclass(frozen=True)
class KeyRule:
    """One line of a table: canonical name, foreign name (or the names it is split into)."""

    ours: str
    theirs: str | tuple[str, ...]


@dataclass(frozen=True)
class AliasRule:
    """A key that repeats another key of the same format.

    ``when`` says in which models the format writes it: ``"refine"`` (box refinement) or ``"two_stage"``.
    """

    alias: str
    canonical: str
    when: str


@dataclass(frozen=True)
class FormatTable:
    """All that is known of one format's names.

    Attributes:
        name: the format.
        rules: pairs of names; the first that fits counts.
        aliases: repeated keys.
        without_counters: whether the format has no ``num_batches_tracked`` (frozen batch norm only).
        alternatives: pairs (other spelling, spelling used by ``rules``) of foreign names that may be read;
            applied in turn, each at most once.
    """

    name: CheckpointFormat
    rules: tuple[KeyRule, ...]
    aliases: tuple[AliasRule, ...] = ()
    without_counters: bool = False
    alternatives: tuple[tuple[str, str], ...] = ()


_ATTENTION_PARTS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def _deformable_attention(ours: str, theirs: str) -> tuple[KeyRule, ...]:
    return tuple(KeyRule(f"{ours}.{part}.{{leaf}}", f"{theirs}.{part}.{{leaf}}") for part in _ATTENTION_PARTS)


_OFFICIAL_RULES: tuple[KeyRule, ...] = (
    KeyRule("backbone.{rest}", "backbone.0.body.{rest}"),
    KeyRule("neck.convs.{level}.conv.{leaf}", "input_proj.{level}.0.{leaf}"),
    KeyRule("neck.convs.{level}.gn.{leaf}", "input_proj.{level}.1.{leaf}"),
    KeyRule("neck.extra_convs.{extra}.conv.{leaf}", "input_proj.{extra}.0.{leaf}"),
    KeyRule("neck.extra_convs.{extra}.gn.{leaf}", "input_proj.{extra}.1.{leaf}"),
    KeyRule("level_embed", "transformer.level_embed"),
    KeyRule("query_embedding.weight", "query_embed.weight"),
    KeyRule("reference_points_fc.{leaf}", "transformer.reference_points.{leaf}"),
    KeyRule("memory_trans_fc.{leaf}", "transformer.enc_output.{leaf}"),
    KeyRule("memory_trans_norm.{leaf}", "transformer.enc_output_norm.{leaf}"),
    KeyRule("pos_trans_fc.{leaf}", "transformer.pos_trans.{leaf}"),
    KeyRule("pos_trans_norm.{leaf}", "transformer.pos_trans_norm.{leaf}"),
    *_deformable_attention("encoder.layers.{i}.self_attn", "transformer.encoder.layers.{i}.self_attn"),
    KeyRule("encoder.layers.{i}.norms.0.{leaf}", "transformer.encoder.layers.{i}.norm1.{leaf}"),
    KeyRule("encoder.layers.{i}.norms.1.{leaf}", "transformer.encoder.layers.{i}.norm2.{leaf}"),
    KeyRule("encoder.layers.{i}.ffn.layers.0.0.{leaf}", "transformer.encoder.layers.{i}.linear1.{leaf}"),
    KeyRule("encoder.layers.{i}.ffn.layers.1.{leaf}", "transformer.encoder.layers.{i}.linear2.{leaf}"),
    KeyRule("decoder.layers.{i}.self_attn.attn.{rest}", "transformer.decoder.layers.{i}.self_attn.{rest}"),
    *_deformable_attention("decoder.layers.{i}.cross_attn", "transformer.decoder.layers.{i}.cross_attn"),
    KeyRule("decoder.layers.{i}.norms.0.{leaf}", "transformer.decoder.layers.{i}.norm2.{leaf}"),
    KeyRule("decoder.layers.{i}.norms.1.{leaf}", "transformer.decoder.layers.{i}.norm1.{leaf}"),
    KeyRule("decoder.layers.{i}.norms.2.{leaf}", "transformer.decoder.layers.{i}.norm3.{leaf}"),
    KeyRule("decoder.layers.{i}.ffn.layers.0.0.{leaf}", "transformer.decoder.layers.{i}.linear1.{leaf}"),
    KeyRule("decoder.layers.{i}.ffn.layers.1.{leaf}", "transformer.decoder.layers.{i}.linear2.{leaf}"),
    KeyRule("bbox_head.cls_branches.{i}.{leaf}", "class_embed.{i}.{leaf}"),
    KeyRule("bbox_head.reg_branches.{i}.0.{leaf}", "bbox_embed.{i}.layers.0.{leaf}"),
    KeyRule("bbox_head.reg_branches.{i}.2.{leaf}", "bbox_embed.{i}.layers.1.{leaf}"),
    KeyRule("bbox_head.reg_branches.{i}.4.{leaf}", "bbox_embed.{i}.layers.2.{leaf}"),
)

_OFFICIAL_ALIASES = (
    AliasRule("transformer.decoder.bbox_embed.{i}.{rest}", "bbox_embed.{i}.{rest}", "refine"),
    AliasRule("transformer.decoder.class_embed.{i}.{rest}", "class_embed.{i}.{rest}", "two_stage"),
)

OFFICIAL = FormatTable("official", _OFFICIAL_RULES, _OFFICIAL_ALIASES)
"""The original authors' release: the state dict under ``model``."""

TAO_PREFIX = "model.model."


def _tao(name: str) -> str:
    return TAO_PREFIX + name


TAO = FormatTable(
    "tao",
    tuple(KeyRule(rule.ours, _tao(str(rule.theirs))) for rule in _OFFICIAL_RULES),
    tuple(AliasRule(_tao(rule.alias), _tao(rule.canonical), rule.when) for rule in _OFFICIAL_ALIASES),
)
"""The reference's Lightning checkpoint: the original's names behind the two wrappers' prefixes."""


def _hf_resnet_alternatives() -> tuple[tuple[str, str], ...]:
    """Hugging Face's own ResNet (in place of timm's): nested numbers for torchvision's names."""
    backbone = "model.backbone.conv_encoder.model"
    pairs = [
        (f"{backbone}.embedder.embedder.convolution.{{leaf}}", f"{backbone}.conv1.{{leaf}}"),
        (f"{backbone}.embedder.embedder.normalization.{{leaf}}", f"{backbone}.bn1.{{leaf}}"),
    ]
    for stage in range(4):
        theirs = f"{backbone}.encoder.stages.{stage}.layers.{{i}}"
        ours = f"{backbone}.layer{stage + 1}.{{i}}"
        pairs.append((f"{theirs}.shortcut.convolution.{{leaf}}", f"{ours}.downsample.0.{{leaf}}"))
        pairs.append((f"{theirs}.shortcut.normalization.{{leaf}}", f"{ours}.downsample.1.{{leaf}}"))
        for conv in range(3):
            pairs.append((f"{theirs}.layer.{conv}.convolution.{{leaf}}", f"{ours}.conv{conv + 1}.{{leaf}}"))
            pairs.append((f"{theirs}.layer.{conv}.normalization.{{leaf}}", f"{ours}.bn{conv + 1}.{{leaf}}"))
    return tuple(pairs)


HF = FormatTable(
    "hf",
    (
        KeyRule("backbone.{rest}", "model.backbone.conv_encoder.model.{rest}"),
        KeyRule("neck.convs.{level}.conv.{leaf}", "model.input_proj.{level}.0.{leaf}"),
        KeyRule("neck.convs.{level}.gn.{leaf}", "model.input_proj.{level}.1.{leaf}"),
        KeyRule("neck.extra_convs.{extra}.conv.{leaf}", "model.input_proj.{extra}.0.{leaf}"),
        KeyRule("neck.extra_convs.{extra}.gn.{leaf}", "model.input_proj.{extra}.1.{leaf}"),
        KeyRule("level_embed", "model.level_embed"),
        KeyRule("query_embedding.weight", "model.query_position_embeddings.weight"),
        KeyRule("reference_points_fc.{leaf}", "model.reference_points.{leaf}"),
        KeyRule("memory_trans_fc.{leaf}", "model.enc_output.{leaf}"),
        KeyRule("memory_trans_norm.{leaf}", "model.enc_output_norm.{leaf}"),
        KeyRule("pos_trans_fc.{leaf}", "model.pos_trans.{leaf}"),
        KeyRule("pos_trans_norm.{leaf}", "model.pos_trans_norm.{leaf}"),
        *_deformable_attention("encoder.layers.{i}.self_attn", "model.encoder.layers.{i}.self_attn"),
        KeyRule("encoder.layers.{i}.norms.0.{leaf}", "model.encoder.layers.{i}.self_attn_layer_norm.{leaf}"),
        KeyRule("encoder.layers.{i}.norms.1.{leaf}", "model.encoder.layers.{i}.final_layer_norm.{leaf}"),
        KeyRule("encoder.layers.{i}.ffn.layers.0.0.{leaf}", "model.encoder.layers.{i}.fc1.{leaf}"),
        KeyRule("encoder.layers.{i}.ffn.layers.1.{leaf}", "model.encoder.layers.{i}.fc2.{leaf}"),
        KeyRule(
            "decoder.layers.{i}.self_attn.attn.in_proj_weight",
            tuple(f"model.decoder.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
        ),
        KeyRule(
            "decoder.layers.{i}.self_attn.attn.in_proj_bias",
            tuple(f"model.decoder.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv"),
        ),
        KeyRule(
            "decoder.layers.{i}.self_attn.attn.out_proj.{leaf}",
            "model.decoder.layers.{i}.self_attn.out_proj.{leaf}",
        ),
        *_deformable_attention("decoder.layers.{i}.cross_attn", "model.decoder.layers.{i}.encoder_attn"),
        KeyRule("decoder.layers.{i}.norms.0.{leaf}", "model.decoder.layers.{i}.self_attn_layer_norm.{leaf}"),
        KeyRule(
            "decoder.layers.{i}.norms.1.{leaf}", "model.decoder.layers.{i}.encoder_attn_layer_norm.{leaf}"
        ),
        KeyRule("decoder.layers.{i}.norms.2.{leaf}", "model.decoder.layers.{i}.final_layer_norm.{leaf}"),
        KeyRule("decoder.layers.{i}.ffn.layers.0.0.{leaf}", "model.decoder.layers.{i}.fc1.{leaf}"),
        KeyRule("decoder.layers.{i}.ffn.layers.1.{leaf}", "model.decoder.layers.{i}.fc2.{leaf}"),
        KeyRule("bbox_head.cls_branches.{i}.{leaf}", "class_embed.{i}.{leaf}"),
        KeyRule("bbox_head.reg_branches.{i}.0.{leaf}", "bbox_embed.{i}.layers.0.{leaf}"),
        KeyRule("bbox_head.reg_branches.{i}.2.{leaf}", "bbox_embed.{i}.layers.1.{leaf}"),
        KeyRule("bbox_head.reg_branches.{i}.4.{leaf}", "bbox_embed.{i}.layers.2.{leaf}"),
    ),
    (
        AliasRule("model.decoder.bbox_embed.{i}.{rest}", "bbox_embed.{i}.{rest}", "refine"),
        AliasRule("model.decoder.class_embed.{i}.{rest}", "class_embed.{i}.{rest}", "two_stage"),
    ),
    without_counters=True,
    # What transformers 5 calls the same modules once they are in memory; its files keep the names above.
    alternatives=(
        ("model.backbone.model.{rest}", "model.backbone.conv_encoder.model.{rest}"),
        (
            "model.{side}.layers.{i}.self_attn.o_proj.{leaf}",
            "model.{side}.layers.{i}.self_attn.out_proj.{leaf}",
        ),
        ("model.{side}.layers.{i}.mlp.{part}.{leaf}", "model.{side}.layers.{i}.{part}.{leaf}"),
        *_hf_resnet_alternatives(),
    ),
)
"""Hugging Face's ``DeformableDetrForObjectDetection`` as its published files spell it."""

MMDET = FormatTable("mmdet", (KeyRule("{rest}", "{rest}"),))
"""mmdet 3.x, and ours: the canonical names themselves."""

MMDET_2 = FormatTable(
    "mmdet",
    (
        KeyRule("query_embedding.weight", "bbox_head.query_embedding.weight"),
        KeyRule("level_embed", "bbox_head.transformer.level_embeds"),
        KeyRule("reference_points_fc.{leaf}", "bbox_head.transformer.reference_points.{leaf}"),
        KeyRule("memory_trans_fc.{leaf}", "bbox_head.transformer.enc_output.{leaf}"),
        KeyRule("memory_trans_norm.{leaf}", "bbox_head.transformer.enc_output_norm.{leaf}"),
        KeyRule("pos_trans_fc.{leaf}", "bbox_head.transformer.pos_trans.{leaf}"),
        KeyRule("pos_trans_norm.{leaf}", "bbox_head.transformer.pos_trans_norm.{leaf}"),
        KeyRule(
            "encoder.layers.{i}.self_attn.{rest}",
            "bbox_head.transformer.encoder.layers.{i}.attentions.0.{rest}",
        ),
        KeyRule(
            "decoder.layers.{i}.self_attn.{rest}",
            "bbox_head.transformer.decoder.layers.{i}.attentions.0.{rest}",
        ),
        KeyRule(
            "decoder.layers.{i}.cross_attn.{rest}",
            "bbox_head.transformer.decoder.layers.{i}.attentions.1.{rest}",
        ),
        *(
            KeyRule(
                f"{side}.layers.{{i}}.ffn.{{rest}}",
                f"bbox_head.transformer.{side}.layers.{{i}}.ffns.0.{{rest}}",
            )
            for side in ("encoder", "decoder")
        ),
        *(
            KeyRule(
                f"{side}.layers.{{i}}.norms.{{rest}}",
                f"bbox_head.transformer.{side}.layers.{{i}}.norms.{{rest}}",
            )
            for side in ("encoder", "decoder")
        ),
        KeyRule("bbox_head.cls_branches.{rest}", "bbox_head.cls_branches.{rest}"),
        KeyRule("bbox_head.reg_branches.{rest}", "bbox_head.reg_branches.{rest}"),
        KeyRule("backbone.{rest}", "backbone.{rest}"),
        KeyRule("neck.{rest}", "neck.{rest}"),
    ),
    (
        AliasRule(
            "bbox_head.transformer.decoder.reg_branches.{rest}", "bbox_head.reg_branches.{rest}", "refine"
        ),
        AliasRule(
            "bbox_head.transformer.decoder.cls_branches.{rest}", "bbox_head.cls_branches.{rest}", "two_stage"
        ),
    ),
)
"""mmdet 2.x, read only: the transformer stood inside the head."""

TABLES = {table.name: table for table in (MMDET, TAO, OFFICIAL, HF)}
"""Format name → the table it is written by."""
