"""The training loop: resumes in the middle of an epoch, and stops after the current step when asked to.

With it: signal handling, the data workers' start and end, and a bound on the history of logged scalars.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from mmdet.registry import LOOPS
from mmengine.dist import all_reduce, broadcast_object_list, get_world_size
from mmengine.logging import MessageHub
from mmengine.registry import FUNCTIONS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from ddetr_mm.datasets.samplers import ElasticBatchSampler
from ddetr_mm.engine.checkpoint import TAOCheckpointHook, find_latest_checkpoint, is_updated
from ddetr_mm.engine.distributed import is_first_rank, is_launched_by_us
from ddetr_mm.errors import TrainingError, printable, shorten
from ddetr_mm.files import END_SIGNALS, write_text_whole
from ddetr_mm.models.data_preprocessor import tensors_of
from ddetr_mm.weights.entries import is_finite

# --- Stop requests ---

SIGNALS = (signal.SIGINT, *END_SIGNALS)
WORKER_GRACE_S = 5
PASSED_ON_WITHIN_S = 5.0


class StoppedBySignalError(KeyboardInterrupt):
    """The run stopped after the current step because it was asked to."""


class StopSignals:
    """Turns SIGTERM, SIGHUP and Ctrl-C into a stop request that is honoured after the current step.

    Works while its ``with`` block runs. The second signal ends the process at once; the exit status is 130
    either way. Outside the main thread, where Python allows no handlers, nothing is changed. A signal that
    the process was started to ignore, as shells do for Ctrl-C in background jobs, stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._at_once = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self.received is not None

    @property
    def reason(self) -> str:
        """The signal that requested the stop, for messages."""
        if self.received is None:
            return "another process was asked to stop"
        return "Ctrl-C" if self.received == signal.SIGINT else self.received.name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Honour a stop request anywhere in the block, by raising :class:`StoppedBySignalError`.

        Raises:
            StoppedBySignalError: also when a stop was requested before the block.
        """
        self._at_once = True
        try:
            if self.requested:
                raise StoppedBySignalError(self.reason)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            # Schedulers signal all processes of a job, and the launcher among them passes it on.
            if is_launched_by_us() and now - self._received_at < PASSED_ON_WITHIN_S:
                return
            raise KeyboardInterrupt
        self.received, self._received_at = signal.Signals(number), now
        if self._at_once:
            raise StoppedBySignalError(self.reason)
        if not is_first_rank():
            return
        print(
            f"{self.reason}: stopping after this step, with a checkpoint; once more to stop at once",
            file=sys.stderr,
            flush=True,
        )


@FUNCTIONS.register_module()
def signal_proof_worker_init(worker_id: int) -> None:
    """Prepare a data worker: it survives signals meant for the main process, and its sockets fit their
    folder.

    Ctrl-C and a scheduler's SIGTERM reach all processes of a run; a worker that ended would lose the batch
    that the main process waits for. After SIGTERM a worker has :data:`WORKER_GRACE_S` seconds left.

    Args:
        worker_id: from 0.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _end_worker)
    signal.signal(signal.SIGTERM, _end_worker_later)
    keep_socket_names_short()


def _end_worker_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(WORKER_GRACE_S)


def _end_worker(number: int, frame: FrameType | None) -> None:
    # torch raises an error in the main process for any status but 0
    os._exit(0)


# --- Time limit ---

_clock = time.monotonic
_LOADED_AT = _clock()
_LARGEST_MARGIN_S = 60.0
_MARGIN = 0.02


class OutOfTimeError(Exception):
    """The run ends before its last epoch, as the spec asks for; it has written a checkpoint."""


class TimeLimit:
    """Says when a run must end so that its last checkpoint is written within a number of hours.

    Hours count from the start of the process. Kept free are twice the longest step, twice the longest
    checkpoint so far, and 2 % of the limit, at most a minute.

    Args:
        hours: the limit; None for none.
    """

    def __init__(self, hours: float | None) -> None:
        self.hours = hours
        self.last_step_s = 0.0
        self.validation_s: float | None = None
        self._longest_step_s = 0.0
        self._longest_checkpoint_s = 0.0
        self._mark = 0.0

    def mark(self) -> None:
        """Start the clock of a step, a checkpoint or a validation."""
        self._mark = _clock()

    def step_done(self) -> None:
        """Count a step since the mark, and start the next one's clock."""
        self.last_step_s = _clock() - self._mark
        self._longest_step_s = max(self._longest_step_s, self.last_step_s)
        self.mark()

    def checkpoint_done(self) -> None:
        """Count what came since the mark as a checkpoint."""
        self._longest_checkpoint_s = max(self._longest_checkpoint_s, _clock() - self._mark)

    def validation_done(self) -> None:
        """Count a validation since the mark."""
        self.validation_s = max(self.validation_s or 0.0, _clock() - self._mark)

    def is_near(self, ahead_s: float = 0.0) -> bool:
        """Whether there is no time for one more step.

        Args:
            ahead_s: seconds of other work that would come first.
        """
        if self.hours is None:
            return False
        limit_s = self.hours * 3600
        margin_s = min(_MARGIN * limit_s, _LARGEST_MARGIN_S)
        reserve_s = 2 * self._longest_step_s + 2 * self._longest_checkpoint_s + margin_s
        return _clock() - _LOADED_AT + ahead_s + reserve_s > limit_s


