"""Writes what a training or evaluation loop does into ``status.json``, in the reference's words."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from ddetr_mm.errors import InputError, Problem, SpecError, StackError, TrainingError

# --- ``status.json``: one JSON object a line, appended as a run goes on ---
# Fields stand in the reference's order: extra data first, then ``date`` (``M/D/YYYY``) and ``time``
# (``H:M:S``), both without leading zeros, ``status``, ``verbosity``, ``message``, then ``categorical``,
# ``graphical`` and ``kpi`` where they hold something. A ``kpi`` is repeated by every later line until
# another takes its place.
#
# Beyond the reference: a run always ends with a line of status SUCCESS or FAILURE, whatever ended it, and
# a failure of any kind gives its reason.

logger = logging.getLogger(__name__)

STARTED, RUNNING, SUCCESS, FAILURE, SKIPPED = "STARTED", "RUNNING", "SUCCESS", "FAILURE", "SKIPPED"
STATUSES = (STARTED, RUNNING, SUCCESS, FAILURE, SKIPPED)

_START_MESSAGES = {
    "convert": "Starting DDETR/DINO dataset convert",
    "gen_trt_engine": "Starting deformable_detr gen_trt_engine.",
}
_END_MESSAGES = {"convert": "Dataset convert finished successfully"}

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
            message: what is going on.
            status: one of :data:`STATUSES`.
            data: extra fields, put first.
            kpi: figures; repeated by later lines until replaced.
            categorical: figures by category.
            graphical: figures for plots.
            verbosity: name of a log level.

        Raises:
            ValueError: an unknown status.
            OSError: the file cannot be written.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
        if kpi:
            self._kpi = dict(kpi)
        if not on_first_rank():
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

        The exception that ends the block is passed on. ``SystemExit`` without an error status counts as
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
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _lock_where_possible(descriptor)
            if not self._begun:
                # A run that was killed in mid-line must not swallow our first line.
                if _lacks_final_newline(self.path):
                    line = "\n" + line
                self._begun = True
            content = line.encode()
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)


def _lock_where_possible(descriptor: int) -> None:
    """Keep other writers out until the file is closed; without locks a line is still written in one piece."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):  # not on this system, or not on this file system
        return


def on_first_rank() -> bool:
    """Whether this process is the first of its job, by what torchrun or Slurm put into the environment."""
    if "RANK" in os.environ:
        return _number_in_environment("RANK") == 0
    if _number_in_environment("SLURM_NTASKS", 1) > 1:
        return _number_in_environment("SLURM_PROCID", 0) == 0
    return True


def _number_in_environment(name: str, default: int = 0) -> int:
    text = os.environ.get(name)
    try:
        return default if text is None else int(text)
    except ValueError as error:
        allowed = "a whole number, as torchrun and Slurm set it"
        raise StackError(Problem("is no number", where=f"${name}", value=text, allowed=allowed)) from error


def start_message(name: str) -> str:
    """The first message of a subtask, as the reference words it."""
    return _START_MESSAGES.get(name, f"Starting Deformable DETR {name}.")


def end_message(name: str) -> str:
    """The last message of a subtask that succeeded, as the reference words it."""
    return _END_MESSAGES.get(name, f"{name.capitalize()} finished successfully.")


