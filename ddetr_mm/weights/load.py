"""Filling a model from a checkpoint of any format, by name, with an account of every key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.architecture import backbone_kind, describe_backbone
from ddetr_mm.weights.backbone import fill_backbone
from ddetr_mm.weights.checkpoint import Checkpoint
from ddetr_mm.weights.class_columns import numbered_by_position
from ddetr_mm.weights.read import read_checkpoint
from ddetr_mm.weights.report import LoadReport
from ddetr_mm.weights.surgery import ColumnPlan, plan_columns, same_classes

_CLASS_KEY = re.compile(r"bbox_head\.cls_branches\.\d+\.(weight|bias)")
_COUNTERS = (".num_batches_tracked", ".relative_position_index")


def load_for_model(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    strict: bool = False,
) -> LoadReport:
    """Fill a detector with the weights of a checkpoint.

    Keys are paired by name. What does not fit in size is left at its initial values and reported; the class
    head is carried over class by class where the file's classes and ``class_names`` are both known.

    Args:
        model: mmdet's ``DeformableDETR`` or ours, possibly wrapped for parallel training.
        path: a checkpoint of any format (:func:`ddetr_mm.weights.read_checkpoint`).
        class_names: one name for every column of the model's class head, the background's included.
        strict: raise unless every value of the model came from the file and every weight of the file's
            network went into the model. Keys of no Deformable DETR (a criterion's buffers …) may be left.

    Returns:
        The account; ``mapped`` leads from the file's keys to the model's.

    Raises:
        WeightsError: when the file cannot be read, holds another backbone than the model, has nothing in
            common with it, or with ``strict`` when something is left over.
    """
    checkpoint = read_checkpoint(path)
    return fill_model(model, checkpoint, class_names=class_names, strict=strict)


def fill_model(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    class_names: Sequence[str] | None = None,
    strict: bool = False,
) -> LoadReport:
    """As :func:`load_for_model`, from a checkpoint already in memory.

    Raises:
        WeightsError: nothing in it fits the model, or what is missing may not be.
    """
    network = unwrapped(model)
    target: dict[str, Tensor] = {
        key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)
    }
    _refuse_other_backbone(checkpoint, target)
    _refuse_other_scheme(checkpoint, network)
    report = LoadReport(
        str(checkpoint.path), type(network).__name__, source_format=checkpoint.format, target_format="model"
    )
    report.notes = list(checkpoint.notes)
    report.aliases = dict(checkpoint.trace.aliases)
    report.dropped = dict(checkpoint.trace.dropped)
    report.unexpected = list(checkpoint.trace.unexpected)
    file_keys = {ours: key for key, targets in checkpoint.trace.mapped.items() for ours in targets}

    plan = _column_plan(checkpoint, target, class_names, report)
    head = getattr(network, "bbox_head", None)
    if plan is None and getattr(head, "background_column", False) and numbered_by_position(checkpoint.meta):
        plan = plan_columns((), class_names or ())
        report.notes.append(
            "the file numbers its classes by position, the model by category id, and there are no names to"
            " match them by: the class head keeps its initial values"
        )
    remaining = dict(checkpoint.state_dict)
    backbone = getattr(network, "backbone", None)
    if isinstance(backbone, nn.Module) and hasattr(backbone, "load_backbone_state_dict"):
        part = {key: remaining.pop(key) for key in [*remaining] if key.startswith("backbone.")}
        if part:
            fill_backbone(backbone, part, report, prefix="backbone.", file_keys=file_keys)
    loaded = _copy_by_name(remaining, target, plan, report, file_keys)
    _report_missing(target, loaded, checkpoint, report)
    taken = [key for targets in report.mapped.values() for key in targets]
    # Biases of the attention alone do not count: they have the same size at any width.
    if not any(key.startswith(("encoder.", "decoder.")) and target[key].dim() > 1 for key in taken):
        raise WeightsError(
            Problem(
                f"has nothing that fits the model (hidden width {checkpoint.architecture.hidden_dim})",
                file=checkpoint.path,
                value=f"{len(report.reshaped)} keys of other sizes",
                mend="use the spec it was trained with (model.hidden_dim, model.dim_feedforward …)",
            )
        )
    _scheme_notes(network, checkpoint, report)
    unused = set(report.unexpected) - set(checkpoint.trace.unexpected)
    if strict and (report.missing or report.reshaped or report.carried_over or unused):
        what = "does not fit the model exactly:\n" + report.summary()
        raise WeightsError(Problem(what, file=checkpoint.path))
    return report


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers for parallel training."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _refuse_other_backbone(checkpoint: Checkpoint, target: Mapping[str, Tensor]) -> None:
    theirs = {key: tuple(value.shape) for key, value in checkpoint.state_dict.items()}
    ours = {key: tuple(value.shape) for key, value in target.items()}
    kinds = backbone_kind(theirs)[0], backbone_kind(ours)[0]
    has_backbone = any(key.startswith("backbone.") for key in theirs)
    matrices = {key: shape for key, shape in theirs.items() if key.startswith("backbone.") and len(shape) > 1}
    shared = any(ours.get(key) == shape for key, shape in matrices.items())
    if has_backbone and (not shared or ("unknown" not in kinds and kinds[0] != kinds[1])):
        raise WeightsError(
            Problem(
                f"holds another backbone than the model: {describe_backbone(theirs)} in the file,"
                f" {describe_backbone(ours)} in the model",
                file=checkpoint.path,
                where="model.backbone",
                mend="set model.backbone to the checkpoint's, or give a checkpoint of this backbone",
            )
        )


def _refuse_other_scheme(checkpoint: Checkpoint, network: nn.Module) -> None:
    two_stage = getattr(network, "as_two_stage", None)
    if isinstance(two_stage, bool) and two_stage != checkpoint.architecture.two_stage:
        if two_stage:
            what, mend = "is no two-stage model, but the network is", "use a model without as_two_stage"
        else:
            what = "is a two-stage model (the encoder proposes the boxes), which a spec has no words for"
            mend = "convert it with `ddetr-mm weights … --to mmdet` and use it in an mmdet config"
        raise WeightsError(Problem(what, file=checkpoint.path, mend=mend))


def _column_plan(
    checkpoint: Checkpoint,
    target: Mapping[str, Tensor],
    class_names: Sequence[str] | None,
    report: LoadReport,
) -> ColumnPlan | None:
    """How the class head is carried over, or None when its tensors are taken as they are."""
    head = target.get("bbox_head.cls_branches.0.weight")
    if head is None or checkpoint.architecture.num_classes is None:
        return None
    columns, there = head.shape[0], checkpoint.architecture.num_classes
    if class_names is not None and len(class_names) != columns:
        raise WeightsError(
            Problem(
                f"{len(class_names)} class names were given for a class head of {columns} columns",
                mend="give one name a column, the background's included",
            )
        )
    names = checkpoint.meta.class_names
    if names is not None and class_names is not None:
        return None if same_classes(names, class_names) else plan_columns(names, class_names)
    if columns != there:
        unknown = "the file's" if names is None else "the model's"
        report.notes.append(
            f"the class head has {there} columns in the file and {columns} in the model, and {unknown}"
            " classes are not known by name: it keeps its initial values"
        )
    return None


def _copy_by_name(
    tensors: Mapping[str, Tensor],
    target: dict[str, Tensor],
    plan: ColumnPlan | None,
    report: LoadReport,
    file_keys: Mapping[str, str],
) -> set[str]:
    """Copy what fits; returns the model's keys that are accounted for."""
    done: set[str] = set()
    fresh = {}
    for key, value in tensors.items():
        file_key = file_keys.get(key, key)
        place = target.get(key)
        if place is None:
            if key.endswith(_COUNTERS):
                report.dropped[file_key] = "a buffer the model makes itself"
            elif re.fullmatch(r"neck\..+\.conv\.bias", key) and not bool(torch.count_nonzero(value)):
                report.dropped[file_key] = "zero bias of a neck that has none in the model"
            else:
                report.unexpected.append(file_key)
            continue
        done.add(key)
        if plan is not None and _CLASS_KEY.fullmatch(key) and value.shape[1:] == place.shape[1:]:
            # Branches shared by all layers are one tensor: read it before the first copy changes it.
            fresh[key] = _carried(value, place, plan)
            report.carried_over[key] = plan.describe()
        elif value.shape != place.shape:
            report.reshaped[key] = (tuple(value.shape), tuple(place.shape))
        else:
            fresh[key] = value
            report.mapped.setdefault(file_key, []).append(key)
    with torch.no_grad():
        for key, value in fresh.items():
            target[key].copy_(value)
    return done


def _carried(value: Tensor, place: Tensor, plan: ColumnPlan) -> Tensor:
    """The model's rows with those of the shared classes replaced by the file's."""
    result = place.detach().clone()
    for source, column in plan.pairs:
        result[column] = value[source].to(result)
    return result


def _report_missing(
    target: Mapping[str, Tensor], loaded: set[str], checkpoint: Checkpoint, report: LoadReport
) -> None:
    accounted = loaded | {key for targets in report.mapped.values() for key in targets}
    accounted |= set(report.reshaped) | set(report.carried_over) | set(report.filled) | set(report.missing)
    for key, place in target.items():
        if key in accounted:
            continue
        if key.endswith(_COUNTERS):
            report.filled[key] = "left as the model made it"
        elif re.fullmatch(r"neck\..+\.conv\.bias", key) and not checkpoint.architecture.neck_bias:
            with torch.no_grad():
                place.zero_()
            report.filled[key] = "zeros: the source's neck has no bias"
        else:
            report.missing.append(key)


def _scheme_notes(network: nn.Module, checkpoint: Checkpoint, report: LoadReport) -> None:
    """What differs between file and model without showing in any shape."""
    meta = checkpoint.meta
    zeroed = getattr(network, "zero_padded_values", None)
    if isinstance(zeroed, bool) and zeroed != meta.zero_padded_values:
        report.notes.append(
            "the weights were made with attention values at padded positions"
            f" {_zeroed(meta.zero_padded_values)}; the model has them {_zeroed(zeroed)}"
            " (ddetr_mm.zero_padded_values)"
        )
    refine = getattr(network, "with_box_refine", None)
    if isinstance(refine, bool) and refine != meta.with_box_refine:
        report.notes.append(
            "the weights were made "
            + ("with" if meta.with_box_refine else "without")
            + " box refinement, the model is the other way (model.with_box_refine)"
        )
    dilations = getattr(getattr(network, "backbone", None), "dilations", None)
    if meta.dilation is not None and dilations is not None and meta.dilation != (max(dilations) > 1):
        report.notes.append(
            "the weights were made "
            + ("with" if meta.dilation else "without")
            + " a dilated last stage of the backbone, the model is the other way (model.dilation)"
        )


def _zeroed(value: bool) -> str:
    return "zeroed" if value else "as they are"
