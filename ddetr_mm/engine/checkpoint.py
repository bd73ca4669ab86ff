"""Checkpoints of a run: files, the hook that writes them, and everything that is restored on resume.

Restored are weights, optimizer and schedules (by mmengine), random states, the message hub, and the
position in the epoch (:class:`~ddetr_mm.engine.train_loop.ResumableTrainLoop`).
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local

import ddetr_mm
from ddetr_mm.classes import BY_NAME_HINT, compare_columns, list_columns, named_columns, some_of
from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.errors import InputError, Problem, WeightsError
from ddetr_mm.files import free_space_text, write_text_whole, written_whole
from ddetr_mm.models import sampling_choice
from ddetr_mm.outputs import remove_leftovers, remove_ours, require_free
from ddetr_mm.weights.encryption import (
    encrypt_file,
    encryption_key,
    hidden_file,
    is_encrypted,
    is_whole_encrypted,
    plain_file,
)
from ddetr_mm.weights.load import leave_out_unread, require_resumable, unwrapped
from ddetr_mm.weights.report import UNREAD
from ddetr_mm.weights.scheme import network_scheme

# --- Random states ---
# Tensors, numbers, strings, lists and dicts only, so that ``torch.load(weights_only=True)`` reads them.

RngState = dict[str, Any]


def capture_rng_state() -> RngState:
    """The states of ``random``, numpy's global generator, torch on CPU and torch on every GPU."""
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "python": {"version": version, "internal": list(internal), "gauss_next": gauss_next},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached_gaussian),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_host_rng(state: RngState) -> None:
    """Restore ``random`` and numpy, which data augmentation in this process draws from."""
    saved = state["python"]
    random.setstate((saved["version"], tuple(saved["internal"]), saved["gauss_next"]))
    saved = state["numpy"]
    keys = saved["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(
        (saved["name"], keys, saved["position"], saved["has_gauss"], saved["cached_gaussian"])
    )


def restore_torch_rng(state: RngState) -> None:
    """Restore torch's generators, which dropout draws from.

    GPU states are restored for as many GPUs as there are both now and in the state.
    """
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(saved.cpu(), device)


# --- Message hub ---
# mmengine pickles ``HistoryBuffer`` objects and numpy scalars into a checkpoint, which
# ``torch.load(weights_only=True)`` refuses. In the plain form reading a checkpoint needs no class.

_BUFFER_KEYS = {"values", "counts", "max_length"}


def plain_message_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The plain form of ``MessageHub.state_dict()``."""
    return {
        "log_scalars": {name: _plain_buffer(buffer) for name, buffer in state["log_scalars"].items()},
        "runtime_info": plain_values(dict(state["runtime_info"])),
        "resumed_keys": dict(state["resumed_keys"]),
    }


def message_state_from_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The form that ``MessageHub.load_state_dict`` takes, from the plain form or from mmengine's own."""
    restored = dict(state)
    restored["log_scalars"] = {
        name: _restored_buffer(buffer) for name, buffer in state.get("log_scalars", {}).items()
    }
    return restored


def plain_values(value: Any) -> Any:
    """Config containers as dicts and lists, numpy's numbers as Python's, numpy arrays as lists."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain_values(item) for item in value)
    if isinstance(value, list):
        return [plain_values(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value


def _plain_buffer(buffer: Any) -> Any:
    if not isinstance(buffer, HistoryBuffer):
        return buffer
    values, counts = buffer.data
    return {
        "values": torch.from_numpy(np.asarray(values, dtype=np.float64)),
        "counts": torch.from_numpy(np.asarray(counts, dtype=np.int64)),
        "max_length": buffer.max_length,
    }


def _restored_buffer(buffer: Any) -> Any:
    if not isinstance(buffer, Mapping) or not _BUFFER_KEYS.issubset(buffer):
        return buffer
    return HistoryBuffer(
        buffer["values"].cpu().numpy(), buffer["counts"].cpu().numpy(), max_length=buffer["max_length"]
    )


# --- Files ---


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local_or_encrypted(filename: str, map_location: Any = None) -> Any:
    """mmengine's ``load_from_local`` for files that may be encrypted.

    Raises:
        WeightsError: see :func:`ddetr_mm.weights.encryption.decrypt_file`.
        FileNotFoundError: there is no such file.
    """
    with plain_file(filename) as plain:
        return load_from_local(str(plain), map_location)


# The results folder of training has ``model_epoch_NNN.pth`` (0-based number of the epoch just finished) or
# ``model_epoch_NNN_step_SSSSS.pth`` where saving goes by steps (SSSSS optimizer steps done since the
# beginning), and ``dd_model_latest.pth``, which points at the newest of them.

LATEST_NAME = "dd_model_latest.pth"
RESUME_KEY = "train.resume_training_checkpoint_path"

_NAME = re.compile(r"model_epoch_(?P<epoch>\d{3,})(?:_step_(?P<step>\d{5,}))?\.pth")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CheckpointName:
    """The name of a checkpoint file, parsed.

    Attributes:
        epoch: 0-based number of the epoch in which, or at the end of which, it was written.
        step: optimizer steps done since the beginning, where the name has them.
    """

    epoch: int
    step: int | None = None

    def __str__(self) -> str:
        steps = "" if self.step is None else f"_step_{self.step:05d}"
        return f"model_epoch_{self.epoch:03d}{steps}.pth"

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """Parse a file name; None if it is not a checkpoint's."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(int(match["epoch"]), None if match["step"] is None else int(match["step"]))

    @property
    def age_key(self) -> tuple[int, float]:
        """Sort key by training time; the end of an epoch comes after all its steps."""
        return self.epoch, float("inf") if self.step is None else self.step


