"""``ddetr-mm train``: spec → config → Runner, resuming by itself."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ddetr_mm.engine.status import on_first_rank
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.spec import ExperimentSpec, load_spec
from ddetr_mm.tasks.check import quick_check
from ddetr_mm.tasks.launch import joined_ranks, launched
from ddetr_mm.tasks.session import open_session, require_gpus

RESUME_KEY = "train.resume_training_checkpoint_path"


def run(arguments: Namespace) -> None:
    """Train, validate and checkpoint; see the contract of the command in the README."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "train")
    spec = loaded.spec
    if launched(arguments, loaded, "train"):
        return
    with open_session(loaded, "train") as session:
        require_gpus(spec)
        if on_first_rank():
            quick_check(loaded)
        with joined_ranks():
            from ddetr_mm.engine.distributed import decided_by_first_rank
            from ddetr_mm.tasks.runner import build_runner
            from ddetr_mm.weights.load import require_same_network

            start = decided_by_first_rank(checkpoint_to_resume(spec, session.folder))
            runner = build_runner(
                loaded,
                "train",
                session.folder,
                spec.train.pretrained_model_path,
                load_from=str(start) if start else None,
                resume=start is not None,
            )
            if start is not None:
                named = spec.train.resume_training_checkpoint_path
                require_same_network(start, runner.model, where=RESUME_KEY if named else "results_dir")
            runner.train()


def checkpoint_to_resume(spec: ExperimentSpec, folder: Path) -> Path | None:
    """Where to go on: the checkpoint the spec names, else the folder's latest, else nowhere.

    A dry run goes on from nowhere, so that a finished training can be tried out too.

    Raises:
        WeightsError: when the spec names a checkpoint that is not there or that holds weights alone.
    """
    from ddetr_mm.engine.checkpoint import find_latest_checkpoint
    from ddetr_mm.weights.load import require_resumable

    if spec.train.is_dry_run:
        return None
    named = spec.train.resume_training_checkpoint_path
    if named:
        if not Path(named).is_file():
            raise WeightsError(
                Problem(
                    "does not exist",
                    file=named,
                    where=RESUME_KEY,
                    hint="name a checkpoint of this training, or remove the key to go on from the latest",
                )
            )
        require_resumable(named, where=RESUME_KEY)
        return Path(named)
    latest = find_latest_checkpoint(folder)
    if latest is not None:
        require_resumable(latest, where="results_dir")
    return latest
