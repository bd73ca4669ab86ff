"""Numpy columns in one file that any number of processes map into memory and share.

The file is a safetensors file: raw arrays behind a JSON header, nothing in it is executed. The kernel
keeps one copy of its pages for the whole machine, gives them back under memory pressure, and needs no
clean-up when a process dies.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ddetr_mm.files import written_whole

_DTYPES = {"BOOL": np.bool_, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "F64": np.float64}
_CHECKSUMS = "checksums"


class DamagedFile(Exception):
    """The file is cut, altered or none of ours."""


@dataclass(frozen=True)
class ColumnFile:
    """Read-only columns over a mapped file.

    Attributes:
        columns: name to array.
        metadata: name to text.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    metadata: Mapping[str, str]


def write_columns(path: Path, columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write columns (bool, uint8, int32, int64 or float64) so that ``path`` never names half a file.

    Raises:
        TypeError: a column is of another type.
        OSError: the disk is full, or the folder cannot be written.
    """
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    for name, array in arrays.items():
        if array.dtype not in _DTYPES.values():
            raise TypeError(f"column {name} is of type {array.dtype}")
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    with written_whole(path) as temporary:
        save_file(arrays, temporary, {**metadata, _CHECKSUMS: json.dumps(checksums)})


def map_columns(path: Path, *, verify: bool) -> ColumnFile:
    """Map a file that :func:`write_columns` wrote.

    Args:
        path: the file.
        verify: compare every column's checksum, which reads the whole file once.

    Raises:
        DamagedFile: it is not such a file, or damaged.
        FileNotFoundError: there is none.
    """
    with path.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise DamagedFile(f"{path} is empty") from None
    try:
        header_end = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:header_end])
        metadata = header.pop("__metadata__")
        columns = {name: _column(mapped, header_end, entry) for name, entry in header.items()}
        checksums = json.loads(metadata[_CHECKSUMS])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFile(f"{path} has no readable header: {error}") from None
    if checksums.keys() != columns.keys():
        raise DamagedFile(f"{path} lacks columns")
    if verify:
        for name, column in columns.items():
            if _checksum(column) != checksums[name]:
                raise DamagedFile(f"{path}: the checksum of {name} is wrong")
    return ColumnFile(columns, metadata)


def _column(mapped: mmap.mmap, data_start: int, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    start, end = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    count = int(np.prod(shape, dtype=np.int64))
    if not 0 <= start <= end <= len(mapped) - data_start or count * dtype.itemsize != end - start:
        raise ValueError("an array does not fit in the file")
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(mapped, dtype, count, data_start + start).reshape(shape)


def _checksum(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)
