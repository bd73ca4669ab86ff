"""One checkpoint format into another: the writing half of the passport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.architecture import Architecture, expected_keys
from ddetr_mm.weights.checkpoint import FORMATS, ZERO_PADDED_VALUES, Checkpoint, column_ids
from ddetr_mm.weights.hf_config import hf_config
from ddetr_mm.weights.key_engine import KeyTrace, from_canonical
from ddetr_mm.weights.key_maps import TABLES
from ddetr_mm.weights.read import read_checkpoint
from ddetr_mm.weights.report import LoadReport
from ddetr_mm.weights.write import spec_as_plain, write_checkpoint


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    spec: Any = None,
    class_names: Sequence[str] | None = None,
) -> LoadReport:
    """Read a checkpoint of any format and write it in another.

    Values are never changed: a way there and back gives the same bits. What the formats mean differently
    (zeroed padding, what a column of the class head stands for) is carried in the written file's metadata.

    Args:
        src: file or folder to read.
        dst: file to write; for ``hf`` a folder. ``….safetensors`` writes a safetensors file of the format.
        to: ``mmdet``, ``tao``, ``official`` or ``hf``.
        spec: the experiment spec (dataclass or mapping) the weights belong to: stored without secrets, and
            used for what shapes do not tell (number of heads).
        class_names: a name for every column of the class head, in place of those in the file.

    Returns:
        The report of every key.

    Raises:
        WeightsError: when the source cannot be read or the target format cannot hold the network.
    """
    src, dst = Path(src), Path(dst)
    if to not in FORMATS:
        raise WeightsError(Problem("is no format", where="--to", value=to, allowed=FORMATS))
    checkpoint = read_checkpoint(src)
    checkpoint = _completed(checkpoint, spec_as_plain(spec), class_names)
    _check_target(checkpoint, to)
    config = hf_config(checkpoint, checkpoint.meta.spec) if to == "hf" else None

    canonical, filled, dropped = _neck_bias(checkpoint, to)
    tensors, trace = from_canonical(
        canonical,
        TABLES[to],
        with_box_refine=checkpoint.meta.with_box_refine,
        two_stage=checkpoint.meta.two_stage,
    )
    write_checkpoint(dst, to, tensors, checkpoint.meta, config)
    report = compose_report(checkpoint, trace, filled, dropped)
    report.target, report.target_format = str(dst), to
    report.notes += _spec_notes(checkpoint) + _difference_notes(checkpoint, to)
    return report


def compose_report(
    checkpoint: Checkpoint, trace: KeyTrace, filled: dict[str, str], dropped: dict[str, str]
) -> LoadReport:
    """One account of both steps: file → canonical names → target names.

    Args:
        checkpoint: what was read, with the trace of the first step.
        trace: the trace of the second step.
        filled: canonical key → value put there before the second step.
        dropped: canonical key → why it was left out before the second step.
    """
    report = LoadReport(str(checkpoint.path), source_format=checkpoint.format)
    report.unexpected = list(checkpoint.trace.unexpected)
    report.aliases = dict(checkpoint.trace.aliases)
    report.dropped = dict(checkpoint.trace.dropped)
    for key, middles in checkpoint.trace.mapped.items():
        targets = [target for middle in middles for target in trace.mapped.get(middle, [])]
        reasons = [reason for middle in middles if (reason := (dropped | trace.dropped).get(middle))]
        if targets:
            report.mapped[key] = targets
        elif reasons:
            report.dropped[key] = reasons[0]
        else:
            report.unexpected.append(key)
    report.filled = {target: value for key, value in filled.items() for target in trace.mapped[key]}
    report.missing = [
        key for key in expected_keys(checkpoint.architecture) if key not in checkpoint.state_dict
    ]
    if not any(key.startswith("backbone.") for key in checkpoint.state_dict):
        report.missing.append("backbone.*")
    report.notes = list(checkpoint.notes)
    return report


def _completed(
    checkpoint: Checkpoint, spec: dict[str, Any] | None, class_names: Sequence[str] | None
) -> Checkpoint:
    """The checkpoint with what the caller knows beyond the file."""
    meta = checkpoint.meta
    if spec is not None:
        meta = replace(meta, spec=spec)
        checkpoint = _with_heads(checkpoint, spec)
        meta = replace(meta, num_heads=checkpoint.meta.num_heads)
        dilation = (spec.get("model") or {}).get("dilation")
        if isinstance(dilation, bool):
            meta = replace(meta, dilation=dilation)
    if class_names is not None:
        names = tuple(class_names)
        if meta.num_classes is not None and len(names) != meta.num_classes:
            raise WeightsError(
                Problem(
                    f"has {meta.num_classes} class columns, but {len(names)} class names were given",
                    file=checkpoint.path,
                    mend="give one name a column, the background's included",
                )
            )
        meta = replace(meta, class_names=names, category_ids=column_ids(names, meta.label_mode))
    return replace(checkpoint, meta=meta)


def _with_heads(checkpoint: Checkpoint, spec: dict[str, Any]) -> Checkpoint:
    heads = (spec.get("model") or {}).get("nheads")
    found = checkpoint.architecture
    if not isinstance(heads, int) or heads < 1 or heads == found.num_heads:
        return checkpoint
    changed = replace(
        found,
        num_heads=heads,
        enc_points=_points(checkpoint, "encoder.layers.0.self_attn", heads),
        dec_points=_points(checkpoint, "decoder.layers.0.cross_attn", heads),
    )
    return replace(checkpoint, architecture=changed, meta=replace(checkpoint.meta, num_heads=heads))


def _points(checkpoint: Checkpoint, attention: str, heads: int) -> int | None:
    weight = checkpoint.state_dict.get(f"{attention}.attention_weights.weight")
    if weight is None:
        return None
    points, rest = divmod(weight.shape[0], heads * checkpoint.architecture.num_feature_levels)
    return None if rest else points


def _check_target(checkpoint: Checkpoint, to: str) -> None:
    if to == "tao" and checkpoint.architecture.two_stage:
        raise WeightsError(
            Problem(
                "is a two-stage model, which the reference does not have",
                file=checkpoint.path,
                allowed="mmdet, official, hf",
            )
        )


def _neck_bias(checkpoint: Checkpoint, to: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Add zero biases to a neck that has none where the target needs them; take them out again for mmdet."""
    canonical = dict(checkpoint.state_dict)
    filled: dict[str, str] = {}
    dropped: dict[str, str] = {}
    weights = [key for key in canonical if key.startswith("neck.") and key.endswith(".conv.weight")]
    for key in weights:
        bias = key.removesuffix("weight") + "bias"
        if bias not in canonical and to != "mmdet":
            canonical[bias] = canonical[key].new_zeros(canonical[key].shape[0])
            filled[bias] = "zeros: the source's neck has no bias"
        unwanted = to == "mmdet" and not checkpoint.meta.neck_bias and bias in canonical
        if unwanted and not bool(torch.count_nonzero(canonical[bias])):
            del canonical[bias]
            dropped[bias] = "zeros that stood for the missing bias of the original neck"
    return canonical, filled, dropped


