"""Losses or gradients that are NaN or infinite: stop or skip the step, save its batch, find the layer.

The loss is checked at three places: with the losses that the detector sends to the host anyway, else by its
own sum on the device; the norm of the gradients where clipping has read it, else by one reduction over all
of them. All ranks decide together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ddetr_mm.engine.checkpoint import checkpoint_written_whole, plain_values
from ddetr_mm.errors import Problem, TrainingError, WeightsError
from ddetr_mm.weights.encryption import encrypt_file, encryption_key, hidden_file
from ddetr_mm.weights.safe_read import read_raw

# --- Saved batches ---

FORMAT = "ddetr_mm non-finite batch"


@dataclass(frozen=True)
class Finding:
    """Where values stopped being finite.

    Attributes:
        loss: the total loss.
        weights: parameters and buffers that are not finite to begin with.
        module: dotted path of the first module, in the order of the forward pass, whose output is not
            finite for finite input; "" for the detector itself; None where the forward pass is finite.
        module_class: its class.
        gradient: the first parameter, in the order of the backward pass, whose gradient is not finite; None
            where all are, and where the backward pass was not run.
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
    """Write a batch with the weights and the random state of its step, encrypted if the process has a key.

    Args:
        path: file to write.
        model: the detector, without a wrapper.
        batch: what the loader gave: ``inputs`` and ``data_samples``.
        rng_state: torch's CPU random state before the step.
        about: plain values to add: images, step, precision.
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
        WeightsError: it cannot be read safely, or is another kind of file.
    """
    content = read_raw(path).payload
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WeightsError(
            Problem("is no saved batch", file=path, hint="give a non_finite_step_*.pth of a training run")
        )
    samples = [_sample(plain) for plain in content["samples"]]
    batch = {"inputs": content["inputs"], "data_samples": samples}
    return {"batch": batch, **{key: content[key] for key in ("state_dict", "rng_state", "about")}}


def image_names(batch: Any) -> list[str]:
    """The images of a batch, by path, or by number where samples have none."""
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
        model: the detector in training mode, without a wrapper; its gradients are removed, its
            buffers restored.
        batch: what the loader gave.
        rng_state: torch's CPU random state before the step; restored at the end.
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
        # Modules end in the order of the computation, so the first is the innermost one.
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


# --- The hook ---

ACTIONS = ("stop", "skip")
MOST_SAVED = 3
"""Batches that one run saves and examines; further ones are only logged."""

