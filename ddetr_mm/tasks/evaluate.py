"""``ddetr-mm evaluate`` and ``ddetr-mm inference``: a checkpoint, ONNX file or engine on images."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_mm.datasets.sources import SYSTEM_FILES, SkippedFile, find_images
from ddetr_mm.engine.distributed import is_first_rank, process_group
from ddetr_mm.engine.status import TEST_METRICS
from ddetr_mm.errors import DataError, Problem, printable
from ddetr_mm.files import size_text, write_text_whole
from ddetr_mm.outputs import remove_ours, require_free
from ddetr_mm.spec import ExperimentSpec, LoadedSpec, load_spec, task_results_dir
from ddetr_mm.tasks.session import Session, open_session, require_checkpoint, require_gpus, run_on_ranks

if TYPE_CHECKING:
    import torch

    from ddetr_mm.engine.runner import QuietRunner


def run(arguments: Namespace) -> None:
    """Evaluate; writes ``results.json``, ``predictions.json``, plots and ``report.html``."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "evaluate")
    if run_on_ranks(arguments, loaded, "evaluate"):
        return
    with predicting_session(loaded, "evaluate") as session, process_group():
        metrics = predict(loaded, "evaluate", session)
        session.status.write(
            TEST_METRICS,
            kpi={
                "test_mAP": str(metrics["coco/bbox_mAP"]),
                "test_mAP50": str(metrics["coco/bbox_mAP_50"]),
            },
        )


def run_inference(arguments: Namespace) -> None:
    """Detect; writes ``labels/*.txt``, ``images_annotated/`` and, of files it skips, ``skipped.json``.

    Raises:
        DataError: a file cannot be read and ``ddetr_mm.strict_images`` is set, or no image can be read.
    """
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "inference")
    if run_on_ranks(arguments, loaded, "inference"):
        return
    with predicting_session(loaded, "inference") as session:
        source = loaded.spec.dataset.infer_data_sources
        images, left_out = find_images(source.image_dir) if source is not None else ([], [])
        if loaded.spec.ddetr_mm.strict_images:
            refuse_left_out(left_out)
        with process_group():
            if source is not None and is_first_rank():
                require_free_results(loaded.spec, images)
            runner = predicting_runner(loaded, "inference", session)
            counts = runner.test()
            if is_first_rank():
                writer = next(one for one in runner.test_evaluator.metrics if hasattr(one, "skipped"))
                report_skipped([*left_out, *writer.skipped], session)
                print(
                    f"{counts['inference/objects']:.0f} objects in {counts['inference/images']:.0f} images: "
                    f"{session.folder}/labels, {session.folder}/images_annotated"
                )
                unnamed = int(counts.get("inference/unnamed", 0))
                if unnamed:
                    message = f"{unnamed} objects of ids that the class map does not name were left out"
                    session.status.write(message, data=dict(unnamed_objects=unnamed), verbosity="WARNING")
                    print(f"note: {message}", file=sys.stderr)
            if not counts["inference/images"]:
                raise DataError(
                    Problem(
                        f"none of {counts['inference/skipped']:.0f} images can be read",
                        where="dataset.infer_data_sources.image_dir",
                        value=list(source.image_dir) if source is not None else None,
                        hint=f"{SKIPPED_NAME} has the reasons",
                    )
                )


def require_free_results(spec: ExperimentSpec, images: Sequence[Path]) -> None:
    """Check before the work that no label file or picture of another origin is in the way.

    Raises:
        DataError: there are such files.
    """
    from ddetr_mm.engine.detections import result_files, result_names

    folder, per_sequence = task_results_dir(spec, "inference"), spec.inference.is_internal
    names = result_names(images, per_sequence)
    require_free(
        target for image in images for target in result_files(folder, image, per_sequence, names.get(image))
    )


# --- Files that inference skips ---

SKIPPED_NAME = "skipped.json"
SKIPPED_SHOWN = 20
"""Skipped files that are named on the screen and in ``status.json``; :data:`SKIPPED_NAME` has all."""


def refuse_left_out(left_out: Sequence[SkippedFile]) -> None:
    """Refuse files that have the name of an image and are none; those of the operating system may stay.

    Raises:
        DataError: there are such files.
    """
    DataError.collect(
        Problem(f"is {one.reason}", file=one.path, where="ddetr_mm.strict_images", hint="take it away")
        for one in left_out
        if one.path.name not in SYSTEM_FILES and not one.path.name.startswith("._")
    )


def report_skipped(skipped: Sequence[SkippedFile], session: Session) -> None:
    """Write what was skipped to :data:`SKIPPED_NAME` and ``status.json``, and say so; no file without any."""
    path = session.folder / SKIPPED_NAME
    remove_ours(path)  # of an earlier run
    if not skipped:
        return
    entries = [dict(file=str(one.path), reason=one.reason) for one in skipped]
    write_text_whole(path, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    message = f"{len(skipped)} files were skipped: {path}"
    shown = entries[:SKIPPED_SHOWN]
    session.status.write(message, data=dict(skipped=len(skipped), skipped_files=shown), verbosity="WARNING")
    print(f"note: {message}", file=sys.stderr)
    for entry in shown:
        print(f"  - {printable(entry['file'])}: {printable(entry['reason'])}", file=sys.stderr)


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
    runner = predicting_runner(loaded, subtask, session)
    for metric in runner.test_evaluator.metrics:
        if hasattr(metric, "report_facts"):
            metric.report_facts = report_facts(loaded, runner)
    return runner.test()


def report_facts(loaded: LoadedSpec, runner: QuietRunner) -> dict[str, str]:
    """What ``report.html`` says of an evaluation: name → value."""
    spec, model = loaded.spec, runner.model
    given, sources = spec.evaluate, spec.dataset.test_data_sources
    weights = str(given.trt_engine or given.checkpoint)
    size = [size_text(Path(weights).stat().st_size)]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters:  # an exported graph keeps them to itself
        size.insert(0, f"{num_parameters / 1e6:.1f} M parameters")
    found = {"Checkpoint": weights, "Spec": str(loaded.path), "Size": ", ".join(size)}
    if sources is not None:
        found["Data"] = f"{sources.json_file}, images in {sources.image_dir}"
    for step in runner.cfg.test_dataloader.dataset.pipeline:
        if step.type == "Resize":
            long, short = step.scale
            fixed = f"{long} x {short} pixels, whatever the image's shape"
            kept = f"shorter side {short}, longer side at most {long} pixels"
            found["Image size"] = kept if step.keep_ratio else fixed
    found["Device"] = device_name(next((one.device for one in model.parameters()), None))
    return found


def device_name(device: torch.device | None) -> str:
    """The name of a device, of a GPU its model."""
    import torch

    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device or "cpu")


def predicting_runner(loaded: LoadedSpec, subtask: str, session: Session) -> QuietRunner:
    """The Runner of a subtask that predicts, with its weights."""
    from ddetr_mm.tasks.runner import build_predicting_runner

    given = getattr(loaded.spec, subtask)
    runner = build_predicting_runner(loaded, subtask, session.folder)
    session.status.write(f"Loading checkpoint: {given.trt_engine or given.checkpoint}")
    return runner