# --- Data workers ---

LONGEST_FOLDER = 70
"""Bytes of a temporary folder's name below which a worker's socket still has room in the 104 to 108 of a
socket's name (unix(7)): ``/pymp-XXXXXXXX/listener-XXXXXXXX`` takes 32."""


def keep_socket_names_short() -> None:
    """Make this process create its sockets in a folder with a short name where ``TMPDIR`` has a long one.

    A data worker passes tensors through a socket below the temporary folder. With a longer name than a
    socket can have it fails silently, and the main process waits for ever.

    Raises:
        OSError: no folder with a short name may be written to.
    """
    here = tempfile.gettempdir()
    if os.name != "posix" or len(os.fsencode(here)) <= LONGEST_FOLDER:
        return
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - a private folder is made below it
        if os.access(folder, os.W_OK | os.X_OK):
            tempfile.tempdir = folder
            return
    raise OSError(
        f"TMPDIR={here} is too long for the sockets of data workers (at most {LONGEST_FOLDER} bytes); "
        "set TMPDIR to a folder with a shorter name"
    )


def end_data_workers(runner: Any) -> None:
    """End the data workers of a runner's loops and wait for them.

    Persistent workers are otherwise killed when Python exits, and leave their socket's temporary folder.

    Args:
        runner: mmengine's; loops that were never built are left alone.
    """
    for name in ("_train_loop", "_val_loop", "_test_loop"):
        loader = getattr(getattr(runner, name, None), "dataloader", None)
        iterator = getattr(loader, "_iterator", None)
        end = getattr(iterator, "_shutdown_workers", None)
        if end is not None:
            end()
            loader._iterator = None


# --- History of logged scalars ---
# mmengine keeps the last million values of every scalar, in memory and in each checkpoint, and copies all of
# them to add one: a long run grows and slows down.

LEAST_KEPT = 1_000
"""Values of every scalar that are kept at least; the log's windows are shorter."""

LOSS = "train/loss"
EPOCHS_OF_LOSS = 10
"""Epochs of the total loss that are kept: the alarm for a loss that does not fall needs its trend."""


def bound_history(hub: MessageHub, steps_an_epoch: int) -> None:
    """Keep one epoch of each scalar, for its mean.

    Args:
        hub: the run's message hub.
        steps_an_epoch: training steps of an epoch.
    """
    for name, buffer in hub.log_scalars.items():
        epochs = EPOCHS_OF_LOSS if name == LOSS else 1
        buffer.max_length = max(LEAST_KEPT, epochs * steps_an_epoch)


# --- Copies of the next batch ---


class CopiedAhead:
    """A loader's batches; while a step runs, the next batch is copied to the GPU, beside the step's work.

    A thread packs the batch and starts the copy on a stream of its own, so that neither the host nor the GPU
    waits for it. The batches themselves stay as the loader gives them: hooks see nothing of it.

    Args:
        loader: gives the batches.
        preprocessor: a :class:`~ddetr_mm.models.data_preprocessor.FixedPadDetDataPreprocessor` on a GPU.
    """

    def __init__(self, loader: Iterable[Any], preprocessor: Any) -> None:
        self.loader, self.preprocessor = loader, preprocessor

    def __iter__(self) -> Iterator[Any]:
        device = self.preprocessor.device
        stream = torch.cuda.Stream(device)
        with ThreadPoolExecutor(1, thread_name_prefix="copy-ahead") as thread:
            ahead: tuple[Any, Future] | None = None
            for batch in self.loader:
                following = batch, thread.submit(self._copy, batch, stream)
                if ahead is not None:
                    yield self._ready(*ahead)
                ahead = following
            if ahead is not None:
                yield self._ready(*ahead)

    def _copy(self, batch: Any, stream: torch.cuda.Stream) -> tuple[dict, torch.cuda.Event]:
        """Start the copy of a batch; returns it and what says that it is done."""
        with torch.cuda.stream(stream):
            copied = self.preprocessor.copy_to_device(batch)
            done = torch.cuda.Event()
            done.record(stream)
        return copied, done

    def _ready(self, batch: Any, copy: Future) -> Any:
        """Have the current stream wait for a copy, and the preprocessor use it."""
        copied, done = copy.result()
        current = torch.cuda.current_stream(self.preprocessor.device)
        current.wait_event(done)
        for tensor in tensors_of(copied):
            tensor.record_stream(current)  # else its memory may be used again too early
        self.preprocessor.take_copied(batch, copied)
        return batch