def is_whole(path: Path) -> bool:
    """Whether a file is a complete archive as ``torch.save`` writes it, encrypted or not.

    Reads only the archive's directory at the end of the file, which a truncated file lacks. Of
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
    """The checkpoint that a run in this folder resumes from, None for none: see :func:`read_latest`."""
    return read_latest(folder).path


@dataclass(frozen=True)
class Latest:
    """What ``dd_model_latest.pth`` of a folder leads to.

    Attributes:
        path: the checkpoint to resume from; None where there is none.
        fault: what is wrong with the link, so that ``path`` is another than it names; None where it is good
            or missing.
    """

    path: Path | None = None
    fault: str | None = None


def read_latest(folder: str | os.PathLike[str]) -> Latest:
    """Follow ``dd_model_latest.pth`` of a folder.

    Without it there is nothing to resume from, whatever other checkpoints there are. A link whose file is
    missing or incomplete leads to the newest complete ``model_epoch_*.pth``: one that is newer than the link
    says comes after the others, for it may be of an earlier run.
    """
    folder = Path(folder)
    link = folder / LATEST_NAME
    if not os.path.lexists(link):
        return Latest()
    file = Path(os.path.realpath(link))
    if is_whole(file):
        return Latest(file)
    fault = f"is incomplete ({file.stat().st_size:,} bytes)" if file.is_file() else "does not exist"
    if link.is_symlink():
        fault = f"points at {os.readlink(link)}, which {fault}"
    whole = [path for path in list_checkpoints(folder) if is_whole(path)]
    named = CheckpointName.parse(file.name)
    if named is not None:
        limit = named.age_key
        whole = [path for path in whole if _age_key(path) <= limit] or whole
    return Latest(whole[-1].resolve() if whole else None, fault)


def _age_key(path: Path) -> tuple[int, float]:
    name = CheckpointName.parse(path.name)
    return (-1, 0.0) if name is None else name.age_key


@dataclass(frozen=True)
class Start:
    """What a training run starts from.

    Attributes:
        checkpoint: to resume from; None where the run begins.
        message: one line for the log: begins or resumes, from what, and how to get the other.
        warning: why it is another checkpoint than ``dd_model_latest.pth`` names, if it is.
    """

    checkpoint: Path | None
    message: str
    warning: str | None = None


def find_start(folder: Path, named: str | None = None, *, weights: str | None = None) -> Start:
    """Decide what a training run starts from; a checkpoint is checked to hold a whole training state.

    Args:
        folder: results folder; its ``dd_model_latest.pth`` counts where no checkpoint is named.
        named: ``train.resume_training_checkpoint_path`` of the spec.
        weights: the file of pretrained weights that a new run begins with, for the message.

    Raises:
        WeightsError: the named checkpoint does not exist, or the file holds weights alone.
    """
    latest = read_latest(folder)
    if named:
        if not Path(named).is_file():
            hint = "name a checkpoint of this run, or remove the key to resume from the latest"
            raise WeightsError(Problem("does not exist", file=named, where=RESUME_KEY, hint=hint))
        require_resumable(named, where=RESUME_KEY)
        other = f"resume from {latest.path}" if latest.path else "begin anew"
        message = f"Training resumes from {named} ({RESUME_KEY}); without that key it would {other}."
        return Start(Path(named), message)
    link = folder / LATEST_NAME
    broken = None if latest.fault is None else f"{link} {latest.fault}"
    if latest.path is not None:
        require_resumable(latest.path, where="results_dir")
        which = LATEST_NAME if broken is None else "the newest complete checkpoint"
        other = f"to begin anew, remove {link} or name another results_dir"
        return Start(latest.path, f"Training resumes from {latest.path} ({which}); {other}.", broken)
    earlier = list_checkpoints(folder)
    if broken is not None:
        reason = f"there is no complete checkpoint in {folder}"
    elif earlier:
        reason = f"{folder} has no {LATEST_NAME}; to resume the earlier run, set {RESUME_KEY}={earlier[-1]}"
    else:
        reason = f"{folder} has no checkpoint; to resume a run elsewhere, set {RESUME_KEY}=FILE"
    origin = f"with the weights of {weights}" if weights else "without pretrained weights"
    return Start(None, f"Training begins anew, {origin}: {reason}.", broken)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a folder, oldest first by the training time in their names."""
    found = []
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        name = CheckpointName.parse(path.name)
        if name is not None and path.is_file():
            found.append((name.age_key, path))
    return [path for _, path in sorted(found)]


