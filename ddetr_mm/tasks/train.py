"""``ddetr-mm train``: spec to config to Runner; resumes from ``dd_model_latest.pth``.

What needs torch is imported inside functions: the devices are chosen before.
"""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ddetr_mm.engine.distributed import (
    decided_by_first_rank,
    end_with_study,
    is_first_rank,
    process_group,
)
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.check import early_check, quick_check
from ddetr_mm.tasks.session import open_session, require_gpus, run_on_ranks

# As in engine.checkpoint, model_selection and curves, which take seconds to import.
LATEST_NAME, BEST_NAME, CURVES_NAME = "dd_model_latest.pth", "dd_model_best.pth", "curves.html"


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
            if is_first_rank() and not spec.train.is_dry_run:
                print(what_next(session.folder, arguments.experiment_spec, arguments.overrides))


def what_next(folder: Path, spec_file: str, overrides: Sequence[str]) -> str:
    """Say where the results of a run are, and which command evaluates the best of its checkpoints.

    Args:
        folder: the results folder of the run.
        spec_file: the spec, as it was given.
        overrides: those of the run; what is for other tasks too is repeated.
    """
    names = [name for name in (LATEST_NAME, BEST_NAME, CURVES_NAME) if (folder / name).exists()]
    best = next((name for name in (BEST_NAME, LATEST_NAME) if name in names), None)
    if best is None:
        return f"results: {folder}"
    kept = [text for text in overrides if not text.startswith(("train.", "evaluate.checkpoint="))]
    words = ["ddetr-mm", "evaluate", "-e", str(spec_file), *kept, f"evaluate.checkpoint={folder / best}"]
    return f"results: {', '.join(str(folder / name) for name in names)}\nnext: {shlex.join(words)}"


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
