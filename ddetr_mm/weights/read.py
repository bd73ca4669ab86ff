"""From a file to a :class:`~ddetr_mm.weights.checkpoint.Checkpoint`: the reading half of the passport."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.architecture import Architecture, infer_architecture
from ddetr_mm.weights.checkpoint import (
    META_KEY,
    ZERO_PADDED_VALUES,
    Checkpoint,
    CheckpointInfo,
    CheckpointMeta,
    column_ids,
    is_filler,
    meta_from_dict,
)
from ddetr_mm.weights.coco_names import NUM_COLUMNS, coco_column_names
from ddetr_mm.weights.config_text import model_settings
from ddetr_mm.weights.detect import FoundWeights, find_weights
from ddetr_mm.weights.key_engine import KeyTrace, to_canonical
from ddetr_mm.weights.key_maps import HF
from ddetr_mm.weights.pickle_names import InertObject
from ddetr_mm.weights.refusals import short_names
from ddetr_mm.weights.safe_read import RawFile, read_raw


def read_checkpoint(path: str | Path, *, check_finite: bool = True) -> Checkpoint:
    """Read a detector's checkpoint of any known format.

    Args:
        path: a TAO ``.pth``, an original release, an mmdet ``.pth``, a safetensors file of one of these, or
            a Hugging Face folder.
        check_finite: refuse weights that hold NaN or infinity.

    Returns:
        The weights under canonical names. Tensors may be backed by the file (memory-mapped, copy on
        write): changing them never changes the file.

    Raises:
        WeightsError: when the file cannot be read safely, is no Deformable DETR, or has broken weights.
    """
    raw = read_raw(path)
    found = find_weights(raw)
    canonical, trace = to_canonical(found.state_dict, found.table)
    _name_as_in_file(trace, found)
    if not canonical:
        raise WeightsError(Problem("holds no key that fits a Deformable DETR", file=path))
    if raw.kind != "torch" or found.table is HF:
        _restore_shared_branches(canonical, trace)
    if check_finite:
        refuse_non_finite(raw.path, canonical)
    meta, architecture, notes = _interpret(raw, found, canonical, trace)
    if trace.differing_aliases:
        notes.append(
            f"{len(trace.differing_aliases)} repeated keys differ from what they repeat"
            f" ({short_names(trace.differing_aliases, 2)}); the values under the main names are used"
        )
    return Checkpoint(canonical, found.table.name, meta, architecture, raw.path, trace, notes)


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """Tell a checkpoint's format, classes and structure without using its weights.

    PyTorch files are memory-mapped: little more than their index is read.

    Raises:
        WeightsError: as :func:`read_checkpoint`, except that non-finite weights go unnoticed.
    """
    checkpoint = read_checkpoint(path, check_finite=False)
    meta = checkpoint.meta
    return CheckpointInfo(
        path=checkpoint.path,
        format=checkpoint.format,
        class_names=meta.class_names,
        category_ids=meta.category_ids,
        num_classes=meta.num_classes,
        zero_padded_values=meta.zero_padded_values,
        label_mode=meta.label_mode,
        background_column=meta.background_column,
        architecture=checkpoint.architecture,
        meta=meta,
        notes=tuple(checkpoint.notes),
    )


def refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise a :class:`WeightsError` that names the keys holding NaN or infinity, if any do."""
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not _is_finite(value)]
    if broken:
        raise WeightsError(
            Problem(
                f"holds weights that are NaN or infinite: {short_names(broken)}",
                file=path,
                mend="the run that wrote it had diverged: use an earlier checkpoint",
            )
        )


def _is_finite(value: Tensor) -> bool:
    if value.numel() == 0:
        return True
    # Both ends are NaN as soon as one value is; unlike isfinite() this needs no memory of the tensor's size.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value))


def _name_as_in_file(trace: KeyTrace, found: FoundWeights) -> None:
    """Put the file's own keys into a trace made with unwrapped ones."""
    names = found.original_keys
    if not names:
        return
    trace.mapped = {names.get(key, key): targets for key, targets in trace.mapped.items()}
    trace.unexpected = [names.get(key, key) for key in trace.unexpected]
    trace.aliases = {names.get(key, key): names.get(target, target) for key, target in trace.aliases.items()}
    trace.differing_aliases = [names.get(key, key) for key in trace.differing_aliases]


