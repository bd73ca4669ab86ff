"""Apply a function to many tasks on several processes, and get the results in the tasks' order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_TASKS_IN_FLIGHT_PER_PROCESS = 4


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


class _Pending(Generic[Task, Result]):
    """A task that was handed out, and its result as soon as there is one."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.future: Future[Result] | None = None
        self.result: Result | None = None
        self.finished = False  # by the calling process


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_processes: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield ``function(task)`` for each task, in order, whatever process computed it.

    The calling process takes part whenever the result that is due is not ready: it is busy while the
    others start, and does all the work when there are none. Only a few tasks are in flight at a time, so
    ``tasks`` may be a generator of any length. Processes are spawned, ignore Ctrl-C (the caller's
    KeyboardInterrupt ends them) and end when the caller dies. When one of them dies the caller does the
    rest alone.

    Args:
        function: a module-level function.
        tasks: its arguments; must be picklable, like the results.
        num_processes: processes besides this one; 0 for none.
        initializer: called once in every process, this one included, before the first task.
        initargs: its arguments.
    """
    initializer(*initargs)
    if num_processes <= 0:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(initializer, initargs),
    )
    try:
        yield from _share_out(pool, function, iter(tasks), num_processes * _TASKS_IN_FLIGHT_PER_PROCESS + 2)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _share_out(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterator[Task], num_in_flight: int
) -> Iterator[Result]:
    window: deque[_Pending[Task, Result]] = deque()
    try:
        for task in tasks:
            window.append(_Pending(task))
            _submit(pool, function, window[-1])
            while len(window) >= num_in_flight:
                yield _next_result(window, function)
        while window:
            yield _next_result(window, function)
    except BrokenProcessPool:
        logger.warning("a worker process ended unexpectedly; going on in one process")
        for pending in window:
            yield pending.result if pending.finished else function(pending.task)  # type: ignore[misc]
        yield from map(function, tasks)


def _submit(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], pending: _Pending[Task, Result]
) -> None:
    # Submitting may start a process, which inherits the blocked signal: Ctrl-C never reaches it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pending.future = pool.submit(function, pending.task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next_result(window: deque[_Pending[Task, Result]], function: Callable[[Task], Result]) -> Result:
    """Result of the first task of the window, which leaves it."""
    first = window[0]
    while not first.finished and first.future is not None and not first.future.done():
        stolen = next(
            (item for item in window if not item.finished and item.future and item.future.cancel()), None
        )
        if stolen is None:
            break
        stolen.result, stolen.finished = function(stolen.task), True
    result = first.result if first.finished or first.future is None else first.future.result()
    window.popleft()
    return result  # type: ignore[return-value]


def _start_process(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
