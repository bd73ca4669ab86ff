"""Load a checkpoint into a model, a backbone, or a resumed run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.checkpoint import Checkpoint, backbone_kind, describe_backbone
from ddetr_mm.weights.class_columns import ColumnPlan, numbered_by_position, plan_columns, same_classes
from ddetr_mm.weights.formats import to_canonical
from ddetr_mm.weights.read import (
    find_weights,
    is_backbone_alone,
    plain_state_dict,
    read_checkpoint,
    refuse_non_finite,
    strip_wrappers,
)
from ddetr_mm.weights.report import LoadReport
from ddetr_mm.weights.safe_read import read_raw, short_names

# --- Whether a training can go on from a file: told before anything of it is taken over ---
# Resuming takes over weights, optimizer and schedules as they are: unlike with starting weights nothing can be
# left out or carried over.

NEEDED = ("state_dict", "optimizer", "meta")
COUNTS = ("epoch", "iter")
LIGHTNING = "optimizer_states"

Shapes = Mapping[str, tuple[int, ...]]

_START_WITH = "start a new training from its weights with train.pretrained_model_path"
_CLASS_HEAD = "bbox_head.cls_branches.0.weight"


def require_resumable(path: str | Path, *, where: str) -> None:
    """Check, before anything is built, that mmengine can resume from a file.

    Args:
        path: the checkpoint.
        where: the spec key that named it, for messages.

    Raises:
        WeightsError: when it cannot be read, asks for code to be run, or holds weights alone.
    """
    content = read_raw(path).payload
    found = content if isinstance(content, Mapping) else {}
    missing = [name for name in NEEDED if not isinstance(found.get(name), Mapping)]
    if not missing:
        missing = [f"meta.{name}" for name in COUNTS if not isinstance(found["meta"].get(name), int)]
    if missing:
        whose = (
            " (it is the reference's, whose schedules are PyTorch Lightning's)" if LIGHTNING in found else ""
        )
        raise WeightsError(
            Problem(
                f"holds no training to go on with: {', '.join(missing)} is missing{whose}",
                file=path,
                where=where,
                allowed="a checkpoint written by `ddetr-mm train`",
                hint="to start anew from its weights, name it as train.pretrained_model_path",
            )
        )


def require_same_network(path: str | Path, model: nn.Module, *, where: str) -> None:
    """Check that a checkpoint to resume from holds the very network of the run.

    Args:
        path: the checkpoint, see :func:`require_resumable`.
        model: the network of the run, possibly wrapped for parallel training.
        where: what named the file, for messages.

    Raises:
        WeightsError: when it holds the weights of another network; told is what differs and what to do.
    """
    raw = read_raw(path)
    theirs = _shapes(raw.payload["state_dict"])
    ours = _shapes(unwrapped(model).state_dict())
    if theirs == ours:
        return
    difference, key = _difference(theirs, ours)
    raise WeightsError(
        Problem(
            f"cannot be resumed: {difference}",
            file=raw.path,
            where=where,
            hint=f"resume with the spec that the run was started with ({key}), name an empty results_dir, or"
            f" {_START_WITH}",
        )
    )


def _shapes(state_dict: Mapping[str, Any]) -> Shapes:
    return {
        key.removeprefix("module."): tuple(value.shape)
        for key, value in state_dict.items()
        if isinstance(value, Tensor)
    }


def _difference(theirs: Shapes, ours: Shapes) -> tuple[str, str]:
    """What differs between file and model in words, and the spec field to look at."""
    backbones = describe_backbone(theirs), describe_backbone(ours)
    parts = [{key: shape for key, shape in one.items() if "backbone." in key} for one in (theirs, ours)]
    if parts[0] != parts[1]:
        fitting = sum(parts[1].get(key) == shape for key, shape in parts[0].items())
        detail = f"{backbones[0]} in the file, {backbones[1]} in the model ({fitting} of {len(parts[1])} fit)"
        return f"it holds another backbone than the model: {detail}", "model.backbone"
    columns = theirs.get(_CLASS_HEAD, (0,))[0], ours.get(_CLASS_HEAD, (0,))[0]
    if columns[0] != columns[1]:
        text = f"its class head has {columns[0]} columns, the model's {columns[1]}"
        return text, "dataset.num_classes"
    reshaped = [key for key in theirs if key in ours and theirs[key] != ours[key]]
    lists = [
        ("missing in the file", [key for key in ours if key not in theirs]),
        ("not in the model", [key for key in theirs if key not in ours]),
        (
            "of another size",
            [f"{key} {list(theirs[key])} in the file, {list(ours[key])} in the model" for key in reshaped],
        ),
    ]
    told = [f"{len(keys)} keys {how} ({short_names(keys, 2)})" for how, keys in lists if keys]
    return "it is of another network: " + "; ".join(told), "the section model"


# --- Filling a backbone from a classifier's weights or from the backbone of a whole detector ---

_CLASSIFIER = re.compile(r"(fc|head|classifier|last_linear)\..+")
_PREFIXES = ("", "backbone.", "model.", "encoder.", "model.backbone.", "backbone.0.body.", "body.")


def load_backbone(backbone: nn.Module, path: str | Path) -> LoadReport:
    """Fill a backbone by name.

    Args:
        backbone: mmdet's ResNet, our ``GCViT``, or any module whose names the file has.
        path: torchvision's or timm's ResNet or GCViT, a published GCViT classifier, a state dict of the
            backbone itself, or a whole detector of any format, whose backbone is used.

    Returns:
        The account; keys of the model are those of ``backbone``.

    Raises:
        WeightsError: when the file cannot be read safely, holds another backbone, or nothing that fits.
    """
    raw = read_raw(path)
    state_dict, _extras = plain_state_dict(raw)
    report = LoadReport(str(raw.path), type(backbone).__name__, target_format="backbone")
    tensors, file_keys = _backbone_part(raw, state_dict, report)
    refuse_non_finite(raw.path, tensors)
    fill_backbone(backbone, tensors, report, file_keys=file_keys)
    return report


def _backbone_part(
    raw: Any, state_dict: Mapping[str, Tensor], report: LoadReport
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The backbone's tensors under its own names, and the file's key of each."""
    stripped, original = strip_wrappers(state_dict)
    in_detector = any(key.startswith(("transformer.", "bbox_head.")) for key in stripped)
    for prefix in _PREFIXES:
        part = {key[len(prefix) :]: value for key, value in stripped.items() if key.startswith(prefix)}
        if is_backbone_alone(part) and not in_detector:
            report.source_format = "backbone"
            return part, {key: original.get(prefix + key, prefix + key) for key in part}
    try:
        found = find_weights(raw)
    except WeightsError:
        # No detector of a known format: any module's state dict, used by name as it stands.
        report.source_format = "state dict"
        names = {key: key.removeprefix("backbone.") for key in stripped}
        return (
            {names[key]: value for key, value in stripped.items()},
            {names[key]: original.get(key, key) for key in stripped},
        )
    canonical, trace = to_canonical(found.state_dict, found.table)
    report.source_format = found.table.name
    sources = {ours: key for key, targets in trace.mapped.items() for ours in targets}
    part = {
        key.removeprefix("backbone."): value
        for key, value in canonical.items()
        if key.startswith("backbone.")
    }
    unwrapped_keys = {key: sources[f"backbone.{key}"] for key in part}
    names = {key: found.original_keys.get(source, source) for key, source in unwrapped_keys.items()}
    used = set(names.values())
    for key in state_dict:
        if key not in used:
            report.dropped[key] = "not part of the backbone"
    return part, names


