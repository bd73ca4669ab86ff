"""Build, check and run TensorRT engines.

Sections: settings of a build (and the same as a ``trtexec`` command line), INT8 calibration images, engines
at run time, the build itself and the comparison of an engine with its ONNX graph. The first two need no
TensorRT; ``tensorrt`` is imported where it is used.
"""

from __future__ import annotations

import fnmatch
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ddetr_mm.deploy.onnx_file import OUTPUT_NAMES, GraphSignature, Normalisation, load_batch
from ddetr_mm.deploy.parity import Forward, ParityReport, compare_batches
from ddetr_mm.errors import DataError, ExportError, Problem, StackError, WeightsError
from ddetr_mm.files import parse_json, written_whole

# --- Settings of a build ---

MIB = 1 << 20
PRECISIONS = ("fp32", "fp16", "int8")
TOLERANCES = {"fp32": (0.05, 0.005), "fp16": (0.5, 0.03), "int8": (4.0, 0.5)}
"""Accepted differences of logits and boxes from the ONNX graph; fp32 allows for TF32."""
LEAST_AGREEMENT = {"fp32": 0.95, "fp16": 0.8, "int8": 0.5}
"""Smallest accepted share of the best 100 detections that engine and graph have in common."""


@dataclass(frozen=True)
class BatchProfile:
    """Minimum, optimum and maximum batch of an engine."""

    minimum: int
    optimum: int
    maximum: int

    def shapes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int, int, int], ...]:
        """Return the three input shapes (B, 3, H, W)."""
        return tuple((batch, 3, *size_hw) for batch in (self.minimum, self.optimum, self.maximum))


@dataclass(frozen=True)
class LayerPrecision:
    """A precision for the layers whose names match a pattern (``*`` matches anything)."""

    pattern: str
    precision: str

    def matches(self, layer_name: str) -> bool:
        """Return whether a layer's name matches."""
        return fnmatch.fnmatchcase(layer_name, self.pattern)


@dataclass(frozen=True)
class BuilderSettings:
    """Everything that a build depends on.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``; int8 allows fp16 too, as in TAO.
        input_size_hw: the graph's input.
        profile: batch sizes; all three are equal for a graph of fixed batch.
        dynamic_batch: whether the graph takes any batch, so that the engine needs the profile.
        workspace_bytes: memory limit of a tactic; 0 for TensorRT's default.
        layers: precisions of single layers; the first match counts.
        timing_cache: file of timings, read and updated, or None.
        verbose: print TensorRT's own messages.
        quantized: formats of the graph's Q/DQ nodes, see :func:`.onnx_file.q_dq_formats`; they have
            their ranges, so that nothing is calibrated.
    """

    precision: str
    input_size_hw: tuple[int, int]
    profile: BatchProfile
    dynamic_batch: bool
    workspace_bytes: int = 0
    layers: tuple[LayerPrecision, ...] = ()
    timing_cache: Path | None = None
    verbose: bool = False
    quantized: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether int8 ranges must be found from images."""
        return self.precision == "int8" and not self.quantized

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's builder flags."""
        flags = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}[self.precision]
        flags = (*(name for name in self.quantized if name not in flags), *flags)
        wanted = {layer.precision for layer in self.layers}
        flags += tuple(
            name.upper() for name in ("fp16", "int8") if name in wanted and name.upper() not in flags
        )
        return (*flags, "PREFER_PRECISION_CONSTRAINTS") if self.effective_layers else flags

    @property
    def effective_layers(self) -> tuple[LayerPrecision, ...]:
        """The layer precisions that have an effect: none in an fp32 engine."""
        return () if self.precision == "fp32" else self.layers

    def layer_precision(self, layer_name: str) -> str | None:
        """Return the precision requested for a layer, or None."""
        return next((layer.precision for layer in self.effective_layers if layer.matches(layer_name)), None)


