"""Progress of long work: a rich bar on a terminal, a plain line every few seconds elsewhere.

Both go to standard error, so that standard output keeps a command's answer. ``NO_COLOR`` and ``TERM=dumb``
are respected. Of a distributed run only the first rank shows anything.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from ddetr_mm.engine.distributed import is_first_rank

Item = TypeVar("Item")

LINE_INTERVAL_S = 5.0
"""Seconds between two plain lines."""

FACTS_INTERVAL_S = 0.5
"""Seconds between two readings of :attr:`Progress.facts` for a bar: a loss on a GPU has to be waited for."""

RATE_WINDOW_S = 120.0
"""The rate is that of the steps of this many seconds: long enough to be steady though images differ in size,
short enough to follow a machine that gets busy."""


class Progress:
    """Shows the progress of one piece of work while its ``with`` block runs.

    Args:
        description: what is being done, e.g. ``"converting"``.
        total: number of steps; None until it is known.
        unit: what a step is, e.g. ``"images"``.
        stream: where to write; standard error when None.
        done: steps that an earlier start has done.

    Attributes:
        facts: gives more to show, such as the loss; asked only when something is printed.
        pauses_left: how many pauses (see :meth:`pause`) are still to come, for the time left.
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
        self._done_before = done
        self.facts: Callable[[], str] | None = None
        self.pauses_left = 0
        self._stream = stream or sys.stderr
        self._shown = is_first_rank()
        self._live = self._shown and is_live_terminal(self._stream)
        self._pauses_s: list[float] = []
        self._paused_at: float | None = None
        self._last_line = 0.0
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        # Without a terminal it only keeps the rate.
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[facts]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=Console(force_jupyter=False, file=self._stream),
            disable=not self._live,
            get_time=self._working_time,
            speed_estimate_period=RATE_WINDOW_S,
        )

    def __enter__(self) -> Progress:
        self._last_line = time.monotonic()
        self._task = self._bar.add_task(
            self.description, total=self.total, completed=self.done, facts="", rate="", left=""
        )
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._bar.stop()
        if self._shown and not self._live and kind is None and self.done > self._done_before:
            self._print_line(time.monotonic())

    def update(self, done: int, total: int | None = None) -> None:
        """Report how much is done.

        Args:
            done: steps done since the beginning.
            total: number of steps, if that is known now or has changed.
        """
        self.done = done
        self.total = total if total is not None else self.total
        self._bar.update(self._task, completed=done, total=self.total)
        now = time.monotonic()
        if self._live:
            if self.facts is not None and now - self._last_line >= FACTS_INTERVAL_S:
                self._bar.update(self._task, facts=self.facts())
                self._last_line = now
            self._bar.update(self._task, rate=self._rate_text(), left=self._left_text())
        elif self._shown and now - self._last_line >= LINE_INTERVAL_S:
            self._print_line(now)

    def show_next(self) -> None:
        """Print the line, or the bar's facts, of the next update whatever time it comes at."""
        self._last_line = -math.inf

    def advance(self, steps: int = 1) -> None:
        """Report that so many more steps are done."""
        self.update(self.done + steps)

    def pause(self) -> None:
        """Stop the clock while other work runs, such as a validation during training."""
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Start the clock again."""
        if self._paused_at is not None:
            self._pauses_s.append(time.monotonic() - self._paused_at)
            self._paused_at = None
        self.pauses_left = max(self.pauses_left - 1, 0)

    def show_above(self, logger: logging.Logger) -> None:
        """Print the console lines of a logger above the bar instead of through it."""
        if not self._live:
            return
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler and not isinstance(handler.stream, FileProxy):
                self._redirected.append((handler, handler.stream))
                handler.setStream(FileProxy(self._bar.console, handler.stream))

    def _working_time(self) -> float:
        now = time.monotonic() if self._paused_at is None else self._paused_at
        return now - sum(self._pauses_s)

    def _rate_text(self) -> str:
        rate = self._bar.tasks[0].speed
        if not rate:
            return ""
        if rate < 1:
            one = self.unit.removesuffix("es" if self.unit.endswith("ches") else "s")
            return f"{1 / rate:,.3g} s/{one or 'step'}"
        return f"{rate:,.3g}/s" if rate < 1000 else f"{rate:,.0f}/s"

    def _left_text(self) -> str:
        """The time left as ``H:MM:SS``; empty as long as it is not known."""
        rate = self._bar.tasks[0].speed
        if not rate or not self.total or self.done >= self.total:
            return ""
        pause_s = statistics.median(self._pauses_s) if self._pauses_s else 0.0
        seconds = (self.total - self.done) / rate + self.pauses_left * pause_s
        return str(timedelta(seconds=round(seconds)))

    def _print_line(self, now: float) -> None:
        self._last_line = now
        text = f"{self.description}: {self.done}"
        if self.total:
            text += f"/{self.total}"
        text += f" {self.unit}".rstrip()
        if self.total:
            text += f" ({self.done / self.total:.0%})"
        facts = self.facts() if self.facts is not None else ""
        if facts:
            text += f", {facts}"
        left = self._left_text()
        if left:
            text += f", {self._rate_text()}, {left} left"
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
    """Whether a stream can show a bar that redraws itself."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"
