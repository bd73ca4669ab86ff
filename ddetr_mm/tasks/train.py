"""``ddetr-mm train``: spec to config to Runner; resumes from ``dd_model_latest.pth``.

What needs torch is imported inside functions: the devices are chosen before.
"""

from __future__ import annotations

import os
from argparse import Namespace

from ddetr_mm.engine.distributed import (
    decided_by_first_rank,
    end_with_study,
    is_first_rank,
    process_group,
)
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.check import early_check, quick_check
from ddetr_mm.tasks.session import open_session, require_gpus, run_on_ranks

LATEST_NAME = "dd_model_latest.pth"  # as in engine.checkpoint, which takes seconds to import


def run(arguments: Namespace) -> None:
    """Train, validate and write checkpoints."""
    end_with_study()
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "train")
    spec = loaded.spec
    if run_on_ranks(arguments, loaded, "train"):
        return
    with open_session(loaded, "train") as session:
        require_gpus(spec)
        if is_first_rank():
            link = session.folder / LATEST_NAME
            resumes = bool(spec.train.resume_training_checkpoint_path) or os.path.lexists(link)
            early_check(loaded, resumes=resumes and not spec.train.is_dry_run)
            quick_check(loaded)
        with process_group():
            from ddetr_mm.engine.checkpoint import RESUME_KEY, Start, find_start
            from ddetr_mm.tasks.runner import build_runner
            from ddetr_mm.weights.load import require_same_network, trained_epochs

            named = spec.train.resume_training_checkpoint_path
            weights = spec.train.pretrained_model_path or spec.model.pretrained_backbone_path
            if spec.train.is_dry_run:
                # It never resumes, so that it can be tried in the folder of a finished run.
                found = Start(None, "A dry run never resumes.")
            else:
                found = find_start(session.folder, named, weights=weights)
            start = decided_by_first_rank(found)
            path = start.checkpoint
            runner = build_runner(
                loaded,
                "train",
                session.folder,
                spec.train.pretrained_model_path,
                load_from=str(path) if path else None,
                resume=path is not None,
            )
            if start.warning:
                runner.logger.warning(start.warning)
            runner.logger.info(start.message)
            if path is not None:
                require_same_network(path, runner.model, where=RESUME_KEY if named else "results_dir")
                done, wanted = trained_epochs(path), spec.train.num_epochs
                if done >= wanted:
                    text = nothing_to_do(done, wanted)
                    runner.logger.info(text)
                    session.status.write(text)
            runner.train()


def nothing_to_do(done: int, wanted: int) -> str:
    """Say that a run is finished, and how to train on.

    Args:
        done: epochs that are trained.
        wanted: ``train.num_epochs``.
    """
    trained = f"{done} of {wanted} epochs trained"
    if done > wanted:
        trained = f"{done} epochs trained, train.num_epochs is {wanted}"
    return (
        f"Nothing to do: {trained}; to train on, set train.num_epochs={2 * done}, or any number above {done}."
    )
