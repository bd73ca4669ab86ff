"""What a run may write: it replaces neither one of its inputs nor a file that no run of ours left there.

:func:`claim` is asked before a file gets its name. Names of files that we wrote are kept in
:data:`OWNED_NAME`, in their folder or, of a run, in its results folder: a line each, added before the file
has its name, so that a killed run has listed what it left.
:func:`only_writer` keeps two runs out of one folder. Temporary files have a name of their own
(:func:`temporary_beside`) and are locked while they are written, so that leftovers can be recognised.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ddetr_mm.errors import DataError, Problem

OWNED_NAME = ".ddetr_mm_files"
"""The list of the files of a folder that we wrote: JSON strings, one a line."""

LOCK_NAME = ".ddetr_mm_lock"

_FORCE_HINT = "move it away, choose another folder or name, or replace it with --force"
_MAX_SUFFIX_BYTES = 24
_MOST_SHOWN = 5
_TEMPORARY = re.compile(r"\.ddetr_mm-[0-9a-f]{16}\.tmp(\.[^/]*)?", re.DOTALL)


class _Known:
    """What this process knows.

    Attributes:
        inputs: real path → path as given, of the files that the run reads.
        force: whether files that we did not write may be replaced.
        active: whether a command runs.
        owned: folder → size of its list when it was read, and the names on it.
        roots: results folders whose list has the files of their folders too.
        cleaned: folders without leftovers of killed runs.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, str] = {}
        self.force = False
        self.active = False
        self.owned: dict[str, tuple[int, set[str]]] = {}
        self.roots: tuple[str, ...] = ()
        self.cleaned: set[Path] = set()


_known = _Known()


# --- What may be replaced ---


@contextmanager
def protected_inputs(paths: Iterable[str | os.PathLike[str]], *, force: bool = False) -> Iterator[None]:
    """Within the block none of these files is replaced, nor, without ``force``, are files of others.

    Every command runs in such a block. Outside it, where functions are called from other code, that code
    decides.

    Args:
        paths: files that the run reads; those that do not exist are ignored.
        force: whether files that we did not write may be replaced.
    """
    before = _known.inputs, _known.force, _known.active
    _known.active = True
    _known.cleaned = set()  # each command looks anew
    _known.inputs = dict(before[0])
    folders: dict[str, str] = {}
    for path in map(os.fspath, paths):
        _known.inputs[_place(path, folders)] = path
        if os.path.islink(path):
            _known.inputs[os.path.realpath(path)] = path
    _known.force = force or before[1]
    try:
        yield
    finally:
        _known.inputs, _known.force, _known.active = before


