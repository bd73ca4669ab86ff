"""Checkpoint files: their names, the link to the latest, and writing them so that none is ever broken.

A training folder holds ``model_epoch_NNN.pth`` (0-based number of the epoch just finished), or
``model_epoch_NNN_step_SSSSS.pth`` where saving goes by steps (SSSSS optimizer steps done since the
beginning), and ``dd_model_latest.pth``, which points at the newest of them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.errors import InputError, Problem
from ddetr_mm.files import written_whole
from ddetr_mm.weights.encryption import is_encrypted, is_whole_encrypted

LATEST_NAME = "dd_model_latest.pth"

_NAME = re.compile(r"model_epoch_(?P<epoch>\d{3,})(?:_step_(?P<step>\d{5,}))?\.pth")
_LEFTOVER = re.compile(r"\.tmp-\d+-(?:model_epoch_.*|dd_model_latest)\.pth")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CheckpointName:
    """What the name of a checkpoint file says.

    Attributes:
        epoch: 0-based number of the epoch in which, or at the end of which, it was written.
        step: optimizer steps done since the beginning, where the name tells them.
    """

    epoch: int
    step: int | None = None

    def __str__(self) -> str:
        steps = "" if self.step is None else f"_step_{self.step:05d}"
        return f"model_epoch_{self.epoch:03d}{steps}.pth"

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """The meaning of a file name; None if it is not a checkpoint's."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(int(match["epoch"]), None if match["step"] is None else int(match["step"]))

    @property
    def age_key(self) -> tuple[int, float]:
        """Sorts names by training time; the end of an epoch comes after all its steps."""
        return self.epoch, float("inf") if self.step is None else self.step


def is_whole(path: Path) -> bool:
    """Whether a file is a complete archive as ``torch.save`` writes it, encrypted or not.

    Reads only the archive's directory, which stands at the file's end: a file that was cut off has none. Of
    an encrypted file only the length is checked, which needs no key.
    """
    if is_encrypted(path):
        return is_whole_encrypted(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint a run in this folder goes on from.

    That is the file ``dd_model_latest.pth`` points at; if the link is missing or its file is broken, the
    newest whole ``model_epoch_*.pth``. None if there is neither.
    """
    folder = Path(folder)
    latest = (folder / LATEST_NAME).resolve()
    if latest.is_file() and is_whole(latest):
        return latest
    return next((path.resolve() for path in reversed(list_checkpoints(folder)) if is_whole(path)), None)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a folder, oldest first by the training time in their names."""
    found = []
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        name = CheckpointName.parse(path.name)
        if name is not None and path.is_file():
            found.append((name.age_key, path))
    return [path for _, path in sorted(found)]


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete half-written checkpoints that a killed run left; returns what was deleted."""
    leftovers = [path for path in Path(folder).iterdir() if _LEFTOVER.fullmatch(path.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


@contextmanager
def checkpoint_written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a checkpoint to; make it durable and put it under its name after.

    Yields:
        The path to write to, in the same folder.
    """
    with written_whole(path) as temporary:
        yield temporary
        _flush(temporary)
    _flush(path.parent)


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn a full disk while ``path`` is written into one message that names what is safe.

    Raises:
        InputError: the disk, or the user's share of it, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        last = find_latest_checkpoint(path.parent)
        kept = f"the last good checkpoint is {last}" if last else "no earlier checkpoint is there"
        raise InputError(
            Problem(
                "no space left on the disk to write the checkpoint",
                file=path,
                mend=f"free some space and start the same command again; {kept}",
            )
        ) from error


def link_latest(checkpoint: Path) -> Path:
    """Make ``dd_model_latest.pth`` stand for a checkpoint of the same folder, in one step.

    It is a relative symbolic link; where the file system has none, a hard link, or else a copy.
    """
    link = checkpoint.with_name(LATEST_NAME)
    with written_whole(link) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(checkpoint.name)
        except (OSError, NotImplementedError):
            _link_without_symlinks(checkpoint, temporary)
    _flush(link.parent)
    return link


def _link_without_symlinks(checkpoint: Path, temporary: Path) -> None:
    try:
        os.link(checkpoint, temporary)
    except OSError:
        shutil.copyfile(checkpoint, temporary)


def _flush(path: Path) -> None:
    """Have the system put a file's or folder's content on the disk now, so that it outlives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
