"""File names of a folder in a few bytes each, for folders of millions of files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES_AT_ONCE = 2**16


class NameList:
    """Names in one array of bytes: about as many bytes a name as the longest one has characters.

    Args:
        names: ``(n,)`` array of fixed-width bytes (file names hold no NUL, which such arrays drop).
    """

    def __init__(self, names: NDArray[np.bytes_]) -> None:
        self._names = names

    @classmethod
    def of(cls, names: Iterable[bytes]) -> NameList:
        """Collect names; they may come from a generator."""
        iterator = iter(names)
        parts: list[NDArray[np.bytes_]] = []
        while batch := list(itertools.islice(iterator, _NAMES_AT_ONCE)):
            parts.append(np.array(batch, dtype=np.bytes_))
        return cls(np.concatenate(parts) if parts else np.zeros(0, dtype="S1"))

    @classmethod
    def of_folder(cls, folder: Path, wanted: Callable[[bytes], bool]) -> NameList:
        """The sorted names in a folder that are ``wanted``."""
        with os.scandir(os.fsencode(folder)) as entries:
            found = cls.of(name for name in (entry.name for entry in entries) if wanted(name))
        found._names.sort()
        return found

    def __len__(self) -> int:
        return len(self._names)

    def part(self, start: int, stop: int) -> list[str]:
        """The names from ``start`` up to ``stop``."""
        return [os.fsdecode(name) for name in self._names[start:stop].tolist()]

    def take(self, which: NDArray[Any]) -> NameList:
        """The names at these positions, or where this mask is true."""
        return NameList(self._names[which])

    def map(self, function: Callable[[bytes], bytes]) -> NameList:
        """``function`` of every name, in the same order."""
        starts = range(0, len(self), _NAMES_AT_ONCE)
        batches = (self._names[start : start + _NAMES_AT_ONCE].tolist() for start in starts)
        return NameList.of(function(name) for batch in batches for name in batch)

    def first_of_each(self) -> NDArray[np.bool_]:
        """``(n,)`` mask: False where the same name stands further up."""
        mask = np.zeros(len(self), dtype=bool)
        mask[np.unique(self._names, return_index=True)[1]] = True
        return mask

    def missing_in(self, other: NameList) -> NDArray[np.bool_]:
        """``(n,)`` mask: True for names that ``other`` does not have."""
        return ~np.isin(self._names, other._names)
