"""``ddetr-mm train``: spec to config to Runner; resumes from ``dd_model_latest.pth``.

What needs torch is imported inside functions: the devices are chosen before.
"""

from __future__ import annotations

from argparse import Namespace

from ddetr_mm.engine.distributed import decided_by_first_rank, is_first_rank, process_group
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.check import early_check, quick_check
from ddetr_mm.tasks.session import open_session, require_gpus, run_on_ranks


def run(arguments: Namespace) -> None:
    """Train, validate and write checkpoints."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "train")
    spec = loaded.spec
    if run_on_ranks(arguments, loaded, "train"):
        return
    with open_session(loaded, "train") as session:
        require_gpus(spec)
        if is_first_rank():
            resumes = not spec.train.is_dry_run and any(session.folder.glob("*.pth"))
            early_check(loaded, resumes=resumes)
            quick_check(loaded)
        with process_group():
            from ddetr_mm.engine.checkpoint import RESUME_KEY, checkpoint_to_resume
            from ddetr_mm.tasks.runner import build_runner
            from ddetr_mm.weights.load import require_same_network

            named = spec.train.resume_training_checkpoint_path
            # A dry run never resumes, so that it can be tried in the folder of a finished run.
            found = None if spec.train.is_dry_run else checkpoint_to_resume(session.folder, named)
            start = decided_by_first_rank(found)
            runner = build_runner(
                loaded,
                "train",
                session.folder,
                spec.train.pretrained_model_path,
                load_from=str(start) if start else None,
                resume=start is not None,
            )
            if start is not None:
                require_same_network(start, runner.model, where=RESUME_KEY if named else "results_dir")
            runner.train()