def builder_settings(
    signature: GraphSignature,
    *,
    data_type: str,
    workspace_mib: int,
    batches: tuple[int, int, int],
    layers_precision: Sequence[str] = (),
    timing_cache: str | None = None,
    verbose: bool = False,
    quantized: tuple[str, ...] = (),
) -> BuilderSettings:
    """Return the settings for a spec's values.

    Args:
        signature: the graph to build from.
        data_type: FP32, FP16 or INT8, any case.
        workspace_mib: memory limit of a tactic in MiB. (TAO rounds it down to whole GiB, so that less than
            1024 becomes 0.)
        batches: minimum, optimum and maximum batch; a graph of fixed batch overrides them.
        layers_precision: ``name:precision`` each.
        timing_cache: path or None.
        verbose: print TensorRT's messages.
        quantized: formats of the graph's Q/DQ nodes.

    Raises:
        ExportError: unknown precision, or batches out of order.
    """
    precision = data_type.lower()
    if precision not in PRECISIONS:
        where = "gen_trt_engine.tensorrt.data_type"
        raise ExportError(Problem("is not a precision", where=where, value=data_type, allowed=PRECISIONS))
    if signature.batch_size is not None:
        batches = (signature.batch_size,) * 3
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise ExportError(
            Problem(
                "batch sizes are out of order",
                where="gen_trt_engine.tensorrt.{min,opt,max}_batch_size",
                value=batches,
                allowed="min <= opt <= max, all at least 1",
            )
        )
    return BuilderSettings(
        precision=precision,
        input_size_hw=signature.input_size_hw,
        profile=BatchProfile(*batches),
        dynamic_batch=signature.batch_size is None,
        workspace_bytes=workspace_mib * MIB,
        layers=tuple(parse_layer(text) for text in layers_precision),
        timing_cache=Path(timing_cache) if timing_cache else None,
        verbose=verbose,
        quantized=quantized,
    )


def parse_layer(text: str) -> LayerPrecision:
    """Parse ``name:precision``; the name may hold colons.

    Raises:
        ExportError: the text has another form.
    """
    pattern, _, precision = text.rpartition(":")
    if not pattern or precision.lower() not in PRECISIONS:
        where = "gen_trt_engine.tensorrt.layers_precision"
        raise ExportError(
            Problem("is not a layer precision", where=where, value=text, allowed="name:fp32, *:fp16 …")
        )
    return LayerPrecision(pattern, precision.lower())


def trtexec_command(
    settings: BuilderSettings,
    onnx_file: str | Path,
    engine_file: str | Path,
    calibration_cache: str | None = None,
) -> str:
    """Return the ``trtexec`` command line of the same build, for another machine.

    trtexec reads a calibration cache but cannot create one from images.
    """
    words = ["trtexec", f"--onnx={onnx_file}", f"--saveEngine={engine_file}"]
    if settings.workspace_bytes:
        words.append(f"--memPoolSize=workspace:{settings.workspace_bytes // MIB}M")
    if settings.dynamic_batch:
        for name, shape in zip(
            ("min", "opt", "max"), settings.profile.shapes(settings.input_size_hw), strict=True
        ):
            words.append(f"--{name}Shapes=inputs:{'x'.join(str(size) for size in shape)}")
    words += [f"--{flag.lower()}" for flag in settings.flags if not flag.startswith("PREFER")]
    if settings.needs_calibration and calibration_cache:
        words.append(f"--calib={calibration_cache}")
    if settings.effective_layers:
        pairs = ",".join(f"{layer.pattern}:{layer.precision}" for layer in settings.effective_layers)
        words += ["--precisionConstraints=prefer", f"--layerPrecisions={pairs}"]
    if settings.timing_cache:
        words.append(f"--timingCacheFile={settings.timing_cache}")
    if settings.verbose:
        words.append("--verbose")
    return shlex.join(words)


# --- INT8 calibration ---

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".JPEG", ".JPG", ".PNG")
WHERE = "gen_trt_engine.tensorrt.calibration"


