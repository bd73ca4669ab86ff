"""What every subtask shares: ranks, devices, results folder, ``status.json``, failures of the machine."""

from __future__ import annotations

import errno
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.engine.distributed import (
    adopt_slurm,
    is_first_rank,
    is_rank,
    plan_launch,
    rank_command,
    run_ranks,
    world_size,
)
from ddetr_mm.engine.status import FAILURE, StatusLog, failure_message
from ddetr_mm.errors import DataError, InputError, Problem, RankFailure, RunError, WeightsError, printable
from ddetr_mm.files import free_space_text, size_text, write_text_whole
from ddetr_mm.outputs import only_writer, protected_inputs, remove_leftovers, require_free, results_root
from ddetr_mm.spec import ConvertSpec, ExperimentSpec, LoadedSpec, spec_to_yaml, task_results_dir

# --- Failures of the machine: memory, disk, killed processes ---

_HINTS = {
    errno.ENOSPC: "free some space, or name a folder on another disk, and start the same command again",
    errno.EDQUOT: "free some of your quota, or name a folder on another disk, and start the command again",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), or name a folder elsewhere",
    errno.EROFS: "name a folder on a disk that may be written to",
    errno.EACCES: "allow it for your user, or name another file or folder",
    errno.EPERM: "allow it for your user, or name another file or folder",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "name a folder whose upper folders are no files",
    errno.EEXIST: "there is a file of that name: name another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`), or use fewer workers: dataset.workers",
    errno.ENFILE: "close other programs, or use fewer workers: dataset.workers",
}


@contextmanager
def machine_failures_as_errors() -> Iterator[None]:
    """Turn failures of the machine into one message each; other errors pass unchanged.

    Raises:
        DataError: a file or folder that cannot be read or written, a full disk.
        RunError: a data worker that was killed, too little memory.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        known = machine_error(error)
        if known is None:
            raise
        raise known from error


def machine_error(error: BaseException) -> InputError | None:
    """The message for an error of the machine; None for any other."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        where = "the GPU" if "CUDA" in text or "HIP" in text else "the machine"
        return RunError(Problem(f"{where} has too little memory: {text or 'MemoryError'}", hint=_LESS_MEMORY))
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return RunError(Problem("the machine has too little memory", value=text, hint=_LESS_MEMORY))
    if isinstance(error, RuntimeError) and text.startswith("DataLoader timed out"):
        return RunError(_late_batch(text))
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return RunError(_killed_worker(text))
    if isinstance(error, ConnectionResetError):  # the other end of a worker's pipe has gone
        return RunError(_killed_worker(text))
    if isinstance(error, OSError) and error.errno in _HINTS:
        what = f"cannot be read or written: {error.strerror}"
        if error.filename is None:
            return DataError(Problem(f"a file {what}", hint=_HINTS[error.errno]))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what += free_space_text(str(error.filename))
        return DataError(Problem(what, file=str(error.filename), hint=_HINTS[error.errno]))
    return None


_LESS_MEMORY = (
    "lower dataset.batch_size or the image sizes of dataset.augmentation, set "
    "train.activation_checkpoint=true, or use fewer workers: dataset.workers"
)


def _late_batch(text: str) -> Problem:
    """The message for a batch that did not come in time; ``text`` is torch's, with the seconds."""
    from ddetr_mm.datasets.worker_state import files_being_read
    from ddetr_mm.preflight.resources import shared_memory_free

    seconds = "".join(filter(str.isdigit, text)) or "?"
    read = ", ".join(f"{path} (process {process})" for process, path in files_being_read().items())
    free = shared_memory_free()
    if read:
        what = f"no batch came from a data worker within {seconds} s; being read: {read}"
        hint = "look at these files and their disk; a longer limit: ddetr_mm.data_timeout_s"
    else:
        what = f"no batch came from a data worker within {seconds} s, and none of them reads a file"
        hint = "give the container more shared memory (`--shm-size`), or set dataset.workers=0"
        if free is not None:
            hint += f"; {size_text(free)} of /dev/shm are free"
    return Problem(what, where="dataset.workers", hint=hint)


def _killed_worker(text: str) -> Problem:
    """The message for a data worker that ended on its own; ``text`` is torch's."""
    hint = (
        "when the system ran out of memory (see `dmesg`), lower dataset.workers or dataset.batch_size; "
        "then start the same command again"
    )
    if "bus error" in text.lower():
        hint = "give the container more shared memory (`--shm-size`), or set dataset.workers=0"
    return Problem(f"a data worker was killed: {text.splitlines()[0]}", where="dataset.workers", hint=hint)


# --- Results folder, status.json, experiment.yaml, notes ---

