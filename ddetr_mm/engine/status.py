"""``status.json``: one JSON object a line, appended while a subtask runs, with TAO's fields and messages.

Fields are in TAO's order: extra data first, then ``date`` (``M/D/YYYY``) and ``time`` (``H:M:S``), both
without leading zeros, ``status``, ``verbosity``, ``message``, then ``categorical``, ``graphical`` and
``kpi`` where they have values. A ``kpi`` is repeated by every later line until another replaces it.

Beyond TAO: a run always ends with a line of status SUCCESS or FAILURE, and every failure gives its reason.
This module imports no torch: ``convert`` starts without it.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.errors import InputError, SpecError, TrainingError
from ddetr_mm.files import parse_json
from ddetr_mm.outputs import claim

logger = logging.getLogger(__name__)

STARTED, RUNNING, SUCCESS, FAILURE, SKIPPED = "STARTED", "RUNNING", "SUCCESS", "FAILURE", "SKIPPED"
STATUSES = (STARTED, RUNNING, SUCCESS, FAILURE, SKIPPED)

_START_MESSAGES = {
    "convert": "Starting DDETR/DINO dataset convert",
    "gen_trt_engine": "Starting deformable_detr gen_trt_engine.",
}
_END_MESSAGES = {"convert": "Dataset convert finished successfully"}

LOOP_STARTED, RESUMING = "Starting Training Loop.", "Resuming training from checkpoint"
TRAIN_METRICS, EVAL_METRICS, TEST_METRICS = (
    "Train metrics generated.",
    "Eval metrics generated.",
    "Test metrics generated.",
)

_open_logs: dict[Path, StatusLog] = {}


class StatusLog:
    """Appends status lines to one file.

    Every line is written by a single ``write`` to a file opened for appending, so lines of several
    writers never mix. Only the first rank of a distributed run writes.

    Args:
        path: the file; its folder is made when the first line is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._kpi: dict[str, Any] = {}
        self._begun = False

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> StatusLog:
        """The one log of this process for a file, so that all writers share the repeated kpi."""
        key = Path(path).resolve()
        return _open_logs.setdefault(key, cls(path))

    def write(
        self,
        message: str,
        status: str = RUNNING,
        *,
        data: Mapping[str, Any] | None = None,
        kpi: Mapping[str, Any] | None = None,
        categorical: Mapping[str, Any] | None = None,
        graphical: Mapping[str, Any] | None = None,
        verbosity: str = "INFO",
    ) -> None:
        """Append one line.

        Args:
            message: the message.
            status: one of :data:`STATUSES`.
            data: extra fields, put first.
            kpi: metrics; repeated by later lines until replaced.
            categorical: values by category.
            graphical: values for plots.
            verbosity: name of a log level.

        Raises:
            ValueError: an unknown status.
            OSError: the file cannot be written.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
        if kpi:
            self._kpi = dict(kpi)
        if not is_first_rank():
            return
        now = datetime.now()
        line: dict[str, Any] = dict(data or {})
        line["date"] = f"{now.month}/{now.day}/{now.year}"
        line["time"] = f"{now.hour}:{now.minute}:{now.second}"
        line["status"] = status
        line["verbosity"] = verbosity
        line["message"] = message
        for name, values in (("categorical", categorical), ("graphical", graphical), ("kpi", self._kpi)):
            if values:
                line[name] = dict(values)
        self._append(json.dumps(_plain(line), allow_nan=False) + "\n")

    @contextmanager
    def task(self, name: str) -> Iterator[StatusLog]:
        """Log a whole subtask: STARTED before the block, SUCCESS or FAILURE after it.

        The exception that ends the block is raised again. ``SystemExit`` without an error status counts as
        success.

        Args:
            name: the subtask, e.g. ``"train"``.
        """
        self.write(start_message(name), STARTED)
        try:
            yield self
        except SystemExit as stop:
            if stop.code in (None, 0):
                self.write(end_message(name), SUCCESS)
            else:
                self._write_failure(stop, name)
            raise
        except BaseException as error:
            self._write_failure(error, name)
            raise
        else:
            self.write(end_message(name), SUCCESS)

    def _write_failure(self, error: BaseException, name: str) -> None:
        try:
            self.write(failure_message(error, name), FAILURE, verbosity="ERROR")
        except OSError as unwritable:
            # The first error is the one that matters; this one is often its consequence (a full disk).
            logger.error("could not write the failure to %s: %s", self.path, unwritable)

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._begun:
            claim(self.path)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _lock_where_possible(descriptor)
            if not self._begun:
                # A killed run may have left half a line; the first line must not be joined to it.
                if _lacks_final_newline(self.path):
                    line = "\n" + line
                self._begun = True
            content = line.encode()
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)


# --- Reading ---


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a status file; one that a killed run has left half written is skipped.

    Raises:
        OSError: the file cannot be read.
    """
    for content in path.read_bytes().splitlines():
        try:
            line = parse_json(content)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def numbers_of(values: Any) -> dict[str, float]:
    """Return the numbers of a ``kpi``, some of which are text; those that are NaN are left out."""
    items = values.items() if isinstance(values, Mapping) else ()
    found = {str(name): number_of(value) for name, value in items}
    return {name: value for name, value in found.items() if value is not None}


def number_of(value: Any) -> float | None:
    """Return a number, which may be written as text; None for NaN and everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return None if math.isnan(number) else number


# --- Writing ---


def _lock_where_possible(descriptor: int) -> None:
    """Lock out other writers until the file is closed; without locks a line is still written by one call."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):  # not on this system, or not on this file system
        return


def start_message(name: str) -> str:
    """The first message of a subtask, in TAO's words."""
    return _START_MESSAGES.get(name, f"Starting Deformable DETR {name}.")


def end_message(name: str) -> str:
    """The last message of a subtask that succeeded, in TAO's words."""
    return _END_MESSAGES.get(name, f"{name.capitalize()} finished successfully.")


def failure_message(error: BaseException, name: str) -> str:
    """The reason of a failure, with TAO's prefix for its kind.

    Kinds for which TAO writes nothing (a RuntimeError such as running out of GPU memory, a failed
    assertion) get the name of their class.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        reason = f": {error}" if str(error) and isinstance(error, KeyboardInterrupt) else ""
        return f"User/System interruption: {name.capitalize()} was interrupted{reason}"
    kinds: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
        (SpecError, "Configuration error"),
        (TrainingError, "Training error"),
        (InputError, "Parameter validation error"),
        (NotImplementedError, "Feature not implemented"),
        ((ValueError, TypeError), "Parameter validation error"),
        (OSError, "File system error"),
    )
    for kind, prefix in kinds:
        if isinstance(error, kind):
            return f"{prefix}: {error}"
    return f"{type(error).__name__}: {error}"


def _lacks_final_newline(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    """A value as plain JSON: numpy and torch scalars as numbers, non-finite numbers as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "size", 1) != 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