def _restore_shared_branches(canonical: dict[str, Tensor], trace: KeyTrace) -> None:
    """Give every decoder layer its prediction branches where the file keeps only the first of equal ones.

    safetensors files hold no tensor twice, so Hugging Face leaves out branches that repeat the first.
    """
    layers = {key.split(".")[2] for key in canonical if key.startswith("decoder.layers.")}
    count = len(layers) + ("memory_trans_fc.weight" in canonical)
    sources = {target: key for key, targets in trace.mapped.items() for target in targets}
    for kind in ("cls", "reg"):
        prefix = f"bbox_head.{kind}_branches"
        first = {key: value for key, value in canonical.items() if key.startswith(f"{prefix}.0.")}
        for index in range(1, count):
            for key, value in first.items():
                target = f"{prefix}.{index}." + key.removeprefix(f"{prefix}.0.")
                if target not in canonical:
                    canonical[target] = value
                    trace.mapped[sources[key]].append(target)


def _interpret(
    raw: RawFile, found: FoundWeights, canonical: dict[str, Tensor], trace: KeyTrace
) -> tuple[CheckpointMeta, Architecture, list[str]]:
    """Metadata and structure: what the file says where it says something, else what its format means."""
    format_name = found.table.name
    notes: list[str] = []
    hints = _hints(raw, found)
    own = _own_meta(raw, found)
    refine = hints.get("with_box_refine")
    if isinstance(own.get("with_box_refine"), bool):
        refine = own["with_box_refine"]
    if refine is None and "refine" in trace.used_alias:
        refine = True
    heads = _count(own.get("num_heads")) or _count(hints.get("num_heads"))
    architecture = infer_architecture(canonical, with_box_refine=refine, num_heads=heads)
    columns = architecture.num_classes
    names = _class_names(raw, found, columns, notes)
    meta = CheckpointMeta(
        source_format=format_name,
        zero_padded_values=hints.get("zero_padded_values", ZERO_PADDED_VALUES[format_name]),
        label_mode="contiguous",
        num_classes=columns,
        class_names=names,
        with_box_refine=architecture.with_box_refine,
        two_stage=architecture.two_stage,
        neck_bias=architecture.neck_bias,
        num_heads=heads,
        dilation=hints.get("dilation"),
        num_queries=architecture.num_queries or _count(hints.get("num_queries")),
        epoch=_epoch(found.extras),
    )
    meta = _label_convention(format_name, found, meta)
    meta = meta_from_dict(own, meta)
    meta = replace(meta, num_classes=columns)
    if meta.class_names is not None and columns is not None and len(meta.class_names) != columns:
        notes.append(f"{len(meta.class_names)} class names for {columns} columns: the names are not used")
        meta = replace(meta, class_names=None, category_ids=None)
    if meta.category_ids is None:
        meta = replace(meta, category_ids=column_ids(meta.class_names, meta.label_mode))
    return meta, architecture, [*notes, *architecture.notes]