def batches_for(model: nn.Module, loader: DataLoader) -> Iterable[Any]:
    """The loader, with the next batch copied ahead where that saves time and changes nothing.

    That is on a GPU, with data workers (without them, fetching a batch early would take random numbers of
    this process early) and with a preprocessor of ours.

    Args:
        model: of the run, wrapped for several ranks or not.
        loader: gives the batches.
    """
    preprocessor = getattr(getattr(model, "module", model), "data_preprocessor", None)
    if not hasattr(preprocessor, "copy_to_device") or not getattr(loader, "num_workers", 0):
        return loader
    return CopiedAhead(loader, preprocessor) if preprocessor.device.type == "cuda" else loader


# --- The loop ---

EXCHANGE_S = 1.0
MOST_STEPS_BETWEEN = 25
"""Several ranks exchange whether one of them is to stop about every second, at the latest after so many
steps: each time the host waits for the GPU."""


def steps_between_exchanges(step_s: float) -> int:
    """How many steps pass until ranks exchange again whether to stop.

    Args:
        step_s: the longest last step of all ranks, seconds.
    """
    return max(1, min(MOST_STEPS_BETWEEN, int(EXCHANGE_S / max(step_s, 1e-6))))


VALIDATED_NAME = "last_validation"
"""File in the runner's ``work_dir`` with the number of steps that the last finished validation came after."""


def is_finite_state(runner: Any) -> bool:
    """Whether all weights and all of the optimizer's state are finite."""
    optimizer = getattr(runner.optim_wrapper, "optimizer", None)
    states = [] if optimizer is None else optimizer.state.values()
    tensors = [*runner.model.state_dict().values(), *(value for state in states for value in state.values())]
    return all(is_finite(value) for value in tensors if isinstance(value, torch.Tensor))


