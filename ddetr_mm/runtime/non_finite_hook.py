"""What training does about a loss or gradients that are NaN or infinite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor

from ddetr_mm.errors import Problem, TrainingError
from ddetr_mm.runtime.non_finite_batch import find_first_non_finite, image_names, save_batch

ACTIONS = ("stop", "skip")
MOST_SAVED = 3
"""Batches that one run saves and looks into; further ones are only told."""

MOST_SKIPPED_IN_A_ROW = 50


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops before, or skips, an update by a loss or gradients that are not finite.

    Told are the images of the batch and the layer where it first appeared. The batch is saved as
    ``non_finite_step_NNNNN.pth`` in the runner's ``work_dir``, with the weights and the random state of the
    step; ``ddetr-mm reproduce FILE`` repeats it.

    In half precision with loss scaling the scaler's own search for a factor is left alone: only a loss that
    is not finite counts, and gradients that the scaler lets through.

    All ranks of a job stop or skip together. Where gradients are clipped by their norm and the detector is
    ours, nothing more is read from a GPU than the step reads anyway.

    Args:
        action: ``"stop"``, with a :class:`~ddetr_mm.errors.TrainingError`; ``"skip"``: the weights stay as
            they are and training goes on, unless :data:`MOST_SKIPPED_IN_A_ROW` steps are skipped in a row.
    """

    # The last before the step: its random state is the step's.
    priority = "LOWEST"

    def __init__(self, action: str = "stop") -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}")
        self.action = action
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self._told = 0
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
            head.tolerates_non_finite = True  # this hook tells more than the matcher could
        model.register_forward_hook(self._note_losses)
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._look_before_step)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Remember what the step is made of."""
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
        """Count skipped steps; look at the loss where no step was made (accumulation, a scaler).

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
                    mend="lower the learning rate, and go on from an earlier checkpoint",
                )
            )

    def _note_losses(self, model: Any, inputs: Any, output: Any) -> None:
        """Add up the losses where they are: reading the sum here would make the host wait for the GPU."""
        if not isinstance(output, dict) or not model.training or self._batch is None:
            return
        losses = [value for key, value in output.items() if "loss" in key and isinstance(value, Tensor)]
        if losses:
            self._own_loss = torch.stack([loss.detach().sum() for loss in losses]).sum()

    def _look_before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Drop the gradients of a step with a loss or gradients that are not finite, on all ranks alike."""
        finite = self._loss_is_finite()
        if finite and not self._gradients_are_finite(optimizer):
            finite = False
            self._found("the gradients are not finite", here=True)
        if not finite:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # the optimizer leaves what has no gradient

    def _loss_is_finite(self) -> bool:
        """Whether the loss of every rank is; looked at once a step."""
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
            self._found("the loss is not finite", here=alone or not torch.isfinite(own))
        return finite

    def _gradients_are_finite(self, optimizer: Any) -> bool:
        wrapper = self._runner.optim_wrapper
        if wrapper.clip_grad_kwargs and wrapper.grad_name == "grad_norm":
            # Clipping has just read the norm of all gradients of all ranks.
            return math.isfinite(self._runner.message_hub.get_scalar("train/grad_norm").current())
        gradients = [
            # A rank looks at its own shard; all are asked below.
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

    def _found(self, what: str, here: bool) -> None:
        """Restore buffers, save the batch, and raise or warn; all ranks of a job must call this.

        Args:
            what: is not finite.
            here: whether it is this rank's.
        """
        self._skip_this = True
        batch, self._batch = self._batch, None  # the repeated step is not watched
        for buffer, before in zip(self._model().buffers(), self._buffers, strict=True):
            # Running means of a batch norm must not keep what is not finite. Not by buffer.copy_: autograd
            # would miss the version it has seen, though those that it needs have not changed.
            buffer.data.copy_(before)
        self._told += 1
        path, finding = self._look_into(batch, what) if here and self._told <= MOST_SAVED else (None, "")
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
            raise TrainingError(Problem(text, mend=f"{command}; {causes}" if command else causes))
        self._runner.logger.warning(f"Step skipped: {text}" + (f"; {command}" if command else ""))

    def _look_into(self, batch: Any, what: str) -> tuple[Path, str]:
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
