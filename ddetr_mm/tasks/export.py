"""``ddetr-mm export``: write a checkpoint as ONNX, compared with PyTorch before it gets its name."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_mm.errors import DataError, ExportError, Problem
from ddetr_mm.outputs import require_free
from ddetr_mm.spec import ExperimentSpec, LoadedSpec, load_spec
from ddetr_mm.tasks.session import Session, choose_device, open_session, require_checkpoint

if TYPE_CHECKING:
    from ddetr_mm.deploy.onnx_export import ExportOptions, ImageSource
    from ddetr_mm.deploy.onnx_file import Normalisation

MAX_TEST_IMAGES = 7


def run(arguments: Namespace) -> None:
    """Write the ONNX file, ``<name>.parity.json`` and, if requested, DeepStream's files."""
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "export")
    spec = loaded.spec
    choose_device(spec, [spec.export.gpu_id])
    with open_session(loaded, "export") as session:
        check_target(Path(spec.export.onnx_file), ".onnx", "export.onnx_file", force=arguments.force)
        require_checkpoint(spec.export.checkpoint, "export.checkpoint")
        require_free(side_files(spec))
        export(loaded, session)


def side_files(spec: ExperimentSpec) -> list[Path]:
    """Return the files that an export writes beside its ONNX file."""
    from ddetr_mm.deploy.deepstream import CONFIG_NAME, LABELS_NAME
    from ddetr_mm.deploy.onnx_export import half_file, parity_file

    target = Path(spec.export.onnx_file)
    graphs = [target, *([half_file(target)] if spec.ddetr_mm.export_fp16 else [])]
    found = [*graphs[1:], *map(parity_file, graphs)]
    if spec.export.serialize_nvdsinfer:
        found += [target.parent / LABELS_NAME, target.parent / CONFIG_NAME]
    return found


def export(loaded: LoadedSpec, session: Session) -> None:
    """Export, after the checks that need no model."""
    from ddetr_mm.deploy.deepstream import write_deepstream_files
    from ddetr_mm.deploy.onnx_export import export_half, export_onnx, usable_opset
    from ddetr_mm.tasks.runner import build_model, predicted_names, weights_selection
    from ddetr_mm.weights import full_class_names, inspect_checkpoint, names_by_category_id

    spec, settings = loaded.spec, loaded.spec.export
    usable_opset(settings.opset_version, plugin=not settings.on_cpu)
    session.status.write(f"Loading checkpoint: {settings.checkpoint}")
    checkpoint = inspect_checkpoint(settings.checkpoint, weights_selection(spec))
    if checkpoint.quantization is not None and checkpoint.quantization.rounds_inputs:
        hint = "export the float checkpoint, and quantize its float graph: quantize.backend modelopt.onnx or"
        raise ExportError(
            Problem(
                "has quantized inputs, which a graph of float weights cannot express",
                file=settings.checkpoint,
                where="export.checkpoint",
                hint=f"{hint} onnxruntime",
            )
        )
    meta = checkpoint.meta
    columns = spec.dataset.num_classes
    known = names_by_category_id(meta, columns, path=settings.checkpoint)
    names = full_class_names(predicted_names(loaded, "export", known), columns)
    model, _ = build_model(loaded, "export", settings.checkpoint, where="export.checkpoint")
    options = export_options(spec, names)
    normalisation = spec_normalisation(spec)
    images, images_from = test_images(spec, options.input_size_hw, normalisation)
    target = Path(settings.onnx_file)
    report = export_onnx(model, target, options, images=images, images_from=images_from, log=log)
    written = [report.onnx_file]
    if spec.ddetr_mm.export_fp16:
        written.append(
            export_half(model, target, options, images=images, images_from=images_from, log=log).onnx_file
        )
    if settings.serialize_nvdsinfer:
        written += write_deepstream_files(target, options.input_size_hw, names, normalisation)
    print("written: " + ", ".join(str(path) for path in written))


def log(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=sys.stderr)


def export_options(spec: ExperimentSpec, class_names: list[str]) -> ExportOptions:
    """Return the exporter's options for the spec's ``export`` section."""
    from ddetr_mm.deploy.onnx_export import ExportOptions

    settings, augmentation = spec.export, spec.dataset.augmentation
    meta: dict[str, Any] = dict(
        class_names=class_names,
        input_mean=list(augmentation.input_mean),
        input_std=list(augmentation.input_std),
        num_select=spec.model.num_select,
    )
    return ExportOptions(
        input_size_hw=(settings.input_height, settings.input_width),
        batch_size=settings.batch_size,
        opset=settings.opset_version,
        plugin=not settings.on_cpu,
        verbose=settings.verbose,
        meta=meta,
    )


def spec_normalisation(spec: ExperimentSpec) -> Normalisation:
    """Return the spec's mean and standard deviation, for values of 0..255."""
    from ddetr_mm.deploy.onnx_file import Normalisation
    from ddetr_mm.translate.model import three

    augmentation = spec.dataset.augmentation
    mean, std = (
        tuple(round(255 * value, 6) for value in three(values))
        for values in (augmentation.input_mean, augmentation.input_std)
    )
    return Normalisation(mean, std)


def test_images(
    spec: ExperimentSpec, size_hw: tuple[int, int], normalisation: Normalisation
) -> tuple[ImageSource | None, str]:
    """Return validation images for the comparison with PyTorch, or None; and where they come from."""
    from ddetr_mm.deploy.onnx_file import cycling_source

    paths = validation_images(spec)
    if not paths:
        return None, "generated"
    return cycling_source(paths, size_hw, normalisation), "validation"


def validation_images(spec: ExperimentSpec) -> list[str]:
    """Return up to :data:`MAX_TEST_IMAGES` files of ``dataset.val_data_sources``; none if any is missing."""
    from ddetr_mm.datasets.sources import CocoSource, join_location, read_coco_sources

    sources = [CocoSource(one.image_dir, one.json_file) for one in spec.dataset.val_data_sources or []]
    if not sources:
        return []
    try:
        table = read_coco_sources(sources, annotations_required=False)
    except DataError as error:
        log(f"note: dataset.val_data_sources cannot be used for the comparison: {error}")
        return []
    paths = []
    for row in range(min(MAX_TEST_IMAGES, len(table.image_ids))):
        folder = sources[table.source_indices[row]].image_dir
        paths.append(join_location(folder, table.file_name(row)))
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        log(f"note: {missing[0]} is missing: comparing on generated images")
        return []
    return paths


def check_target(target: Path, suffix: str, where: str, *, force: bool) -> None:
    """Refuse a target that cannot be written.

    Args:
        target: the file to write.
        suffix: its usual ending.
        where: the spec key that named it.
        force: whether a file there may be replaced.

    Raises:
        ExportError: it exists (without ``force``), would have to be encrypted, is a folder, or cannot be
            created.
    """
    if target.suffix == ".etlt":
        raise ExportError(
            Problem("encrypted files are not written", file=target, where=where, hint=f"name it *{suffix}")
        )
    if target.is_dir():
        raise ExportError(
            Problem("is a folder", file=target, where=where, hint=f"name a {suffix} file in it")
        )
    if target.exists() and not force:
        raise ExportError(
            Problem(
                "exists already",
                file=target,
                where=where,
                hint="give --force to replace it, or name another file",
            )
        )
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ExportError(
            Problem("cannot be written to", file=folder, where=where, hint="name a folder you may write to")
        )
