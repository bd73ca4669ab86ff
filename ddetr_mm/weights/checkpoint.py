"""A checkpoint in memory: canonical weights, metadata, and the architecture that they show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ddetr_mm.weights.formats import CheckpointFormat, KeyTrace, same_values
from ddetr_mm.weights.gcvit import VARIANTS, stage_shapes, variant_names
from ddetr_mm.weights.quantized import Quantization

# --- Checkpoint and metadata ---

LabelMode = Literal["category_id", "contiguous"]
FORMATS: tuple[CheckpointFormat, ...] = ("mmdet", "tao", "official", "hf")

ZERO_PADDED_VALUES: dict[str, bool] = {"mmdet": True, "tao": False, "official": True, "hf": True}
"""Whether a format's own implementation zeroes attention values at padded positions."""

META_KEY = "ddetr_mm"
"""Key of :meth:`CheckpointMeta.to_dict` in our files (mmdet: inside ``meta``)."""


@dataclass(frozen=True)
class CheckpointMeta:
    """Metadata of weights.

    Attributes:
        source_format: the format that the weights were first read from; conversions keep it.
        zero_padded_values: whether the weights were trained with attention values zeroed at padded positions.
        label_mode: ``category_id``: column = category id of the annotations; ``contiguous``: column =
            position in the list of classes.
        background_column: the column of the background, or None.
        num_classes: columns of the class head, or None without a head.
        class_names: a name for every column, or None when unknown.
        category_ids: category id of every column (None for background and gaps), or None when unknown.
        with_box_refine, two_stage: the decoder's scheme.
        neck_bias: False when the weights come from a neck without bias; conversions that need one add zeros,
            and writing mmdet's names removes them.
        num_heads, enc_points, dec_points: attention heads, and sampling points of one head on one level;
            None where the file does not say. Shapes show their product only.
        dilation: whether the backbone's last stage is dilated, which no shape shows; None where the file
            does not say.
        input_mean, input_std: normalisation of the images, as parts of the pixels' range; None where the
            file does not say.
        aux_loss: whether every decoder layer was trained with a loss; None where the file does not say.
        num_queries: object queries (two-stage: proposals), where the file says.
        epoch: epoch after which the file was written, where it says.
        spec: the experiment spec of the weights as plain data, or None.
        numbered_by_name: whether the category ids were made from the class names (spec field
            ``ddetr_mm.category_ids``).
        assumed: the settings above that no file said, only the format of the one they were first read from.
        test_settings: how pictures reach the network and detections are chosen, and the backbone of a config,
            where the file says: see :data:`ddetr_mm.weights.describe.TEST_SETTINGS`.
    """

    source_format: str
    zero_padded_values: bool
    label_mode: LabelMode
    background_column: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    category_ids: tuple[int | None, ...] | None = None
    with_box_refine: bool = False
    two_stage: bool = False
    neck_bias: bool = True
    num_heads: int | None = None
    enc_points: int | None = None
    dec_points: int | None = None
    dilation: bool | None = None
    input_mean: tuple[float, ...] | None = None
    input_std: tuple[float, ...] | None = None
    aux_loss: bool | None = None
    num_queries: int | None = None
    epoch: int | None = None
    spec: dict[str, Any] | None = None
    numbered_by_name: bool | None = None
    assumed: tuple[str, ...] = ()
    test_settings: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (lists, strings, numbers) for a file's metadata, without unknown values."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value is not None and value != ()
        }


@dataclass
class Checkpoint:
    """Weights under canonical names, and what is known of them.

    Attributes:
        state_dict: canonical key → tensor. Tensors may be backed by the file they were read from.
        format: the format of the file.
        meta: metadata of the file, completed by its format.
        architecture: of the network.
        path: the file or folder.
        trace: which key of the file became which canonical key.
        notes: remarks for the user, one sentence each.
        stated: the names of those settings in ``meta`` that the file says, see
            :data:`ddetr_mm.weights.scheme.FIELDS`; its format alone implies the others.
        entry: dotted path of the dictionary that was read and the prefix of its keys, the format's own
            prefix left out.
        quantization: how torchao or ModelOpt quantized the weights; None for float weights.
    """

    state_dict: dict[str, Tensor]
    format: CheckpointFormat
    meta: CheckpointMeta
    architecture: Architecture
    path: Path
    trace: KeyTrace
    notes: list[str] = field(default_factory=list)
    stated: frozenset[str] = frozenset()
    entry: str = ""
    quantization: Quantization | None = None


