"""Apply a function to many tasks on several processes, and get the results in the tasks' order."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# A process works on one task while the next ones wait for it in a pipe.
_TASKS_PER_PROCESS = 3
# Tasks that the calling process can take from while the others work.
_SPARE_TASKS = 8


def can_fork() -> bool:
    """Whether processes may be forked, which start at once; spawned ones first import for half a second.

    Not where there are other threads: one of them may hold a lock that nobody in the copy would ever open.
    """
    return "fork" in multiprocessing.get_all_start_methods() and threading.active_count() == 1


class _Pending(Generic[Task, Result]):
    """A task, and its result to be, once somebody is at it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.future: Future[Result] | None = None

    def do(self, function: Callable[[Task], Result]) -> None:
        """Do it here and now; an error is kept for the moment at which the result is due."""
        self.future = Future()
        try:
            self.future.set_result(function(self.task))
        except Exception as error:
            self.future.set_exception(error)

    def is_lost(self) -> bool:
        """Whether no result will come, now that the pool is broken."""
        if self.future is None or not self.future.done():
            return True
        return isinstance(self.future.exception(), BrokenProcessPool)


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_processes: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """Yield ``function(task)`` for each task, in order, whatever process computed it.

    The calling process takes part whenever the result that is due is not ready: it is busy while the
    others start, and does all the work when there are none. Only a few tasks are in flight at a time, so
    ``tasks`` may be a generator of any length. Processes are forked where :func:`can_fork` allows it, else
    spawned; they ignore Ctrl-C (the caller's KeyboardInterrupt ends them) and end when the caller dies. When
    one of them dies the caller does the rest alone.

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
        mp_context=multiprocessing.get_context("fork" if can_fork() else "spawn"),
        initializer=_start_process,
        initargs=(initializer, initargs),
    )
    try:
        yield from _share_out(pool, function, iter(tasks), num_processes * _TASKS_PER_PROCESS)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _share_out(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterator[Task], num_elsewhere: int
) -> Iterator[Result]:
    window: deque[_Pending[Task, Result]] = deque()
    try:
        while True:
            for task in itertools.islice(tasks, num_elsewhere + _SPARE_TASKS - len(window)):
                window.append(_Pending(task))
            if not window:
                return
            _hand_out(pool, function, window, num_elsewhere)
            first = window[0].future
            spare = next((pending for pending in window if pending.future is None), None)
            if spare is not None and not (first and first.done()):
                spare.do(function)
            elif first is not None:
                result = first.result()
                window.popleft()
                yield result
    except BrokenProcessPool:
        logger.warning("a worker process ended unexpectedly; going on in one process")
    for pending in window:
        if pending.is_lost():
            pending.do(function)
        yield pending.future.result()  # type: ignore[union-attr]
    yield from map(function, tasks)


def _hand_out(
    pool: ProcessPoolExecutor,
    function: Callable[[Task], Result],
    window: Iterable[_Pending[Task, Result]],
    num_elsewhere: int,
) -> None:
    """Give waiting tasks to the pool until it has ``num_elsewhere`` to do.

    Tasks are given only when they are about to be done: one that has been given cannot be taken back
    (cancelling it would leave a pool that breaks later in a state in which it never answers).
    """
    missing = num_elsewhere - sum(
        pending.future is not None and not pending.future.done() for pending in window
    )
    # Submitting may start a process, which inherits the blocked signal: Ctrl-C never reaches it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for pending in window:
            if missing > 0 and pending.future is None:
                pending.future = pool.submit(function, pending.task)
                missing -= 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_process(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