def calibration_images(folders: Sequence[str | Path], *, at_least: int, seed: int = 0) -> list[Path]:
    """List all images below the folders, shuffled reproducibly.

    Args:
        folders: searched to any depth.
        at_least: images that the calibration needs.
        seed: of the shuffle.

    Raises:
        DataError: a folder is missing or empty, or there are too few images.
    """
    where = f"{WHERE}.cal_image_dir"
    if not folders:
        raise DataError(
            Problem("is not given", where=where, hint="give folders with images like those of training")
        )
    found: set[Path] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(Problem("is not a folder", file=folder, where=where))
        here = {path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
        if not here:
            raise DataError(Problem("holds no images", file=folder, where=where, allowed=SUFFIXES))
        found |= here
    if len(found) < at_least:
        raise DataError(
            Problem(
                "has fewer images than cal_batches * cal_batch_size",
                where=where,
                value=len(found),
                allowed=f"{at_least} or more",
            )
        )
    paths = sorted(found)
    random.Random(seed).shuffle(paths)  # noqa: S311 - an order, no secret
    return paths


@dataclass
class Calibration:
    """The images and the cache file of a calibration.

    Attributes:
        paths: shuffled image files.
        batch_size: images in a batch.
        batches: number of batches.
        cache_file: read if it exists, else written; or None.
        size_hw: the graph's input.
        normalisation: that of training.
    """

    paths: Sequence[Path]
    batch_size: int
    batches: int
    cache_file: Path | None
    size_hw: tuple[int, int]
    normalisation: Normalisation

    @property
    def uses_cache(self) -> bool:
        """Whether the cache exists, so that no image is read."""
        return self.cache_file is not None and self.cache_file.is_file()

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield the batches (B, 3, H, W), float32; none with a cache.

        Raises:
            DataError: an image cannot be read.
        """
        if self.uses_cache:
            return
        for start in range(0, self.batches * self.batch_size, self.batch_size):
            paths = self.paths[start : start + self.batch_size]
            yield load_batch(paths, self.size_hw, self.normalisation)

    def read_cache(self) -> bytes | None:
        """Return the cache's content, or None without one."""
        return self.cache_file.read_bytes() if self.cache_file is not None and self.uses_cache else None

    def write_cache(self, content: bytes) -> None:
        """Write the result of the calibration; an existing cache is not replaced."""
        if self.cache_file is not None and not self.uses_cache:
            with written_whole(self.cache_file) as temporary:
                temporary.write_bytes(bytes(content))


def plan_calibration(
    folders: Sequence[str],
    *,
    batch_size: int,
    batches: int,
    cache_file: str | None,
    fixed_batch: int | None,
    size_hw: tuple[int, int],
    normalisation: Normalisation,
) -> Calibration:
    """Check the images and batch sizes of a calibration; with a cache too, as TAO does.

    Args:
        folders: ``cal_image_dir``.
        batch_size: ``cal_batch_size``; overridden by ``fixed_batch``.
        batches: ``cal_batches``.
        cache_file: ``cal_cache_file``.
        fixed_batch: the graph's batch, or None.
        size_hw: the graph's input.
        normalisation: that of training.

    Raises:
        DataError: see :func:`calibration_images`; or a count is below 1.
    """
    for name, value in (("cal_batch_size", batch_size), ("cal_batches", batches)):
        if value < 1:
            raise DataError(Problem("must be at least 1", where=f"{WHERE}.{name}", value=value))
    size = fixed_batch or batch_size
    paths = calibration_images(folders, at_least=size * batches)
    return Calibration(paths, size, batches, Path(cache_file) if cache_file else None, size_hw, normalisation)


# --- Engines at run time ---

INSTALL = "pip install tensorrt (with the libraries for your CUDA version), on a machine with an NVIDIA GPU"


def require_tensorrt() -> ModuleType:
    """Import the ``tensorrt`` package.

    Raises:
        StackError: it cannot be imported, or there is no GPU.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise StackError(Problem("TensorRT is not installed here", hint=INSTALL)) from error
    import torch

    if not torch.cuda.is_available():
        raise StackError(Problem("TensorRT needs a CUDA GPU, and torch sees none", hint="check `nvidia-smi`"))
    return tensorrt


def meta_file(engine_file: str | Path) -> Path:
    """Return the path of an engine's metadata, a file beside it: an engine cannot hold any."""
    path = Path(engine_file)
    return path.with_name(f"{path.name}.json")


def read_engine_meta(engine_file: str | Path) -> dict[str, Any]:
    """Read :func:`meta_file`; empty where it does not exist.

    Raises:
        WeightsError: the file cannot be read.
    """
    path = meta_file(engine_file)
    if not path.is_file():
        return {}
    try:
        meta = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(Problem(f"cannot be read: {error}", file=path)) from error
    return meta if isinstance(meta, dict) else {}


class EngineRunner:
    """A loaded engine as a function, run by ``execute_async_v3`` on buffers of torch.

    Args:
        engine_file: built by this package, TAO or ``trtexec``.
        where: the spec key that named it, for messages.

    Raises:
        StackError: TensorRT or a GPU is missing.
        WeightsError: TensorRT cannot load the file, or it has other inputs and outputs.
    """

    def __init__(self, engine_file: str | Path, *, where: str | None = None) -> None:
        import torch

        trt = require_tensorrt()
        logger = trt.Logger(trt.Logger.WARNING)
        trt.init_libnvinfer_plugins(logger, "")
        path = Path(engine_file)
        self.engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise WeightsError(
                Problem(
                    "TensorRT cannot load the engine: it was built by another version or for another GPU",
                    file=path,
                    where=where,
                    hint="build it here with `ddetr-mm gen_trt_engine`",
                )
            )
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        if sorted(names) != sorted(("inputs", *OUTPUT_NAMES)):
            raise WeightsError(
                Problem("is not an engine of a Deformable DETR", file=path, where=where, value=sorted(names))
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        shape = tuple(self.engine.get_tensor_shape("inputs"))
        largest = tuple(self.engine.get_tensor_profile_shape("inputs", 0)[2])
        classes = tuple(self.engine.get_tensor_shape("pred_logits"))[2]
        self.signature = GraphSignature(
            path=path,
            input_size_hw=(shape[2], shape[3]),
            batch_size=shape[0] if shape[0] > 0 else None,
            num_queries=None,
            num_classes=classes if classes > 0 else None,
            meta=read_engine_meta(path),
            max_batch_size=int(largest[0]),
        )

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run on normalised images (B, 3, H, W), float32; returns logits (B, Q, C), boxes_cxcywh (B, Q, 4).

        Raises:
            WeightsError: the engine does not take this batch size, or fails.
        """
        import torch

        with torch.cuda.stream(self.stream):
            tensors = {"inputs": torch.from_numpy(np.ascontiguousarray(images)).cuda()}
            if not self.context.set_input_shape("inputs", tuple(images.shape)):
                raise WeightsError(
                    Problem(
                        "the engine does not take this batch", file=self.signature.path, value=images.shape
                    )
                )
            for name in OUTPUT_NAMES:
                shape = tuple(self.context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=torch.float32, device="cuda")
            for name, tensor in tensors.items():
                self.context.set_tensor_address(name, tensor.data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise WeightsError(Problem("TensorRT failed to run the engine", file=self.signature.path))
        self.stream.synchronize()
        logits, boxes_cxcywh = (tensors[name].cpu().numpy() for name in OUTPUT_NAMES)
        return logits, boxes_cxcywh


def read_engine_signature(engine_file: str | Path, *, where: str | None = None) -> GraphSignature:
    """Load an engine and return its signature; raises as :class:`EngineRunner` does."""
    return EngineRunner(engine_file, where=where).signature


# --- Building and comparing an engine ---


def build_engine(
    onnx_file: str | Path,
    engine_file: str | Path,
    settings: BuilderSettings,
    calibration: Calibration | None = None,
) -> None:
    """Build an engine and write it to a file.

    Args:
        onnx_file: the graph.
        engine_file: written in place, so give a temporary name.
        settings: see the class.
        calibration: for int8.

    Raises:
        StackError: TensorRT or a GPU is missing, or this TensorRT lacks what the settings need.
        ExportError: TensorRT cannot read the graph or build the engine.
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
        if flag in settings.quantized and not hasattr(trt.BuilderFlag, flag):
            continue  # TensorRT 11 reads formats from the Q/DQ nodes, earlier ones need the flag too
        config.set_flag(builder_flag(trt, flag))
    if settings.dynamic_batch:
        profile = builder.create_optimization_profile()
        profile.set_shape("inputs", *settings.profile.shapes(settings.input_size_hw))
        config.add_optimization_profile(profile)
    if settings.needs_calibration:
        config.int8_calibrator = make_calibrator(trt, calibration)
        if settings.dynamic_batch:
            # TensorRT calibrates with this profile's optimum batch, which must be the calibrator's.
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
                hint="try more gen_trt_engine.tensorrt.workspace_size, or gen_trt_engine.verbose=true",
            )
        )
    Path(engine_file).write_bytes(bytes(plan))
    save_timing_cache(config, timings, settings.timing_cache)


