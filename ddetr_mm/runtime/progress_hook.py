"""Progress of the Runner's loops on the console: a bar on terminals, a line every few seconds elsewhere."""

from __future__ import annotations

from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from ddetr_mm.runtime.progress import Progress


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows how far training, validation and testing are, with the time left.

    mmengine logs by steps, which on a slow machine leaves a user without a sign of life for minutes; this
    shows by time.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._train: Progress | None = None
        self._eval: Progress | None = None

    def before_train(self, runner: Any) -> None:
        """Start counting steps, from where a resumed run goes on."""
        self._train = self._start(runner, "training", runner.max_iters, "steps", done=runner.iter)
        if runner.val_loop is not None:
            self._train.pauses_left = validations_left(runner)
            # Without a backward pass a batch costs about a third.
            self._train.pause_steps = len(runner.val_dataloader) / 3

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """One more step."""
        if self._train is not None:
            self._train.update(runner.iter + 1)

    def after_train(self, runner: Any) -> None:
        """Stop."""
        self._train = self._stop(self._train)

    def before_val_epoch(self, runner: Any) -> None:
        """Start counting batches; within a training its own bar goes on and does not take it for a step."""
        if self._train is None:
            self._eval = self._start(runner, "validating", len(runner.val_dataloader), "batches")
        else:
            self._train.pause()

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One more batch."""
        if self._eval is not None:
            self._eval.update(batch_idx + 1)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Stop."""
        self._eval = self._stop(self._eval)
        if self._train is not None:
            self._train.resume()

    def before_test_epoch(self, runner: Any) -> None:
        """Start counting batches."""
        self._eval = self._start(runner, "testing", len(runner.test_dataloader), "batches")

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One more batch."""
        if self._eval is not None:
            self._eval.update(batch_idx + 1)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Stop."""
        self._eval = self._stop(self._eval)

    def _start(self, runner: Any, description: str, total: int, unit: str, done: int = 0) -> Progress:
        progress = Progress(description, total, unit, done=done)
        progress.__enter__()
        progress.show_above(runner.logger)
        return progress

    def _stop(self, progress: Progress | None) -> None:
        if progress is not None:
            progress.__exit__(None, None, None)


def validations_left(runner: Any) -> int:
    """How many validations a training that begins now will still run."""
    loop = runner.train_loop
    interval, begin = getattr(loop, "val_interval", 0), getattr(loop, "val_begin", 1)
    if not interval:
        return 0
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    now, last = (runner.epoch, runner.max_epochs) if by_epoch else (runner.iter, runner.max_iters)
    due = [step for step in range(now + 1, last + 1) if step >= begin and step % interval == 0]
    return len(due) + int(by_epoch and last > now and last % interval != 0)
