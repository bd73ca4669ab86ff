"""The ``quantize`` section, which the reference has a schema for but no subtask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddetr_mm.spec.schema.fields import spec_field


@dataclass
class TensorQuantizationConfig:
    """How one kind of tensor is quantized."""

    dtype: str = spec_field("", doc="Number format, for example int8.")
    observer_or_fake_quant: str = spec_field("", doc="Name of the observer that finds the range.")
    quant_axis: int | None = spec_field(
        None, doc="Axis that gets a scale of its own per index; null: one scale for the tensor."
    )
    observer_or_fake_quant_kwargs: dict[str, Any] | None = spec_field({}, doc="Arguments of the observer.")


@dataclass
class LayerQuantizationConfig:
    """How the layers of one name are quantized."""

    module_name: str = spec_field("", doc="Name, or pattern of names, of the layers.")
    weights: TensorQuantizationConfig | None = spec_field(None, doc="Their weights; null: not.")
    activations: TensorQuantizationConfig | None = spec_field(None, doc="Their activations; null: not.")


@dataclass
class QuantizeConfig:
    """Quantization after training; accepted for the reference's sake, nothing here acts."""

    backend: str | None = spec_field(
        "torchao",
        options=("modelopt.pytorch", "torchao", "modelopt.onnx"),
        doc="Library that quantizes.",
    )
    mode: str | None = spec_field(
        "weight_only_ptq", options=("static_ptq", "weight_only_ptq"), doc="What is quantized."
    )
    algorithm: str | None = spec_field(
        "minmax",
        options=("minmax", "max", "entropy", "awq_clip", "awq_lite", "awq_full", "rtn_dq"),
        doc="How ranges are found.",
    )
    layers: list[LayerQuantizationConfig] | None = spec_field([], doc="Settings for single layers.")
    skip_names: list[str] | None = spec_field([], doc="Layers that stay as they are.")
    model_path: str | None = spec_field("", doc="Model to quantize.")
    results_dir: str | None = spec_field("", doc="Folder for the quantized model.")
    backend_kwargs: dict[str, Any] | None = spec_field({}, doc="Arguments of the library.")
    device: str = spec_field(
        "cuda",
        pattern=r"cuda|cpu|trt|cuda:[0-9]+",
        pattern_words="cuda, cpu, trt or cuda:N",
        doc="Where quantization runs.",
    )
