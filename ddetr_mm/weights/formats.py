"""Key tables of the checkpoint formats, and the renaming of keys by them.

Canonical names are those of mmdet's ``DeformableDETR`` (3.x). Each table pairs a canonical name with the
format's own. Placeholders: ``{i}``, ``{j}`` a number; ``{leaf}`` the last part of a name (``weight``,
``bias`` …); ``{rest}`` anything; ``{level}`` a feature level from a backbone stage; ``{extra}`` a feature
level from one more convolution, which the canonical names count from 0 and the other formats from the last
``{level}``.

Several foreign names mean that the canonical tensor is their concatenation along axis 0. The decoder's norms
are paired crosswise because the original numbers them in order of creation (cross attention first), mmdet in
order of use (self attention first).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

# --- Tables ---

CheckpointFormat = Literal["mmdet", "tao", "official", "hf"]


@dataclass(frozen=True)
class KeyRule:
    """One line of a table: canonical name, foreign name (or the names that it is split into)."""

    ours: str
    theirs: str | tuple[str, ...]


@dataclass(frozen=True)
class AliasRule:
    """A key that repeats another key of the same format.

    ``when`` is the kind of model for which the format writes it: ``"refine"`` (box refinement) or
    ``"two_stage"``.
    """

    alias: str
    canonical: str
    when: str


@dataclass(frozen=True)
class FormatTable:
    """The names of one format.

    Attributes:
        name: the format.
        rules: pairs of names; the first match counts.
        aliases: repeated keys.
        exact: whether a written file has the keys of the format's own network alone: no
            ``num_batches_tracked`` (its batch norm is frozen) and no stage of the backbone that is not read.
        alternatives: pairs (other spelling, spelling of ``rules``) of foreign names that may be read,
            applied in order, each at most once.
    """

    name: CheckpointFormat
    rules: tuple[KeyRule, ...]
    aliases: tuple[AliasRule, ...] = ()
    exact: bool = False
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

OFFICIAL = FormatTable("official", _OFFICIAL_RULES, _OFFICIAL_ALIASES, exact=True)
"""The original authors' release: the state dict under ``model``."""

TAO_PREFIX = "model.model."


def _tao(name: str) -> str:
    return TAO_PREFIX + name


TAO = FormatTable(
    "tao",
    tuple(KeyRule(rule.ours, _tao(str(rule.theirs))) for rule in _OFFICIAL_RULES),
    tuple(AliasRule(_tao(rule.alias), _tao(rule.canonical), rule.when) for rule in _OFFICIAL_ALIASES),
    exact=True,
)
"""TAO's Lightning checkpoint: the original's names behind the prefixes of two wrappers."""


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
    exact=True,
    # Names of transformers 5 in memory; its files keep the names above.
    alternatives=(
        ("model.backbone.model.{rest}", "model.backbone.conv_encoder.model.{rest}"),
        (
            "model.{side}.layers.{i}.self_attn.o_proj.{leaf}",
            "model.{side}.layers.{i}.self_attn.out_proj.{leaf}",
        ),
        ("model.{side}.layers.{i}.mlp.{part}.{leaf}", "model.{side}.layers.{i}.{part}.{leaf}"),
    ),
)
"""Hugging Face's ``DeformableDetrForObjectDetection`` in its published files."""

_MMDET_PARTS = (
    "backbone.{rest}",
    "neck.{rest}",
    "level_embed",
    "query_embedding.weight",
    "reference_points_fc.{leaf}",
    "memory_trans_fc.{leaf}",
    "memory_trans_norm.{leaf}",
    "pos_trans_fc.{leaf}",
    "pos_trans_norm.{leaf}",
    "encoder.{rest}",
    "decoder.{rest}",
    "bbox_head.cls_branches.{rest}",
    "bbox_head.reg_branches.{rest}",
)

MMDET = FormatTable("mmdet", tuple(KeyRule(name, name) for name in _MMDET_PARTS))
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
"""mmdet 2.x, read only: the transformer was part of the head."""

