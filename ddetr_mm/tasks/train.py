"""``ddetr-mm train``: spec to config to Runner; resumes from ``dd_model_latest.pth``.

What needs torch is imported inside functions: the devices are chosen before.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ddetr_mm.engine.distributed import decided_by_first_rank, is_first_rank, process_group
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.spec import ExperimentSpec, load_spec
from ddetr_mm.tasks.check import quick_check
from ddetr_mm.tasks.session import open_session, require_gpus, run_on_ranks

RESUME_KEY = "train.resume_training_checkpoint_path"


def run(arguments: Namespace) -> None:
    """Train, validate and write checkpoints."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "train")
    spec = loaded.spec
    if run_on_ranks(arguments, loaded, "train"):
        return
    with open_session(loaded, "train") as session:
        require_gpus(spec)
        if is_first_rank():
            quick_check(loaded)
        with process_group():
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
    """The checkpoint to resume from: the one the spec names, else the folder's latest, else None.

    A dry run never resumes, so that it can be tried in the folder of a finished run.

    Raises:
        WeightsError: the named checkpoint does not exist or holds weights alone.
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
                    hint="name a checkpoint of this run, or remove the key to resume from the latest",
                )
            )
        require_resumable(named, where=RESUME_KEY)
        return Path(named)
    latest = find_latest_checkpoint(folder)
    if latest is not None:
        require_resumable(latest, where="results_dir")
    return latest