@contextmanager
def checkpoint_written_whole(path: Path) -> Iterator[Path]:
    """Write a checkpoint to a temporary path, flush it to the disk, then rename it.

    Yields:
        The path to write to, in the same folder.
    """
    with written_whole(path) as temporary:
        yield temporary
        _flush(temporary)
    _flush(path.parent)


@contextmanager
def full_disk_as_error(path: Path, num_bytes: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn a full disk while ``path`` is written into one message that names the last good checkpoint.

    Args:
        path: the checkpoint.
        num_bytes: counts the bytes that it takes.

    Raises:
        InputError: the disk or the user's quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        last = find_latest_checkpoint(path.parent)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise InputError(
            Problem(
                "no space left on the disk to write the checkpoint"
                + free_space_text(path, num_bytes() if num_bytes is not None else None),
                file=path,
                hint=f"free some space and start the same command again; {kept}",
            )
        ) from error


def link_latest(checkpoint: Path, name: str = LATEST_NAME) -> Path:
    """Point ``dd_model_latest.pth``, or a link of another name, at a checkpoint of its folder, atomically.

    It is a relative symbolic link; where the file system has none, a hard link, or else a copy.
    """
    link = checkpoint.with_name(name)
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
    """Flush a file or folder to the disk, so that it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- The hook ---

UNITS = ("epoch", "step")
KERNELS_KEY = "attention_kernels"
"""In ``meta['ddetr_mm']`` of a run on a GPU: what computed deformable attention, by kind, which a resumed run
prefers (:mod:`ddetr_mm.models.sampling_choice`)."""


@HOOKS.register_module()
class TAOCheckpointHook(Hook):
    """Saves checkpoints every so many epochs or steps, and always at the end of training.

    The content is mmengine's (``meta``, ``state_dict``, ``message_hub``, ``optimizer``,
    ``param_schedulers``), so every mm* tool reads it and ``Runner`` resumes from it. All of it is kept as
    tensors and plain values, so that ``torch.load(weights_only=True)`` reads it. Added are
    ``meta['ddetr_mm']``, the position in the current epoch (0 at its end) as ``meta['batches_done']``, of
    one rank, and ``meta['samples_done']``, of all ranks together, and ``rng_states`` (one entry a rank).

    A checkpoint is written under a temporary name and renamed, then ``dd_model_latest.pth`` is pointed at
    it, so a run may be killed at any time. mmengine's ``last_checkpoint`` file is written too, so its own
    automatic resuming works in the same folder.

    Random states: on resume, numpy's and Python's are restored before the epoch begins and torch's before
    its first step. An uninterrupted run does the same between two epochs, so that numbers drawn by
    validation or by starting workers make no difference.

    ``meta['ddetr_mm']`` has the attention kernels of a run on a GPU too, which a resumed run prefers.

    Args:
        interval: save every so many units.
        unit: ``"epoch"`` or ``"step"``. A step that ends an epoch is saved as finished epoch.
        out_dir: folder for the files; the runner's ``work_dir`` when None.
        extra_meta: saved as ``meta['ddetr_mm']``, with the network's settings that no shape shows
            (:data:`ddetr_mm.weights.scheme.FIELDS`); plain values only.
        max_keep: keep at most so many of the checkpoints this run wrote, those before a resume included; 0
            keeps all.
        save_optimizer: include the optimizer's state (needed for resuming).
        save_param_scheduler: include the schedulers' state (needed for resuming).
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = 1,
        unit: str = "epoch",
        out_dir: str | os.PathLike[str] | None = None,
        extra_meta: Mapping[str, Any] | None = None,
        max_keep: int = 0,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, not {interval}")
        self.interval = interval
        self.unit = unit
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.extra_meta = plain_values(extra_meta or {})
        self.max_keep = max_keep
        self.save_optimizer = save_optimizer
        self.save_param_scheduler = save_param_scheduler
        self._written: list[Path] = []
        self._iter_of_last_save: int | None = None
        self._step_is_due = False
        self._rng_states: list[RngState] = []
        self._host_rng_to_restore: RngState | None = None
        self._torch_rng_to_restore: RngState | None = None
        self._waits_for_ranks = True

    def before_run(self, runner: Any) -> None:
        """Let this run choose its attention kernels, whatever an earlier run of this process chose."""
        sampling_choice.forget_choices()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the message hub's form for mmengine, and keep this rank's random states for later.

        Raises:
            WeightsError: a resumed run's data number their classes otherwise than the checkpoint.
        """
        if isinstance(checkpoint.get("message_hub"), dict):
            checkpoint["message_hub"] = message_state_from_plain(checkpoint["message_hub"])
        if not getattr(runner, "_resume", False):
            return
        if left_out := leave_out_unread(checkpoint, runner.model):
            runner.logger.info(f"{left_out} tensors of the checkpoint are left out: {UNREAD}")
        refuse_other_classes(checkpoint.get("meta") or {}, runner.train_dataloader.dataset, runner.logger)
        own = (checkpoint.get("meta") or {}).get("ddetr_mm")
        sampling_choice.prefer(own.get(KERNELS_KEY) if isinstance(own, Mapping) else None)
        states = checkpoint.get("rng_states") or []
        if get_rank() < len(states):
            self._restore_later(states[get_rank()])
        if hasattr(runner.train_loop, "seek"):
            meta = checkpoint["meta"]
            position = {name: meta.get(name, 0) for name in ("samples_done", "batches_done")}
            runner.train_loop.seek(epoch=meta["epoch"], iter=meta["iter"], **position)

    def before_train(self, runner: Any) -> None:
        """Make the folder, and remove half-written checkpoints of a killed run."""
        self.out_dir = self.out_dir or Path(runner.work_dir)
        # Nothing has been trained since this point: an already finished run needs no second last checkpoint.
        self._iter_of_last_save = runner.iter
        if is_first_rank():
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for name in remove_leftovers(self.out_dir):
                runner.logger.info(f"Removed the half-written file {name}.")
            names = {path: CheckpointName.parse(path.name) for path in list_checkpoints(self.out_dir)}
            epochs = range(runner.epoch, runner.max_epochs)
            coming = [path for path, name in names.items() if name is not None and name.epoch in epochs]
            require_free([*coming, self.out_dir / LATEST_NAME])
            if self.max_keep and getattr(runner, "_resume", False):
                before = {path: name.epoch for path, name in names.items() if name is not None}
                self._written = [path for path, epoch in before.items() if epoch < runner.epoch]
            runner.logger.info(f"Checkpoints will be saved to {self.out_dir}.")

    def before_train_epoch(self, runner: Any) -> None:
        """Restore numpy's and Python's random states."""
        if self._host_rng_to_restore is not None:
            restore_host_rng(self._host_rng_to_restore)
            self._host_rng_to_restore = None

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | tuple | list | None = None
    ) -> None:
        """Restore torch's random state, after the start of workers has drawn from it."""
        if self._torch_rng_to_restore is not None:
            restore_torch_rng(self._torch_rng_to_restore)
            self._torch_rng_to_restore = None

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | tuple | list | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Save by steps; while gradients are being accumulated, after the step that uses them."""
        if self.unit != "step":
            return
        self._step_is_due |= (runner.iter + 1) % self.interval == 0
        if not self._step_is_due or not is_updated(runner.optim_wrapper):
            return
        # The last step of an epoch waits for after_train_epoch, where the epoch's schedulers have stepped.
        if _counts_iterations(runner) or not self.end_of_epoch(runner.train_dataloader, batch_idx):
            self.save_step(runner, batches_done=batch_idx + 1)

    def after_train_epoch(self, runner: Any) -> None:
        """Save by epochs, and steps that end one."""
        if _counts_iterations(runner):
            return  # called once, at the end, where after_train saves
        if self.unit == "epoch":
            due = (runner.epoch + 1) % self.interval == 0 or self.is_last_train_epoch(runner)
            name = CheckpointName(runner.epoch)
        else:
            due = self._step_is_due or self.is_last_train_epoch(runner)
            name = CheckpointName(runner.epoch, runner.iter)
        self._restore_later(capture_rng_state())
        if due:
            meta = {"epoch": runner.epoch + 1, "iter": runner.iter, "batches_done": 0, "samples_done": 0}
            self._save(runner, name, meta)

    def after_train(self, runner: Any) -> None:
        """Save the end of training where it is not saved yet, after a stop before the last epoch."""
        if self._iter_of_last_save != runner.iter:
            self._save_between_epochs(runner)

    def save_step(self, runner: Any, batches_done: int) -> Path:
        """Save in the middle of an epoch, from within ``after_train_iter``.

        Args:
            runner: the runner, whose ``iter`` still counts the current step as not done.
            batches_done: batches of this epoch that are trained on, the current one included.

        Returns:
            The file.

        Raises:
            InputError: the disk is full.
        """
        return self._save_within_epoch(runner, runner.iter + 1, batches_done)

    def save_now(self, runner: Any, batches_done: int = 0) -> Path | None:
        """Save between two steps or two epochs, for a run that is about to end early.

        Args:
            runner: the runner, whose ``iter`` counts all steps that are done.
            batches_done: batches of the present epoch that are trained on; 0 between two epochs.

        Returns:
            The newest checkpoint: an earlier one where nothing was trained since, None where there is none.

        Raises:
            InputError: the disk is full.
        """
        if self._iter_of_last_save == runner.iter:
            return find_latest_checkpoint(self.out_dir or runner.work_dir)
        if batches_done:
            return self._save_within_epoch(runner, runner.iter, batches_done)
        return self._save_between_epochs(runner)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Save without the other ranks within the block, whichever rank this is.

        Every rank has the whole state but for the others' random states, which such a file lacks: a run that
        resumes from it draws other random numbers.
        """
        self._waits_for_ranks = False
        try:
            yield
        finally:
            self._waits_for_ranks = True

    def _save_within_epoch(self, runner: Any, step: int, batches_done: int) -> Path:
        meta = {"epoch": runner.epoch, "iter": step, "batches_done": batches_done}
        meta["samples_done"] = getattr(runner.train_loop, "samples_done", 0)
        return self._save(runner, CheckpointName(runner.epoch, step), meta)

    def _save_between_epochs(self, runner: Any) -> Path:
        name = CheckpointName(max(runner.epoch - 1, 0), runner.iter if self.unit == "step" else None)
        meta = {"epoch": runner.epoch, "iter": runner.iter, "batches_done": 0, "samples_done": 0}
        return self._save(runner, name, meta)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all ranks, and turn everything into plain values."""
        checkpoint["meta"] = plain_values(checkpoint["meta"])
        checkpoint["message_hub"] = plain_message_state(checkpoint["message_hub"])
        if self._rng_states:
            checkpoint["rng_states"] = self._rng_states

    def save_best(self, runner: Any, path: Path, remark: Mapping[str, Any]) -> None:
        """Save between two epochs under a name of the caller's, beside the checkpoints of every interval.

        Args:
            runner: the runner.
            path: the file; every rank names the same.
            remark: plain values, saved as ``meta['ddetr_mm']['best']``.

        Raises:
            InputError: the disk is full.
        """
        meta = {"epoch": runner.epoch, "iter": runner.iter, "batches_done": 0, "samples_done": 0}
        self._write_whole(runner, path, meta, {"best": dict(remark)})

    def _save(self, runner: Any, name: CheckpointName, meta: dict[str, Any]) -> Path:
        """Write one checkpoint and point ``dd_model_latest.pth`` at it; every rank calls it."""
        path = Path(self.out_dir or runner.work_dir) / str(name)
        self._write_whole(runner, path, meta)
        if is_first_rank() or not self._waits_for_ranks:
            with full_disk_as_error(path):
                link_latest(path)
                write_text_whole(path.with_name("last_checkpoint"), str(path))
            self._delete_oldest(path)
        self._iter_of_last_save = meta["iter"]
        self._step_is_due = False
        return path

    def _write_whole(
        self, runner: Any, path: Path, meta: dict[str, Any], remarks: Mapping[str, Any] | None = None
    ) -> None:
        """Write a file on the first rank; the others take part, unless it is :meth:`alone`."""
        scheme = plain_values(network_scheme(unwrapped(runner.model)))
        version = {"package_version": ddetr_mm.__version__}
        kernels = {KERNELS_KEY: chosen} if (chosen := sampling_choice.chosen_names()) else {}
        meta["ddetr_mm"] = {**scheme, **version, **kernels, **self.extra_meta, **(remarks or {})}
        # Between two epochs the state to restore is the one after the last step, whatever was drawn since.
        own_state = self._torch_rng_to_restore or capture_rng_state()
        self._rng_states = all_gather_object(own_state) if self._waits_for_ranks else []
        try:
            if is_first_rank() or not self._waits_for_ranks:
                with (
                    full_disk_as_error(path, lambda: self._num_bytes(runner)),
                    checkpoint_written_whole(path) as temporary,
                ):
                    self._write(runner, temporary, meta)
                runner.logger.info(f"Saved checkpoint {path.name}.")
            else:
                self._call_runner(runner, path, meta)
        finally:
            self._rng_states = []

    def _num_bytes(self, runner: Any) -> int:
        """Return the bytes of the tensors of one file, of this rank where the ranks share them."""
        tensors = [*runner.model.parameters(), *runner.model.buffers()]
        if self.save_optimizer:
            states = runner.optim_wrapper.optimizer.state.values()
            tensors += [value for state in states for value in state.values() if torch.is_tensor(value)]
        return sum(tensor.nbytes for tensor in tensors)

    def _write(self, runner: Any, path: Path, meta: dict[str, Any]) -> None:
        """Write one file, encrypted if the process has a key."""
        key = encryption_key()
        if key is None:
            self._call_runner(runner, path, meta)
            return
        with hidden_file() as (content, name):
            self._call_runner(runner, name, meta)
            encrypt_file(content, path, key)

    def _call_runner(self, runner: Any, path: Path, meta: dict[str, Any]) -> None:
        save = runner.save_checkpoint
        if not self._waits_for_ranks:
            save = partial(save.__wrapped__, runner)  # mmengine's, which other ranks than the first one skip
        save(
            str(path.parent),
            path.name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
        )

    def _delete_oldest(self, path: Path) -> None:
        self._written = [known for known in self._written if known != path] + [path]
        while self.max_keep > 0 and len(self._written) > self.max_keep:
            remove_ours(self._written.pop(0))

    def _restore_later(self, state: RngState) -> None:
        self._host_rng_to_restore = state
        self._torch_rng_to_restore = state


def refuse_other_classes(meta: Mapping[str, Any], dataset: Any, logger: Any) -> None:
    """Check that a run resumes with its classes in the same columns; new and missing ones are logged.

    Args:
        meta: the checkpoint's ``meta``, with mmengine's ``dataset_meta``.
        dataset: the training data.
        logger: for the log.

    Raises:
        WeightsError: a column is another class, or a class is in another column.
    """
    saved = meta.get("dataset_meta") or {}
    columns = [
        named_columns(info.get("classes") or (), info.get("category_ids"))
        for info in (saved, getattr(dataset, "metainfo", {}))
    ]
    if not all(any(name is not None for name in names) for names in columns):
        return
    found = compare_columns(*columns)
    if found.clashes:
        raise WeightsError(
            Problem(
                "cannot be resumed: the training data number their classes otherwise than the checkpoint",
                where="dataset.train_data_sources",
                value=list_columns(columns[1]),
                allowed=list_columns(columns[0]),
                hint="give the data the checkpoint's numbers, or start a new run with"
                f" train.pretrained_model_path, which matches classes by name; {BY_NAME_HINT} in every run",
            )
        )
    for names, what in (
        (found.only_first, "of the checkpoint are not in the data"),
        (found.only_second, "of the data are new to the checkpoint"),
    ):
        if names:
            logger.warning(f"Resuming: {len(names)} classes {what}: {some_of(names)}.")


def _counts_iterations(runner: Any) -> bool:
    """Whether the training loop has no epochs of its own."""
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def is_updated(optim_wrapper: Any) -> bool:
    """Whether the last step has updated the weights, rather than left gradients for later ones."""
    should_update = getattr(optim_wrapper, "should_update", None)
    return should_update is None or bool(should_update())
