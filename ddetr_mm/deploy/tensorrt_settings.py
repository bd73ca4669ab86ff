"""What a TensorRT build is told, worked out without TensorRT, and the same as a command line."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.deploy.onnx_file import OnnxSignature
from ddetr_mm.errors import ExportError, Problem

MIB = 1 << 20
PRECISIONS = ("fp32", "fp16", "int8")
TOLERANCES = {"fp32": (0.05, 0.005), "fp16": (0.5, 0.03), "int8": (4.0, 0.5)}
"""Accepted differences of logits and boxes from the ONNX graph. fp32 leaves room for TF32."""
LEAST_AGREEMENT = {"fp32": 0.95, "fp16": 0.8, "int8": 0.5}
"""Least share of the best 100 detections that engine and graph must have in common."""


@dataclass(frozen=True)
class BatchProfile:
    """Smallest, tuned-for and largest batch of an engine."""

    smallest: int
    tuned: int
    largest: int

    def shapes(self, size_hw: tuple[int, int]) -> tuple[tuple[int, int, int, int], ...]:
        """The three input shapes (B, 3, H, W)."""
        smallest, tuned, largest = (
            (batch, 3, *size_hw) for batch in (self.smallest, self.tuned, self.largest)
        )
        return smallest, tuned, largest


@dataclass(frozen=True)
class LayerPrecision:
    """A precision for the layers whose names match a pattern (``*`` stands for anything)."""

    pattern: str
    precision: str

    def matches(self, layer_name: str) -> bool:
        """Whether a layer's name matches."""
        return fnmatch.fnmatchcase(layer_name, self.pattern)


@dataclass(frozen=True)
class BuilderSettings:
    """Everything a build is told.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``; int8 allows fp16 too, as the reference does.
        input_size_hw: the graph's input.
        profile: the batches; all three equal for a graph of fixed batch.
        dynamic_batch: whether the graph's batch is open, so that the engine needs the profile.
        workspace_bytes: most memory of a tactic; 0 leaves it to TensorRT.
        layers: precisions of single layers, the first match counts.
        timing_cache: file of timings, read and updated, or None.
        verbose: print TensorRT's own messages.
    """

    precision: str
    input_size_hw: tuple[int, int]
    profile: BatchProfile
    dynamic_batch: bool
    workspace_bytes: int = 0
    layers: tuple[LayerPrecision, ...] = ()
    timing_cache: Path | None = None
    verbose: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's builder flags."""
        flags = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}[self.precision]
        wanted = {layer.precision for layer in self.layers}
        flags += tuple(
            name.upper() for name in ("fp16", "int8") if name in wanted and name.upper() not in flags
        )
        return (*flags, "PREFER_PRECISION_CONSTRAINTS") if self.obeyed_layers else flags

    @property
    def obeyed_layers(self) -> tuple[LayerPrecision, ...]:
        """The layer precisions that act: an fp32 engine has nothing to be told apart."""
        return () if self.precision == "fp32" else self.layers

    def layer_precision(self, layer_name: str) -> str | None:
        """The precision asked for a layer, or None."""
        return next((layer.precision for layer in self.obeyed_layers if layer.matches(layer_name)), None)


def builder_settings(
    signature: OnnxSignature,
    *,
    data_type: str,
    workspace_mib: int,
    batches: tuple[int, int, int],
    layers_precision: Sequence[str] = (),
    timing_cache: str | None = None,
    verbose: bool = False,
) -> BuilderSettings:
    """Settings from a spec's values.

    Args:
        signature: the graph to build from.
        data_type: FP32, FP16 or INT8, any case.
        workspace_mib: memory of a tactic in MiB. (The reference divides it by 1024 to whole GiB, so that less
            than 1024 becomes nothing; here it is taken as it stands.)
        batches: smallest, tuned and largest batch; a graph of fixed batch overrules them.
        layers_precision: ``name:precision`` each.
        timing_cache: path or None.
        verbose: print TensorRT's messages.

    Raises:
        ExportError: for batches out of order, or another precision.
    """
    precision = data_type.lower()
    if precision not in PRECISIONS:
        where = "gen_trt_engine.tensorrt.data_type"
        raise ExportError(Problem("is no precision", where=where, value=data_type, allowed=PRECISIONS))
    if signature.batch_size is not None:
        batches = (signature.batch_size,) * 3
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise ExportError(
            Problem(
                "batches must not fall",
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
    )


def parse_layer(text: str) -> LayerPrecision:
    """``name:precision`` in parts; the name may hold colons.

    Raises:
        ExportError: for anything else.
    """
    pattern, _, precision = text.rpartition(":")
    if not pattern or precision.lower() not in PRECISIONS:
        where = "gen_trt_engine.tensorrt.layers_precision"
        raise ExportError(
            Problem("is no layer precision", where=where, value=text, allowed="name:fp32, *:fp16 …")
        )
    return LayerPrecision(pattern, precision.lower())


def trtexec_command(
    settings: BuilderSettings,
    onnx_file: str | Path,
    engine_file: str | Path,
    calibration_cache: str | None = None,
) -> str:
    """The same build as a ``trtexec`` command line, for another machine.

    trtexec reads a calibration cache and cannot make one from images.
    """
    words = ["trtexec", f"--onnx={onnx_file}", f"--saveEngine={engine_file}"]
    if settings.workspace_bytes:
        words.append(f"--memPoolSize=workspace:{settings.workspace_bytes // MIB}M")
    if settings.dynamic_batch:
        for name, shape in zip(
            ("min", "opt", "max"), settings.profile.shapes(settings.input_size_hw), strict=True
        ):
            words.append(f"--{name}Shapes=inputs:{'x'.join(str(size) for size in shape)}")
    words += [f"--{flag.lower()}" for flag in settings.flags if flag in ("FP16", "INT8")]
    if settings.precision == "int8" and calibration_cache:
        words.append(f"--calib={calibration_cache}")
    if settings.obeyed_layers:
        pairs = ",".join(f"{layer.pattern}:{layer.precision}" for layer in settings.obeyed_layers)
        words += ["--precisionConstraints=prefer", f"--layerPrecisions={pairs}"]
    if settings.timing_cache:
        words.append(f"--timingCacheFile={settings.timing_cache}")
    if settings.verbose:
        words.append("--verbose")
    return shlex.join(words)