def _max_over_ranks(*values: float) -> list[float]:
    """The largest of each value over all ranks, which must all call this."""
    found = torch.tensor([float(value) for value in values])
    all_reduce(found, "max")
    return found.tolist()


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """mmengine's ``EpochBasedTrainLoop`` with exact resuming and stopping.

    - Resumes in the middle of an epoch. With an :class:`~ddetr_mm.datasets.samplers.ElasticBatchSampler` it
      seeks to the position, which counts samples of all ranks, so that the number of ranks and the batch size
      may change; with any other sampler the epoch restarts.
    - On SIGTERM or Ctrl-C finishes the step, writes a checkpoint if the runner has a ``TAOCheckpointHook``
      and raises :class:`StoppedBySignalError`, on all ranks after the same step.
    - Runs a validation that a killed run had not finished.
    - Where an exception ends a run, writes a checkpoint, unless the weights were just being changed, are not
      finite, or are divided among ranks (fsdp).
    - Before ``max_hours`` are over, and after ``stop_after_epoch`` epochs, writes a checkpoint and ends as a
      run does that is finished.

    Args:
        *args, **kwargs: those of ``EpochBasedTrainLoop``.
        max_hours: see :class:`TimeLimit`; None for no limit.
        stop_after_epoch: number of epochs after which this run ends, validated; None for all.

    Attributes:
        samples_done: samples of the current epoch that all ranks together have trained on; the current
            step's are counted as soon as the model is updated.
        out_of_time: why the run ended before its last epoch, and how to continue; None where it did not.
    """

    def __init__(
        self, *args: Any, max_hours: float | None = None, stop_after_epoch: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.stop_after_epoch = stop_after_epoch
        self.samples_done = 0
        self.out_of_time: str | None = None
        self._limit = TimeLimit(max_hours)
        self._stop = StopSignals()
        self._batches_done: int | None = None  # of the epoch; None where the state is between two others
        self._is_counted = True  # whether _iter has the last of them
        self._steps_to_exchange = 0

    @property
    def elastic(self) -> ElasticBatchSampler | None:
        """The batch sampler, where it can seek."""
        batch_sampler = self.dataloader.batch_sampler
        return batch_sampler if isinstance(batch_sampler, ElasticBatchSampler) else None

    def seek(self, *, epoch: int, iter: int, samples_done: int, batches_done: int) -> None:
        """Move to the position of a checkpoint; called while it is loaded.

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
                self.runner.logger.warning("The sampler cannot seek: the epoch restarts.")
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
            except OutOfTimeError:
                self.runner.logger.info(self.out_of_time)
                self.runner.call_hook("after_train")
            except BaseException as error:
                if isinstance(error, Exception) and not isinstance(error, TrainingError):
                    self._save_after(error)
                end_data_workers(self.runner)
                raise
        return self.runner.model

    def _run(self) -> None:
        self.runner.call_hook("before_train")
        optimizer = getattr(self.runner.optim_wrapper, "optimizer", None)
        if optimizer is not None:
            optimizer.register_step_pre_hook(self._weights_change)
        if self._missed_validation():
            self._validate()
        self._stop_where_asked_for()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self._validation_due():
                self._stop_if_time_is_over(ahead_s=self._validation_s())
                self._validate()
            self._stop_if_asked()
            self._stop_where_asked_for()
            if self._epoch < self._max_epochs and not self.stop_training:
                self._stop_if_time_is_over()
        self.runner.call_hook("after_train")

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of it."""
        self.runner.call_hook("before_train_epoch")
        bound_history(self.runner.message_hub, len(self.dataloader))
        self.runner.model.train()
        first = 0
        self._limit.mark()
        if self.elastic is not None:
            self.elastic.sampler.seed = self.runner.seed  # a resumed run keeps its first seed
            self.elastic.sampler.set_epoch(self._epoch)
            self.elastic.sampler.seek(self.samples_done)
            first = len(self.elastic) - self.elastic.steps_left(self.samples_done)
        self._batches_done = first
        batches = batches_for(self.runner.model, self.dataloader)
        for batch_idx, data_batch in enumerate(batches, start=first):
            self.run_iter(batch_idx, data_batch)
            self._limit.step_done()
            if batch_idx + 1 < len(self.dataloader):
                self._stop_within_epoch(batch_idx + 1)
        self._limit.mark()
        self._batches_done = None
        self.runner.call_hook("after_train_epoch")
        self._limit.checkpoint_done()
        self._epoch += 1
        self.samples_done = 0
        self._batches_done = 0

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
        self._batches_done, self._is_counted = idx + 1, False
        self.runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1
        self._is_counted = True

    # --- errors ---

    def _weights_change(self, *_: Any) -> None:
        """Mark the state as unsound until the step is done; the optimizer calls it before its step."""
        self._batches_done = None

    def _save_after(self, error: Exception) -> None:
        """Save the state that an error leaves, where it is sound, and log where; the error is raised again.

        Of several ranks each that fails saves its own, which is that of all, without waiting for the others;
        not where they share the network (fsdp).
        """
        log = self.runner.logger.error
        what = f"Training ends by an error ({type(error).__name__}: {printable(shorten(str(error)))})"
        hook = next((hook for hook in self.runner.hooks if isinstance(hook, TAOCheckpointHook)), None)
        if hook is None:
            return
        done, several = self._batches_done, get_world_size() > 1
        # A network that is divided among ranks is whole on none of them.
        divided = any(hasattr(parameter, "device_mesh") for parameter in self.runner.model.parameters())
        try:
            if (
                divided
                or done is None
                or not is_updated(self.runner.optim_wrapper)
                or not is_finite_state(self.runner)
            ):
                last = find_latest_checkpoint(hook.out_dir or self.runner.work_dir)
                log(f"{what}; its state cannot be saved; the newest checkpoint is {last or 'missing'}.")
                return
            with hook.alone() if several else nullcontext():
                save = hook.save_now if self._is_counted else hook.save_step
                path = save(self.runner, done)
        except Exception as second:  # the first one is what the user needs to see
            log(f"{what}; its state could not be saved: {printable(shorten(str(second)))}.")
            return
        if path is not None:
            steps = self._iter + (not self._is_counted)
            remark = ", with other random numbers: those of the other ranks are lost" if several else ""
            log(
                f"{what}. Its state after {steps} steps is in {path}, which the same command resumes from"
                f"{remark}."
            )

    # --- validation ---

    def _validation_due(self) -> bool:
        """Whether the epochs done so far call for a validation."""
        return (
            self.runner.val_loop is not None
            and self._epoch >= self.val_begin
            and (
                self._epoch % self.val_interval == 0
                or self._epoch in (self._max_epochs, self.stop_after_epoch)
            )
        )

    def _missed_validation(self) -> bool:
        """Whether the run resumes from a checkpoint whose validation never finished."""
        if not getattr(self.runner, "_resume", False) or self._epoch == 0 or self.samples_done:
            return False
        if self.elastic is None and self._iter % len(self.dataloader):
            return False
        self._decide_current_val_interval()
        marker = self._marker()
        done = marker.is_file() and marker.read_text(encoding="utf-8").strip() == str(self._iter)
        missed = [self._validation_due() and not done]
        broadcast_object_list(missed)
        return missed[0]

    def _validate(self) -> None:
        """Validate; a signal stops a single process at once, several ranks after the validation."""
        self._limit.mark()
        try:
            with self._stop.at_once() if get_world_size() == 1 else nullcontext():
                self.runner.val_loop.run()
        except StoppedBySignalError:
            self._save_and_stop()
        self._limit.validation_done()
        if is_first_rank():
            write_text_whole(self._marker(), f"{self._iter}\n")

    def _validation_s(self) -> float:
        """Seconds that a validation is expected to take: as before, else as training steps of its batches."""
        if self._limit.validation_s is not None:
            return self._limit.validation_s
        return self._limit.last_step_s * len(self.runner.val_dataloader)

    def _marker(self) -> Path:
        return Path(self.runner.work_dir) / VALIDATED_NAME

    # --- stopping ---

    def _stop_within_epoch(self, batches_done: int) -> None:
        """Save and raise where any rank was asked to stop or has no time left.

        Several ranks find out together about once a second, after the same steps.

        Args:
            batches_done: of the current epoch.
        """
        if not is_updated(self.runner.optim_wrapper):
            return
        several = get_world_size() > 1
        self._steps_to_exchange -= 1
        if several and self._steps_to_exchange > 0:
            return
        asked, near, step_s = _max_over_ranks(
            self._stop.requested,
            self._limit.is_near(EXCHANGE_S if several else 0.0),
            self._limit.last_step_s,
        )
        self._steps_to_exchange = steps_between_exchanges(step_s)
        if asked:
            self._save_and_stop(batches_done)
        if near:
            self._end_before_time_is_over(batches_done)

    def _stop_if_asked(self) -> None:
        """Save and raise where any rank was asked to stop; between two epochs."""
        if _max_over_ranks(self._stop.requested)[0]:
            self._save_and_stop()

    def _stop_if_time_is_over(self, ahead_s: float = 0.0) -> None:
        """Save and raise where any rank has no time left; between two epochs."""
        if self._limit.hours is not None and _max_over_ranks(self._limit.is_near(ahead_s))[0]:
            self._end_before_time_is_over(0)

    def _end_before_time_is_over(self, batches_done: int) -> NoReturn:
        path = self._save_now(batches_done)
        where = f"; the same command continues from {path}" if path else ""
        self.out_of_time = (
            f"Stopped before ddetr_mm.max_hours={self._limit.hours:g} are over: {self._epoch} of "
            f"{self._max_epochs} epochs trained, {self._iter} steps{where}."
        )
        raise OutOfTimeError

    def _stop_where_asked_for(self) -> None:
        """Save and raise after the epoch that ``stop_after_epoch`` names, where more are to come."""
        last = self.stop_after_epoch
        if last is None or not last <= self._epoch < self._max_epochs or self.stop_training:
            return
        path = self._save_now(0)
        where = f" ({path})" if path else ""
        self.out_of_time = (
            f"Stopped by ddetr_mm.stop_after_epoch={last}: {self._epoch} of {self._max_epochs} epochs"
            f" trained, {self._iter} steps; to continue{where}, raise it or set it to null."
        )
        raise OutOfTimeError

    def _save_now(self, batches_done: int) -> Path | None:
        hook = next((hook for hook in self.runner.hooks if isinstance(hook, TAOCheckpointHook)), None)
        return None if hook is None else hook.save_now(self.runner, batches_done)

    def _save_and_stop(self, batches_done: int = 0) -> NoReturn:
        path = self._save_now(batches_done)
        self.runner.visualizer.close()  # writes what TensorBoard's file still lacks
        where = f"; the same command resumes from {path}" if path else ""
        raise StoppedBySignalError(f"stopped by {self._stop.reason} after {self._iter} steps{where}")