def meta_from_dict(values: Mapping[str, Any], default: CheckpointMeta) -> CheckpointMeta:
    """Read what :meth:`CheckpointMeta.to_dict` wrote, with ``default`` for what is left out.

    Values of the wrong type are ignored: files are not trusted.
    """
    changes: dict[str, Any] = {}
    flags = (
        "zero_padded_values",
        "with_box_refine",
        "two_stage",
        "neck_bias",
        "dilation",
        "aux_loss",
        "numbered_by_name",
    )
    for key in flags:
        if isinstance(values.get(key), bool):
            changes[key] = values[key]
    for key in ("input_mean", "input_std"):
        if (numbers := channel_values(values.get(key))) is not None:
            changes[key] = numbers
    for key in ("background_column", "num_heads", "enc_points", "dec_points", "num_queries", "epoch"):
        if isinstance(values.get(key), int) and not isinstance(values[key], bool):
            changes[key] = values[key]
    if isinstance(values.get("source_format"), str):
        changes["source_format"] = values["source_format"]
    if values.get("label_mode") in ("category_id", "contiguous"):
        changes["label_mode"] = values["label_mode"]
        changes.setdefault("background_column", None)
    names = values.get("class_names")
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        changes["class_names"] = tuple(names) or None
    assumed = values.get("assumed")
    if isinstance(assumed, (list, tuple)) and all(isinstance(name, str) for name in assumed):
        changes["assumed"] = tuple(assumed)
    ids = values.get("category_ids")
    if isinstance(ids, (list, tuple)) and all(number is None or isinstance(number, int) for number in ids):
        changes["category_ids"] = tuple(ids) or None
    if isinstance(values.get("test_settings"), Mapping):
        changes["test_settings"] = dict(values["test_settings"])
    if isinstance(values.get("spec"), Mapping):
        changes["spec"] = dict(values["spec"])
    return replace(default, **changes)


