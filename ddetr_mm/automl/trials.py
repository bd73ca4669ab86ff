"""A trial: an ordinary training run in a folder of its own, with its spec, started as a process.

The run ends after each rung by ``ddetr_mm.stop_after_epoch`` and is continued by exact resume. What it
reached is read from its ``status.json``.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddetr_mm.automl.space import shown, with_values
from ddetr_mm.engine.distributed import STUDY_VARIABLE
from ddetr_mm.engine.status import EVAL_METRICS, FAILURE, STARTED, TRAIN_METRICS, numbers_of, read_lines
from ddetr_mm.files import python_module, write_text_whole
from ddetr_mm.outputs import OWNED_NAME, is_ours, remove_ours, results_root
from ddetr_mm.spec import ExperimentSpec
from ddetr_mm.spec.describe import dump, to_plain

KEY_VARIABLE = "DDETR_MM_ENCRYPTION_KEY"
"""The environment variable that passes the encryption key on to trials, whose specs name it."""

SPEC_NAME, LOG_NAME = "spec.yaml", "log.txt"
_CHECKPOINT = re.compile(r"(model_|dd_model_)[^/]*\.pth")
_OF_A_JOB = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|NUM_GPU_PER_NODE|MASTER_ADDR|MASTER_PORT"
    r"|SLURM_(PROCID|LOCALID|NTASKS|NPROCS|STEP_NUM_TASKS|STEP_NUM_NODES|STEP_TASKS_PER_NODE)"
    r"|PMI_\w+|OMPI_\w+)"
)
"""Variables by which a launcher numbers its processes: a trial is no part of that job."""


# --- What a trial reached ---


@dataclass
class History:
    """What ``status.json`` of a training run has.

    Attributes:
        metrics: number of epochs trained → metrics of the validation after it, by name.
        trained: number of every epoch that was trained to its end, in order, from 1.
        failure: message of the last failure, empty where the last start did not fail.
        seconds_an_epoch: of the last epoch; None before the first.
    """

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    failure: str = ""
    seconds_an_epoch: float | None = None

    @property
    def epochs(self) -> int:
        """Epochs that are trained."""
        return max(self.trained, default=0)

    def curve(self, metric: str) -> dict[int, float]:
        """A metric by number of epochs, of the validations that have it."""
        return {epoch: one[metric] for epoch, one in sorted(self.metrics.items()) if metric in one}


def read_history(path: Path) -> History:
    """Read a training run's ``status.json``; half lines of killed runs are skipped."""
    history = History()
    if not path.is_file():
        return history
    epoch = 0
    for entry in read_lines(path):
        message = str(entry.get("message", ""))
        if isinstance(entry.get("epoch"), int):
            epoch = entry["epoch"] + 1
            history.trained.append(epoch)
            history.seconds_an_epoch = _seconds(str(entry.get("time_per_epoch", "")))
        elif message in (TRAIN_METRICS, EVAL_METRICS) and epoch:
            # A line repeats the figures of those before it.
            own = {
                name: value
                for name, value in numbers_of(entry.get("kpi")).items()
                if (name == "train_loss") == (message == TRAIN_METRICS)
            }
            history.metrics.setdefault(epoch, {}).update(own)
        if entry.get("status") == STARTED:
            history.failure = ""
        elif entry.get("status") == FAILURE:
            history.failure = message
    return history


