"""A training batch whose loss or gradients were NaN or infinite: kept in a file, read again, looked into."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.runtime.checkpoints import checkpoint_written_whole
from ddetr_mm.runtime.message_state import plain_values
from ddetr_mm.weights.encryption import encrypt_file, encryption_key, hidden_file
from ddetr_mm.weights.safe_read import read_raw

FORMAT = "ddetr_mm non-finite batch"


@dataclass(frozen=True)
class Finding:
    """Where values stopped being finite.

    Attributes:
        loss: the total loss.
        weights: parameters and buffers that are not finite to begin with.
        module: dotted path of the first module, in the order of the forward pass, that makes non-finite
            values out of finite ones; "" for the detector itself; None where the forward pass is finite.
        module_class: its class.
        gradient: the first parameter, in the order of the backward pass, whose gradient is not finite; None
            where all are, and where the backward pass was not looked at.
    """

    loss: float
    weights: list[str] = field(default_factory=list)
    module: str | None = None
    module_class: str = ""
    gradient: str | None = None

    def __str__(self) -> str:
        if self.weights:
            more = f" and {len(self.weights) - 3} more" if len(self.weights) > 3 else ""
            return f"weights were not finite before the step: {', '.join(self.weights[:3])}{more}"
        if self.module is not None:
            return f"first in the output of {self.module or 'the detector itself'} ({self.module_class})"
        if self.gradient is not None:
            return f"the loss is {self.loss:g}; first in the gradient of {self.gradient}"
        return f"all is finite when the step is repeated (loss {self.loss:g})"


def save_batch(
    path: Path, model: nn.Module, batch: Mapping[str, Any], rng_state: Tensor, about: Mapping[str, Any]
) -> None:
    """Write a batch with the weights and the random state of its step; encrypted if the process has a key.

    Args:
        path: file to write, beside and renamed.
        model: the detector, without a wrapper.
        batch: what the loader gave: ``inputs`` and ``data_samples``.
        rng_state: torch's CPU random state before the step.
        about: plain values to keep: images, step, precision.
    """
    content = {
        "format": FORMAT,
        "about": plain_values(dict(about)),
        "inputs": [image.detach().cpu() for image in batch["inputs"]],
        "samples": [_plain_sample(sample) for sample in batch["data_samples"]],
        "rng_state": rng_state,
        "state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()},
    }
    with checkpoint_written_whole(path) as temporary:
        key = encryption_key()
        if key is None:
            torch.save(content, temporary)
            return
        with hidden_file() as (hidden, name):
            torch.save(content, name)
            encrypt_file(hidden, temporary, key)


def load_batch(path: str | Path) -> dict[str, Any]:
    """Read a file of :func:`save_batch`, without running code from it.

    Returns:
        ``batch`` as a loader gives it, ``state_dict``, ``rng_state`` and ``about``.

    Raises:
        WeightsError: it cannot be read safely, or is something else.
    """
    content = read_raw(path).payload
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WeightsError(
            Problem("is no saved batch", file=path, mend="give a non_finite_step_*.pth of a training")
        )
    samples = [_sample(plain) for plain in content["samples"]]
    batch = {"inputs": content["inputs"], "data_samples": samples}
    return {"batch": batch, **{key: content[key] for key in ("state_dict", "rng_state", "about")}}


def image_names(batch: Any) -> list[str]:
    """The images of a batch, by path, or by number where samples do not tell it."""
    samples = batch.get("data_samples") or [] if isinstance(batch, Mapping) else []
    names = [sample.metainfo.get("img_path") for sample in samples]
    return [str(name or f"image {number}") for number, name in enumerate(names)]


def find_first_non_finite(
    model: nn.Module,
    batch: Mapping[str, Any],
    rng_state: Tensor,
    autocast: AbstractContextManager[Any] | None = None,
) -> Finding:
    """Repeat a step, without updating anything, and find where values stop being finite.

    Args:
        model: the detector in training mode, without a wrapper; its gradients are removed, its buffers are
            put back.
        batch: what the loader gave.
        rng_state: torch's CPU random state before the step; the present one is put back at the end.
        autocast: the context that the step runs in; by default none.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = [name for name, value in tensors if not _all_finite(value)]
    before, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    torch.set_rng_state(rng_state)
    modules: list[tuple[str, str]] = []
    gradients: list[str] = []
    handles = [
        module.register_forward_hook(_forward_watch(name, modules)) for name, module in model.named_modules()
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(_gradient_watch(name, gradients))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    model.zero_grad(set_to_none=True)
    try:
        with autocast or nullcontext():
            data = model.data_preprocessor(dict(batch), True)
            loss, _ = model.parse_losses(model(**data, mode="loss"))
        if torch.isfinite(loss):
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(before)
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.data.copy_(kept)
    module, module_class = modules[0] if modules else (None, "")
    return Finding(float(loss), weights, module, module_class, gradients[0] if gradients else None)


def _forward_watch(name: str, found: list[tuple[str, str]]) -> Any:
    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        # Modules end in the order of the computation, so the first is the innermost that is to blame.
        if not found and not _all_finite(output):
            found.append((name, type(module).__name__))

    return watch


def _gradient_watch(name: str, found: list[str]) -> Any:
    def watch(parameter: Tensor) -> None:
        if not found and not _all_finite(parameter.grad):
            found.append(name)

    return watch


def _all_finite(value: Any) -> bool:
    """Whether all floating-point tensors in nested containers are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_all_finite, value))
    return True


def _plain_sample(sample: DetDataSample) -> dict[str, Any]:
    parts = {}
    for name in ("gt_instances", "ignored_instances"):
        instances = getattr(sample, name, None)
        if instances is not None and "bboxes" in instances:
            boxes = instances.bboxes
            boxes_xyxy = boxes.tensor if isinstance(boxes, BaseBoxes) else boxes
            parts[name] = {"bboxes": boxes_xyxy.detach().cpu(), "labels": instances.labels.detach().cpu()}
    return {"metainfo": plain_values(dict(sample.metainfo)), **parts}


def _sample(plain: Mapping[str, Any]) -> DetDataSample:
    sample = DetDataSample(metainfo=dict(plain["metainfo"]))
    for name in ("gt_instances", "ignored_instances"):
        if name in plain:
            setattr(sample, name, InstanceData(**plain[name]))
    return sample
