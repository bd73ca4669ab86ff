"""How far long work has got: a bar on a terminal, a plain line every few seconds elsewhere.

Both go to standard error, so that standard output stays a command's answer. ``NO_COLOR`` and
``TERM=dumb`` are respected. Of a distributed run only the first rank shows anything.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO, TypeVar

from ddetr_mm.runtime.status import on_first_rank
from ddetr_mm.runtime.time_left import TimeLeft

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