TABLES = {table.name: table for table in (MMDET, TAO, OFFICIAL, HF)}
"""Format name → the table for writing."""


# --- Renaming keys ---

_PATTERNS = {
    "i": r"\d+",
    "j": r"\d+",
    "level": r"\d+",
    "extra": r"\d+",
    "leaf": r"[^.]+",
    "rest": r".+",
    "side": r"encoder|decoder",
    "part": r"[^.]+",
}


@dataclass
class KeyTrace:
    """Which key became which when one table was applied.

    Attributes:
        mapped: source key → the target keys that hold its values.
        unexpected: source keys without a rule.
        aliases: source key → the key that it repeats.
        dropped: source key → why it was left out.
        differing_aliases: repeated keys whose values differ from those of the key that they repeat.
        used_alias: the kinds of aliases (``refine``, ``two_stage``) that were seen.
    """

    mapped: dict[str, list[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    differing_aliases: list[str] = field(default_factory=list)
    used_alias: set[str] = field(default_factory=set)


def is_counter(key: str) -> bool:
    """Return whether a key is one of batch norm's step counters, which evaluation does not read."""
    return key.endswith(".num_batches_tracked")


def num_stage_levels(state_dict: Mapping[str, Tensor], table: FormatTable) -> int:
    """Count the feature levels from a backbone stage: those with a 1x1 projection."""
    pattern = _compiled(_foreign_projection(table))
    found = 0
    for key, value in state_dict.items():
        if pattern.fullmatch(key) and value.dim() == 4 and value.shape[-1] == 1:
            found += 1
    return found


def _foreign_projection(table: FormatTable) -> str:
    for rule in table.rules:
        if rule.ours == "neck.convs.{level}.conv.{leaf}" and isinstance(rule.theirs, str):
            return rule.theirs.replace("{leaf}", "weight")
    return "neck.convs.{level}.conv.weight"


def to_canonical(state_dict: Mapping[str, Tensor], table: FormatTable) -> tuple[dict[str, Tensor], KeyTrace]:
    """Rename a foreign state dict to canonical names.

    Tensors are not copied, except where several are joined into one.

    Args:
        state_dict: foreign key → tensor.
        table: the format's table.

    Returns:
        The canonical state dict and the trace of every key.
    """
    trace = KeyTrace()
    num_levels = num_stage_levels(state_dict, table)
    spelled = {_usual_spelling(key, table): key for key in state_dict}
    canonical: dict[str, Tensor] = {}
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for usual, key in spelled.items():
        value = state_dict[key]
        name = _resolve_alias(usual, value, spelled, state_dict, table, trace)
        if name is None:
            continue
        match = _first_match(name, table, num_levels)
        if match is None:
            trace.unexpected.append(key)
            continue
        ours, position = match
        if position is None:
            canonical[ours] = value
            trace.mapped[key] = [ours]
        else:
            parts.setdefault(ours, {})[position] = (key, value)
    for ours, pieces in parts.items():
        _join(ours, pieces, canonical, trace)
    return canonical, trace


def _resolve_alias(
    usual: str,
    value: Tensor,
    spelled: Mapping[str, str],
    state_dict: Mapping[str, Tensor],
    table: FormatTable,
    trace: KeyTrace,
) -> str | None:
    """Return the name to match a key by, or None where the key only repeats another."""
    for rule in table.aliases:
        match = _compiled(rule.alias).fullmatch(usual)
        if match is None:
            continue
        trace.used_alias.add(rule.when)
        original = rule.canonical.format(**match.groupdict())
        if original not in spelled:
            return original
        key = spelled[usual]
        trace.aliases[key] = spelled[original]
        if not same_values(value, state_dict[spelled[original]]):
            trace.differing_aliases.append(key)
        return None
    return usual


def _first_match(key: str, table: FormatTable, num_levels: int) -> tuple[str, int | None] | None:
    """Return the canonical name of a foreign key, and its position if it is a part of a joined tensor."""
    for rule in table.rules:
        options = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        for position, template in enumerate(options):
            match = _compiled(template).fullmatch(key)
            if match is None:
                continue
            values = match.groupdict()
            if "level" in values and int(values["level"]) >= num_levels:
                continue
            if "extra" in values:
                if int(values["extra"]) < num_levels:
                    continue
                values["extra"] = str(int(values["extra"]) - num_levels)
            return rule.ours.format(**values), None if isinstance(rule.theirs, str) else position
    return None


def _join(
    ours: str, pieces: dict[int, tuple[str, Tensor]], canonical: dict[str, Tensor], trace: KeyTrace
) -> None:
    """Concatenate q, k and v; unless all three have equal width, none is used."""
    tensors = [pieces[position][1] for position in sorted(pieces)]
    if len(tensors) == 3 and len({tuple(tensor.shape[1:]) for tensor in tensors}) == 1:
        canonical[ours] = torch.cat(tensors)
        for _, (key, _value) in sorted(pieces.items()):
            trace.mapped[key] = [ours]
    else:
        trace.unexpected += [key for key, _value in pieces.values()]


def from_canonical(
    state_dict: Mapping[str, Tensor],
    table: FormatTable,
    *,
    with_box_refine: bool,
    two_stage: bool,
) -> tuple[dict[str, Tensor], KeyTrace]:
    """Rename a canonical state dict to a foreign format, with its repeated keys.

    Repeated keys share one tensor, as in the format's own files.

    Args:
        state_dict: canonical key → tensor.
        table: the target format's table.
        with_box_refine: whether the model refines boxes from layer to layer.
        two_stage: whether its encoder proposes the boxes.

    Returns:
        The foreign state dict and the trace of every canonical key.
    """
    trace = KeyTrace()
    num_levels = num_stage_levels(state_dict, MMDET)
    foreign: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if table.exact and is_counter(key):
            trace.dropped[key] = "batch norm's step counter, which the target does not have"
            continue
        targets = _foreign_names(key, table, num_levels)
        if targets is None:
            trace.unexpected.append(key)
        else:
            rows = [value] if len(targets) == 1 else list(value.chunk(len(targets)))
            foreign.update(zip(targets, rows, strict=True))
            trace.mapped[key] = targets
    wanted = {"refine": with_box_refine, "two_stage": two_stage}
    sources = {target: key for key, targets in trace.mapped.items() for target in targets}
    for rule in table.aliases:
        if not wanted[rule.when]:
            continue
        for name in [*foreign]:
            match = _compiled(rule.canonical).fullmatch(name)
            if match is not None:
                alias = rule.alias.format(**match.groupdict())
                foreign[alias] = foreign[name]
                trace.mapped[sources[name]].append(alias)
    return foreign, trace


def _foreign_names(key: str, table: FormatTable, num_levels: int) -> list[str] | None:
    for rule in table.rules:
        match = _compiled(rule.ours).fullmatch(key)
        if match is None:
            continue
        values = match.groupdict()
        if "extra" in values:
            values["extra"] = str(int(values["extra"]) + num_levels)
        options = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        return [template.format(**values) for template in options]
    return None


def _usual_spelling(key: str, table: FormatTable) -> str:
    """Return a foreign key in the spelling of the table's rules."""
    for spelling, usual in table.alternatives:
        match = _compiled(spelling).fullmatch(key)
        if match is not None:
            key = usual.format(**match.groupdict())
    return key


def same_values(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit (equal NaNs included)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
        return True
    return bool(torch.equal(left, right)) or (
        left.is_floating_point() and bool(torch.allclose(left, right, rtol=0.0, atol=0.0, equal_nan=True))
    )


@cache
def pattern_of(template: str) -> str:
    """Return the regular expression of a template; placeholders become named groups."""
    pieces = re.split(r"\{(\w+)\}", template)
    return "".join(
        re.escape(piece) if index % 2 == 0 else f"(?P<{piece}>{_PATTERNS[piece]})"
        for index, piece in enumerate(pieces)
    )


@cache
def _compiled(template: str) -> re.Pattern[str]:
    return re.compile(pattern_of(template))