def _difference_notes(checkpoint: Checkpoint, to: str) -> list[str]:
    """What the target's own implementation would make of these weights otherwise than their origin did."""
    notes: list[str] = []
    if to != "mmdet" and checkpoint.meta.zero_padded_values != ZERO_PADDED_VALUES[to]:
        notes.append(
            "in batches with padding the target's own implementation predicts something else: it"
            + (" zeroes" if ZERO_PADDED_VALUES[to] else " does not zero")
            + " attention values there, the weights were made the other way"
        )
    if to in ("tao", "official") and checkpoint.meta.label_mode == "contiguous":
        notes.append(
            "a column of the class head is a position in the list of classes; the target's own implementation"
            " takes it for a category id (this package reads which it is from the file)"
        )
    if to == "hf" and checkpoint.meta.num_heads is None:
        notes.append(
            f"{checkpoint.architecture.num_heads} attention heads are assumed: weights tell only heads x"
            " points; a spec with model.nheads settles it"
        )
    return notes


def _spec_notes(checkpoint: Checkpoint) -> list[str]:
    """Where the spec given with a conversion and the weights disagree."""
    spec = checkpoint.meta.spec
    if spec is None:
        return []
    model, dataset = spec.get("model") or {}, spec.get("dataset") or {}
    found: Architecture = checkpoint.architecture
    # A backbone of the spec's own section takes the place of model.backbone.
    own_backbone = bool((spec.get("ddetr_mm") or {}).get("backbone"))
    backbone = None if own_backbone or found.backbone == "unknown" else found.backbone
    pairs = (
        ("dataset.num_classes", dataset.get("num_classes"), found.num_classes),
        ("model.num_queries", model.get("num_queries"), found.num_queries),
        ("model.num_feature_levels", model.get("num_feature_levels"), found.num_feature_levels),
        ("model.enc_layers", model.get("enc_layers"), found.enc_layers),
        ("model.dec_layers", model.get("dec_layers"), found.dec_layers),
        ("model.hidden_dim", model.get("hidden_dim"), found.hidden_dim),
        ("model.with_box_refine", model.get("with_box_refine"), found.with_box_refine),
        ("model.backbone", model.get("backbone"), backbone),
    )
    return [
        f"the spec says {key} = {said}, the weights have {there}"
        for key, said, there in pairs
        if said is not None and there is not None and said != there
    ]
