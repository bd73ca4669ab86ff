"""``ddetr-mm evaluate``: COCO metrics of a checkpoint."""

from __future__ import annotations

from argparse import Namespace

from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.launch import joined_ranks, launched
from ddetr_mm.tasks.session import open_session, require_checkpoint, require_gpus


def run(arguments: Namespace) -> None:
    """Evaluate; leaves ``results.json`` and ``predictions.json``."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "evaluate")
    spec = loaded.spec
    checkpoint, engine = spec.evaluate.checkpoint, spec.evaluate.trt_engine
    if launched(arguments, loaded, "evaluate"):
        return
    with open_session(loaded, "evaluate") as session:
        require_checkpoint(engine or checkpoint, "evaluate.trt_engine" if engine else "evaluate.checkpoint")
        require_gpus(spec)
        with joined_ranks():
            from ddetr_mm.tasks.runner import build_predicting_runner

            runner = build_predicting_runner(loaded, "evaluate", session.folder)
            session.status.write(f"Loading checkpoint: {engine or checkpoint}")
            metrics = runner.test()
            session.status.write(
                "Test metrics generated.",
                kpi={
                    "test_mAP": str(metrics["coco/bbox_mAP"]),
                    "test_mAP50": str(metrics["coco/bbox_mAP_50"]),
                },
            )