RESUME_KEY = "train.resume_training_checkpoint_path"


@dataclass(frozen=True)
class Session:
    """One run of a subtask: its results folder and its status log."""

    folder: Path
    status: StatusLog


@contextmanager
def open_session(loaded: LoadedSpec, subtask: str) -> Iterator[Session]:
    """Make the results folder, write ``experiment.yaml`` and keep ``status.json`` while the block runs.

    A conversion leaves no ``experiment.yaml``, as in TAO. Of a distributed run only the first rank writes.

    Raises:
        DataError: when the results folder cannot be written to, or the disk is full.
        RunError: when a data worker is killed or memory runs out.
    """
    folder = task_results_dir(loaded.spec, subtask)
    with ExitStack() as stack:
        stack.enter_context(protected_inputs(input_files(loaded, subtask)))
        stack.enter_context(results_root(folder))
        if is_first_rank():
            with _folder_failure_as_error(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if subtask != "convert":
                    stack.enter_context(only_writer(folder, f"ddetr-mm {subtask}"))
                    remove_leftovers(folder)
                    require_free(folder / name for name in RESULT_NAMES.get(subtask, ()))
                    _write_experiment(loaded, folder / "experiment.yaml")
            print_notes(loaded)
        status = StatusLog.at(folder / "status.json")
        # Inside, so that they are in the status file too; the command reports those of that file itself.
        with status.task(subtask), machine_failures_as_errors(), encryption_key_of(loaded.spec):
            stack.callback(close_log_files, folder)
            yield Session(folder, status)


def close_log_files(folder: Path) -> None:
    """Close the log files below a folder, which mmengine's loggers keep open until the process ends."""
    logging_module = sys.modules.get("mmengine.logging")
    if logging_module is None:
        return
    inside = os.path.realpath(folder) + os.sep
    for logger in logging_module.MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler) and os.path.realpath(handler.baseFilename).startswith(
                inside
            ):
                logger.removeHandler(handler)
                handler.close()


RESULT_NAMES = {
    "train": ("config.py", "dd_model_latest.pth", "last_checkpoint", "curves.html"),
    "evaluate": ("config.py", "results.json", "predictions.json", "report.html"),
    "inference": ("config.py", "skipped.json"),
    "export": ("config.py",),
    "quantize": ("parity.json", "report.html"),
}
"""Files that a subtask writes into its results folder late, checked before the work."""


def input_files(loaded: LoadedSpec, subtask: str) -> list[str]:
    """The files that a subtask reads: spec, checkpoints, annotation files, class map, images to predict.

    What cannot be found is left out: it is reported where it is read. The checkpoint that a training run
    resumes from is left out too where it lies among the results.
    """
    spec = loaded.spec
    found = [str(loaded.path)]
    if isinstance(spec, ConvertSpec):
        return found
    from ddetr_mm.datasets.sources import CocoSource, list_images
    from ddetr_mm.preflight.inputs import named_files

    weights = named_files(spec, subtask)
    resumed = weights.pop(RESUME_KEY, None)
    if resumed and Path(resumed).resolve().parent != task_results_dir(spec, subtask).resolve():
        found.append(resumed)
    found += weights.values()
    if subtask == "gen_trt_engine" or subtask == "export":
        return found
    dataset = spec.dataset
    sources = [dataset.test_data_sources] if subtask == "evaluate" else list(dataset.train_data_sources or [])
    if subtask == "quantize":
        sources = [dataset.quant_calibration_data_sources]
    sources += dataset.val_data_sources or []
    for source in filter(None, () if subtask == "inference" else sources):
        with suppress(DataError):
            found += map(str, CocoSource(source.image_dir or "", source.json_file or "").files())
    if subtask == "inference" and dataset.infer_data_sources is not None:
        with suppress(DataError):
            found += map(str, list_images(dataset.infer_data_sources.image_dir))
        found += filter(None, [dataset.infer_data_sources.classmap])
    return found


def _write_experiment(loaded: LoadedSpec, path: Path) -> None:
    """Write the complete spec, unless it is the very file that was read."""
    if os.path.realpath(path) != os.path.realpath(loaded.path):
        write_text_whole(path, spec_to_yaml(loaded.spec))


@contextmanager
def encryption_key_of(spec: ExperimentSpec | ConvertSpec | None) -> Iterator[None]:
    """Inside the block this process reads and writes checkpoints with the spec's ``encryption_key``."""
    key = getattr(spec, "encryption_key", None)
    if not key:
        yield
        return
    from ddetr_mm.weights.encryption import use_encryption_key

    use_encryption_key(key)
    try:
        yield
    finally:
        use_encryption_key(None)


