"""``ddetr-mm evaluate`` and ``ddetr-mm inference``: a checkpoint, ONNX file or engine on images."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from ddetr_mm.datasets.sources import list_images
from ddetr_mm.engine.detections import refuse_shared_targets
from ddetr_mm.engine.distributed import is_first_rank, process_group
from ddetr_mm.spec import LoadedSpec, load_spec
from ddetr_mm.tasks.session import Session, open_session, require_checkpoint, require_gpus, run_on_ranks


def run(arguments: Namespace) -> None:
    """Evaluate; writes ``results.json``, ``predictions.json``, plots and ``report.html``."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "evaluate")
    if run_on_ranks(arguments, loaded, "evaluate"):
        return
    with predicting_session(loaded, "evaluate") as session, process_group():
        metrics = predict(loaded, "evaluate", session)
        session.status.write(
            "Test metrics generated.",
            kpi={
                "test_mAP": str(metrics["coco/bbox_mAP"]),
                "test_mAP50": str(metrics["coco/bbox_mAP_50"]),
            },
        )


def run_inference(arguments: Namespace) -> None:
    """Detect; writes ``labels/*.txt`` and ``images_annotated/``."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "inference")
    spec = loaded.spec
    if run_on_ranks(arguments, loaded, "inference"):
        return
    with predicting_session(loaded, "inference") as session:
        source = spec.dataset.infer_data_sources
        if source is not None and is_first_rank():
            refuse_shared_targets(list_images(source.image_dir), spec.inference.is_internal)
        with process_group():
            counts = predict(loaded, "inference", session)
            if is_first_rank():
                print(
                    f"{counts['inference/objects']:.0f} objects in {counts['inference/images']:.0f} images: "
                    f"{session.folder}/labels, {session.folder}/images_annotated"
                )


@contextmanager
def predicting_session(loaded: LoadedSpec, subtask: str) -> Iterator[Session]:
    """The session of a subtask that predicts, with its checkpoint and GPUs checked."""
    given = getattr(loaded.spec, subtask)
    with open_session(loaded, subtask) as session:
        key = "trt_engine" if given.trt_engine else "checkpoint"
        require_checkpoint(getattr(given, key), f"{subtask}.{key}")
        require_gpus(loaded.spec)
        yield session


def predict(loaded: LoadedSpec, subtask: str, session: Session) -> dict[str, float]:
    """Run the network over the subtask's images.

    Returns:
        The metrics of the Runner's test loop.
    """
    from ddetr_mm.tasks.runner import build_predicting_runner

    given = getattr(loaded.spec, subtask)
    runner = build_predicting_runner(loaded, subtask, session.folder)
    session.status.write(f"Loading checkpoint: {given.trt_engine or given.checkpoint}")
    return runner.test()