@contextmanager
def results_root(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block one list, in this folder, has the files of its folders too."""
    before = _known.roots
    _known.roots = (os.path.realpath(folder), *before)
    try:
        yield
    finally:
        _known.roots = before


def claim(path: str | os.PathLike[str]) -> None:
    """Record that a file is about to get its name.

    Args:
        path: the file; its folder exists.

    Raises:
        DataError: the file is an input of this run, a folder, or exists and is not ours.
    """
    if not _known.active:
        return
    problem = objection(path)
    if problem is not None:
        raise DataError(problem)
    folder, name = _list_of(path)
    if name not in _known.owned.get(folder, (0, ()))[1]:
        _append(folder, name)


def objection(path: str | os.PathLike[str]) -> Problem | None:
    """Return why a file must not be written, or None."""
    if not _known.active:
        return None
    read = _known.inputs.get(_place(os.fspath(path), {}))
    if read is not None:
        hint = "choose another folder or name for the results"
        return Problem("is read by this run and would be replaced by a result", file=read, hint=hint)
    if not os.path.lexists(path):
        return None
    if os.path.isdir(path) and not os.path.islink(path):
        return Problem("is a folder, where a file is to be written", file=path)
    folder, name = _list_of(path)
    if _known.force or _wrote(folder, name):
        return None
    return Problem("would be replaced, but no run of ours wrote it", file=path, hint=_FORCE_HINT)


def require_free(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Check before the work that every one of these files may be written.

    Raises:
        DataError: with all that may not.
    """
    problems = [problem for path in paths if (problem := objection(path)) is not None]
    if len(problems) > _MOST_SHOWN:
        more = len(problems) - _MOST_SHOWN
        problems = [*problems[:_MOST_SHOWN], Problem(f"and {more} more files would be replaced")]
    DataError.collect(problems)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Return whether a run of ours wrote a file; outside a command all are taken for ours."""
    if not _known.active:
        return True
    folder, name = _list_of(path)
    return _wrote(folder, name)


def remove_ours(path: str | os.PathLike[str]) -> None:
    """Remove a file if it is there and a run of ours wrote it."""
    if is_ours(path):
        Path(path).unlink(missing_ok=True)
        disown(path)


def disown(path: str | os.PathLike[str]) -> None:
    """Forget that we wrote a file, which has been removed or handed over."""
    folder, name = _list_of(path)
    if _known.active and _wrote(folder, name):
        _append(folder, name, removed=True)


def _place(path: str, folders: dict[str, str]) -> str:
    """Return a path with its folder resolved; the file may be a link, which a result replaces alone."""
    folder, name = os.path.split(os.path.abspath(path))
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def _list_of(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the folder whose list has a file, and its name there."""
    place = _place(os.fspath(path), {})
    for root in _known.roots:
        if place.startswith(root + os.sep):
            return root, place[len(root) + 1 :]
    folder, name = os.path.split(place)
    return folder, name


def _wrote(folder: str, name: str) -> bool:
    """Return whether a list names a file; it is read again where another process has added to it."""
    path = os.path.join(folder, OWNED_NAME)
    size, names = _known.owned.get(folder, (-1, set()))
    if name in names:
        return True
    try:
        described = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        _known.owned.pop(folder, None)
        return False
    if not stat.S_ISREG(described.st_mode):
        raise DataError(Problem("is no regular file", file=path, hint="remove it"))
    if described.st_size != size:
        names = _read_list(path)
        _known.owned[folder] = (described.st_size, names)
    return name in names


def _read_list(path: str) -> set[str]:
    names: set[str] = set()
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            try:
                name = json.loads(line)
            except ValueError:  # an empty line, or the half line of a killed run, whose file was not written
                continue
            if isinstance(name, str):
                names.add(name)
            elif isinstance(name, list) and len(name) == 1 and isinstance(name[0], str):
                names.discard(name[0])
    return names


def _append(folder: str, name: str, removed: bool = False) -> None:
    """Add a line by a single write, which several processes may do at once."""
    path = os.path.join(folder, OWNED_NAME)
    line = json.dumps([name] if removed else name)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        # A line break in front ends the half line that a killed run may have left.
        content = f"\n{line}\n".encode()
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    size_before, names = _known.owned.setdefault(folder, (0, set()))
    (names.discard if removed else names.add)(name)
    if size_before + len(content) == size:  # else another process has added to it: read again when it matters
        _known.owned[folder] = (size, names)


# --- Temporary files ---


@contextmanager
def temporary_beside(path: Path, *, locked: bool = True) -> Iterator[Path]:
    """Give an empty, locked temporary file in the folder of ``path``; what is left of it is removed.

    So are temporary files of killed runs, when a command writes to the folder for the first time.

    Args:
        path: the file that it will become. Its name may have the greatest length that is allowed.
        locked: False for writers that lock their file themselves, such as HDF5.

    Yields:
        A path with the same suffix.
    """
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _MAX_SUFFIX_BYTES else ""
    temporary = path.with_name(f".ddetr_mm-{secrets.token_hex(8)}.tmp{suffix}")
    if _known.active and path.parent not in _known.cleaned:
        remove_leftovers(path.parent)
        _known.cleaned.add(path.parent)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if locked:
            _lock(descriptor)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove temporary files of runs that were killed; returns their names.

    Only regular files of this user with a name as :func:`temporary_beside` gives it, that no process writes:
    where the file system has no locks, which would show it, all stay.
    """
    removed = []
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in entries:
        if not _TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        try:
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # gone, or not ours to open
            continue
        try:
            if _lock(descriptor):
                os.unlink(entry.path)
                removed.append(entry.name)
        except FileNotFoundError:
            continue
        finally:
            os.close(descriptor)
    return removed


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed; returns False where another process has it or there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # another process has it, or there are none on this (file) system
        return False
    return True


# --- One run a folder ---


@contextmanager
def only_writer(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Keep other runs from writing to a folder within the block; the death of this process ends it too.

    Where the file system has no locks, the block runs with a warning.

    Args:
        folder: exists.
        what: the command, which the other run's message names.

    Raises:
        DataError: another run writes to the folder.
    """
    path = os.path.join(folder, LOCK_NAME)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            import fcntl

            # A record lock: forked data workers do not inherit it, so that it ends with this process.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EAGAIN):
                raise DataError(_held(path, os.fspath(folder))) from None
            print(f"warning: {folder} cannot be locked: do not run two commands into it", file=sys.stderr)
        about = f"{what}, process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}\n"
        os.truncate(descriptor, 0)
        os.write(descriptor, about.encode(errors="surrogateescape"))
        yield
    finally:
        os.close(descriptor)


def _held(path: str, folder: str) -> Problem:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            holder = file.read(200).strip()
    except OSError:
        holder = ""
    return Problem(
        f"another run writes to this folder ({holder or 'it does not say which'})",
        file=folder,
        where="results_dir",
        hint="wait for it, stop it, or choose another results_dir",
    )
