"""One parsed copy of the annotations a machine, kept in a mapped file under the user's cache folder.

The first process that needs a set of annotation files parses them and writes the columns; the others
wait for it, then map the file. The file is found by the *content* of the annotation files. So that a
start need not read hundreds of megabytes to know the content, the digest of a file is remembered with
its size, times and inode and only computed anew when one of those has changed.

Nothing is left behind by a killed process but a temporary file, which the next writer removes. What has
not been used for a month is removed, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from safetensors.numpy import save_file

from ddetr_mm.datasets.coco_table import CocoTable
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import write_text_whole, written_whole

# --- Numpy columns in one file that any number of processes map into memory and share ---
# The file is a safetensors file: raw arrays behind a JSON header, nothing in it is executed. The kernel
# keeps one copy of its pages for the whole machine, gives them back under memory pressure, and needs no
# clean-up when a process dies.

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


# --- One parsed copy of the annotations a machine, kept in a mapped file under the user's cache folder ---

FORMAT_VERSION = 1
"""Raised whenever the columns or their meaning change: older files are then never read."""

FOLDER_VARIABLE = "DDETR_MM_CACHE"
VERIFY_UP_TO_BYTES = 1 << 30
"""Larger files are not read through at every start; they are still checked for being whole."""

_SETTLED_NS = 2_000_000_000
_UNUSED_SECONDS = 30 * 24 * 3600
_DEAD_AFTER_SECONDS = 600  # a writer on another host that shares the folder is not seen by its number
_WAIT_TOLD_EVERY = 10.0

_log = logging.getLogger(__name__)


class MappedCocoTable(CocoTable):
    """A table over a mapped file. Pickling it stores the file's path, not the columns."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path),)


def cache_folders() -> list[Path]:
    """Where cache files may lie, best first.

    ``$DDETR_MM_CACHE``, else ``$XDG_CACHE_HOME/ddetr_mm`` or ``~/.cache/ddetr_mm``; where that cannot be
    written, a folder of the user's own among the temporary files.
    """
    own = os.environ.get(FOLDER_VARIABLE)
    general = os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else (Path(general) if general else Path.home() / ".cache") / "ddetr_mm"
    return [base / "annotations", Path(tempfile.gettempdir()) / f"ddetr_mm-{os.getuid()}"]


def cached_table(
    files: Sequence[Sequence[Path]], options: Sequence[Any], build: Callable[[], CocoTable]
) -> CocoTable:
    """The table of some annotation files, shared by all processes of the machine.

    Args:
        files: the annotation files, per source.
        options: what else the table depends on; must be plain JSON data.
        build: parses the files; called when no valid cache file is there.

    Returns:
        A table over a mapped file, or, where no folder can be written, the built table itself.
    """
    for folder in cache_folders():
        try:
            _make_folder(folder)
            path = _path_of(folder, files, options)
            table = _open_valid(path)
            if table is not None:
                return table
        except OSError as error:
            _log.warning("annotations cannot be shared through %s: %s", folder, error.strerror or error)
            continue
        with _only_one(path.with_suffix(".lock")):
            # another process may have written it in the meantime
            return _open_valid(path) or _write_and_map(build(), path)
    return build()


def _path_of(folder: Path, files: Sequence[Sequence[Path]], options: Sequence[Any]) -> Path:
    digests = [[_file_digest(folder, path) for path in source] for source in files]
    return folder / f"{_digest(json.dumps([FORMAT_VERSION, digests, options]).encode())}.columns"


def _write_and_map(table: CocoTable, path: Path) -> CocoTable:
    """Put a table into the cache; where that fails (a full disk), go on with the table in memory."""
    try:
        _remove_leftovers(path.parent)
        save_table(table, path)
    except OSError as error:
        _log.warning("annotations stay in this process's memory: %s: %s", path, error.strerror or error)
        return table
    return open_table(path, verify=False)


def save_table(table: CocoTable, path: Path) -> None:
    """Write a table for :func:`open_table`."""
    names = json.dumps(list(table.category_names.items()))
    columns = {name: getattr(table, name) for name in table.array_names()}
    write_columns(path, columns, {"category_names": names, "version": str(FORMAT_VERSION)})


def open_table(path: Path, *, verify: bool = True) -> MappedCocoTable:
    """Map a table that :func:`save_table` wrote.

    Raises:
        DamagedFile: it is of another version, or damaged.
        FileNotFoundError: there is none.
    """
    found = map_columns(path, verify=verify)
    if found.metadata.get("version") != str(FORMAT_VERSION) or set(found.columns) != set(
        CocoTable.array_names()
    ):
        raise DamagedFile(f"{path} is of another version")
    names = {int(category): str(name) for category, name in json.loads(found.metadata["category_names"])}
    table = MappedCocoTable(**found.columns, category_names=names)
    object.__setattr__(table, "path", path)
    return table


def _reopen(path: str) -> MappedCocoTable:
    """Open a table in another process of the same run; it was verified there."""
    try:
        return open_table(Path(path), verify=False)
    except FileNotFoundError:
        hint = "start again, and leave the cache folder alone during a run"
        raise DataError(Problem("cached annotations vanished during the run", path, hint=hint)) from None


def _open_valid(path: Path) -> MappedCocoTable | None:
    try:
        table = open_table(path, verify=path.stat().st_size <= VERIFY_UP_TO_BYTES)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        _log.warning("cached annotations are read anew: %s", error)
        return None
    with contextlib.suppress(PermissionError):  # the time of last use, for the removal of unused files
        os.utime(path)
    return table


class _Remembered(msgspec.Struct):
    identity: list[int]
    digest: str


def _file_digest(folder: Path, path: Path) -> str:
    """Digest of a file's content, from memory where the file has not changed since."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", path)) from error
    identity = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
    memory = folder / f"{_digest(os.fsencode(path.resolve()))}.digest"
    try:
        remembered = msgspec.json.decode(memory.read_bytes(), type=_Remembered)
        if remembered.identity == identity:
            return remembered.digest
    except FileNotFoundError:
        pass
    except msgspec.DecodeError:
        _log.warning("%s is damaged; the annotation file is read anew", memory)
    try:
        with path.open("rb") as file:
            digest = _stream_digest(file)
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", path)) from error
    # a file that was just written may change again within the resolution of its times
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS:
        write_text_whole(memory, msgspec.json.encode(_Remembered(identity, digest)).decode())
    return digest


def _stream_digest(file: Any) -> str:
    running = hashlib.blake2b(digest_size=16)
    while block := file.read(1 << 22):
        running.update(block)
    return running.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@contextlib.contextmanager
def _only_one(lock_path: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when its holder dies; say so when waiting takes long."""
    lock = FileLock(lock_path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_WAIT_TOLD_EVERY)
        except Timeout:
            _log.warning("waiting for another process that reads the annotations (%s)", lock_path)
        except (NotImplementedError, OSError) as error:
            _log.warning("no lock on %s (%s): several processes may read the annotations", lock_path, error)
            break
    try:
        yield
    finally:
        lock.release()


def _make_folder(folder: Path) -> None:
    """Make the cache folder; among the temporary files, refuse one that another user has prepared."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.parent == Path(tempfile.gettempdir()) and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that died, and what has long not been used."""
    for item in folder.iterdir():
        temporary = re.match(r"\.tmp-(\d+)-", item.name)
        with contextlib.suppress(FileNotFoundError):
            unused = time.time() - item.stat().st_mtime
            if unused > _UNUSED_SECONDS or (
                temporary and unused > _DEAD_AFTER_SECONDS and not _alive(int(temporary.group(1)))
            ):
                item.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
