"""``ddetr-mm export``: a checkpoint as ONNX, checked against PyTorch before it gets its name."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from ddetr_mm.errors import ExportError, Problem
from ddetr_mm.spec import ExperimentSpec, load_spec
from ddetr_mm.tasks.session import choose_device, open_session, require_checkpoint


def run(arguments: Namespace) -> None:
    """Export; leaves the ONNX file and ``<name>.parity.json`` beside it."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "export")
    spec = loaded.spec
    check_target(spec)
    require_checkpoint(spec.export.checkpoint, "export.checkpoint")
    choose_device(spec, [spec.export.gpu_id])
    with open_session(loaded, "export") as session:
        from ddetr_mm.deploy.onnx_export import export_onnx
        from ddetr_mm.tasks.runner import build_model

        settings = spec.export
        session.status.write(f"Loading checkpoint: {settings.checkpoint}")
        model, _ = build_model(loaded, "export", settings.checkpoint, where="export.checkpoint")
        report = export_onnx(
            model,
            settings.onnx_file,
            input_size_hw=(settings.input_height, settings.input_width),
            batch_size=settings.batch_size,
            opset=settings.opset_version,
            say=lambda line: print(line, file=sys.stderr),
        )
        print(f"written: {report.onnx_file}")


def check_target(spec: ExperimentSpec) -> None:
    """Refuse to write over a file, before any work.

    Raises:
        ExportError: when ``export.onnx_file`` exists.
    """
    target = Path(spec.export.onnx_file)
    if target.exists():
        raise ExportError(
            Problem(
                "exists already", file=target, where="export.onnx_file", mend="remove it or name another file"
            )
        )