def channel_values(values: Any) -> tuple[float, ...] | None:
    """Return three finite numbers from an untrusted file, or None."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return None
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        return None
    numbers = tuple(float(value) for value in values)
    return numbers if all(math.isfinite(number) for number in numbers) else None


def named_backbone(checkpoint: Checkpoint) -> str:
    """Return the backbone's kind.

    Without its last stages it may be of several (:func:`backbone_kinds`): then the spec of the weights
    decides, where the file has it.
    """
    kinds = backbone_kinds({key: tuple(value.shape) for key, value in checkpoint.state_dict.items()})
    said = (checkpoint.meta.spec or {}).get("model")
    named = said.get("backbone") if isinstance(said, Mapping) else None
    return named if named in kinds else kinds[0]


# --- Architecture from names and shapes ---

_BOTTLENECKS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "resnet_50",
    (3, 4, 23, 3): "resnet_101",
    (3, 8, 36, 3): "resnet_152",
}
_BASIC_BLOCKS: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet_18", (3, 4, 6, 3): "resnet_34"}
DEFAULT_NUM_HEADS = 8


@dataclass(frozen=True)
class Architecture:
    """A Deformable DETR's structure.

    Shapes show only the product of heads and points: ``num_heads`` is 8, the value of every published model,
    unless the file says otherwise, and the points follow from it.

    Attributes:
        backbone: ``resnet_18/34/50/101/152``, ``gc_vit_<variant>`` or ``unknown``.
        backbone_stage_channels: channels of the backbone's stages, empty for an unknown backbone.
        return_interm_indices: TAO's feature level indices (0..3 a stage, 4 the extra level); None where the
            backbone's channels do not show them.
        neck_in_channels: channels of the stages that feed the neck.
        num_extra_levels: levels from further stride-2 convolutions.
        num_feature_levels: all levels.
        neck_bias: whether the neck's convolutions have a bias.
        hidden_dim: width of the transformer.
        num_queries: object queries; None in two-stage models, whose weights do not show it.
        enc_layers, dec_layers: number of layers.
        enc_feedforward, dec_feedforward: hidden width of their feed-forward networks.
        num_heads: attention heads (see above).
        enc_points, dec_points: sampling points of one head on one level; None when 8 heads do not divide.
        num_classes: columns of the class head; None without a head.
        with_box_refine: whether boxes are refined from layer to layer.
        two_stage: whether the encoder proposes the boxes.
    """

    backbone: str = "unknown"
    backbone_stage_channels: tuple[int, ...] = ()
    return_interm_indices: tuple[int, ...] | None = None
    neck_in_channels: tuple[int, ...] = ()
    num_extra_levels: int = 0
    num_feature_levels: int = 0
    neck_bias: bool = True
    hidden_dim: int = 0
    num_queries: int | None = None
    enc_layers: int = 0
    dec_layers: int = 0
    enc_feedforward: int = 0
    dec_feedforward: int = 0
    num_heads: int = DEFAULT_NUM_HEADS
    enc_points: int | None = None
    dec_points: int | None = None
    num_classes: int | None = None
    with_box_refine: bool = False
    two_stage: bool = False
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the notes."""
        values = asdict(self)
        values.pop("notes")
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def infer_architecture(
    canonical: Mapping[str, Tensor],
    *,
    with_box_refine: bool | None = None,
    num_heads: int | None = None,
) -> Architecture:
    """Infer the structure from a canonical state dict.

    Args:
        canonical: canonical key → tensor; only names, shapes and, for the refinement, the equality of the
            prediction branches are used.
        with_box_refine: what the file says; None infers it from the branches, which are copies of one another
            exactly when boxes are not refined.
        num_heads: attention heads if known.
    """
    shapes = {key: tuple(value.shape) for key, value in canonical.items()}
    notes: list[str] = []
    heads = num_heads or DEFAULT_NUM_HEADS
    levels, extra = _numbered(shapes, "neck.convs"), _numbered(shapes, "neck.extra_convs")
    in_channels = tuple(shapes[f"neck.convs.{index}.conv.weight"][1] for index in range(levels))
    num_levels = shapes.get("level_embed", (levels + extra,))[0]
    backbone, stage_channels = backbone_kind(shapes)
    queries = shapes.get("query_embedding.weight")
    enc_points = _num_points(shapes, "encoder.layers.0.self_attn", heads, num_levels, notes)
    dec_points = _num_points(shapes, "decoder.layers.0.cross_attn", heads, num_levels, notes)
    head = shapes.get("bbox_head.cls_branches.0.weight")
    two_stage = "memory_trans_fc.weight" in shapes
    if with_box_refine is None:
        with_box_refine = two_stage or branches_differ(canonical)
    return Architecture(
        backbone=backbone,
        backbone_stage_channels=stage_channels,
        return_interm_indices=_interm_indices(in_channels, stage_channels, extra),
        neck_in_channels=in_channels,
        num_extra_levels=extra,
        num_feature_levels=num_levels,
        neck_bias="neck.convs.0.conv.bias" in shapes,
        hidden_dim=shapes.get("level_embed", (0, 0))[-1],
        num_queries=queries[0] if queries else None,
        enc_layers=_numbered(shapes, "encoder.layers"),
        dec_layers=_numbered(shapes, "decoder.layers"),
        enc_feedforward=shapes.get("encoder.layers.0.ffn.layers.0.0.weight", (0,))[0],
        dec_feedforward=shapes.get("decoder.layers.0.ffn.layers.0.0.weight", (0,))[0],
        num_heads=heads,
        enc_points=enc_points,
        dec_points=dec_points,
        num_classes=head[0] if head else None,
        with_box_refine=with_box_refine,
        two_stage=two_stage,
        notes=tuple(notes),
    )


