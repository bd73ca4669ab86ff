"""Filling a backbone from a classifier's weights or from the backbone of a whole detector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.architecture import backbone_kind, describe_backbone
from ddetr_mm.weights.detect import find_weights, is_backbone_alone, plain_state_dict, strip_wrappers
from ddetr_mm.weights.key_engine import to_canonical
from ddetr_mm.weights.read import refuse_non_finite
from ddetr_mm.weights.report import LoadReport
from ddetr_mm.weights.safe_read import read_raw

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
                mend="give the weights of this backbone, or choose the file's backbone in the spec",
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
