"""The hook that records training curves and draws them while training runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ddetr_mm.runtime.curve_page import PAGE_NAME, write_curve_page
from ddetr_mm.runtime.curve_plots import draw_curves
from ddetr_mm.runtime.curve_record import CurveRecord, Point
from ddetr_mm.runtime.learning_rates import learning_rates

RECORD_NAME = "curves.jsonl"


@HOOKS.register_module()
class CurvesHook(Hook):
    """Records loss parts, learning rates of every group and validation figures; draws them as PNG and HTML.

    The record (``curves.jsonl``) and the pictures (``curve_loss.png``, ``curve_lr.png``,
    ``curve_ap.png``) lie in the runner's ``work_dir``, with a page of all of it (``curves.html``) that renews
    itself in a browser while training runs. A resumed run goes on with the earlier points;
    those of steps that were lost are dropped.

    Args:
        interval: record a point every so many steps; losses are averaged in between.
        redraw_s: draw again at most every so many seconds; the end of training is always drawn.
        out_dir: folder; the runner's ``work_dir`` when None.
    """

    priority = "LOW"

    def __init__(
        self, interval: int = 10, redraw_s: float = 10.0, out_dir: str | os.PathLike[str] | None = None
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, not {interval}")
        self.interval = interval
        self.redraw_s = redraw_s
        self.out_dir = out_dir
        self._record: CurveRecord | None = None
        self._steps_since_point = 0
        self._drawn_at = float("-inf")

    def before_train(self, runner: Any) -> None:
        """Open the record, with the points of the run that is resumed."""
        if is_main_process():
            self._record = CurveRecord(self._folder(runner) / RECORD_NAME, resumed_step=runner.iter)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | tuple | list | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Record a point every ``interval`` steps."""
        self._steps_since_point += 1
        if self._record is None or (runner.iter + 1) % self.interval != 0:
            return
        steps = self._steps_since_point
        self._steps_since_point = 0
        losses = {
            key.removeprefix("train/"): float(buffer.mean(steps))
            for key, buffer in runner.message_hub.log_scalars.items()
            if key.startswith("train/") and "loss" in key
        }
        epoch = runner.epoch + (batch_idx + 1) / len(runner.train_dataloader)
        self._record.add_train(runner.iter + 1, epoch, losses, learning_rates(runner))
        self._draw(runner)

    def after_train_epoch(self, runner: Any) -> None:
        """Draw."""
        self._draw(runner)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Record the validation figures and draw."""
        if self._record is not None and metrics:
            # Validation follows the epoch, which the loop has counted by now.
            self._record.add_val(runner.iter, runner.epoch, metrics)
            self._draw(runner)

    def after_train(self, runner: Any) -> None:
        """Draw everything."""
        self._draw(runner, now_or_never=True)

    def _draw(self, runner: Any, now_or_never: bool = False) -> None:
        if self._record is None:
            return
        if now_or_never or time.monotonic() - self._drawn_at >= self.redraw_s:
            self._draw_now(runner, self._record.points, finished=now_or_never)
            # Measured from the end, so that drawing can never take most of the time.
            self._drawn_at = time.monotonic()

    def _draw_now(self, runner: Any, points: list[Point], finished: bool) -> None:
        folder = self._folder(runner)
        pictures = draw_curves(points, folder)
        write_curve_page(
            folder / PAGE_NAME,
            points,
            pictures,
            alarms=runner.message_hub.runtime_info.get("alarms", []),
            refresh_s=None if finished else max(round(self.redraw_s), 5),
            progress=f"epoch {runner.epoch} of {runner.max_epochs}, step {runner.iter} of {runner.max_iters}",
        )

    def _folder(self, runner: Any) -> Path:
        return Path(self.out_dir or runner.work_dir)
