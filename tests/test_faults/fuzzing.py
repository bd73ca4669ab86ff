"""What the fuzz tests share: how many examples, damaged bytes, a bound on memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis
from hypothesis import strategies as st

MANY = 500
"""A profile with at least so many examples (``--hypothesis-profile=many``) is a long search for faults."""


def few(count: int) -> int:
    """So many examples for a costly test; as many as the profile says in a long search."""
    usual = hypothesis.settings.default.max_examples
    return usual if usual >= MANY else min(count, usual)


@contextmanager
def memory_grows_less_than(num_bytes: int) -> Iterator[None]:
    """The highest memory use of this process must not rise by more than ``num_bytes`` in the block."""
    before = _highest_memory()
    yield
    grown = _highest_memory() - before
    assert grown < num_bytes, f"the memory grew by {grown / 2**20:.0f} MiB"


def _highest_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with bytes replaced, cut out, put in, or its end left out."""
    place = st.integers(0, len(content))
    replaced = st.tuples(st.just("replace"), place, st.binary(min_size=1, max_size=8))
    put_in = st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8))
    cut_out = st.tuples(st.just("remove"), place, st.integers(1, 64))
    ended = st.tuples(st.just("end"), place, st.just(0))
    return st.lists(st.one_of(replaced, put_in, cut_out, ended), min_size=1, max_size=4).map(
        lambda changes: _apply(content, changes)
    )


def _apply(content: bytes, changes: list[tuple[str, int, bytes | int]]) -> bytes:
    data = bytearray(content)
    for kind, place, what in changes:
        place = min(place, len(data))
        if kind == "replace" and isinstance(what, bytes):
            data[place : place + len(what)] = what
        elif kind == "insert" and isinstance(what, bytes):
            data[place:place] = what
        elif kind == "remove" and isinstance(what, int):
            del data[place : place + what]
        else:
            del data[place:]
    return bytes(data)
