"""Annotations parsed once a machine: a cache file under the user's cache folder that all processes map.

The first process that needs a set of annotation files parses them and writes the columns; the others wait for
it, then map the file. Its name is a digest of the *content* of the annotation files. So that a start need not
read hundreds of megabytes, the digest of a file is remembered with its size, times and inode, and computed
again when one of those has changed.

A killed process leaves nothing but a temporary file, which the next writer removes, together with cache files
that have not been used for a month.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
import re
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from ddetr_mm.datasets.coco_table import CocoTable
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import written_whole
from ddetr_mm.outputs import remove_leftovers

# --- Columns in a mapped file ---
# Arrays in numpy's own format (.npy), one after the other; the first holds JSON with the names of the others.
# Nothing in the file is executed. The kernel keeps one copy of its pages for the whole machine, takes them
# back under memory pressure, and needs no clean-up when a process dies.

_DTYPES = tuple(map(np.dtype, (np.bool_, np.uint8, np.int32, np.int64, np.float64)))
_ALIGNMENT = 64


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
        if array.dtype not in _DTYPES:
            raise TypeError(f"column {name} is of type {array.dtype}")
    checksums = {name: _checksum(name, array) for name, array in arrays.items()}
    head = json.dumps(dict(metadata=dict(metadata), checksums=checksums)).encode()
    with written_whole(path, owned=False) as temporary, temporary.open("wb") as file:
        for array in (np.frombuffer(head, np.uint8), *arrays.values()):
            file.write(bytes(-file.tell() % _ALIGNMENT))
            np.lib.format.write_array(file, array, allow_pickle=False)


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
            head = json.loads(_next_array(file, mapped).tobytes())
            metadata, checksums = dict(head["metadata"]), dict(head["checksums"])
            columns = {name: _next_array(file, mapped) for name in checksums}
        except Exception as error:  # numpy's and JSON's parsers raise many kinds
            raise DamagedFile(f"{path} is damaged: {error}") from None
    if verify:
        for name, column in columns.items():
            if _checksum(name, column) != checksums[name]:
                raise DamagedFile(f"{path}: the checksum of {name} is wrong")
    return ColumnFile(columns, metadata)


def _next_array(file: IO[bytes], mapped: mmap.mmap) -> npt.NDArray[Any]:
    """The array at the file's position, as a view of the mapped file; moves the position behind it.

    Raises:
        ValueError: there is no array of ours, or it does not fit in the file.
    """
    file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of numpy's format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype not in _DTYPES or min(shape, default=1) < 0:
        raise ValueError("an array of another kind")
    start, count = file.tell(), math.prod(shape)
    if start + count * dtype.itemsize > len(mapped):
        raise ValueError("an array does not fit in the file")
    file.seek(count * dtype.itemsize, os.SEEK_CUR)
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(mapped, dtype, count, start).reshape(shape)


def _checksum(name: str, array: npt.NDArray[Any]) -> int:
    kind = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode("utf-8", "surrogatepass"))
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, kind)


# --- The cache ---

FORMAT_VERSION = 3
"""Raised whenever the columns or their meaning change: older files are then not read."""

FOLDER_VARIABLE = "DDETR_MM_CACHE"
VERIFY_UP_TO_BYTES = 1 << 30
"""Larger files are not read as a whole at every start; their length is still checked."""

_SETTLED_NS = 2_000_000_000
_UNUSED_SECONDS = 30 * 24 * 3600
_NAME = re.compile(r"[0-9a-f]{32}\.(?:columns|digest|lock)")
_WARN_EVERY_SECONDS = 10.0

_log = logging.getLogger(__name__)


class MappedCocoTable(CocoTable):
    """A table over a mapped file. Pickling it stores the file's path, not the columns."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path),)


def cache_folders() -> list[Path]:
    """Folders for cache files, best first.

    ``$DDETR_MM_CACHE``, else ``$XDG_CACHE_HOME/ddetr_mm`` or ``~/.cache/ddetr_mm``; where that cannot be
    written, the user's folder among the temporary files.
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
        options: what else the table depends on, as plain JSON data.
        build: parses the files; called where there is no valid cache file.

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
    """Put a table into the cache; where that fails (a full disk), return the table in memory."""
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
    metadata = {
        "category_names": names,
        "repairs": json.dumps(table.repairs),
        "version": str(FORMAT_VERSION),
    }
    write_columns(path, columns, metadata)


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
    repairs = tuple(json.loads(found.metadata["repairs"]))
    table = MappedCocoTable(**found.columns, category_names=names, repairs=repairs)
    object.__setattr__(table, "path", path)
    return table


def _reopen(path: str) -> MappedCocoTable:
    """Open a table in another process of the same run, which has verified it."""
    try:
        return open_table(Path(path), verify=False)
    except FileNotFoundError:
        hint = "start again, and do not change the cache folder during a run"
        raise DataError(Problem("cached annotations vanished during the run", path, hint=hint)) from None


def _open_valid(path: Path) -> MappedCocoTable | None:
    try:
        table = open_table(path, verify=path.stat().st_size <= VERIFY_UP_TO_BYTES)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        _log.warning("annotations are parsed again: %s", error)
        return None
    with contextlib.suppress(PermissionError):  # the time of last use, for the removal of unused files
        os.utime(path)
    return table


class _Remembered(msgspec.Struct):
    identity: list[int]
    digest: str


def _file_digest(folder: Path, path: Path) -> str:
    """Digest of a file's content; the remembered one where the file has not changed since."""
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
        _log.warning("%s is damaged; the annotation file is read again", memory)
    try:
        with path.open("rb") as file:
            digest = _stream_digest(file)
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", path)) from error
    # a file that was just written may change again within the resolution of its times
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS:
        with written_whole(memory, owned=False) as temporary:
            temporary.write_bytes(msgspec.json.encode(_Remembered(identity, digest)))
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
    """Hold a lock that the kernel releases when its holder dies; warn while waiting for it."""
    lock = FileLock(lock_path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_WARN_EVERY_SECONDS)
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
    """Make the cache folder; refuse one that another user has made, and a link.

    Raises:
        PermissionError: it is one of these.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    described = folder.lstat()
    if not stat.S_ISDIR(described.st_mode):
        raise PermissionError(f"{folder} is a link")
    if described.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of dead processes, and cache files that have not been used for a month.

    Nothing else is touched: only regular files of this user with a name and a content as this module writes
    them.
    """
    remove_leftovers(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):
                described = entry.stat(follow_symlinks=False)
                unused = time.time() - described.st_mtime > _UNUSED_SECONDS
                if unused and described.st_uid == os.getuid() and _is_ours(Path(entry.path)):
                    os.unlink(entry.path)


def _is_ours(path: Path) -> bool:
    """Whether a file begins as one of this cache does."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    if path.suffix == ".columns":
        return start.startswith(np.lib.format.magic(1, 0)) and b'{"metadata": {' in start
    return not start if path.suffix == ".lock" else start.startswith(b'{"identity":[')
