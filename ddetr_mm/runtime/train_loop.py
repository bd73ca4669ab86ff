"""A training loop that stops anywhere in good order and goes on exactly there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmdet.registry import LOOPS
from mmengine.dist import all_reduce, broadcast_object_list, get_world_size, is_main_process
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from ddetr_mm.data.samplers import ElasticBatchSampler
from ddetr_mm.files import write_text_whole
from ddetr_mm.runtime.checkpoint_hook import TAOCheckpointHook, is_updated
from ddetr_mm.runtime.data_workers import end_data_workers
from ddetr_mm.runtime.scalar_history import bound_history
from ddetr_mm.runtime.stop_signals import StoppedBySignalError, StopSignals

VALIDATED_NAME = "last_validation"
"""File in the runner's ``work_dir`` with the number of steps that the last finished validation came after."""


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """mmengine's loop by epochs, which in addition

    - begins in the middle of an epoch where the checkpoint was written there. With an
      :class:`~ddetr_mm.data.samplers.ElasticBatchSampler` it seeks to the position, which counts samples of
      all ranks, so that a run may go on with another number of ranks or another batch size; with any other
      sampler the epoch begins anew;
    - on SIGTERM or Ctrl-C ends the step, writes a checkpoint if the runner has a ``TAOCheckpointHook`` and
      raises :class:`~ddetr_mm.runtime.stop_signals.StoppedBySignalError`, on all ranks after the same step;
    - catches up on a validation that a killed run owes.

    Arguments are those of ``EpochBasedTrainLoop``.

    Attributes:
        samples_done: samples of the present epoch that are trained on, by all ranks together; the current
            step's are counted as soon as the model is updated.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples_done = 0
        self._stop = StopSignals()

    @property
    def elastic(self) -> ElasticBatchSampler | None:
        """The batch sampler, where it can seek."""
        batch_sampler = self.dataloader.batch_sampler
        return batch_sampler if isinstance(batch_sampler, ElasticBatchSampler) else None

    def seek(self, *, epoch: int, iter: int, samples_done: int, batches_done: int) -> None:
        """Take the position of a checkpoint; called while it is loaded.

        Args:
            epoch: epochs that are done.
            iter: steps that are done.
            samples_done: samples that are done in the epoch after those, all ranks together.
            batches_done: the same in batches of one rank.
        """
        self._epoch, self._iter = epoch, iter
        steps_an_epoch = len(self.dataloader)
        left = steps_an_epoch
        if self.elastic is None:
            if batches_done:
                self.runner.logger.warning("The sampler cannot seek: the epoch begins anew.")
        else:
            self.samples_done = min(samples_done, self.elastic.sampler.samples_an_epoch)
            left = self.elastic.steps_left(self.samples_done)
        self._max_iters = iter
        if epoch < self._max_epochs:
            self._max_iters += left + (self._max_epochs - epoch - 1) * steps_an_epoch

    def run(self) -> nn.Module:
        """Train.

        Raises:
            StoppedBySignalError: after SIGTERM or Ctrl-C.
        """
        with self._stop:
            try:
                self._run()
            except BaseException:
                end_data_workers(self.runner)
                raise
        return self.runner.model

    def _run(self) -> None:
        self.runner.call_hook("before_train")
        if self._owes_validation():
            self._validate()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self._validation_due():
                self._validate()
            self._stop_if_asked()
        self.runner.call_hook("after_train")

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of it."""
        self.runner.call_hook("before_train_epoch")
        bound_history(self.runner.message_hub, len(self.dataloader))
        self.runner.model.train()
        first = 0
        if self.elastic is not None:
            self.elastic.sampler.seed = self.runner.seed  # a resumed run keeps the seed it began with
            self.elastic.sampler.set_epoch(self._epoch)
            self.elastic.sampler.seek(self.samples_done)
            first = len(self.elastic) - self.elastic.steps_left(self.samples_done)
        for batch_idx, data_batch in enumerate(self.dataloader, start=first):
            self.run_iter(batch_idx, data_batch)
            if batch_idx + 1 < len(self.dataloader):
                self._stop_if_asked(batches_done=batch_idx + 1)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1
        self.samples_done = 0

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train one step.

        Args:
            idx: number of the batch in its epoch, from 0.
            data_batch: what the loader gives.
        """
        self.runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        if self.elastic is not None:
            self.samples_done = self.elastic.samples_after(self.samples_done, 1)
        self.runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    # --- validation ---

    def _validation_due(self) -> bool:
        """Whether the epochs done so far call for a validation."""
        return (
            self.runner.val_loop is not None
            and self._epoch >= self.val_begin
            and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs)
        )

    def _owes_validation(self) -> bool:
        """Whether the checkpoint that the run goes on from was written before a validation it still lacks."""
        if not getattr(self.runner, "_resume", False) or self._epoch == 0 or self.samples_done:
            return False
        if self.elastic is None and self._iter % len(self.dataloader):
            return False
        self._decide_current_val_interval()
        marker = self._marker()
        done = marker.is_file() and marker.read_text(encoding="utf-8").strip() == str(self._iter)
        owed = [self._validation_due() and not done]
        broadcast_object_list(owed)
        return owed[0]

    def _validate(self) -> None:
        """Validate; a signal ends it at once where there is one process, else after it is done."""
        try:
            with self._stop.at_once() if get_world_size() == 1 else nullcontext():
                self.runner.val_loop.run()
        except StoppedBySignalError:
            self._save_and_stop()
        if is_main_process():
            write_text_whole(self._marker(), f"{self._iter}\n")

    def _marker(self) -> Path:
        return Path(self.runner.work_dir) / VALIDATED_NAME

    # --- stopping ---

    def _stop_if_asked(self, batches_done: int = 0) -> None:
        """Save and raise where any rank was asked to stop; every rank calls it at the same moments.

        Args:
            batches_done: of the present epoch; 0 between two epochs.
        """
        if batches_done and not is_updated(self.runner.optim_wrapper):
            return
        asked = torch.tensor(float(self._stop.requested))
        all_reduce(asked, "max")
        if asked:
            self._save_and_stop(batches_done)

    def _save_and_stop(self, batches_done: int = 0) -> NoReturn:
        hook = next((hook for hook in self.runner.hooks if isinstance(hook, TAOCheckpointHook)), None)
        path = None if hook is None else hook.save_now(self.runner, batches_done)
        self.runner.visualizer.close()  # writes what TensorBoard's file still lacks
        where = f"; the same command goes on from {path}" if path else ""
        raise StoppedBySignalError(f"stopped by {self._stop.reason} after {self._iter} steps{where}")
