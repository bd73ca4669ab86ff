"""``ddetr-mm gen_trt_engine``: build a TensorRT engine and compare it with its ONNX file."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_mm.errors import Problem, StackError, WeightsError
from ddetr_mm.files import write_text_whole, written_whole
from ddetr_mm.spec import ExperimentSpec, LoadedSpec, load_spec
from ddetr_mm.tasks.export import check_target, log, spec_normalisation, test_images
from ddetr_mm.tasks.session import Session, choose_device, open_session

if TYPE_CHECKING:
    from ddetr_mm.deploy.onnx_file import GraphSignature
    from ddetr_mm.deploy.tensorrt import BuilderSettings, Calibration


def run(arguments: Namespace) -> None:
    """Write the engine, its parity report and its metadata.

    Raises:
        WeightsError: the ONNX file does not exist.
    """
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "gen_trt_engine")
    spec = loaded.spec
    if spec.gen_trt_engine.trt_engine:
        target = Path(spec.gen_trt_engine.trt_engine)
        check_target(target, ".engine", "gen_trt_engine.trt_engine", force=arguments.force)
    if not Path(spec.gen_trt_engine.onnx_file).is_file():
        where = "gen_trt_engine.onnx_file"
        raise WeightsError(
            Problem(
                "does not exist",
                file=spec.gen_trt_engine.onnx_file,
                where=where,
                hint="run `ddetr-mm export`",
            )
        )
    choose_device(spec, [spec.gen_trt_engine.gpu_id])
    with open_session(loaded, "gen_trt_engine") as session:
        generate(loaded, session)


def generate(loaded: LoadedSpec, session: Session) -> None:
    """Print the ``trtexec`` command of the build, then build and compare.

    Raises:
        StackError: TensorRT is not installed.
        ExportError: TensorRT would read the graph wrongly.
    """
    from ddetr_mm.deploy.onnx_file import q_dq_formats, read_signature, require_sampling_for_tensorrt
    from ddetr_mm.deploy.tensorrt import require_tensorrt, trtexec_command

    spec, options = loaded.spec, loaded.spec.gen_trt_engine
    signature = read_signature(options.onnx_file, where="gen_trt_engine.onnx_file")
    require_sampling_for_tensorrt(options.onnx_file, where="gen_trt_engine.onnx_file")
    quantized = q_dq_formats(options.onnx_file, where="gen_trt_engine.onnx_file")
    settings = engine_settings(spec, signature, quantized=quantized)
    calibration = engine_calibration(spec, signature) if settings.needs_calibration else None
    command = trtexec_command(
        settings,
        options.onnx_file,
        options.trt_engine or Path(options.onnx_file).with_suffix(".engine"),
        options.tensorrt.calibration.cal_cache_file,
    )
    print(f"the same build with trtexec: {command}")
    try:
        require_tensorrt()
    except StackError as error:
        problem = error.problems[0]
        hint = f"{problem.hint}; or run the trtexec command above on a machine with TensorRT"
        raise StackError(Problem(problem.what, hint=hint)) from error
    with ExitStack() as stack:
        if options.trt_engine:
            target = Path(options.trt_engine)
            temporary = stack.enter_context(written_whole(target))
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            target = temporary = Path(folder) / "test.engine"
        build_and_verify(spec, signature, settings, calibration, temporary, target, session)


def build_and_verify(
    spec: ExperimentSpec,
    signature: GraphSignature,
    settings: BuilderSettings,
    calibration: Calibration | None,
    temporary: Path,
    target: Path,
    session: Session,
) -> None:
    """Build ``temporary`` and compare it with the graph; the report is written beside ``target``."""
    import onnx

    from ddetr_mm.deploy.onnx_export import graph_forward
    from ddetr_mm.deploy.parity import generated_images
    from ddetr_mm.deploy.plugin import plugin_nodes
    from ddetr_mm.deploy.tensorrt import build_engine, meta_file, verify_engine

    build_engine(signature.path, temporary, settings, calibration)
    graph = onnx.load(str(signature.path))
    images, images_from = test_images(spec, signature.input_size_hw, spec_normalisation(spec))
    report = verify_engine(
        temporary,
        graph_forward(signature.path, plugin=bool(plugin_nodes(graph))),
        settings,
        images or (lambda count: generated_images(count, signature.input_size_hw)),
        images_from=images_from,
        name=str(target),
        opset=max(entry.version for entry in graph.opset_import if not entry.domain),
    )
    log(report.summary())
    if not spec.gen_trt_engine.trt_engine:
        report.write(session.folder / "engine.parity.json")
        print("the engine builds and agrees; gen_trt_engine.trt_engine is null, so it was not kept")
        return
    report.write(target.with_name(f"{target.stem}.parity.json"))
    write_text_whole(meta_file(target), json.dumps(dict(signature.meta), indent=2) + "\n")
    print(f"written: {target}")


def engine_settings(
    spec: ExperimentSpec, signature: GraphSignature, *, quantized: tuple[str, ...] = ()
) -> BuilderSettings:
    """Return the builder's settings for the spec's ``gen_trt_engine`` section.

    Args:
        spec: the spec.
        signature: the graph to build from.
        quantized: formats of the graph's Q/DQ nodes.
    """
    from ddetr_mm.deploy.tensorrt import builder_settings

    options = spec.gen_trt_engine
    tensorrt = options.tensorrt
    return builder_settings(
        signature,
        data_type=tensorrt.data_type,
        workspace_mib=tensorrt.workspace_size,
        batches=(tensorrt.min_batch_size, tensorrt.opt_batch_size, tensorrt.max_batch_size),
        layers_precision=tensorrt.layers_precision or (),
        timing_cache=options.timing_cache,
        verbose=options.verbose,
        quantized=quantized,
    )


def engine_calibration(spec: ExperimentSpec, signature: GraphSignature) -> Calibration:
    """Return the calibration of the spec, with its images checked."""
    from ddetr_mm.deploy.tensorrt import plan_calibration

    settings = spec.gen_trt_engine.tensorrt.calibration
    return plan_calibration(
        settings.cal_image_dir,
        batch_size=settings.cal_batch_size,
        batches=settings.cal_batches,
        cache_file=settings.cal_cache_file,
        fixed_batch=signature.batch_size,
        size_hw=signature.input_size_hw,
        normalisation=spec_normalisation(spec),
    )
