"""Importing mmdet without what only its language models need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_language_models() -> Iterator[None]:
    """A block in which mmdet, imported for the first time, finds no ``transformers``.

    mmdet imports it for GLIP and Grounding DINO wherever it is installed, which takes a third of the time
    that all of mmdet takes; without it those two alone cannot be built. For processes that run a spec: its
    detector is never one of them. Where ``transformers`` is loaded already, nothing changes.
    """
    name = "transformers"
    if name in sys.modules:
        yield
        return
    # None makes an import fail as one of a package that is not installed.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules[name] is None:
            del sys.modules[name]