def fill_backbone(
    backbone: nn.Module,
    tensors: Mapping[str, Tensor],
    report: LoadReport,
    *,
    prefix: str = "",
    file_keys: Mapping[str, str] | None = None,
) -> None:
    """Copy tensors into a backbone and add every key to a report.

    A backbone with a method ``load_backbone_state_dict(state_dict)`` (our GCViT, which also adapts position
    tables) is asked to do it itself.

    Args:
        backbone: filled in place.
        tensors: key → tensor; keys begin with ``prefix``.
        report: gets every key.
        prefix: what the report's model keys and ``tensors`` put before the backbone's own names.
        file_keys: key in ``tensors`` → key in the file.

    Raises:
        WeightsError: when the backbones differ or nothing fits.
    """
    names = file_keys or {}
    own = {key: value for key, value in backbone.state_dict().items() if isinstance(value, Tensor)}
    part = {key[len(prefix) :]: value for key, value in tensors.items()}
    if hasattr(backbone, "load_backbone_state_dict"):
        _fill_by_itself(backbone, part, own, report, prefix, names)
        return
    _refuse_other(part, own, report)
    fits = {key: value for key, value in part.items() if key in own and own[key].shape == value.shape}
    for key, value in part.items():
        file_key = names.get(prefix + key, prefix + key)
        if key in fits:
            report.mapped.setdefault(file_key, []).append(prefix + key)
        elif key in own:
            report.reshaped[prefix + key] = (tuple(value.shape), tuple(own[key].shape))
        elif _CLASSIFIER.fullmatch(key):
            report.dropped[file_key] = "the classifier's head"
        else:
            report.unexpected.append(file_key)
    for key in own:
        if key not in part:
            if key.endswith("num_batches_tracked"):
                report.filled[prefix + key] = "left as the model made it"
            else:
                report.missing.append(prefix + key)
    with torch.no_grad():
        for key, value in fits.items():
            own[key].copy_(value)