def _seconds(text: str) -> float | None:
    """Seconds of ``H:MM:SS[.f]``, with days in front where there are any."""
    found = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d+):([\d.]+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


# --- Its spec ---


def trial_spec(
    spec: ExperimentSpec,
    values: Mapping[str, Any],
    folder: Path,
    *,
    heading: str,
    goal: str,
) -> str:
    """The spec of a trial as YAML.

    Args:
        spec: the user's.
        values: of the searched fields.
        folder: the trial's.
        heading: one line for a comment on top.
        goal: ``max`` or ``min``.
    """
    plain = _base(spec, values, heading)
    settings = spec.ddetr_mm.automl
    plain["results_dir"] = str(folder)
    train = plain["train"]
    train |= {"results_dir": None, "checkpoint_interval": 1, "checkpoint_interval_unit": "epoch"}
    # On disk stay the newest checkpoint, to resume from, and the best.
    train["checkpointer"] |= {
        "enable_topk": True,
        "replace_periodic": True,
        "monitor": settings.metric,
        "mode": goal,
        "save_top_k": 1,
        "filename": "model_best_{epoch:03d}",
        "dirpath": None,
        "auto_insert_metric_name": False,
    }
    plain["wandb"] |= {"run_id": "", "name": f"{spec.wandb.name} {folder.name}"}
    return f"# {heading}\n{dump(plain)}"


def best_spec(spec: ExperimentSpec, values: Mapping[str, Any], checkpoint: Path, *, heading: str) -> str:
    """The spec of the best trial, for a training run outside the study, and for its checkpoint.

    ``evaluate``, ``inference`` and ``export`` name ``checkpoint`` where the user's spec names none.
    """
    plain = _base(spec, values, heading)
    for name in ("evaluate", "inference", "export"):
        if not getattr(spec, name).checkpoint:
            plain[name]["checkpoint"] = str(checkpoint)
    return f"# {heading}\n{dump(plain)}"


def _base(spec: ExperimentSpec, values: Mapping[str, Any], heading: str) -> dict[str, Any]:
    epochs = spec.ddetr_mm.automl.max_epochs
    plain = to_plain(with_values(spec, values))
    if spec.encryption_key:
        plain["encryption_key"] = f"${{oc.env:{KEY_VARIABLE}}}"
    train = plain["train"]
    train |= {"num_epochs": epochs, "resume_training_checkpoint_path": None, "is_dry_run": False}
    train["validation_interval"] = min(spec.train.validation_interval, epochs)
    if spec.train.checkpoint_interval_unit == "epoch":
        train["checkpoint_interval"] = min(spec.train.checkpoint_interval, epochs)
    plain["ddetr_mm"] |= {"max_hours": None, "stop_after_epoch": None}
    del plain["ddetr_mm"]["automl"]
    return plain


def values_line(values: Mapping[str, Any]) -> str:
    """Values of a trial in one line, by the last part of each path."""
    return ", ".join(f"{path.rpartition('.')[2]} {shown(value)}" for path, value in values.items())


# --- Its process ---


def start_process(
    folder: Path, *, stop_after: int, gpu_ids: Sequence[int] | None, key: str | None
) -> subprocess.Popen[bytes]:
    """Start, or resume, the training run of a trial; what it prints goes to ``log.txt``.

    Args:
        folder: with its ``spec.yaml``.
        stop_after: number of epochs after which it ends.
        gpu_ids: GPUs that it may use, as the driver counts those this process sees; None: the CPU.
        key: the encryption key, if any.
    """
    overrides = [f"ddetr_mm.stop_after_epoch={stop_after}"]
    environment = {name: value for name, value in os.environ.items() if not _OF_A_JOB.fullmatch(name)}
    environment[STUDY_VARIABLE] = str(os.getpid())
    if key is not None:
        environment[KEY_VARIABLE] = key
    if gpu_ids is not None:
        overrides += [f"train.gpu_ids=[{','.join(map(str, gpu_ids))}]", f"train.num_gpus={len(gpu_ids)}"]
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices(gpu_ids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    command = python_module("ddetr_mm", "train", "-e", str(folder / SPEC_NAME), *overrides)
    with (folder / LOG_NAME).open("ab") as log:
        # A session of its own: Ctrl-C reaches the study alone, which stops its trials in good order.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def visible_devices(gpu_ids: Sequence[int], visible: str | None) -> str:
    """``CUDA_VISIBLE_DEVICES`` for some of the GPUs, where a scheduler may have chosen before.

    Args:
        gpu_ids: positions among the GPUs that this process sees.
        visible: this process's own variable; None: all GPUs are visible.
    """
    if visible is None:
        return ",".join(map(str, gpu_ids))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return ",".join(names[index] for index in gpu_ids if index < len(names))


def failure_of(folder: Path, status: int, history: History) -> str:
    """Why a trial's process failed, in one line.

    Args:
        folder: the trial's.
        status: exit status; negative for a signal.
        history: of its ``status.json``.
    """
    if status == -9:
        return "killed by SIGKILL, as the system does when memory runs out"
    if status < 0:
        return f"killed by signal {-status}"
    if history.failure:
        return " ".join(history.failure.split())[:400]
    try:
        tail = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    except FileNotFoundError:
        tail = []
    errors = [line for line in tail if line.startswith("error: ")] or [line for line in tail if line.strip()]
    return (errors[-1].removeprefix("error: ") if errors else f"exit status {status}")[:400]


def kind_of(reason: str) -> str:
    """A reason without numbers and names of trials, so that those of several trials can be compared."""
    return re.sub(r"\S*trial_\d+\S*|[\d.,:]*\d", "#", reason)[:120]


# --- Its files ---


def remove_checkpoints(train_folder: Path) -> list[str]:
    """Remove the checkpoints of a trial, those alone that its runs wrote; returns their names."""
    removed = []
    if not (train_folder / OWNED_NAME).is_file():
        return removed
    with results_root(train_folder):
        for path in sorted(train_folder.iterdir()):
            if _CHECKPOINT.fullmatch(path.name) and is_ours(path):
                remove_ours(path)
                removed.append(path.name)
    return removed


def write_spec(folder: Path, text: str) -> None:
    """Write ``spec.yaml`` of a trial, once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SPEC_NAME).is_file():
        write_text_whole(folder / SPEC_NAME, text)
