"""What every subtask has around it: its results folder, status.json, experiment.yaml, notes, device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.errors import DataError, Problem, WeightsError
from ddetr_mm.files import write_text_whole
from ddetr_mm.runtime.rank_env import is_rank, world_size
from ddetr_mm.runtime.status import StatusLog, on_first_rank
from ddetr_mm.spec import ConvertSpec, ExperimentSpec, LoadedSpec, spec_to_yaml, task_results_dir
from ddetr_mm.tasks.failures import failures_told


@dataclass(frozen=True)
class Session:
    """One run of a subtask: where its results go, and its status log."""

    folder: Path
    status: StatusLog


@contextmanager
def open_session(loaded: LoadedSpec, subtask: str) -> Iterator[Session]:
    """Make the results folder, write ``experiment.yaml`` and keep ``status.json`` while the block runs.

    A conversion leaves no ``experiment.yaml``, as in the reference. Of a distributed run only the first
    rank writes and says anything.

    Raises:
        DataError: when the results folder cannot be written to, or the disk is full.
        RunError: when a data worker is killed or memory runs out.
    """
    folder = task_results_dir(loaded.spec, subtask)
    if on_first_rank():
        with _told_as_input_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if subtask != "convert":
                write_text_whole(folder / "experiment.yaml", spec_to_yaml(loaded.spec))
        say_notes(loaded)
    status = StatusLog.at(folder / "status.json")
    # Inside, so that the status tells them too; the command tells those of the status file itself.
    with status.task(subtask), failures_told(), encryption_key_of(loaded.spec):
        yield Session(folder, status)


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
def _told_as_input_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            Problem(
                f"the results folder cannot be written to: {error.strerror}",
                file=folder,
                where="results_dir",
                mend="name a folder you may write to: results_dir=…",
            )
        ) from error


def say_notes(loaded: LoadedSpec) -> None:
    """Print what loading the spec has to say: fields without effect, values adjusted."""
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)


def require_checkpoint(path: str | None, where: str) -> None:
    """Check that a checkpoint is there, before anything heavy is loaded.

    Args:
        path: a file, or a Hugging Face folder.
        where: the spec key that named it.

    Raises:
        WeightsError: when it is not.
    """
    if not path:
        raise WeightsError(Problem("is not given", where=where, mend="name a checkpoint file"))
    if not Path(path).exists():
        raise WeightsError(Problem("does not exist", file=path, where=where, mend="name a checkpoint file"))


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
                mend="check `nvidia-smi` and that torch was built for CUDA",
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
                mend="name GPUs that `nvidia-smi` lists in gpu_ids, or set ddetr_mm.device: cpu",
            )
        )