def _refuse_other(part: Mapping[str, Tensor], own: Mapping[str, Tensor], report: LoadReport) -> None:
    theirs = {f"backbone.{key}": tuple(value.shape) for key, value in part.items()}
    ours = {f"backbone.{key}": tuple(value.shape) for key, value in own.items()}
    kinds = backbone_kind(theirs)[0], backbone_kind(ours)[0]
    fitting = sum(ours.get(key) == shape for key, shape in theirs.items())
    if ("unknown" not in kinds and kinds[0] != kinds[1]) or fitting * 2 < len(ours):
        raise WeightsError(
            Problem(
                f"holds another backbone than the model: {describe_backbone(theirs)} in the file,"
                f" {describe_backbone(ours)} in the model ({fitting} of {len(ours)} keys fit)",
                file=report.source,
                hint="give the weights of this backbone, or choose the file's backbone in the spec",
            )
        )


def _fill_by_itself(
    backbone: Any,
    part: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    report: LoadReport,
    prefix: str,
    names: Mapping[str, str],
) -> None:
    before = {key: tuple(value.shape) for key, value in part.items()}
    theirs = {f"backbone.{key}": shape for key, shape in before.items()}
    ours = {f"backbone.{key}": tuple(value.shape) for key, value in own.items()}
    kinds = backbone_kind(theirs)[0], backbone_kind(ours)[0]
    if "unknown" not in kinds and kinds[0] != kinds[1]:
        _refuse_other(part, own, report)
    try:
        result = backbone.load_backbone_state_dict(dict(part))
    except WeightsError as error:
        found = f"{describe_backbone(theirs)} in the file, {describe_backbone(ours)} in the model"
        raise WeightsError(
            Problem(f"holds another backbone than the model: {found}", file=report.source), *error.problems
        ) from error

    def in_file(key: str) -> str:
        return names.get(prefix + key, prefix + key)

    for source, key in result.mapped.items():
        if key in result.reshaped:
            continue
        report.mapped.setdefault(in_file(source), []).append(prefix + key)
    for key in result.unexpected:
        if _CLASSIFIER.fullmatch(key):
            report.dropped[in_file(key)] = "the classifier's head"
        else:
            report.unexpected.append(in_file(key))
    report.missing += [prefix + key for key in result.missing]
    for key, (there, here) in result.skipped.items():
        report.reshaped[prefix + key] = (tuple(there), tuple(here))
    for key, (there, here) in result.reshaped.items():
        report.carried_over[prefix + key] = f"position table resized from {list(there)} to {list(here)}"
    for key in before:
        if key.endswith("relative_position_index"):
            report.dropped[in_file(key)] = "a buffer the model makes itself"


# --- Filling a model from a checkpoint of any format, by name, with an account of every key ---

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
                hint="use the spec it was trained with (model.hidden_dim, model.dim_feedforward …)",
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
                hint="set model.backbone to the checkpoint's, or give a checkpoint of this backbone",
            )
        )


def _refuse_other_scheme(checkpoint: Checkpoint, network: nn.Module) -> None:
    two_stage = getattr(network, "as_two_stage", None)
    if isinstance(two_stage, bool) and two_stage != checkpoint.architecture.two_stage:
        if two_stage:
            what, hint = "is no two-stage model, but the network is", "use a model without as_two_stage"
        else:
            what = "is a two-stage model (the encoder proposes the boxes), which a spec has no words for"
            hint = "convert it with `ddetr-mm weights … --to mmdet` and use it in an mmdet config"
        raise WeightsError(Problem(what, file=checkpoint.path, hint=hint))


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
                hint="give one name a column, the background's included",
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
