"""Tells where the time of a training step goes."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ddetr_mm.files import write_text_whole
from ddetr_mm.models.stages import listening

# --- A ledger of time: how long each named stretch of repeated steps takes, on the host and on a GPU ---
# A stretch that lies in another one is taken off it, so the stretches add up to the step. On a GPU events mark
# the stretches' ends in the stream of work; their times are asked for later, when the GPU has passed them, so
# that keeping the ledger makes nobody wait.

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


# --- Tells where the time of a training step goes ---

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
