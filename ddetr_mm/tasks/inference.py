"""``ddetr-mm inference``: label files and annotated images for folders of images."""

from __future__ import annotations

from argparse import Namespace

from ddetr_mm.datasets.sources import list_images
from ddetr_mm.engine.detections import refuse_shared_targets
from ddetr_mm.engine.status import on_first_rank
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.launch import joined_ranks, launched
from ddetr_mm.tasks.session import open_session, require_checkpoint, require_gpus


def run(arguments: Namespace) -> None:
    """Detect; leaves ``labels/*.txt`` and ``images_annotated/``."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "inference")
    spec = loaded.spec
    checkpoint, engine = spec.inference.checkpoint, spec.inference.trt_engine
    if launched(arguments, loaded, "inference"):
        return
    with open_session(loaded, "inference") as session:
        require_checkpoint(engine or checkpoint, "inference.trt_engine" if engine else "inference.checkpoint")
        require_gpus(spec)
        source = spec.dataset.infer_data_sources
        if source is not None and on_first_rank():
            refuse_shared_targets(list_images(source.image_dir), spec.inference.is_internal)
        with joined_ranks():
            from ddetr_mm.tasks.runner import build_predicting_runner

            runner = build_predicting_runner(loaded, "inference", session.folder)
            session.status.write(f"Loading checkpoint: {engine or checkpoint}")
            counts = runner.test()
            if not on_first_rank():
                return
            print(
                f"{counts['inference/objects']:.0f} objects in {counts['inference/images']:.0f} images: "
                f"{session.folder}/labels, {session.folder}/images_annotated"
            )
