"""Building a TensorRT engine and proving that it computes what its ONNX graph computes.

All decisions stand in :class:`~ddetr_mm.deploy.tensorrt_settings.BuilderSettings`; this module hands them to
TensorRT and is the only one that builds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ddetr_mm.deploy.calibration import Calibration
from ddetr_mm.deploy.parity import Forward, ParityReport, compare_batches
from ddetr_mm.deploy.tensorrt_engine import EngineRunner, require_tensorrt
from ddetr_mm.deploy.tensorrt_settings import LEAST_AGREEMENT, TOLERANCES, BuilderSettings
from ddetr_mm.errors import ExportError, Problem, StackError
from ddetr_mm.files import written_whole


def build_engine(
    onnx_file: str | Path,
    engine_file: str | Path,
    settings: BuilderSettings,
    calibration: Calibration | None = None,
) -> None:
    """Build an engine and write it to a file.

    Args:
        onnx_file: the graph.
        engine_file: written in place; give a temporary name.
        settings: see the class.
        calibration: for int8.

    Raises:
        StackError: without TensorRT or GPU, or when this TensorRT lacks what the settings ask for.
        ExportError: when TensorRT cannot read the graph or build the engine.
    """
    trt = require_tensorrt()
    logger = trt.Logger(trt.Logger.VERBOSE if settings.verbose else trt.Logger.WARNING)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ExportError(Problem(f"TensorRT cannot read the graph: {reasons}", file=onnx_file))
    config = builder.create_builder_config()
    if settings.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    for flag in settings.flags:
        config.set_flag(builder_flag(trt, flag))
    if settings.dynamic_batch:
        profile = builder.create_optimization_profile()
        profile.set_shape("inputs", *settings.profile.shapes(settings.input_size_hw))
        config.add_optimization_profile(profile)
    if settings.precision == "int8":
        config.int8_calibrator = make_calibrator(trt, calibration)
        if settings.dynamic_batch:
            # TensorRT feeds the calibrator with this profile's tuned batch, which must be the calibrator's.
            profile = builder.create_optimization_profile()
            batch = (calibration.batch_size, 3, *settings.input_size_hw)
            profile.set_shape("inputs", batch, batch, batch)
            config.set_calibration_profile(profile)
    set_layer_precisions(trt, network, settings)
    timings = load_timing_cache(config, settings.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            Problem(
                "TensorRT could not build the engine; its messages are above",
                file=onnx_file,
                mend="try more gen_trt_engine.tensorrt.workspace_size, or gen_trt_engine.verbose=true",
            )
        )
    Path(engine_file).write_bytes(bytes(plan))
    save_timing_cache(config, timings, settings.timing_cache)


def builder_flag(trt: ModuleType, name: str) -> Any:
    """One of TensorRT's builder flags.

    Raises:
        StackError: when this TensorRT has dropped it in favour of typed networks.
    """
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise StackError(
            Problem(
                f"TensorRT {trt.__version__} has no {name} flag: it takes precisions from the graph",
                where="gen_trt_engine.tensorrt.data_type",
                mend="export with ddetr_mm.export_fp16=true and build the .fp16.onnx with data_type FP32",
            )
        )
    return flag


def set_layer_precisions(trt: ModuleType, network: Any, settings: BuilderSettings) -> None:
    """Give layers the precisions that the settings name; layers of integers stay as they are."""
    types = {"fp32": trt.float32, "fp16": trt.float16, "int8": trt.int8}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        precision = settings.layer_precision(layer.name)
        floating = layer.num_outputs and layer.get_output(0).dtype in (trt.float32, trt.float16)
        if precision is not None and floating:
            layer.precision = types[precision]


def load_timing_cache(config: Any, path: Path | None) -> Any:
    """Give the builder the timings of earlier builds; returns the cache, or None without a path."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def save_timing_cache(config: Any, cache: Any, path: Path | None) -> None:
    """Write the timings back, this build's included."""
    if path is not None and cache is not None:
        with written_whole(path) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def make_calibrator(trt: ModuleType, calibration: Calibration | None) -> Any:
    """TensorRT's entropy calibrator over a :class:`Calibration`.

    Raises:
        StackError: when this TensorRT has no calibrators any more.
        ExportError: without a calibration.
    """
    if calibration is None:
        raise ExportError(
            Problem("int8 needs calibration images", where="gen_trt_engine.tensorrt.calibration")
        )
    base = getattr(trt, "IInt8EntropyCalibrator2", None)
    if base is None:
        raise StackError(
            Problem(f"TensorRT {trt.__version__} has no INT8 calibration", mend="use TensorRT 10")
        )
    import torch

    class Calibrator(base):  # type: ignore[misc, valid-type]
        """Feeds the batches; the memory of the last one stays alive until the next."""

        def __init__(self) -> None:
            super().__init__()
            self.batches = calibration.arrays()
            self.held: torch.Tensor | None = None

        def get_batch_size(self) -> int:
            return calibration.batch_size

        def get_batch(self, names: list[str]) -> list[int] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            self.held = torch.from_numpy(batch).cuda().contiguous()
            return [self.held.data_ptr()]

        def read_calibration_cache(self) -> bytes | None:
            return calibration.read_cache()

        def write_calibration_cache(self, cache: bytes) -> None:
            calibration.write_cache(cache)

    return Calibrator()


def verify_engine(
    engine_file: str | Path,
    expected: Forward,
    settings: BuilderSettings,
    make_images: Callable[[int], Any],
    *,
    images_are: str,
    name: str,
    opset: int,
) -> ParityReport:
    """Compare an engine with its ONNX graph (itself proven against PyTorch) at every batch of the profile.

    Args:
        engine_file: the engine.
        expected: the graph, run without TensorRT.
        settings: what it was built with; they decide the tolerance.
        make_images: batch size → images (B, 3, H, W).
        images_are: a word on where the images come from.
        name: the file's final name, for the report.
        opset: the graph's.

    Raises:
        ExportError: when the engine disagrees.
    """
    report = engine_report(settings, name=name, opset=opset, images_are=images_are)
    profile = settings.profile
    sizes = sorted({profile.smallest, profile.tuned, profile.largest})
    compare_batches(report, [make_images(size) for size in sizes], expected, EngineRunner(engine_file))
    report.require()
    return report


def engine_report(settings: BuilderSettings, *, name: str, opset: int, images_are: str) -> ParityReport:
    """An empty report with the tolerances of the engine's precision."""
    tolerance_logits, tolerance_boxes = TOLERANCES[settings.precision]
    return ParityReport(
        onnx_file=name,
        runtime=f"TensorRT, {settings.precision}",
        opset=opset,
        num_nodes=0,
        input_size_hw=settings.input_size_hw,
        tolerance_logits=tolerance_logits,
        tolerance_boxes=tolerance_boxes,
        images=images_are,
        least_agreement=LEAST_AGREEMENT[settings.precision],
        reference="the ONNX graph",
    )
