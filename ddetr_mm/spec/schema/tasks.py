"""The ``evaluate``, ``inference`` and ``export`` sections."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.common import DistributedTask
from ddetr_mm.spec.schema.fields import spec_field


@dataclass
class EvaluateConfig(DistributedTask):
    """COCO metrics of a checkpoint on dataset.test_data_sources."""

    checkpoint: str | None = spec_field(None, placeholder=True, doc="Checkpoint (or .onnx file) to evaluate.")
    trt_engine: str | None = spec_field(
        None, doc="TensorRT engine to evaluate in place of the checkpoint; null: none."
    )
    results_dir: str | None = spec_field(
        None, doc="Folder for the results of evaluate; null: results_dir/evaluate."
    )
    batch_size: int = spec_field(-1, ge=-1, doc="Images per step; -1: dataset.batch_size.")
    input_width: int | None = spec_field(None, ge=1, doc="Width of the network's input, in pixels.")
    input_height: int | None = spec_field(None, ge=1, doc="Height of the network's input, in pixels.")
    conf_threshold: float = spec_field(
        0.0, ge=0.0, doc="Predictions with a score below this (0..1) are left out; 0: all count."
    )


@dataclass
class InferenceConfig(DistributedTask):
    """Detections on dataset.infer_data_sources, as drawings and KITTI label files."""

    checkpoint: str | None = spec_field(None, placeholder=True, doc="Checkpoint (or .onnx file) to run.")
    trt_engine: str | None = spec_field(
        None, doc="TensorRT engine to run in place of the checkpoint; null: none."
    )
    results_dir: str | None = spec_field(
        None, doc="Folder for the results of inference; null: results_dir/inference."
    )
    batch_size: int = spec_field(-1, ge=-1, doc="Images per step; -1: dataset.batch_size.")
    color_map: dict[str, str] | None = spec_field(
        None,
        doc="""Colour of the boxes by class name (person: red). Boxes of a class that is not listed are
        written to the label files, not drawn. null: every class gets a colour.""",
    )
    conf_threshold: float = spec_field(
        0.5, ge=0.0, doc="Predictions with a score below this (0..1) are left out."
    )
    is_internal: bool = spec_field(
        False, doc="Write into one sub-folder per folder two levels above the image."
    )
    input_width: int | None = spec_field(
        None,
        ge=32,
        doc="""Width images are stretched to, in pixels; acts together with input_height. null: the
        ratio of the sides is kept.""",
    )
    input_height: int | None = spec_field(
        None, ge=32, doc="Height images are stretched to, in pixels; see input_width."
    )
    outline_width: int = spec_field(3, ge=1, doc="Thickness of the drawn boxes, in pixels.")


@dataclass
class ExportConfig:
    """An ONNX file from a checkpoint."""

    results_dir: str | None = spec_field(None, doc="Folder for the log of export; null: results_dir/export.")
    gpu_id: int = spec_field(0, ge=0, doc="Index of the GPU to use, if there is one.")
    checkpoint: str | None = spec_field(None, placeholder=True, doc="Checkpoint to export.")
    onnx_file: str | None = spec_field(None, placeholder=True, doc="Path of the .onnx file to write.")
    on_cpu: bool = spec_field(
        True,
        doc="""Form of deformable attention. true: standard ONNX operators only (GridSample; opset raised to
        16 or more); false: a node of TensorRT's plugin.""",
    )
    input_channel: int = spec_field(
        3, ge=1, options=(1, 3), doc="Channels of the input; the network takes 3."
    )
    input_width: int = spec_field(960, ge=1, doc="Width of the input, in pixels; fixed in the graph.")
    input_height: int = spec_field(544, ge=1, doc="Height of the input, in pixels; fixed in the graph.")
    opset_version: int = spec_field(12, ge=1, doc="ONNX operator set; below 16, on_cpu raises it to 17.")
    batch_size: int | None = spec_field(
        -1, ge=-1, doc="Batch size fixed in the graph; -1 or null: any, decided at run time."
    )
    verbose: bool = spec_field(False, doc="Print the exporter's own messages.")
    format: str = spec_field("onnx", options=("onnx", "xdl"), doc="Format of the file; onnx is written.")
    serialize_nvdsinfer: bool = spec_field(
        False, doc="Write labels.txt and nvdsinfer_config.yaml for DeepStream next to the file."
    )
