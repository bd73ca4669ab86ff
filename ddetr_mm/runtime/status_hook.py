"""Writes what a training or evaluation loop does into ``status.json``, in the reference's words."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from ddetr_mm.runtime.status import RUNNING, STARTED, StatusLog


@HOOKS.register_module()
class StatusHook(Hook):
    """One status line at the start and the end of training, after every epoch and every evaluation.

    The lines before and after (``Starting Deformable DETR train.`` and its end) belong to the command:
    see :meth:`ddetr_mm.runtime.status.StatusLog.task`.

    Progress lines carry ``epoch`` (0-based, the one just worked on), ``step`` (optimizer steps done),
    ``max_epoch`` (the last epoch's number), ``max_step``, ``time_per_epoch``, ``time_per_step`` and
    ``eta`` as ``H:MM:SS[.ffffff]``.

    Args:
        path: the file; ``status.json`` in the runner's ``work_dir`` when None.
        step_interval: also write a progress line every so many steps; 0 writes one an epoch only, as the
            reference does.
    """

    # After the hooks that compute losses' means and times, before the one that saves checkpoints.
    priority = "LOW"

    def __init__(self, path: str | os.PathLike[str] | None = None, step_interval: int = 0) -> None:
        self.path = path
        self.step_interval = step_interval
        self._epoch_started = 0.0
        self._steps_in_epoch = 0

    def before_train(self, runner: Any) -> None:
        """Tell where training goes on from, if it does, and that the loop starts."""
        if getattr(runner, "_resume", False) and getattr(runner, "_load_from", None):
            self._log(runner).write(f"Resuming training from checkpoint: {runner._load_from}", RUNNING)
        self._log(runner).write("Starting Training Loop.", STARTED)

    def before_train_epoch(self, runner: Any) -> None:
        """Start the epoch's clock."""
        self._epoch_started = time.monotonic()
        self._steps_in_epoch = 0

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | tuple | list | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Write a progress line within an epoch, if asked for."""
        self._steps_in_epoch += 1
        if self.step_interval > 0 and (runner.iter + 1) % self.step_interval == 0:
            self._write_progress(runner, steps_done=runner.iter + 1)

    def after_train_epoch(self, runner: Any) -> None:
        """Write progress and the mean training loss of the epoch."""
        self._write_progress(runner, steps_done=runner.iter)
        losses = runner.message_hub.log_scalars.get("train/loss")
        if losses is not None and self._steps_in_epoch:
            mean = float(losses.mean(self._steps_in_epoch))
            self._log(runner).write("Train metrics generated.", kpi={"train_loss": mean})

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Write the validation figures."""
        self._write_metrics(runner, "Eval metrics generated.", "val", metrics)

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Write the test figures."""
        self._write_metrics(runner, "Test metrics generated.", "test", metrics)

    def after_train(self, runner: Any) -> None:
        """Tell that the loop is over."""
        self._log(runner).write("Training loop complete.")

    def _log(self, runner: Any) -> StatusLog:
        return StatusLog.at(self.path or Path(runner.work_dir) / "status.json")

    def _write_progress(self, runner: Any, steps_done: int) -> None:
        elapsed = time.monotonic() - self._epoch_started
        per_step = elapsed / max(self._steps_in_epoch, 1)
        steps_an_epoch = len(runner.train_dataloader)
        remaining = max(runner.max_iters - steps_done, 0) * per_step
        data = {
            "epoch": runner.epoch,
            "step": steps_done,
            "max_epoch": max(runner.max_epochs - 1, 0),
            "max_step": runner.max_iters,
            "time_per_epoch": str(timedelta(seconds=per_step * steps_an_epoch)),
            "time_per_step": str(timedelta(seconds=per_step)),
            "eta": str(timedelta(seconds=remaining)),
        }
        self._log(runner).write("Training loop in progress", data=data)

    def _write_metrics(
        self, runner: Any, message: str, prefix: str, metrics: Mapping[str, float] | None
    ) -> None:
        kpi: dict[str, Any] = {}
        for ending, name in (("bbox_mAP", "mAP"), ("bbox_mAP_50", "mAP50")):
            value = _find(metrics or {}, ending)
            if value is not None:
                kpi[f"{prefix}_{name}"] = f"{value:.4f}"
        loss = _find(metrics or {}, "loss")
        if loss is not None:
            kpi[f"{prefix}_loss"] = float(loss)
        if kpi:
            self._log(runner).write(message, kpi=kpi)


def _find(metrics: Mapping[str, float], ending: str) -> float | None:
    """The value of ``ending`` or of ``<prefix>/<ending>``."""
    return next((value for key, value in metrics.items() if key.rsplit("/", 1)[-1] == ending), None)
