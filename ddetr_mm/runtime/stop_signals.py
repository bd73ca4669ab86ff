"""SIGTERM and Ctrl-C as a wish that is met at the next safe moment.

The first signal is remembered; whoever works asks :attr:`StopSignals.requested` between two steps. The
second one ends the process at once. Exit status is 130 either way.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mmengine.registry import FUNCTIONS

from ddetr_mm.runtime.data_workers import keep_socket_names_short
from ddetr_mm.runtime.rank_env import is_launched_by_us
from ddetr_mm.runtime.status import on_first_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
WORKER_GRACE_S = 5
PASSED_ON_WITHIN_S = 5.0


class StoppedBySignalError(KeyboardInterrupt):
    """The run was asked to stop and did, in good order."""


class StopSignals:
    """Handlers of SIGTERM and SIGINT while a ``with`` block runs.

    Outside the main thread, where Python allows no handlers, nothing is changed. A signal that the process
    was started to ignore (shells do so to background jobs with Ctrl-C) stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._at_once = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop is wished for."""
        return self.received is not None

    @property
    def reason(self) -> str:
        """What was received, in words."""
        if self.received is None:
            return "another process was asked to stop"
        return "Ctrl-C" if self.received == signal.SIGINT else self.received.name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that may be left anywhere: a signal raises :class:`StoppedBySignalError` in it.

        Raises:
            StoppedBySignalError: also when a stop was wished for before the block.
        """
        self._at_once = True
        try:
            if self.requested:
                raise StoppedBySignalError(self.reason)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            # Schedulers signal all processes of a job, and the launcher among them passes it on.
            if is_launched_by_us() and now - self._received_at < PASSED_ON_WITHIN_S:
                return
            raise KeyboardInterrupt
        self.received, self._received_at = signal.Signals(number), now
        if self._at_once:
            raise StoppedBySignalError(self.reason)
        if not on_first_rank():
            return
        print(
            f"{self.reason}: stopping after this step, with a checkpoint; once more to stop at once",
            file=sys.stderr,
            flush=True,
        )


@FUNCTIONS.register_module()
def signal_proof_worker_init(worker_id: int) -> None:
    """Let a data loader's worker outlive signals that are meant for the process that started it, and
    keep its sockets out of a ``TMPDIR`` with too long a name.

    Ctrl-C and a scheduler's SIGTERM reach all processes of a run; a worker that died of them would take
    the batch with it that the main process still waits for. After SIGTERM a worker has
    :data:`WORKER_GRACE_S` seconds left; one whose parent is gone ends by itself.

    Args:
        worker_id: from 0.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _end_worker)
    signal.signal(signal.SIGTERM, _end_worker_later)
    keep_socket_names_short()


def _end_worker_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(WORKER_GRACE_S)


def _end_worker(number: int, frame: FrameType | None) -> None:
    # with status 0: torch raises an error in the main process, wherever that is, for any other
    os._exit(0)
