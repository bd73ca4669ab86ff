"""Where a training step is: named stretches of the model's work, for whoever keeps time.

The detector and its head mark their parts by :func:`stage` and :func:`staged`. Without a listener that
costs next to nothing; :class:`ddetr_mm.engine.time_ledger.TimeLedgerHook` is one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Listener = Callable[[str], AbstractContextManager]

_NOTHING = contextlib.nullcontext()
_listener: Listener | None = None


def stage(name: str) -> AbstractContextManager:
    """A block that the listener, if there is one, sees begin and end; blocks may lie in each other."""
    return _NOTHING if _listener is None else _listener(name)


def staged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: the whole function is a block of :func:`stage`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with stage(name):
                return function(*args, **kwargs)

        return within

    return decorate


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let ``listener`` make the blocks of :func:`stage` until the end, in this process.

    Raises:
        RuntimeError: if somebody is listening already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("the stages have a listener already")
    _listener = listener
    try:
        yield
    finally:
        _listener = None
