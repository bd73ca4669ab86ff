"""Saving checkpoints under the reference's names, whole or not at all, ready for exact resuming."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop

from ddetr_mm.files import write_text_whole
from ddetr_mm.runtime.checkpoints import (
    CheckpointName,
    checkpoint_written_whole,
    find_latest_checkpoint,
    full_disk_told,
    link_latest,
    remove_leftovers,
)
from ddetr_mm.runtime.message_state import message_state_from_plain, plain_message_state, plain_values
from ddetr_mm.runtime.rng import RngState, capture_rng_state, restore_host_rng, restore_torch_rng
from ddetr_mm.weights.encryption import encrypt_file, encryption_key, hidden_file

__all__ = ["TAOCheckpointHook", "find_latest_checkpoint"]

UNITS = ("epoch", "step")


@HOOKS.register_module()
class TAOCheckpointHook(Hook):
    """Saves checkpoints every so many epochs or steps, and always at the end of training.

    The content is mmengine's (``meta``, ``state_dict``, ``message_hub``, ``optimizer``,
    ``param_schedulers``), so every mm* tool reads it and ``Runner`` resumes from it. All of it is kept as
    tensors and plain values (the message hub is turned back when a checkpoint is loaded), so that
    ``torch.load(weights_only=True)`` reads it without being told of any class. Added are
    ``meta['ddetr_mm']``, the position in the current epoch (0 at its end) as ``meta['batches_done']``, of
    one rank, and ``meta['samples_done']``, of all ranks together, and ``rng_states`` (one entry a rank).

    A checkpoint is written beside its name and renamed, then ``dd_model_latest.pth`` is pointed at it,
    so that a run may be killed at any moment. mmengine's ``last_checkpoint`` file is kept too: its own
    automatic resuming works in the same folder.

    Random states: when a run is resumed, numpy's and Python's are put back before the epoch begins and
    torch's before its first step. An uninterrupted run does the same between two epochs, so that what
    validation or worker start-up draw in between makes no difference.

    Args:
        interval: save every so many units.
        unit: ``"epoch"`` or ``"step"``. A step that ends an epoch is saved as finished epoch.
        out_dir: folder for the files; the runner's ``work_dir`` when None.
        extra_meta: saved as ``meta['ddetr_mm']``; plain values only.
        max_keep: keep at most so many of the checkpoints this run wrote; 0 keeps all.
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

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Give mmengine the message hub as it knows it, and remember this rank's random states."""
        if isinstance(checkpoint.get("message_hub"), dict):
            checkpoint["message_hub"] = message_state_from_plain(checkpoint["message_hub"])
        if not getattr(runner, "_resume", False):
            return
        states = checkpoint.get("rng_states") or []
        if get_rank() < len(states):
            self._restore_later(states[get_rank()])
        if hasattr(runner.train_loop, "seek"):
            meta = checkpoint["meta"]
            position = {name: meta.get(name, 0) for name in ("samples_done", "batches_done")}
            runner.train_loop.seek(epoch=meta["epoch"], iter=meta["iter"], **position)

    def before_train(self, runner: Any) -> None:
        """Make the folder ready; what a killed run left half-written goes."""
        self.out_dir = self.out_dir or Path(runner.work_dir)
        # Nothing has been trained since this point: an already finished run needs no second last checkpoint.
        self._iter_of_last_save = runner.iter
        if is_main_process():
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for path in remove_leftovers(self.out_dir):
                runner.logger.info(f"Removed the half-written checkpoint {path.name}.")
            runner.logger.info(f"Checkpoints will be saved to {self.out_dir}.")

    def before_train_epoch(self, runner: Any) -> None:
        """Put numpy's and Python's random states back."""
        if self._host_rng_to_restore is not None:
            restore_host_rng(self._host_rng_to_restore)
            self._host_rng_to_restore = None

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | tuple | list | None = None
    ) -> None:
        """Put torch's random state back, after the workers' start has drawn from it."""
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
        """Save the end of training, where a stop before the last epoch has left it unsaved."""
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

    def _save_within_epoch(self, runner: Any, step: int, batches_done: int) -> Path:
        meta = {"epoch": runner.epoch, "iter": step, "batches_done": batches_done}
        meta["samples_done"] = getattr(runner.train_loop, "samples_done", 0)
        return self._save(runner, CheckpointName(runner.epoch, step), meta)

    def _save_between_epochs(self, runner: Any) -> Path:
        name = CheckpointName(max(runner.epoch - 1, 0), runner.iter if self.unit == "step" else None)
        meta = {"epoch": runner.epoch, "iter": runner.iter, "batches_done": 0, "samples_done": 0}
        return self._save(runner, name, meta)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all ranks, and leave nothing that needs a class to be read."""
        checkpoint["meta"] = plain_values(checkpoint["meta"])
        checkpoint["message_hub"] = plain_message_state(checkpoint["message_hub"])
        if self._rng_states:
            checkpoint["rng_states"] = self._rng_states

    def _save(self, runner: Any, name: CheckpointName, meta: dict[str, Any]) -> Path:
        """Write one checkpoint; every rank calls it, the first one writes."""
        path = Path(self.out_dir or runner.work_dir) / str(name)
        meta["ddetr_mm"] = self.extra_meta
        # Between two epochs the state to go on with is the one after the last step, whatever was drawn since.
        self._rng_states = all_gather_object(self._torch_rng_to_restore or capture_rng_state())
        try:
            if is_main_process():
                with full_disk_told(path):
                    with checkpoint_written_whole(path) as temporary:
                        self._write(runner, temporary, meta)
                    link_latest(path)
                    write_text_whole(path.with_name("last_checkpoint"), str(path))
                self._forget_oldest(path)
                runner.logger.info(f"Saved checkpoint {path.name}.")
            else:
                self._call_runner(runner, path, meta)
        finally:
            self._rng_states = []
        self._iter_of_last_save = meta["iter"]
        self._step_is_due = False
        return path

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
        runner.save_checkpoint(
            str(path.parent),
            path.name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
        )

    def _forget_oldest(self, path: Path) -> None:
        self._written = [known for known in self._written if known != path] + [path]
        while self.max_keep > 0 and len(self._written) > self.max_keep:
            self._written.pop(0).unlink(missing_ok=True)

    def _restore_later(self, state: RngState) -> None:
        self._host_rng_to_restore = state
        self._torch_rng_to_restore = state


def _counts_iterations(runner: Any) -> bool:
    """Whether the training loop has no epochs of its own."""
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def is_updated(optim_wrapper: Any) -> bool:
    """Whether the last step has updated the weights, rather than left gradients for later ones."""
    should_update = getattr(optim_wrapper, "should_update", None)
    return should_update is None or bool(should_update())
