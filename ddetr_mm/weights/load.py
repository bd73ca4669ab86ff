"""Load a checkpoint into a detector or a backbone, and check whether a run can resume from it.

:func:`load_for_model` and :func:`load_backbone` pair keys by name and return a :class:`LoadReport` of every
key. :func:`require_resumable` and :func:`require_same_network` refuse a file to resume from before anything
is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddetr_mm.classes import Columns
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights import gcvit, layouts, scheme
from ddetr_mm.weights.checkpoint import (
    Checkpoint,
    backbone_kinds,
    describe_backbone,
    infer_architecture,
    is_unread,
)
from ddetr_mm.weights.class_columns import CLASS_KEY, HEAD_KEY, ColumnPlan, carried_rows, plan_head
from ddetr_mm.weights.entries import DEFAULT, Entry, Selection, check_storage, choose, tensor_entries
from ddetr_mm.weights.layouts import Found
from ddetr_mm.weights.quantized import quantize_inputs
from ddetr_mm.weights.read import detector_format, read_checkpoint, refuse_non_finite, refuse_odd
from ddetr_mm.weights.report import UNREAD, LoadReport
from ddetr_mm.weights.safe_read import RawFile, read_raw, short_names

Shapes = Mapping[str, tuple[int, ...]]

_COUNTERS = (".num_batches_tracked", ".relative_position_index")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
_COMPUTED = "a buffer that the model computes"
_NECK_BIAS = re.compile(r"neck\..+\.conv\.bias")
_CLASSIFIER = re.compile(r"(fc|head|classifier|last_linear)\..+")

# --- A whole detector ---


def load_for_model(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Columns | None = None,
    strict: bool = False,
    selection: Selection = DEFAULT,
) -> LoadReport:
    """Load a checkpoint into a detector.

    What does not fit in size keeps its initial values and is reported; the class head is loaded class by
    class where the file's classes and ``class_names`` are both known.

    Args:
        model: mmdet's ``DeformableDETR`` or ours, possibly wrapped for parallel training.
        path: a checkpoint of any format (:func:`ddetr_mm.weights.read_checkpoint`).
        class_names: the class of every column of the model's class head, background included, see
            :func:`ddetr_mm.classes.named_columns`.
        strict: raise unless every value of the model came from the file and every weight of the file's
            network went into the model. Keys of no Deformable DETR (such as a criterion's buffers) may be
            left.
        selection: which of several sets of weights to read.

    Returns:
        The report; ``mapped`` leads from the file's keys to the model's.

    Raises:
        WeightsError: the file cannot be read, holds another backbone than the model, has nothing in common
            with it, or with ``strict`` something is left over.
    """
    checkpoint = read_checkpoint(path, selection=selection)
    return fill_model(model, checkpoint, class_names=class_names, strict=strict)


def fill_model(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    class_names: Columns | None = None,
    strict: bool = False,
) -> LoadReport:
    """Load a checkpoint in memory, see :func:`load_for_model`.

    Raises:
        WeightsError: see there.
    """
    network = unwrapped(model)
    target: dict[str, Tensor] = {
        key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)
    }
    _refuse_other_detector(checkpoint, network, target)
    settings = scheme.compare(checkpoint, network)
    if strict:
        WeightsError.collect(scheme.refusals(checkpoint, settings))
    report = LoadReport(
        str(checkpoint.path), type(network).__name__, source_format=checkpoint.format, target_format="model"
    )
    report.notes = list(checkpoint.notes)
    report.aliases = dict(checkpoint.trace.aliases)
    report.dropped = dict(checkpoint.trace.dropped)
    report.unexpected = list(checkpoint.trace.unexpected)
    file_keys = {ours: key for key, targets in checkpoint.trace.mapped.items() for ours in targets}

    plan = None
    if HEAD_KEY in target:
        by_category = bool(getattr(getattr(network, "bbox_head", None), "background_column", False))
        plan, notes = plan_head(checkpoint, target[HEAD_KEY].shape[0], class_names, by_category=by_category)
        report.notes += notes
    remaining = dict(checkpoint.state_dict)
    backbone = getattr(network, "backbone", None)
    if isinstance(backbone, nn.Module) and gcvit.is_gcvit(backbone.state_dict()):
        part = {key: remaining.pop(key) for key in [*remaining] if key.startswith("backbone.")}
        if part:
            fill_backbone(backbone, part, report, prefix="backbone.", file_keys=file_keys)
    last = _last_stage(backbone)
    loaded = _copy_by_name(remaining, target, plan, report, file_keys, last)
    _report_missing(target, loaded, checkpoint, report, last)
    taken = [key for targets in report.mapped.values() for key in targets]
    # Biases of the attention do not count: they have the same size at any width.
    if not any(key.startswith(("encoder.", "decoder.")) and target[key].dim() > 1 for key in taken):
        raise WeightsError(
            Problem(
                f"has nothing that fits the model (hidden width {checkpoint.architecture.hidden_dim})",
                file=checkpoint.path,
                value=f"{len(report.reshaped)} keys of other sizes",
                hint="use the spec it was trained with (model.hidden_dim, model.dim_feedforward …)",
            ),
            *field_problems(checkpoint.state_dict, target, checkpoint.path),
        )
    report.notes += scheme.notes(checkpoint, settings)
    unused = set(report.unexpected) - set(checkpoint.trace.unexpected)
    if strict and (report.missing or report.reshaped or report.carried_over or unused):
        problems = field_problems(checkpoint.state_dict, target, checkpoint.path)
        what = "does not fit the model exactly:\n" + report.summary()
        raise WeightsError(*problems, Problem(what, file=checkpoint.path))
    if checkpoint.quantization is not None and strict:  # a network that is trained on rounds nothing
        quantize_inputs(network, checkpoint.quantization)
    return report


def field_problems(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: Path, *, where: str = ""
) -> list[Problem]:
    """Return a problem for every spec field in which a file and a model differ, as their shapes show it.

    Args:
        theirs: canonical state dict of the file.
        ours: of the model.
        path: the file, for messages.
        where: what named the file, put before the field.
    """
    there, here = (infer_architecture(one, with_box_refine=False) for one in (theirs, ours))
    pairs = [
        ("dataset.num_classes", there.num_classes, here.num_classes),
        ("model.num_queries", there.num_queries, here.num_queries),
        ("model.num_feature_levels", there.num_feature_levels, here.num_feature_levels),
        ("model.return_interm_indices", there.return_interm_indices, here.return_interm_indices),
        ("model.hidden_dim", there.hidden_dim, here.hidden_dim),
        ("model.enc_layers", there.enc_layers, here.enc_layers),
        ("model.dec_layers", there.dec_layers, here.dec_layers),
        ("model.dim_feedforward", there.enc_feedforward, here.enc_feedforward),
    ]
    if there.num_feature_levels == here.num_feature_levels:
        pairs.append(("model.enc_n_points (with model.nheads 8)", there.enc_points, here.enc_points))
        pairs.append(("model.dec_n_points (with model.nheads 8)", there.dec_points, here.dec_points))
    return [
        Problem(
            "the checkpoint has another value",
            file=path,
            where=f"{where}: {field}" if where else field,
            value=list(value) if isinstance(value, tuple) else value,
            allowed=str(list(said) if isinstance(said, tuple) else said),
            hint="set the field to the checkpoint's value, or give another checkpoint",
        )
        for field, said, value in pairs
        if said is not None and value is not None and said != value
    ]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers for parallel training."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _refuse_other_detector(checkpoint: Checkpoint, network: nn.Module, target: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint with another backbone, or another number of stages, than the network."""
    theirs = {key: tuple(value.shape) for key, value in checkpoint.state_dict.items()}
    ours = {key: tuple(value.shape) for key, value in target.items()}
    has_backbone = any(key.startswith("backbone.") for key in theirs)
    matrices = {key: shape for key, shape in theirs.items() if key.startswith("backbone.") and len(shape) > 1}
    shared = any(ours.get(key) == shape for key, shape in matrices.items())
    further = _further_modules(theirs, ours)
    if has_backbone and (not shared or further or _differ(backbone_kinds(theirs), backbone_kinds(ours))):
        raise WeightsError(
            Problem(
                f"holds another backbone than the model: {_both_backbones(theirs, ours, further)}",
                file=checkpoint.path,
                where="model.backbone",
                hint="set model.backbone to the checkpoint's, or give a checkpoint of this backbone",
            )
        )
    two_stage = getattr(network, "as_two_stage", None)
    if isinstance(two_stage, bool) and two_stage != checkpoint.architecture.two_stage:
        if two_stage:
            what, hint = "is not a two-stage model, but the network is", "use a model without as_two_stage"
        else:
            what = "is a two-stage model (the encoder proposes the boxes), which a spec cannot describe"
            hint = "convert it with `ddetr-mm weights … --to mmdet` and use it in an mmdet config"
        raise WeightsError(Problem(what, file=checkpoint.path, hint=hint))


_BLOCK = re.compile(r"(?:backbone\.)?(?:layer\d\.\d+|levels\.\d\.blocks\.\d+)\.")


def _further_modules(theirs: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Return what blocks of a file's backbone have and the model's have not: attention, offsets …"""
    own = set(ours)
    blocks = {match[0] for key in own if (match := _BLOCK.match(key))}
    return [
        key
        for key in theirs
        if (match := _BLOCK.match(key))
        and match[0] in blocks
        and key not in own
        and not key.endswith(_BUFFERS)
    ]


def _differ(theirs: tuple[str, ...], ours: tuple[str, ...]) -> bool:
    """Return whether two backbones, each of one of several kinds, cannot be of the same kind."""
    return "unknown" not in (*theirs, *ours) and not set(theirs) & set(ours)


def _last_stage(backbone: Any) -> int | None:
    """Return the last stage that a backbone of mmdet's returns, None where it does not say."""
    indices = getattr(backbone, "out_indices", None)
    return max(indices) if isinstance(indices, (list, tuple)) and indices else None


def _both_backbones(theirs: Shapes, ours: Shapes, further: list[str] | None = None) -> str:
    more = f" with further modules ({short_names(further, 2)})" if further else ""
    return f"{describe_backbone(theirs)}{more} in the file, {describe_backbone(ours)} in the model"


def _copy_by_name(
    tensors: Mapping[str, Tensor],
    target: dict[str, Tensor],
    plan: ColumnPlan | None,
    report: LoadReport,
    file_keys: Mapping[str, str],
    last: int | None,
) -> set[str]:
    """Copy what fits; returns the model's keys that the file has."""
    done: set[str] = set()
    fresh = {}
    for key, value in tensors.items():
        file_key = file_keys.get(key, key)
        place = target.get(key)
        if place is None:
            if is_unread(key, last):
                report.dropped[file_key] = UNREAD
            elif key.endswith(_COUNTERS):
                report.dropped[file_key] = _COMPUTED
            elif _NECK_BIAS.fullmatch(key) and not bool(torch.count_nonzero(value)):
                report.dropped[file_key] = "zero bias of a neck that has none in the model"
            else:
                report.unexpected.append(file_key)
            continue
        done.add(key)
        if plan is not None and CLASS_KEY.fullmatch(key) and value.shape[1:] == place.shape[1:]:
            # Branches shared by all layers are one tensor: computed before the first copy changes it.
            fresh[key] = carried_rows(value, place, plan)
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


def _report_missing(
    target: Mapping[str, Tensor],
    loaded: set[str],
    checkpoint: Checkpoint,
    report: LoadReport,
    last: int | None,
) -> None:
    accounted = loaded | {key for targets in report.mapped.values() for key in targets}
    accounted |= set(report.reshaped) | set(report.carried_over) | set(report.filled) | set(report.missing)
    for key, place in target.items():
        if key in accounted:
            continue
        if is_unread(key, last):
            report.filled[key] = f"left as the model created it: {UNREAD}"
        elif key.endswith(_COUNTERS):
            report.filled[key] = "left as the model created it"
        elif _NECK_BIAS.fullmatch(key) and not checkpoint.architecture.neck_bias:
            with torch.no_grad():
                place.zero_()
            report.filled[key] = "zeros: the source's neck has no bias"
        else:
            report.missing.append(key)


# --- A backbone ---


def load_backbone(
    backbone: nn.Module, path: str | Path, prefix: str | None = None, *, selection: Selection = DEFAULT
) -> LoadReport:
    """Load a file into a backbone.

    Args:
        backbone: mmdet's ResNet, our ``GCViT``, or any module whose names the file has.
        path: a ResNet of torchvision, timm, Hugging Face or Detectron2, a GCViT of timm or its authors, a
            state dict of the backbone, or any network below whose keys it is: a detector, a classifier, a
            contrastive pretraining.
        prefix: what precedes the backbone's keys in the file; None finds where most of them are.
        selection: which of several sets of weights to read.

    Returns:
        The report; keys of the model are those of ``backbone``.

    Raises:
        WeightsError: the file cannot be read safely, holds another backbone, or nothing that fits.
    """
    raw = read_raw(path)
    report = LoadReport(str(raw.path), type(backbone).__name__, target_format="backbone")
    tensors, file_keys = _backbone_part(raw, backbone, prefix, selection, report)
    check_storage(raw.path, tensors)
    refuse_odd(raw.path, tensors)
    refuse_non_finite(raw.path, tensors)
    fill_backbone(backbone, tensors, report, file_keys=file_keys)
    return report


def _backbone_part(
    raw: RawFile, backbone: nn.Module, prefix: str | None, selection: Selection, report: LoadReport
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the backbone's tensors under its own names, and the file's key of each; report the others."""
    entries = tensor_entries(raw)
    own = [key for key, value in backbone.state_dict().items() if isinstance(value, Tensor)]
    names = layouts.module_layout(own)
    start = f"{prefix}." if prefix and not prefix.endswith(".") else prefix

    def own_in(entry: Entry) -> list[Found]:
        found = layouts.find_prefixes(entry.keys, names)
        return found if start is None else [one for one in found if one.prefix == start]

    choice = choose(raw, entries, own_in, selection)
    if start is not None and choice is None:
        listed = short_names([key for entry in entries for key in entry.tensors])
        raise WeightsError(Problem(f"holds no keys below '{start}'", file=raw.path, value=listed))
    if choice is None or 2 * len(choice.candidate.found.names) < len(own):
        _refuse_caffe_2(raw.path, entries)
        # Another backbone, which the message of the refusal names.
        other = choose(raw, entries, lambda entry: layouts.find_backbones(entry.keys), selection)
        choice = other or choice
    if choice is None:
        entry = max(entries, key=lambda one: len(one.tensors))
        return dict(entry.tensors), {}
    entry, found = choice.candidate.entry, choice.candidate.found
    report.source_format = detector_format(entry) or f"a backbone with {found.layout.name} names"
    report.notes += choice.notes
    report.dropped |= dict.fromkeys(choice.unused, "not part of the backbone")
    part: dict[str, Tensor] = {}
    file_keys: dict[str, str] = {}
    for name, (source, key) in choice.members.items():
        # Names of stages that the model does not build are spelled as its own.
        usual = found.layout.usual_name(name) or layouts.usual_backbone_name(found.layout, name) or name
        if usual not in part:
            part[usual], file_keys[usual] = source.tensors[key], key
    return part, file_keys


def _refuse_caffe_2(path: Path, entries: list[Entry]) -> None:
    """Refuse Detectron's ResNets of Caffe2: images in BGR, other strides, norms without statistics.

    Raises:
        WeightsError: the file has their names.
    """
    keys = [key for entry in entries for key in entry.tensors if re.fullmatch(r"res\d_\d+_branch\d\w*", key)]
    if keys:
        raise WeightsError(
            Problem(
                f"holds a ResNet of Caffe2 ({short_names(keys, 2)}), with other strides and images in BGR",
                file=path,
                hint="use torchvision's weights, or Detectron2's from torchvision (R-50.pkl)",
            )
        )


def fill_backbone(
    backbone: nn.Module,
    tensors: Mapping[str, Tensor],
    report: LoadReport,
    *,
    prefix: str = "",
    file_keys: Mapping[str, str] | None = None,
) -> None:
    """Copy tensors into a backbone and report every key.

    For our GCViT the names of other layouts are converted and position tables resized, see
    :mod:`ddetr_mm.weights.gcvit`.

    Args:
        backbone: changed in place.
        tensors: key → tensor; keys begin with ``prefix``.
        report: receives every key.
        prefix: of ``tensors`` and of the report's model keys.
        file_keys: key in ``tensors`` → key in the file.

    Raises:
        WeightsError: the backbones differ, or nothing fits.
    """
    names = file_keys or {}
    own = {key: value for key, value in backbone.state_dict().items() if isinstance(value, Tensor)}
    part = {key[len(prefix) :]: value for key, value in tensors.items()}
    last = _last_stage(backbone)
    adapts = gcvit.is_gcvit(own)
    own_names = gcvit.own_names(part, own) if adapts else {key: key for key in part}
    fitted: dict[str, Tensor] = {}
    for key, name in own_names.items():
        if name in own:
            shape = tuple(own[name].shape)
            value = gcvit.fit(name, part[key], shape) if adapts else part[key]
            if value is not None and value.shape == shape:
                fitted[name] = value
    _refuse_other_backbone({name: part[key] for key, name in own_names.items()}, own, len(fitted), report)
    for key, value in part.items():
        file_key, target = names.get(prefix + key, prefix + key), own_names.get(key)
        if target is None:
            report.dropped[file_key] = _COMPUTED
        elif target not in own:
            if _CLASSIFIER.fullmatch(key):
                report.dropped[file_key] = "the classifier's head"
            elif is_unread(f"backbone.{target}", last):
                report.dropped[file_key] = UNREAD
            else:
                report.unexpected.append(file_key)
        elif target not in fitted:
            report.reshaped[prefix + target] = (tuple(value.shape), tuple(own[target].shape))
        elif fitted[target].numel() != value.numel():
            sizes = f"from {list(value.shape)} to {list(own[target].shape)}"
            report.carried_over[prefix + target] = f"position table resized {sizes}"
        else:
            report.mapped.setdefault(file_key, []).append(prefix + target)
    for key in own:
        if key in own_names.values():
            continue
        if key.endswith("num_batches_tracked"):
            report.filled[prefix + key] = "left as the model created it"
        elif is_unread(f"backbone.{key}", last):
            report.filled[prefix + key] = f"left as the model created it: {UNREAD}"
        else:
            report.missing.append(prefix + key)
    with torch.no_grad():
        for key, value in fitted.items():
            own[key].copy_(value)


def _refuse_other_backbone(
    part: Mapping[str, Tensor], own: Mapping[str, Tensor], fitting: int, report: LoadReport
) -> None:
    """Refuse weights of another known backbone, and those of which less than half fit."""
    theirs = {f"backbone.{key}": tuple(value.shape) for key, value in part.items()}
    ours = {f"backbone.{key}": tuple(value.shape) for key, value in own.items()}
    # GCViTs that differ in their windows alone can be converted.
    kinds = [tuple(kind.removesuffix("_384") for kind in backbone_kinds(shapes)) for shapes in (theirs, ours)]
    further = _further_modules(theirs, ours)
    if _differ(*kinds) or further or fitting * 2 < len(ours):
        raise WeightsError(
            Problem(
                f"holds another backbone than the model: {_both_backbones(theirs, ours, further)}"
                f" ({fitting} of {len(ours)} keys fit)",
                file=report.source,
                hint="give the weights of this backbone, or choose the file's backbone in the spec",
            )
        )


# --- Resuming ---
# A run resumes with weights, optimizer and schedules exactly as saved: nothing can be left out or converted.

_NEEDED = ("state_dict", "optimizer", "meta")
MOST_EPOCHS = 10**7
MOST_STEPS = 10**12
_COUNTS = {"epoch": MOST_EPOCHS, "iter": MOST_STEPS}
"""Counters of a checkpoint, and the most that each may be."""
_LIGHTNING = "optimizer_states"
START_WITH = "start a new run from its weights with train.pretrained_model_path"


def require_resumable(path: str | Path, *, where: str) -> None:
    """Check that mmengine can resume from a file.

    Args:
        path: the checkpoint.
        where: the spec key that named it, for messages.

    Raises:
        WeightsError: it cannot be read, would run code, or holds weights only.
    """
    content = read_raw(path).payload
    found = content if isinstance(content, Mapping) else {}
    missing = [name for name in _NEEDED if not isinstance(found.get(name), Mapping)]
    if not missing:
        missing = [f"meta.{name}" for name in _COUNTS if not _is_count(found["meta"].get(name))]
    if not missing:
        for name, most in _COUNTS.items():
            if not 0 <= found["meta"][name] <= most:
                raise WeightsError(
                    Problem(
                        f"cannot be resumed: meta.{name} is {found['meta'][name]}",
                        file=path,
                        where=where,
                        allowed=f"0 to {most}",
                        hint=START_WITH,
                    )
                )
    if missing:
        tao = " (it is TAO's, with schedules of PyTorch Lightning)" if _LIGHTNING in found else ""
        raise WeightsError(
            Problem(
                f"cannot be resumed: {', '.join(missing)} is missing{tao}",
                file=path,
                where=where,
                allowed="a checkpoint written by `ddetr-mm train`",
                hint=START_WITH,
            )
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def trained_epochs(path: str | Path) -> int:
    """Return how many epochs a checkpoint to resume from has finished.

    Args:
        path: the checkpoint, see :func:`require_resumable`.
    """
    return int(read_raw(path).payload["meta"]["epoch"])


def require_same_network(path: str | Path, model: nn.Module, *, where: str) -> None:
    """Check that a checkpoint to resume from holds exactly the run's network.

    Args:
        path: the checkpoint, see :func:`require_resumable`.
        model: the run's network, possibly wrapped for parallel training.
        where: what named the file, for messages.

    Raises:
        WeightsError: it holds another network; the message says what differs.
    """
    raw = read_raw(path)
    network = unwrapped(model)
    last = _last_stage(getattr(network, "backbone", None))
    stored = _tensors(raw.payload["state_dict"])
    theirs = {key: value for key, value in stored.items() if not is_unread(key, last)}
    ours = _tensors(network.state_dict())
    if _shapes(theirs) == _shapes(ours):
        return
    difference, key = _difference(theirs, ours)
    raise WeightsError(
        Problem(
            f"cannot be resumed: {difference}",
            file=raw.path,
            where=where,
            hint=f"resume with the spec that the run was started with ({key}), give an empty results_dir, or"
            f" {START_WITH}",
        )
    )


def leave_out_unread(content: dict[str, Any], model: nn.Module) -> int:
    """Take stages of the backbone that the model does not build out of a training state.

    Earlier versions built all stages, read or not: what they saved resumes with what is left of its weights,
    its optimizer's state and its schedules.

    Args:
        content: a checkpoint that a run resumes from, changed in place.
        model: the run's network, possibly wrapped for parallel training.

    Returns:
        The number of tensors that were left out.

    Raises:
        WeightsError: the optimizer's state has not a group for each parameter.
    """
    network = unwrapped(model)
    last = _last_stage(getattr(network, "backbone", None))
    weights = content["state_dict"]
    unread = [key for key in weights if is_unread(key.removeprefix("module."), last)]
    if not unread or network.state_dict().keys() & set(unread):
        return 0
    trained = {name for name, _ in network.named_parameters()}
    parameters = [
        key in unread
        for key in weights
        if key.removeprefix("module.") in trained or (key in unread and not key.endswith(_BUFFERS))
    ]
    optimizer = content["optimizer"]
    groups = optimizer.get("param_groups") or []
    kept = [index for index, is_left_out in enumerate(parameters) if not is_left_out]
    if [group.get("params") for group in groups] != [[index] for index in range(len(parameters))]:
        raise WeightsError(
            Problem(
                f"cannot be resumed: it holds {UNREAD}, which is no longer built, and its optimizer has not"
                " a group for each parameter",
                hint=START_WITH,
            )
        )
    for key in unread:
        del weights[key]
    optimizer["param_groups"] = [{**groups[old], "params": [new]} for new, old in enumerate(kept)]
    state = optimizer["state"]
    optimizer["state"] = {new: state[old] for new, old in enumerate(kept) if old in state}
    for scheduler in content.get("param_schedulers") or ():
        for name in ("base_values", "_last_value"):
            values = scheduler.get(name) or []
            # mmengine schedules a rate without multipliers too, after those of the groups.
            scheduler[name] = [values[old] for old in kept if old < len(values)] + values[len(parameters) :]
    return len(unread)


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        key.removeprefix("module."): value for key, value in state_dict.items() if isinstance(value, Tensor)
    }


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _difference(their_tensors: Mapping[str, Tensor], our_tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the difference between file and model in words, and the spec field to check."""
    theirs, ours = _shapes(their_tensors), _shapes(our_tensors)
    parts = [{key: shape for key, shape in one.items() if "backbone." in key} for one in (theirs, ours)]
    if parts[0] != parts[1]:
        fitting = sum(parts[1].get(key) == shape for key, shape in parts[0].items())
        detail = f"{_both_backbones(theirs, ours)} ({fitting} of {len(parts[1])} keys fit)"
        return f"it holds another backbone than the model: {detail}", "model.backbone"
    columns = theirs.get(HEAD_KEY, (0,))[0], ours.get(HEAD_KEY, (0,))[0]
    if columns[0] != columns[1]:
        text = f"its class head has {columns[0]} columns, the model's {columns[1]}"
        return text, "dataset.num_classes"
    lists = {
        "missing in the file": [key for key in ours if key not in theirs],
        "not in the model": [key for key in theirs if key not in ours],
        "of another size": [
            f"{key} {list(theirs[key])} in the file, {list(ours[key])} in the model"
            for key in theirs
            if key in ours and theirs[key] != ours[key]
        ],
    }
    listed = [f"{len(keys)} keys {how} ({short_names(keys, 2)})" for how, keys in lists.items() if keys]
    text = "it is of another network: " + "; ".join(listed)
    fields = field_problems(their_tensors, our_tensors, Path())
    return text, "the section model" + "".join(f", {one.where} {one.allowed}" for one in fields)
