"""A ledger of time: how long each named stretch of repeated steps takes, on the host and on a GPU.

A stretch that lies in another one is taken off it, so the stretches add up to the step. On a GPU events mark
the stretches' ends in the stream of work; their times are asked for later, when the GPU has passed them, so
that keeping the ledger makes nobody wait.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

STAGES = (
    "data",
    "backbone",
    "encoder",
    "decoder",
    "matching",
    "loss",
    "backward",
    "optimizer",
    "idle",
)
"""Stretches of a training step in their order; ``idle`` is what lies in none of the others."""


@dataclass
class _Mark:
    """A moment: from here on time goes to ``stage``."""

    stage: str
    host_s: float
    event: Any = None


class TimeLedger:
    """Marks the stretches of steps and adds up their times.

    Args:
        device: a CUDA device, whose time is kept beside the host's, or the CPU.
        clock: gives the host's time in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = clock
        self._stack: list[str] = []
        self._marks: list[_Mark] = []
        self._waiting: deque[list[_Mark]] = deque()
        self._host: list[dict[str, float]] = []
        self._device: list[dict[str, float]] = []

    @property
    def num_steps(self) -> int:
        """Steps whose times are known."""
        return len(self._host)

    def begin(self, stage: str) -> None:
        """Start a step in ``stage``; a step that was not ended is dropped."""
        self._stack = [stage]
        self._marks = []
        self._mark()

    def switch(self, stage: str) -> None:
        """From here on the step's time goes to ``stage``, outside of blocks of :meth:`stage`."""
        if self._stack:
            self._stack[0] = stage
            self._mark()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block of the step; outside of steps it counts for nothing."""
        if not self._stack:
            yield
            return
        self._stack.append(name)
        self._mark()
        try:
            yield
        finally:
            if len(self._stack) > 1:
                self._stack.pop()
                self._mark()

    def end(self) -> None:
        """End the step."""
        if self._stack:
            self._mark()
            self._waiting.append(self._marks)
            self.drop()
        self._settle(wait=False)

    def drop(self) -> None:
        """Forget the step that is under way."""
        self._stack, self._marks = [], []

    def _mark(self) -> None:
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(_Mark(self._stack[-1], self._clock(), event))

    def _settle(self, wait: bool) -> None:
        """Add up the steps that the GPU has passed, or all of them, waiting for it."""
        while self._waiting:
            marks = self._waiting[0]
            if marks[-1].event is not None:
                if wait:
                    marks[-1].event.synchronize()
                elif not marks[-1].event.query():
                    return
            self._waiting.popleft()
            self._host.append(_sums(marks, lambda one, other: 1e3 * (other.host_s - one.host_s)))
            if self._on_gpu:
                self._device.append(_sums(marks, lambda one, other: one.event.elapsed_time(other.event)))

    def summary(self, skip: int = 0) -> dict[str, Any]:
        """Medians over the steps so far, in milliseconds; waits for a GPU to pass the last of them.

        Args:
            skip: steps at the start that do not count, unless there are no others.

        Returns:
            ``steps``; ``host_ms`` and, on a GPU, ``device_ms``: stage to milliseconds, with the whole as
            ``step``.
        """
        self._settle(wait=True)
        skip = min(skip, max(0, self.num_steps - 1))
        found: dict[str, Any] = {"steps": self.num_steps - skip, "host_ms": _medians(self._host[skip:])}
        if self._on_gpu:
            found["device_ms"] = _medians(self._device[skip:])
        return found


def _sums(marks: list[_Mark], apart: Callable[[_Mark, _Mark], float]) -> dict[str, float]:
    """Time of every stage, each stretch from its mark to the next one, and of the whole."""
    times = dict.fromkeys(STAGES, 0.0)
    for one, other in pairwise(marks):
        times[one.stage] = times.get(one.stage, 0.0) + apart(one, other)
    times["step"] = apart(marks[0], marks[-1])
    return times


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}


def ledger_table(summary: dict[str, Any]) -> str:
    """The summary as lines of text: stage, milliseconds, share of the step.

    Args:
        summary: of :meth:`TimeLedger.summary`.
    """
    device = summary.get("device_ms")
    lines = [
        f"median of {summary['steps']} steps, ms".ljust(30)
        + f"{'host':>10}"
        + (f"{'GPU':>10}" if device else "")
    ]
    main = device or summary["host_ms"]
    for name, host_ms in summary["host_ms"].items():
        share = main[name] / main["step"] if main["step"] else 0.0
        gpu = f"{device[name]:10.1f}" if device else ""
        lines.append(f"  {name:<28}{host_ms:10.1f}{gpu}  {share:4.0%}")
    return "\n".join(lines)
