"""Progress of the Runner's loops on the console: a bar on terminals, a line every few seconds elsewhere."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO, TypeVar

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from ddetr_mm.engine.status import on_first_rank

# --- How long work will still take, from how long its steps have taken ---

RECENT_S = 30.0
RECENT_STEPS = 40
"""The rate is that of the last :data:`RECENT_S` seconds, or of so many steps where those took longer: long
enough to be steady though images differ in size, short enough to follow a machine that gets busy."""

_SLOW_START = 3.0
_CLOSE_S = 0.2


class TimeLeft:
    """Keeps a clock over steps, and another over pauses between them (validations within a training).

    All times are in seconds on any clock that does not go back. Time in pauses counts for no step.
    """

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._paused_at: float | None = None
        self._paused_s = 0.0
        self._pauses: list[float] = []
        self._start_dropped = False

    def add(self, now: float, done: int) -> None:
        """Note that ``done`` steps are done; at most one point in 0.2 s is kept."""
        active = now - self._paused_s
        if len(self._points) > 2 and active - self._points[-2][0] < _CLOSE_S:
            self._points[-1] = (active, done)
        else:
            self._points.append((active, done))
        self._drop_slow_start()
        while len(self._points) > 2:
            time, steps = self._points[1]
            if active - time <= RECENT_S or done - steps < RECENT_STEPS:
                break
            self._points.pop(0)

    def pause(self, now: float) -> None:
        """Something else begins."""
        self._paused_at = now

    def resume(self, now: float) -> None:
        """It is over."""
        if self._paused_at is not None:
            self._pauses.append(now - self._paused_at)
            self._paused_s += now - self._paused_at
            self._paused_at = None

    def per_second(self) -> float:
        """Steps a second of work; 0 as long as it is not known."""
        if len(self._points) < 2:
            return 0.0
        (start, before), (now, done) = self._points[0], self._points[-1]
        return (done - before) / (now - start) if now > start else 0.0

    def seconds(self, steps_left: int, pauses_left: int = 0, pause_steps: float = 0.0) -> float | None:
        """The time left; None as long as it is not known.

        Args:
            steps_left: steps still to do.
            pauses_left: pauses still to come.
            pause_steps: how many steps a pause is expected to be worth, until one has been measured.
        """
        rate = self.per_second()
        if not rate:
            return None
        pause = statistics.median(self._pauses) if self._pauses else pause_steps / rate
        return steps_left / rate + pauses_left * pause

    def _drop_slow_start(self) -> None:
        """Forget the first step when it took far longer than the next ones: it warmed something up."""
        if self._start_dropped or len(self._points) < 5:
            return
        self._start_dropped = True
        pairs = zip(self._points, self._points[1:], strict=False)
        costs = [(late - early) / max(after - before, 1) for (early, before), (late, after) in pairs]
        if costs[0] > _SLOW_START * statistics.median(costs[1:]):
            self._points.pop(0)


# --- How far long work has got: a bar on a terminal, a plain line every few seconds elsewhere ---
# Both go to standard error, so that standard output stays a command's answer. ``NO_COLOR`` and
# ``TERM=dumb`` are respected. Of a distributed run only the first rank shows anything.

Item = TypeVar("Item")

LINE_INTERVAL_S = 5.0
"""Seconds between two plain lines."""


class Progress:
    """Shows the progress of one piece of work while its ``with`` block runs.

    Args:
        description: what is being done, e.g. ``"converting"``.
        total: how many steps there are; None until it is known.
        unit: what a step is, e.g. ``"images"``.
        stream: where to write; standard error when None.
        done: steps that were done before, in a run that goes on.

    Attributes:
        pauses_left: how many pauses (see :meth:`pause`) are still to come, for the time left.
        pause_steps: how many steps a pause is expected to be worth, until one has been measured.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "",
        stream: TextIO | None = None,
        done: int = 0,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = done
        self._stream = stream or sys.stderr
        self._shown = on_first_rank()
        self._bar: Any = None
        self._task: Any = None
        self.pauses_left = 0
        self.pause_steps = 0.0
        self._rate = TimeLeft()
        self._last_line = 0.0
        self._borrowed: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Progress:
        self._last_line = time.monotonic()
        self._rate.add(self._last_line, self.done)
        if self._shown and is_live_terminal(self._stream):
            self._start_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            for handler, stream in self._borrowed:
                handler.setStream(stream)
            self._bar.stop()
        elif self._shown and kind is None and self.done:
            self._print_line(time.monotonic())

    def update(self, done: int, total: int | None = None) -> None:
        """Tell how much is done.

        Args:
            done: steps done since the beginning.
            total: steps in all, if that is known now or has changed.
        """
        now = time.monotonic()
        self.done = done
        self.total = total if total is not None else self.total
        self._rate.add(now, done)
        if self._bar is not None:
            speed = self._rate.per_second()
            shown = f"{speed:,.3g}/s" if speed < 1000 else f"{speed:,.0f}/s"
            self._bar.update(
                self._task,
                completed=done,
                total=self.total,
                speed=shown if speed else "",
                left=self._left(),
            )
        elif self._shown and now - self._last_line >= LINE_INTERVAL_S:
            self._print_line(now)

    def advance(self, steps: int = 1) -> None:
        """Tell that so many more steps are done."""
        self.update(self.done + steps)

    def pause(self) -> None:
        """Something else begins that is no step of this work, a validation within a training, say."""
        self._rate.pause(time.monotonic())

    def resume(self) -> None:
        """It is over."""
        self._rate.resume(time.monotonic())
        self.pauses_left = max(self.pauses_left - 1, 0)

    def _left(self) -> str:
        """The time left as ``H:MM:SS``; empty as long as it is not known."""
        if not self.total or self.done >= self.total:
            return ""
        seconds = self._rate.seconds(self.total - self.done, self.pauses_left, self.pause_steps)
        return "" if seconds is None else str(timedelta(seconds=round(seconds)))

    def show_above(self, logger: logging.Logger) -> None:
        """Let the console lines of a logger appear above the bar instead of through it."""
        if self._bar is None:
            return
        from rich.file_proxy import FileProxy

        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler and not isinstance(handler.stream, FileProxy):
                self._borrowed.append((handler, handler.stream))
                handler.setStream(FileProxy(self._bar.console, handler.stream))

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self.unit),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            # Ours, not rich's: rich takes a pause for slow steps and forgets long steps too soon.
            TextColumn("left {task.fields[left]}"),
            console=Console(file=self._stream),
        )
        self._task = self._bar.add_task(self.description, total=self.total, speed="", left="")
        self._bar.start()

    def _print_line(self, now: float) -> None:
        self._last_line = now
        text = f"{self.description}: {self.done}"
        if self.total:
            text += f"/{self.total}"
        text += f" {self.unit}".rstrip()
        if self.total:
            text += f" ({self.done / self.total:.0%})"
        left = self._left()
        if left:
            text += f", {self._rate.per_second():.3g}/s, {left} left"
        print(text, file=self._stream, flush=True)


def track(
    items: Iterable[Item], description: str, total: int | None = None, unit: str = ""
) -> Iterator[Item]:
    """Yield the items and show how many have been worked on.

    Args:
        items: anything to loop over.
        description: what is being done.
        total: how many there are; ``len(items)`` where it has one.
        unit: what an item is.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def is_live_terminal(stream: TextIO) -> bool:
    """Whether a bar that redraws itself makes sense on a stream."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


# --- Progress of the Runner's loops on the console: a bar on terminals, a line every few seconds elsewhere ---


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