MOST_SKIPPED_IN_A_ROW = 50


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops at, or skips, an update by a loss or gradients that are not finite.

    Logs the images of the batch and the layer where it first appeared. The batch is saved as
    ``non_finite_step_NNNNN.pth`` in the runner's ``work_dir``, with the weights and the random state of the
    step; ``ddetr-mm reproduce FILE`` repeats it.

    Steps that a gradient scaler skips while it searches for its factor do not count: only a loss that is not
    finite does, and gradients that the scaler lets through.

    All ranks stop or skip together. With clipped gradients and our detector the hook reads nothing from the
    GPU that the step does not read anyway.

    Args:
        action: ``"stop"``, with a :class:`~ddetr_mm.errors.TrainingError`; ``"skip"``: the weights stay as
            they are and training continues, unless :data:`MOST_SKIPPED_IN_A_ROW` steps are skipped in a row.
    """

    # Last before the step, so that the random state it saves is the step's.
    priority = "LOWEST"

    def __init__(self, action: str = "stop") -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}")
        self.action = action
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self._num_logged = 0
        self._skip_this = False
        self._runner: Any = None
        self._batch: Any = None
        self._own_loss: Tensor | None = None
        self._rng_state = torch.empty(0)
        self._buffers: list[Tensor] = []

    def before_train(self, runner: Any) -> None:
        """Watch the model's losses and the optimizer's steps."""
        self._runner = runner
        model = self._model()
        head = getattr(model, "bbox_head", None)
        if hasattr(head, "tolerates_non_finite"):
            head.tolerates_non_finite = True  # this hook reports more than the matcher can
        model.register_forward_hook(self._note_losses)
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._check_before_step)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch, the random state and the buffers of the step."""
        self._batch = data_batch
        self._own_loss = None
        self._rng_state = torch.get_rng_state()
        self._skip_this = False
        buffers = list(self._model().buffers())
        if len(self._buffers) != len(buffers):
            self._buffers = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._buffers, buffers)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Count skipped steps; check the loss where no optimizer step was made (accumulation, a scaler).

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        self._loss_is_finite()
        if not self._skip_this:
            self._skipped_in_a_row = 0
            return
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                Problem(
                    f"{self._skipped_in_a_row} steps in a row had no finite loss and gradients",
                    hint="lower the learning rate, and resume from an earlier checkpoint",
                )
            )

    def _note_losses(self, model: Any, inputs: Any, output: Any) -> None:
        """Sum the losses on the device: reading the sum here would make the host wait for the GPU."""
        if not isinstance(output, dict) or not model.training or self._batch is None:
            return
        losses = [value for key, value in output.items() if "loss" in key and isinstance(value, Tensor)]
        if losses:
            self._own_loss = torch.stack([loss.detach().sum() for loss in losses]).sum()

    def _check_before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Drop the gradients of a step with a loss or gradients that are not finite, on all ranks alike."""
        finite = self._loss_is_finite()
        if finite and not self._gradients_are_finite(optimizer):
            finite = False
            self._handle("the gradients are not finite", here=True)
        if not finite:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # the optimizer skips parameters without gradient

    def _loss_is_finite(self) -> bool:
        """Whether the loss of every rank is finite; checked once a step."""
        own, self._own_loss = self._own_loss, None
        if own is None:
            return not self._skip_this
        scalars = getattr(self._model(), "host_losses", None)
        if scalars is None:
            broken = (~torch.isfinite(own)).float()
            all_reduce(broken, "max")
            finite = not broken
        else:
            # The ranks' mean for the log, on its way to the host since the forward pass.
            finite = math.isfinite(float(scalars["loss"]))
        if not finite:
            alone = get_world_size() == 1
            self._handle("the loss is not finite", here=alone or not torch.isfinite(own))
        return finite

    def _gradients_are_finite(self, optimizer: Any) -> bool:
        wrapper = self._runner.optim_wrapper
        if wrapper.clip_grad_kwargs and wrapper.grad_name == "grad_norm":
            # Clipping has just read the norm of all gradients of all ranks.
            return math.isfinite(self._runner.message_hub.get_scalar("train/grad_norm").current())
        gradients = [
            # A rank checks its own shard; the ranks agree below.
            parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not gradients:
            return True
        norms = torch.stack([norm.to(gradients[0].device) for norm in torch._foreach_norm(gradients)])
        broken = (~torch.isfinite(norms).all()).float()
        all_reduce(broken, "max")
        return not broken

    def _handle(self, what: str, here: bool) -> None:
        """Restore buffers, save the batch, and raise or warn; all ranks of a job must call this.

        Args:
            what: what is not finite.
            here: whether it is on this rank.
        """
        self._skip_this = True
        batch, self._batch = self._batch, None  # the repeated step is not checked
        for buffer, before in zip(self._model().buffers(), self._buffers, strict=True):
            # Running means of a batch norm must not keep what is not finite. Not by buffer.copy_: autograd
            # would miss the version it has seen, though those that it needs have not changed.
            buffer.data.copy_(before)
        self._num_logged += 1
        examine = here and self._num_logged <= MOST_SAVED
        path, finding = self._save_and_examine(batch, what) if examine else (None, "")
        own = (image_names(batch), finding, str(path or "")) if here else None
        seen = [entry for entry in all_gather_object(own) if entry is not None]
        images = ", ".join(name for names, _, _ in seen for name in names) or "unknown images"
        text = "; ".join(
            [
                f"{what} in step {self._runner.iter} ({images})",
                *sorted({entry[1] for entry in seen if entry[1]}),
            ]
        )
        paths = [entry[2] for entry in seen if entry[2]]
        command = f"the batch is saved; `ddetr-mm reproduce {paths[0]}` repeats the step" if paths else ""
        if self.action == "stop":
            causes = "usual causes: a learning rate too high, fp16, broken data"
            raise TrainingError(Problem(text, hint=f"{command}; {causes}" if command else causes))
        self._runner.logger.warning(f"Step skipped: {text}" + (f"; {command}" if command else ""))

    def _save_and_examine(self, batch: Any, what: str) -> tuple[Path, str]:
        runner, model = self._runner, self._model()
        rank = f"_rank_{get_rank()}" if get_world_size() > 1 else ""
        path = Path(runner.work_dir) / f"non_finite_step_{runner.iter:05d}{rank}.pth"
        about = {
            "what": what,
            "images": image_names(batch),
            "epoch": runner.epoch,
            "step": runner.iter,
            "precision": str(getattr(runner.optim_wrapper, "cast_dtype", None) or "float32"),
        }
        save_batch(path, model, batch, self._rng_state, about)
        if get_world_size() > 1:
            # Repeating the step here would wait for ranks that do not repeat it.
            return path, "the command below names the layer"
        # Gradients are kept: in a skipped step they have still to be dropped, by all alike.
        context = runner.optim_wrapper.optim_context(model)
        with torch.enable_grad():
            finding = find_first_non_finite(model, batch, self._rng_state, context)
        return path, str(finding)

    def _model(self) -> Any:
        model = self._runner.model
        return model.module if is_model_wrapper(model) else model
