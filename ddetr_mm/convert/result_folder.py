"""A results folder whose files are replaced all at once, or not at all.

New files are made in a hidden folder inside the results folder (so that a rename is enough even where that
is a mount point), under names that no search for ``*.json`` finds. ``.ddetr_mm_convert.manifest`` lists the
files of a run; the next run removes exactly those. Before files are moved the manifest says so: when a run is
killed then, the next one completes it. A lock keeps two runs apart.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import parse_json

MANIFEST_NAME = ".ddetr_mm_convert.manifest"
_STAGING_PREFIX = ".ddetr_mm_convert.tmp-"
_STAGED_SUFFIX = ".part"

logger = logging.getLogger(__name__)


class ResultFolder:
    """The results folder of one run; a context manager.

    Files are written where :meth:`staged` says and appear under their final names with :meth:`commit`.
    Leaving the ``with`` block without it drops them.

    Args:
        path: the results folder; made if missing.

    Attributes:
        path: the results folder.

    Raises:
        DataError: on entering: the folder cannot be written to, or another run is writing to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staging = path
        self._lock = -1
        self._former: list[str] = []
        self._keep_staging = False

    def __enter__(self) -> ResultFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._take_lock()
            manifest = self._read_manifest()
            self._former = manifest["files"]
            if "move_from" in manifest:
                self._finish_moving(manifest)
            for stale in self.path.glob(f"{_STAGING_PREFIX}*"):
                if stale.is_dir():
                    shutil.rmtree(stale)
                else:
                    stale.unlink()
            self._staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=self.path))
        except OSError as error:
            self._release()
            raise DataError(
                Problem(
                    f"the results folder cannot be written to: {error.strerror}",
                    file=self.path,
                    where="results_dir",
                    hint="choose another results_dir or correct its permissions",
                )
            ) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if not self._keep_staging:
                shutil.rmtree(self._staging)
        finally:
            self._release()

    def staged(self, file: str) -> Path:
        """Where to write a file while inside the ``with`` block; its folder is made.

        Args:
            file: path relative to the results folder.
        """
        path = self._staging / (file + _STAGED_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def check_free(self, files: Iterable[str]) -> None:
        """Check that none of ``files`` would replace a file of someone else.

        Args:
            files: paths relative to the results folder.

        Raises:
            DataError: naming the files that are in the way.
        """
        former = set(self._former)
        taken = [file for file in files if file not in former and os.path.lexists(self.path / file)]
        if taken:
            shown = ", ".join(taken[:3]) + (f" and {len(taken) - 3} more" if len(taken) > 3 else "")
            raise DataError(
                Problem(
                    f"files that no former conversion of ours wrote are in the way: {shown}",
                    file=self.path,
                    where="results_dir",
                    hint="move them away or choose another results_dir",
                )
            )

    def commit(self, files: Sequence[str]) -> None:
        """Replace the last run's files by the staged ones.

        Args:
            files: paths relative to the results folder; the last one is moved last, so that it shows that
                all are there.
        """
        self.check_free(files)
        for file in files:
            os.rename(self.staged(file), self._staging / file)
        manifest = {"move_from": self._staging.name, "files": list(files), "former_files": self._former}
        self._keep_staging = True  # from here on it may hold the only copy
        try:
            self._write_manifest(manifest)
            self._finish_moving(manifest)
        except KeyboardInterrupt:  # finishing takes a moment
            self._write_manifest(manifest)
            self._finish_moving(manifest)
            self._keep_staging = False
            raise
        self._keep_staging = False

    def _finish_moving(self, manifest: dict[str, Any]) -> None:
        """Do the removals and moves that are left; can be repeated after a kill at any point."""
        staging = self.path / manifest["move_from"]
        files = manifest["files"]
        for file in reversed(manifest["former_files"]):
            if file not in files or (staging / file).exists():
                (self.path / file).unlink(missing_ok=True)
        for folder in sorted({Path(file).parent for file in manifest["former_files"]}, reverse=True):
            self._remove_empty(folder)
        moved: set[Path] = set()
        for file in files:
            top = Path(Path(file).parts[0])
            if top in moved or not (staging / file).exists():
                continue
            if (staging / top).is_dir() and not (self.path / top).exists():
                os.rename(staging / top, self.path / top)  # all files of a sequence at once
                moved.add(top)
                continue
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / file, self.path / file)
        self._write_manifest({"files": files})
        self._former = files

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder, and those above it inside the results folder, as far as they are empty."""
        while folder != Path():
            try:
                (self.path / folder).rmdir()
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    return
                raise
            folder = folder.parent

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                Problem(
                    "another conversion is writing to this folder",
                    file=self.path,
                    where="results_dir",
                    hint="wait for it or choose another results_dir",
                )
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s: cannot be locked (%s); do not run two conversions into it", self.path, error)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST_NAME
        try:
            manifest = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"files": []}
        except ValueError:
            manifest = None
        if not _is_manifest(manifest):
            raise DataError(
                Problem(
                    "the list of files of the last conversion is damaged",
                    file=path,
                    hint="remove it together with the shards it stood for, or choose another results_dir",
                )
            )
        return manifest

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        temporary = self.path / f"{_STAGING_PREFIX}manifest"
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / MANIFEST_NAME)


def _is_manifest(manifest: Any) -> bool:
    """Whether a manifest is ours, and names nothing outside the results folder."""
    if not isinstance(manifest, dict):
        return False
    lists = [manifest.get("files"), manifest.get("former_files", [])]
    staging = manifest.get("move_from", _STAGING_PREFIX)
    if not isinstance(staging, str) or not staging.startswith(_STAGING_PREFIX) or "/" in staging:
        return False
    return all(
        isinstance(files, list) and all(isinstance(file, str) and _stays_inside(file) for file in files)
        for files in lists
    )


def _stays_inside(file: str) -> bool:
    path = Path(file)
    return not path.is_absolute() and ".." not in path.parts and path != Path()
