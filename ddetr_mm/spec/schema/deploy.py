"""The ``gen_trt_engine`` section."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.fields import REFERENCE_5_1, section, spec_field


@dataclass
class CalibrationConfig:
    """Calibration of an INT8 engine; the fields act only with data_type: INT8."""

    cal_image_dir: list[str] = spec_field(
        [],
        single=True,
        placeholder=True,
        doc="Folders searched, with all below them, for calibration images.",
    )
    cal_cache_file: str | None = spec_field(
        None,
        placeholder=True,
        doc="Calibration cache: used if the file is there, written otherwise.",
    )
    cal_batch_size: int = spec_field(1, ge=1, doc="Images per calibration batch.")
    cal_batches: int = spec_field(1, ge=1, doc="Number of calibration batches.")


@dataclass
class TensorrtConfig:
    """How TensorRT builds the engine."""

    workspace_size: int = spec_field(1024, ge=0, doc="Most memory a TensorRT tactic may use, in MiB.")
    min_batch_size: int = spec_field(
        1, ge=1, doc="Smallest batch the engine takes; acts for an ONNX file of dynamic batch."
    )
    opt_batch_size: int = spec_field(1, ge=1, doc="Batch the engine is tuned for.")
    max_batch_size: int = spec_field(1, ge=1, doc="Largest batch the engine takes.")
    layers_precision: list[str] | None = spec_field(
        [],
        pattern=r"(?i).+:(fp32|fp16|int8)",
        pattern_words="layer:precision, as in name:fp32 or *:fp16",
        doc="Precision of single layers, each as layer:precision; * stands for any part of a name.",
    )
    data_type: str = spec_field("FP32", options=("FP32", "FP16", "INT8"), doc="Precision of the engine.")
    calibration: CalibrationConfig = section(CalibrationConfig)


@dataclass
class GenTrtEngineConfig:
    """A TensorRT engine from an ONNX file."""

    results_dir: str | None = spec_field(
        None, doc="Folder for the log and the parity report; null: results_dir/gen_trt_engine."
    )
    gpu_id: int = spec_field(0, ge=0, doc="Index of the GPU the engine is built on and for.")
    onnx_file: str | None = spec_field(None, placeholder=True, doc="The .onnx file to build from.")
    trt_engine: str | None = spec_field(
        None, doc="Path of the engine to write; null: a temporary file, which only proves the build."
    )
    timing_cache: str | None = spec_field(
        None, doc="File in which TensorRT keeps its timings from one build to the next; null: none."
    )
    batch_size: int = spec_field(-1, ge=-1, doc="Batch size of the ONNX file, which overrules it; -1: any.")
    verbose: bool = spec_field(False, doc="Print TensorRT's own messages.")
    tensorrt: TensorrtConfig = section(TensorrtConfig)
    input_channel: int = spec_field(3, origin=REFERENCE_5_1, doc="Channels of the input.")
    input_width: int = spec_field(960, origin=REFERENCE_5_1, doc="Width of the input, in pixels.")
    input_height: int = spec_field(544, origin=REFERENCE_5_1, doc="Height of the input, in pixels.")
    opset_version: int = spec_field(12, origin=REFERENCE_5_1, doc="ONNX operator set.")