@contextmanager
def _folder_failure_as_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            Problem(
                f"the results folder cannot be written to: {error.strerror}",
                file=folder,
                where="results_dir",
                hint="name a folder you may write to: results_dir=…",
            )
        ) from error


def print_notes(loaded: LoadedSpec) -> None:
    """Print the notes of a loaded spec: fields without effect, values adjusted."""
    for note in loaded.notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def run_on_ranks(arguments: Namespace, loaded: LoadedSpec, subtask: str) -> bool:
    """Choose the devices; where the spec asks for several ranks, run the command on them and wait.

    Must be called before torch is imported.

    Args:
        arguments: of the command, which every rank is called with again.
        loaded: the spec.
        subtask: ``train``, ``evaluate`` or ``inference``.

    Returns:
        True when ranks have done the work; False where this process has to do it, alone or as a rank.

    Raises:
        InputError: the machine has too few GPUs, or the environment does not name the other machines.
        RankFailure: a rank failed.
        KeyboardInterrupt: the run was interrupted; the ranks have ended.
    """
    task = getattr(loaded.spec, subtask)
    plan = plan_launch(task.num_gpus, task.num_nodes, section=subtask)
    adopt_slurm()
    started = plan.ranks_per_node if plan is not None else len(task.gpu_ids)
    # NUM_GPU_PER_NODE replaces gpu_ids, as in TAO.
    choose_device(loaded.spec, task.gpu_ids if started == len(task.gpu_ids) else list(range(started)))
    if plan is None:
        return False
    status = StatusLog.at(task_results_dir(loaded.spec, subtask) / "status.json")
    try:
        require_gpus(loaded.spec, plan.ranks_per_node, where=f"{subtask}.num_gpus")
        run_ranks(plan, rank_command(arguments))
    except InputError as error:
        status.write(failure_message(error, subtask), FAILURE, verbosity="ERROR")
        raise
    except RankFailure as failure:
        # The first rank has written its own failures; of other ranks' it knows the consequence at most.
        if plan.node_rank == 0 and (failure.rank != 0 or failure.killed):
            status.write(str(failure), FAILURE, verbosity="ERROR")
        raise
    return True


def require_checkpoint(path: str | None, where: str) -> None:
    """Check that a checkpoint is there, before anything heavy is loaded.

    Args:
        path: a file, or a Hugging Face folder.
        where: the spec key that named it.

    Raises:
        WeightsError: when it is not.
    """
    if not path:
        raise WeightsError(Problem("is not given", where=where, hint="name a checkpoint file"))
    if not Path(path).exists():
        is_engine = where.endswith("trt_engine")
        hint = "name an engine, or an .onnx file" if is_engine else "name a checkpoint file"
        raise WeightsError(Problem("does not exist", file=path, where=where, hint=hint))


def choose_device(spec: ExperimentSpec, gpu_ids: list[int]) -> None:
    """Decide where PyTorch runs; must be called before torch is imported.

    ``ddetr_mm.device: cpu`` hides all GPUs; else the process sees those that ``gpu_ids`` names, unless the
    environment has chosen already, or has started ranks of another number than ``gpu_ids`` has GPUs.
    """
    if spec.ddetr_mm.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif "CUDA_VISIBLE_DEVICES" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        if not is_rank() or ranks_here == len(gpu_ids):
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpu_ids)


def require_gpus(spec: ExperimentSpec, wanted: int = 1, *, where: str = "num_gpus") -> None:
    """Check that the GPUs are there.

    Without any GPU a run uses the CPU, with as many processes as the spec has GPUs.

    Args:
        spec: the spec; ``ddetr_mm.device`` may insist on a GPU.
        wanted: how many this machine's ranks need.
        where: the spec key that said so, for messages.

    Raises:
        DataError: for ``ddetr_mm.device: cuda`` without a usable GPU, and for fewer GPUs than ranks.
    """
    if spec.ddetr_mm.device == "cpu":
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if spec.ddetr_mm.device == "cuda" and found == 0:
        raise DataError(
            Problem(
                "no CUDA GPU can be used",
                where="ddetr_mm.device",
                value="cuda",
                allowed="auto, cpu",
                hint="check `nvidia-smi` and that torch was built for CUDA",
            )
        )
    if 0 < found < wanted:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise DataError(
            Problem(
                f"only {found} of the GPUs can be used (CUDA_VISIBLE_DEVICES is {visible})",
                where=where,
                value=wanted,
                allowed=f"1 to {found}",
                hint="name GPUs that `nvidia-smi` lists in gpu_ids, or set ddetr_mm.device: cpu",
            )
        )