def _count(value: Any) -> int | None:
    """A positive whole number out of an untrusted file, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _own_meta(raw: RawFile, found: FoundWeights) -> Mapping[str, Any]:
    """What a file written by this package says about itself."""
    candidates: list[Any] = [found.extras.get(META_KEY), raw.config.get(META_KEY)]
    meta = found.extras.get("meta")
    if isinstance(meta, Mapping):
        candidates.append(meta.get(META_KEY))
    text = raw.metadata.get(META_KEY)
    if text:
        try:
            candidates.append(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise WeightsError(Problem(f"has damaged metadata: {error}", file=raw.path)) from error
    return next((dict(found_meta) for found_meta in candidates if isinstance(found_meta, Mapping)), {})


def _hints(raw: RawFile, found: FoundWeights) -> dict[str, Any]:
    """Settings that a format's own bookkeeping tells: refinement, heads, dilation, zeroed padding."""
    hints: dict[str, Any] = {}
    if raw.config:
        hints["with_box_refine"] = bool(raw.config.get("with_box_refine", False))
        hints["num_heads"] = raw.config.get("encoder_attention_heads", 8)
        hints["dilation"] = _hf_dilation(raw.config)
        queries = "two_stage_num_proposals" if raw.config.get("two_stage") else "num_queries"
        hints["num_queries"] = raw.config.get(queries, 300)
        return hints
    arguments = found.extras.get("args")
    if isinstance(arguments, InertObject) and isinstance(arguments.state, Mapping):
        hints["num_heads"] = arguments.state.get("nheads")
        hints["num_queries"] = arguments.state.get("num_queries")
        if isinstance(arguments.state.get("dilation"), bool):
            hints["dilation"] = arguments.state["dilation"]
    meta = found.extras.get("meta")
    if isinstance(meta, Mapping):
        model = model_settings(meta.get("cfg") or meta.get("config"))
        if isinstance(model.get("with_box_refine"), bool):
            hints["with_box_refine"] = model["with_box_refine"]
        if "num_queries" in model:
            hints["num_queries"] = model["num_queries"]
        if model.get("type") == "TAODeformableDETR":
            hints["zero_padded_values"] = bool(model.get("zero_padded_values", False))
        backbone = model.get("backbone")
        if isinstance(backbone, Mapping):
            hints["dilation"] = backbone.get("type") == "TorchvisionDilatedResNet"
        attention = model
        for key in ("encoder", "layer_cfg", "self_attn_cfg"):
            attention = attention.get(key) or {} if isinstance(attention, Mapping) else {}
        if isinstance(attention, Mapping):
            hints["num_heads"] = attention.get("num_heads")
    return hints


def _hf_dilation(config: Mapping[str, Any]) -> bool:
    """Either spelling of it: by name, or as the stride of the backbone's last stage."""
    backbone = config.get("backbone_config")
    stride = backbone.get("output_stride") if isinstance(backbone, Mapping) else None
    return bool(config.get("dilation", False)) or stride == 16


def _class_names(
    raw: RawFile, found: FoundWeights, columns: int | None, notes: list[str]
) -> tuple[str, ...] | None:
    """One name a column, from wherever the format keeps them."""
    if found.table.name == "hf":
        return _hf_names(raw.config, columns)
    meta = found.extras.get("meta")
    if isinstance(meta, Mapping):
        described = meta.get("dataset_meta")
        names = described.get("classes") if isinstance(described, Mapping) else None
        names = names or meta.get("CLASSES")
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return tuple(names)
    if found.table.name == "official" and columns == NUM_COLUMNS:
        notes.append("91 columns are taken for COCO's category ids")
        return coco_column_names()
    return None


def _hf_names(config: Mapping[str, Any], columns: int | None) -> tuple[str, ...] | None:
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or columns is None or len(labels) != columns:
        return None
    names = [labels.get(str(column)) for column in range(columns)]
    # transformers invents LABEL_0, LABEL_1 … where nobody gave names.
    if any(not isinstance(name, str) for name in names) or names == [f"LABEL_{i}" for i in range(columns)]:
        return None
    return tuple(str(name) for name in names)


def _label_convention(format_name: str, found: FoundWeights, meta: CheckpointMeta) -> CheckpointMeta:
    """What a column of the class head means in a format that says nothing about it itself."""
    names = meta.class_names
    if format_name in ("tao", "official"):
        return replace(meta, label_mode="category_id", background_column=0)
    if format_name == "hf":
        if (meta.num_classes == NUM_COLUMNS) if names is None else is_filler(names[0]):
            return replace(meta, label_mode="category_id", background_column=0)
        return meta
    described = found.extras.get("meta")
    described = described.get("dataset_meta") if isinstance(described, Mapping) else None
    ids = described.get("category_ids") if isinstance(described, Mapping) else None
    if isinstance(ids, (list, tuple)) and all(number is None or isinstance(number, int) for number in ids):
        by_id = all(number is None or number == column for column, number in enumerate(ids))
        if by_id and ids and ids[0] is None:
            return replace(meta, label_mode="category_id", background_column=0, category_ids=tuple(ids))
        return replace(meta, category_ids=tuple(ids))
    return meta


def _epoch(extras: Mapping[str, Any]) -> int | None:
    meta = extras.get("meta")
    for place in (extras, meta if isinstance(meta, Mapping) else {}):
        epoch = place.get("epoch")
        if isinstance(epoch, int) and not isinstance(epoch, bool):
            return epoch
    return None
