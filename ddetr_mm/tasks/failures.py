"""What ends a run without being a defect of ours, told in one message: memory, disk, killed processes."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ddetr_mm.errors import DataError, InputError, Problem, RunError

_MENDS = {
    errno.ENOSPC: "free some space, or name a folder on another disk, and start the same command again",
    errno.EDQUOT: "free some of your quota, or name a folder on another disk, and start the command again",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), or name a folder elsewhere",
    errno.EROFS: "name a folder on a disk that may be written to",
    errno.EACCES: "allow it for your user, or name another file or folder",
    errno.EPERM: "allow it for your user, or name another file or folder",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "name a folder whose upper folders are no files",
    errno.EEXIST: "a file stands where a folder is wanted: name another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`), or use fewer workers: dataset.workers",
    errno.ENFILE: "close other programs, or use fewer workers: dataset.workers",
}


@contextmanager
def failures_told() -> Iterator[None]:
    """Turn failures of the machine into one message each; everything else passes unchanged.

    Raises:
        DataError: a file or folder that cannot be read or written, a full disk.
        RunError: a data worker that was killed, too little memory.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        told = as_told(error)
        if told is None:
            raise
        raise told from error


def as_told(error: BaseException) -> InputError | None:
    """The message for an error of the machine; None for any other."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        where = "the GPU" if "CUDA" in text or "HIP" in text else "the machine"
        return RunError(Problem(f"{where} has too little memory: {text or 'MemoryError'}", mend=_LESS_MEMORY))
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return RunError(Problem("the machine has too little memory", value=text, mend=_LESS_MEMORY))
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return RunError(_killed_worker(text))
    if isinstance(error, ConnectionResetError):  # the other end of a worker's pipe has gone
        return RunError(_killed_worker(text))
    if isinstance(error, OSError) and error.errno in _MENDS:
        what = f"cannot be read or written: {error.strerror}"
        if error.filename is None:
            return DataError(Problem(f"a file {what}", mend=_MENDS[error.errno]))
        # Files are written under a temporary name beside their own.
        name = re.sub(r"\.tmp-\d+-", "", str(error.filename))
        return DataError(Problem(what, file=name, mend=_MENDS[error.errno]))
    return None


_LESS_MEMORY = (
    "lower dataset.batch_size or the image sizes of dataset.augmentation, set "
    "train.activation_checkpoint=true, or use fewer workers: dataset.workers"
)


def _killed_worker(text: str) -> Problem:
    """The message for a data worker that ended on its own; ``text`` is torch's."""
    mend = (
        "when the system ran out of memory (`dmesg` tells), lower dataset.workers or dataset.batch_size; "
        "then start the same command again"
    )
    if "bus error" in text.lower():
        mend = "give the container more shared memory (`--shm-size`), or set dataset.workers=0"
    return Problem(f"a data worker was killed: {text.splitlines()[0]}", where="dataset.workers", mend=mend)
