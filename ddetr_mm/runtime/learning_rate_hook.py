"""Tells every change of the learning rates."""

from __future__ import annotations

from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from ddetr_mm.runtime.learning_rates import learning_rates


@HOOKS.register_module()
class LearningRateHook(Hook):
    """Logs the learning rates before the first step and after every step or epoch that changed them.

    One line tells all groups, each by its name and the rate it began with: ``backbone (2e-05) = 2e-06``.
    mmengine's schedulers would print one line for every single parameter.
    """

    # After ParamSchedulerHook (LOW), which changes the rates.
    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._known: list[float] = []

    def before_train(self, runner: Any) -> None:
        """Tell the rates that training begins or goes on with."""
        self._tell(runner, "Learning rates")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Tell what a schedule counted in steps has changed."""
        self._tell(runner, f"Learning rates after step {runner.iter + 1}")

    def after_train_epoch(self, runner: Any) -> None:
        """Tell what a schedule counted in epochs has changed."""
        self._tell(runner, f"Learning rates after epoch {runner.epoch + 1}")

    def _tell(self, runner: Any, when: str) -> None:
        now = [float(group["lr"]) for group in runner.optim_wrapper.param_groups]
        if now != self._known:
            self._known = now
            rates = [f"{group} = {rate:.3g}" for group, rate in learning_rates(runner).items()]
            runner.logger.info(f"{when}: {', '.join(rates)}")