QUANTIZE_HINT = (
    "quantize the graph (ddetr-mm quantize with backend modelopt.onnx, or onnxruntime with backend_kwargs"
    " {symmetric: true}) and build the Q/DQ file with data_type FP32"
)
"""What to do for an INT8 engine where TensorRT has no INT8 flag, from release 11 on."""


def builder_flag(trt: ModuleType, name: str) -> Any:
    """Return one of TensorRT's builder flags.

    Raises:
        StackError: this TensorRT has replaced it by typed networks.
    """
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise StackError(
            Problem(
                f"TensorRT {trt.__version__} has no {name} flag: it takes precisions from the graph",
                where="gen_trt_engine.tensorrt.data_type",
                hint=QUANTIZE_HINT
                if name == "INT8"
                else "export with ddetr_mm.export_fp16=true and build the .fp16.onnx with data_type FP32",
            )
        )
    return flag


def set_layer_precisions(trt: ModuleType, network: Any, settings: BuilderSettings) -> None:
    """Set the requested precisions of floating-point layers."""
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
    """Write the timings, including those of this build."""
    if path is not None and cache is not None:
        with written_whole(path) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def make_calibrator(trt: ModuleType, calibration: Calibration | None) -> Any:
    """Return TensorRT's entropy calibrator for a :class:`Calibration`.

    Raises:
        StackError: this TensorRT has no calibrators.
        ExportError: no calibration is given.
    """
    if calibration is None:
        raise ExportError(
            Problem("int8 needs calibration images", where="gen_trt_engine.tensorrt.calibration")
        )
    base = getattr(trt, "IInt8EntropyCalibrator2", None)
    if base is None:
        raise StackError(Problem(f"TensorRT {trt.__version__} has no INT8 calibration", hint=QUANTIZE_HINT))
    import torch

    class Calibrator(base):  # type: ignore[misc, valid-type]
        """Gives TensorRT the batches; keeps the memory of the last one until the next."""

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
    images_from: str,
    name: str,
    opset: int,
) -> ParityReport:
    """Compare an engine with its ONNX graph at every batch size of the profile.

    Args:
        engine_file: the engine.
        expected: the graph as a function.
        settings: those of the build, which set the tolerance.
        make_images: batch size → images (B, 3, H, W).
        images_from: where the images come from, for the report.
        name: the file's final name, for the report.
        opset: the graph's.

    Raises:
        ExportError: a difference is beyond the tolerance.
    """
    report = engine_report(settings, name=name, opset=opset, images_from=images_from)
    profile = settings.profile
    sizes = sorted({profile.minimum, profile.optimum, profile.maximum})
    compare_batches(report, [make_images(size) for size in sizes], expected, EngineRunner(engine_file))
    report.require()
    return report


def engine_report(settings: BuilderSettings, *, name: str, opset: int, images_from: str) -> ParityReport:
    """Return an empty report with the tolerances of the engine's precision."""
    # Rounding to int8 differs between runtimes, whatever the precision of the other layers.
    compared = "int8" if settings.quantized else settings.precision
    tolerance_logits, tolerance_boxes = TOLERANCES[compared]
    return ParityReport(
        onnx_file=name,
        runtime=f"TensorRT, {settings.precision}",
        opset=opset,
        num_nodes=0,
        input_size_hw=settings.input_size_hw,
        tolerance_logits=tolerance_logits,
        tolerance_boxes=tolerance_boxes,
        images=images_from,
        least_agreement=LEAST_AGREEMENT[compared],
        reference="the ONNX graph",
    )