def branches_differ(canonical: Mapping[str, Tensor]) -> bool:
    """Return whether the prediction branches of the decoder layers hold different values.

    Without refinement all layers share one branch; with it each has its own.
    """
    for key, value in canonical.items():
        match = re.fullmatch(r"(bbox_head\.(?:cls|reg)_branches)\.(\d+)\.(.+)", key)
        if match is None or match[2] == "0":
            continue
        first = canonical.get(f"{match[1]}.0.{match[3]}")
        if first is not None and not same_values(first, value):
            return True
    return False


def backbone_kind(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    """Return name and stage channels of the backbone under the prefix ``backbone.``.

    Args:
        shapes: canonical key → shape.

    Returns:
        For example ``("resnet_50", (256, 512, 1024, 2048))``; ``("unknown", ())`` for another backbone. The
        first of several, see :func:`backbone_kinds`.
    """
    names, channels = _kinds(shapes)
    return names[0], channels


def backbone_kinds(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return all names that the backbone may have: without its last stages it can begin several.

    Args:
        shapes: canonical key → shape.
    """
    return _kinds(shapes)[0]


def _kinds(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if shapes.get("backbone.conv1.weight", ())[1:] == (3, 7, 7):
        counts = [_numbered(shapes, f"backbone.layer{stage}") for stage in (1, 2, 3, 4)]
        blocks = tuple(counts[: counts.index(0)] if 0 in counts else counts)
        bottleneck = "backbone.layer1.0.conv3.weight" in shapes
        last = "conv3" if bottleneck else "conv2"
        known = _BOTTLENECKS if bottleneck else _BASIC_BLOCKS
        names = tuple(name for whole, name in known.items() if whole[: len(blocks)] == blocks)
        usual_width = 64 * (4 if bottleneck else 1)
        stages = range(1, len(blocks) + 1)
        channels = tuple(shapes.get(f"backbone.layer{s}.0.{last}.weight", (0,))[0] for s in stages)
        # ResNeXt and wide ResNets have the same names but other widths inside the blocks.
        plain = shapes.get("backbone.layer1.0.conv2.weight") == (64, 64, 3, 3)
        if blocks and names and plain and channels[0] == usual_width and not any(counts[len(blocks) :]):
            return names, channels
    if "backbone.levels.0.blocks.0.attn.qkv.weight" in shapes:
        return _gcvit_kinds(shapes)
    return ("unknown",), ()


def _gcvit_kinds(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    stages = _numbered(shapes, "backbone.levels")
    depths = tuple(_numbered(shapes, f"backbone.levels.{stage}.blocks") for stage in range(stages))
    qkv = shapes["backbone.levels.0.blocks.0.attn.qkv.weight"]
    if len(qkv) != 2:
        return ("unknown",), ()
    width = qkv[1]
    table = shapes.get("backbone.levels.0.blocks.0.attn.relative_position_bias_table", (0,))
    window = (round(table[0] ** 0.5) + 1) // 2
    names = tuple(f"gc_vit_{name}" for name in variant_names(depths, width, window))
    return names or ("unknown",), tuple(width * 2**stage for stage in range(stages))


_STAGE = re.compile(r"backbone\.(?:layer([1-4])|levels\.([0-3])(\.downsample)?|norm([0-3]?))\.")


def is_unread(key: str, last_stage: int | None) -> bool:
    """Return whether a key is of a backbone's part behind the last stage that is read.

    Args:
        key: canonical, of a ResNet or GCViT.
        last_stage: the last one that feeds the neck, 0..3; None where it is not known.
    """
    match = None if last_stage is None else _STAGE.match(key)
    if match is None or last_stage is None:
        return False
    layer, level, reduction, norm = match.groups()
    if layer is not None:
        return int(layer) - 1 > last_stage
    if level is None:
        return int(norm or 3) > last_stage  # a classifier's norm without a number is the last stage's
    # The reduction behind a level is what the next one reads.
    return int(level) + (reduction is not None) > last_stage


def last_read_stage(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the last stage, 0..3, of a ResNet or GCViT that feeds the neck; None for other backbones.

    Args:
        shapes: canonical key → shape, of a whole detector.
    """
    levels = _numbered(shapes, "neck.convs")
    widths = {shapes[f"neck.convs.{level}.conv.weight"][1] for level in range(levels)}
    ends = [
        [f"backbone.layer{stage + 1}.0.conv3.weight", f"backbone.layer{stage + 1}.0.conv2.weight"]
        + [f"backbone.levels.{stage}.blocks.0.norm1.weight"]
        for stage in range(4)
    ]
    channels = [next((shapes[key][0] for key in keys if key in shapes), 0) for keys in ends]
    return max((stage for stage, width in enumerate(channels) if width in widths), default=None)


def describe_backbone(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the backbone in words, for messages: its name, or some of its keys."""
    name, _channels = backbone_kind(shapes)
    if name != "unknown":
        return name
    keys = [key for key in shapes if key.startswith("backbone.")]
    return f"an unknown backbone ({keys[0]}, …, {keys[-1]})" if keys else "no backbone"


def _numbered(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Count the numbers that follow a prefix, from 0 without a gap."""
    start = prefix + "."
    found = {key[len(start) :].split(".", 1)[0] for key in shapes if key.startswith(start)}
    count = 0
    while str(count) in found:
        count += 1
    return count


def _num_points(
    shapes: Mapping[str, tuple[int, ...]], prefix: str, heads: int, levels: int, notes: list[str]
) -> int | None:
    shape = shapes.get(f"{prefix}.attention_weights.weight")
    if shape is None or levels == 0:
        return None
    points, rest = divmod(shape[0], heads * levels)
    if rest:
        notes.append(f"{prefix}: {shape[0]} is not {heads} heads x {levels} levels x points")
        return None
    return points


def _interm_indices(
    in_channels: tuple[int, ...], stage_channels: tuple[int, ...], extra: int
) -> tuple[int, ...] | None:
    if not stage_channels or any(channels not in stage_channels for channels in in_channels):
        return None
    # TAO has one extra level only.
    if extra > 1:
        return None
    return tuple(stage_channels.index(channels) for channels in in_channels) + (4,) * extra


def expected_keys(architecture: Architecture) -> list[str]:
    """Return the canonical keys of neck, transformer and head for an architecture."""
    affine = ("weight", "bias")
    names = [f"neck.convs.{i}" for i in range(len(architecture.neck_in_channels))]
    names += [f"neck.extra_convs.{i}" for i in range(architecture.num_extra_levels)]
    keys = ["level_embed"]
    conv_leaves = affine if architecture.neck_bias else affine[:1]
    keys += [f"{name}.conv.{leaf}" for name in names for leaf in conv_leaves]
    keys += [f"{name}.gn.{leaf}" for name in names for leaf in affine]
    if architecture.two_stage:
        modules = ["memory_trans_fc", "memory_trans_norm", "pos_trans_fc", "pos_trans_norm"]
    else:
        keys.append("query_embedding.weight")
        modules = ["reference_points_fc"]
    for i in range(architecture.enc_layers):
        modules += _layer_modules(f"encoder.layers.{i}", "self_attn", norms=2)
    for i in range(architecture.dec_layers):
        modules += _layer_modules(f"decoder.layers.{i}", "cross_attn", norms=3)
        modules.append(f"decoder.layers.{i}.self_attn.attn.out_proj")
        keys += [f"decoder.layers.{i}.self_attn.attn.in_proj_{leaf}" for leaf in affine]
    for i in range(architecture.dec_layers + architecture.two_stage):
        modules.append(f"bbox_head.cls_branches.{i}")
        modules += [f"bbox_head.reg_branches.{i}.{j}" for j in (0, 2, 4)]
    return keys + [f"{module}.{leaf}" for module in modules for leaf in affine]


def missing_keys(canonical: Mapping[str, Tensor], architecture: Architecture) -> list[str]:
    """Return what a whole network of this architecture has and a canonical state dict has not."""
    missing = [key for key in expected_keys(architecture) if key not in canonical]
    backbone = [key for key in canonical if key.startswith("backbone.")]
    if not backbone:
        return [*missing, "backbone.*"]
    return missing + _missing_in_resnet(canonical, architecture) + _missing_in_gcvit(backbone, architecture)


def _missing_in_resnet(canonical: Mapping[str, Tensor], architecture: Architecture) -> list[str]:
    blocks: dict[int, set[int]] = {}
    for key in canonical:
        match = re.match(r"backbone\.layer([1-4])\.(\d+)\.conv\d\.", key)
        if match is not None:
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    if not blocks:
        return []
    convs = 3 if any(key.endswith(".conv3.weight") for key in canonical) else 2
    has_statistics = any(key.startswith("backbone.") and key.endswith("running_mean") for key in canonical)
    leaves = ("weight", "bias", "running_mean", "running_var") if has_statistics else ("weight", "bias")
    expected = ["backbone.conv1.weight", *(f"backbone.bn1.{leaf}" for leaf in leaves)]
    for stage in range(1, max(blocks) + 1):
        for block in range(max(blocks.get(stage, {0})) + 1):
            start = f"backbone.layer{stage}.{block}"
            expected += [f"{start}.conv{number}.weight" for number in range(1, convs + 1)]
            expected += [f"{start}.bn{number}.{leaf}" for number in range(1, convs + 1) for leaf in leaves]
            if block == 0 and (stage > 1 or convs == 3):
                expected.append(f"{start}.downsample.0.weight")
                expected += [f"{start}.downsample.1.{leaf}" for leaf in leaves]
    ends = [canonical.get(f"backbone.layer{stage}.0.conv{convs}.weight") for stage in blocks]
    channels = {end.shape[0] for end in ends if end is not None}
    missing = [key for key in expected if key not in canonical]
    needed = [width for width in architecture.neck_in_channels if width not in channels]
    return missing + [f"backbone.* (a stage of {width} channels)" for width in needed]


def _missing_in_gcvit(keys: list[str], architecture: Architecture) -> list[str]:
    """Return what a GCViT of a known size lacks; of an unknown one what a block lacks and others have."""
    variant = VARIANTS.get(architecture.backbone.removeprefix("gc_vit_"))
    if variant is not None:
        last = variant.channels.index(max(architecture.neck_in_channels))
        listed = [key for stage in range(last + 1) for key in stage_shapes(variant, stage)]
        wanted = [f"backbone.{key}" for key in listed if not key.endswith("relative_position_index")]
        wanted += [f"backbone.patch_embed.proj.{leaf}" for leaf in ("weight", "bias")]
        norms = [variant.channels.index(width) for width in architecture.neck_in_channels]
        wanted += [f"backbone.norm{stage}.{leaf}" for stage in norms for leaf in ("weight", "bias")]
        return [key for key in wanted if key not in keys and not is_unread(key, last)]
    blocks: dict[str, dict[str, set[str]]] = {}
    for key in keys:
        match = re.fullmatch(r"(backbone\.levels\.\d+\.blocks)\.(\d+)\.(.+)", key)
        if match is not None and not match[3].endswith("relative_position_index"):
            blocks.setdefault(match[1], {}).setdefault(match[2], set()).add(match[3])
    missing: list[str] = []
    for level, found in blocks.items():
        names = set().union(*found.values())
        missing += [f"{level}.{block}.{name}" for block, own in found.items() for name in sorted(names - own)]
    return missing


def _layer_modules(layer: str, attention: str, norms: int) -> list[str]:
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return [
        *(f"{layer}.{attention}.{part}" for part in parts),
        *(f"{layer}.norms.{i}" for i in range(norms)),
        f"{layer}.ffn.layers.0.0",
        f"{layer}.ffn.layers.1",
    ]