def failure_message(error: BaseException, name: str) -> str:
    """The reason of a failure, with the prefix the reference gives to its kind.

    Kinds for which the reference writes nothing (a RuntimeError such as running out of GPU memory, a
    failed assertion) are told by the name of their class.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        told = f": {error}" if str(error) and isinstance(error, KeyboardInterrupt) else ""
        return f"User/System interruption: {name.capitalize()} was interrupted{told}"
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


# --- Writes what a training or evaluation loop does into ``status.json``, in the reference's words ---


@HOOKS.register_module()
class StatusHook(Hook):
    """One status line at the start and the end of training, after every epoch and every evaluation.

    The lines before and after (``Starting Deformable DETR train.`` and its end) belong to the command:
    see :meth:`ddetr_mm.engine.status.StatusLog.task`.

    Progress lines carry ``epoch`` (0-based, the one just worked on), ``step`` (optimizer steps done),
    ``max_epoch`` (the last epoch's number), ``max_step``, ``time_per_epoch``, ``time_per_step`` and
    ``eta`` as ``H:MM:SS[.ffffff]``.

    Args:
        path: the file; ``status.json`` in the runner's ``work_dir`` when None.
        step_interval: also write a progress line every so many steps; 0 writes one an epoch only, as the
            reference does.
    """

    # After the hooks that compute losses' means and times, before the one that saves checkpoints.
    priority = "LOW"

    def __init__(self, path: str | os.PathLike[str] | None = None, step_interval: int = 0) -> None:
        self.path = path
        self.step_interval = step_interval
        self._epoch_started = 0.0
        self._steps_in_epoch = 0

    def before_train(self, runner: Any) -> None:
        """Tell where training goes on from, if it does, and that the loop starts."""
        if getattr(runner, "_resume", False) and getattr(runner, "_load_from", None):
            self._log(runner).write(f"Resuming training from checkpoint: {runner._load_from}", RUNNING)
        self._log(runner).write("Starting Training Loop.", STARTED)

    def before_train_epoch(self, runner: Any) -> None:
        """Start the epoch's clock."""
        self._epoch_started = time.monotonic()
        self._steps_in_epoch = 0

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | tuple | list | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Write a progress line within an epoch, if asked for."""
        self._steps_in_epoch += 1
        if self.step_interval > 0 and (runner.iter + 1) % self.step_interval == 0:
            self._write_progress(runner, steps_done=runner.iter + 1)

    def after_train_epoch(self, runner: Any) -> None:
        """Write progress and the mean training loss of the epoch."""
        self._write_progress(runner, steps_done=runner.iter)
        losses = runner.message_hub.log_scalars.get("train/loss")
        if losses is not None and self._steps_in_epoch:
            mean = float(losses.mean(self._steps_in_epoch))
            self._log(runner).write("Train metrics generated.", kpi={"train_loss": mean})

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Write the validation figures."""
        self._write_metrics(runner, "Eval metrics generated.", "val", metrics)

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Write the test figures."""
        self._write_metrics(runner, "Test metrics generated.", "test", metrics)

    def after_train(self, runner: Any) -> None:
        """Tell that the loop is over."""
        self._log(runner).write("Training loop complete.")

    def _log(self, runner: Any) -> StatusLog:
        return StatusLog.at(self.path or Path(runner.work_dir) / "status.json")

    def _write_progress(self, runner: Any, steps_done: int) -> None:
        elapsed = time.monotonic() - self._epoch_started
        per_step = elapsed / max(self._steps_in_epoch, 1)
        steps_an_epoch = len(runner.train_dataloader)
        remaining = max(runner.max_iters - steps_done, 0) * per_step
        data = {
            "epoch": runner.epoch,
            "step": steps_done,
            "max_epoch": max(runner.max_epochs - 1, 0),
            "max_step": runner.max_iters,
            "time_per_epoch": str(timedelta(seconds=per_step * steps_an_epoch)),
            "time_per_step": str(timedelta(seconds=per_step)),
            "eta": str(timedelta(seconds=remaining)),
        }
        self._log(runner).write("Training loop in progress", data=data)

    def _write_metrics(
        self, runner: Any, message: str, prefix: str, metrics: Mapping[str, float] | None
    ) -> None:
        kpi: dict[str, Any] = {}
        for ending, name in (("bbox_mAP", "mAP"), ("bbox_mAP_50", "mAP50")):
            value = _find(metrics or {}, ending)
            if value is not None:
                kpi[f"{prefix}_{name}"] = f"{value:.4f}"
        loss = _find(metrics or {}, "loss")
        if loss is not None:
            kpi[f"{prefix}_loss"] = float(loss)
        if kpi:
            self._log(runner).write(message, kpi=kpi)


def _find(metrics: Mapping[str, float], ending: str) -> float | None:
    """The value of ``ending`` or of ``<prefix>/<ending>``."""
    return next((value for key, value in metrics.items() if key.rsplit("/", 1)[-1] == ending), None)
