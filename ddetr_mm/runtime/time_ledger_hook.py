"""Tells where the time of a training step goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ddetr_mm.files import write_text_whole
from ddetr_mm.models.stages import listening
from ddetr_mm.runtime.time_ledger import TimeLedger, ledger_table

LEDGER_NAME = "time_ledger.json"


@HOOKS.register_module()
class TimeLedgerHook(Hook):
    """Measures data, backbone, encoder, decoder, matching, loss, backward, optimizer, and what is left.

    After every epoch the log has a table of medians, and ``time_ledger.json`` in the run's folder the same
    as ``{"steps", "host_ms", "device_ms"}``. On a GPU both the host's and the GPU's time are told: where the
    host takes as long as the GPU, the GPU waits for it. ``data`` is the wait for the loader and the
    preprocessor (transfer, normalisation, padding); ``backbone`` has the neck in it; ``idle`` is what lies
    in none of the others: hooks, logging.

    Args:
        skip: steps at the start that do not count: they compile, choose and allocate.
    """

    priority = "VERY_LOW"  # the other hooks' work after a step lies before the next step's data

    def __init__(self, skip: int = 3) -> None:
        self.skip = skip
        self._ledger: TimeLedger | None = None
        self._undo = contextlib.ExitStack()

    def before_train(self, runner: Any) -> None:
        """Take the places to be measured."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        device = next(model.parameters()).device
        self._ledger = ledger = TimeLedger(device)
        self._undo.enter_context(listening(ledger.stage))
        self._within(model.data_preprocessor, "forward", "data", ledger)
        self._within(runner.optim_wrapper, "backward", "backward", ledger)
        self._within(runner.optim_wrapper, "step", "optimizer", ledger)
        self._within(runner.optim_wrapper, "zero_grad", "optimizer", ledger)

    def _within(self, owner: Any, method: str, stage: str, ledger: TimeLedger) -> None:
        """Let a method of one object run in a stage, until the training ends."""
        original: Callable = getattr(owner, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with ledger.stage(stage):
                return original(*args, **kwargs)

        setattr(owner, method, measured)
        self._undo.callback(delattr, owner, method)

    def before_train_epoch(self, runner: Any) -> None:
        """The first step's data are fetched from here on."""
        if self._ledger is not None:
            self._ledger.begin("data")

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The data are here."""
        if self._ledger is not None:
            self._ledger.switch("idle")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """The step is done; the next one's data are fetched from here on."""
        if self._ledger is not None:
            self._ledger.end()
            self._ledger.begin("data")

    def after_train_epoch(self, runner: Any) -> None:
        """Log the table, write the file, and leave out what comes before the next epoch."""
        if self._ledger is None or not is_main_process():
            return
        self._ledger.drop()
        summary = self._ledger.summary(self.skip)
        runner.logger.info(f"Time of a training step\n{ledger_table(summary)}")
        summary["device"] = str(next(runner.model.parameters()).device)
        if summary["device"].startswith("cuda"):
            summary["device_name"] = torch.cuda.get_device_name(summary["device"])
        write_text_whole(Path(runner.work_dir) / LEDGER_NAME, json.dumps(summary, indent=1) + "\n")

    def after_train(self, runner: Any) -> None:
        """Give the places back."""
        self._undo.close()
        self._ledger = None
