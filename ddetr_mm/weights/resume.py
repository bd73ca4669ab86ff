"""Whether a training can go on from a file: told before anything of it is taken over.

Resuming takes over weights, optimizer and schedules as they are: unlike with starting weights nothing can be
left out or carried over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.architecture import describe_backbone
from ddetr_mm.weights.load import unwrapped
from ddetr_mm.weights.refusals import short_names
from ddetr_mm.weights.safe_read import read_raw

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
                mend="to start anew from its weights, name it as train.pretrained_model_path",
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
            mend=f"resume with the spec that the run was started with ({key}), name an empty results_dir, or"
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
