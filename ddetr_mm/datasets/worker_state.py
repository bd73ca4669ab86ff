"""What each data worker reads at the moment, for the message when none of them gives a batch any more.

The table lies in memory that forked workers share with the main process. A worker writes its process number
and the file before it reads it, and empties its place afterwards. Workers that are spawned have tables of
their own, which the main process does not see.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_PLACES = 256
_HEAD = struct.Struct("<IH")
_PLACE_BYTES = 512
_TEXT_BYTES = _PLACE_BYTES - _HEAD.size

_table = mmap.mmap(-1, _PLACES * _PLACE_BYTES)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Have the table name ``path`` for this process within the block."""
    place = os.getpid() % _PLACES * _PLACE_BYTES
    text = os.fsencode(path)[-_TEXT_BYTES:]
    _HEAD.pack_into(_table, place, os.getpid(), len(text))
    _table[place + _HEAD.size : place + _HEAD.size + len(text)] = text
    try:
        yield
    finally:
        _HEAD.pack_into(_table, place, 0, 0)


def files_being_read() -> dict[int, str]:
    """Return the file that each process of the table reads now, by process number."""
    found = {}
    for place in range(0, _PLACES * _PLACE_BYTES, _PLACE_BYTES):
        process, length = _HEAD.unpack_from(_table, place)
        if process and _is_alive(process):
            text = _table[place + _HEAD.size : place + _HEAD.size + min(length, _TEXT_BYTES)]
            found[process] = os.fsdecode(text)
    return found


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
