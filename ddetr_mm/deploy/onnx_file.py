"""Read and run exported graphs: signature, metadata, onnxruntime session, and images as graph inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddetr_mm.compat.versions import require
from ddetr_mm.datasets.images import read_image, resize_plain
from ddetr_mm.errors import ExportError, Problem, WeightsError
from ddetr_mm.files import parse_json

# --- Images as graph inputs ---


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of red, green and blue, for values of 0..255."""

    mean_rgb: tuple[float, float, float]
    std_rgb: tuple[float, float, float]

    def apply(self, image_rgb: np.ndarray) -> np.ndarray:
        """Normalise an image (H, W, 3) of 0..255; returns (3, H, W) float32."""
        mean, std = np.float32(self.mean_rgb), np.float32(self.std_rgb)
        return np.ascontiguousarray(((image_rgb.astype(np.float32) - mean) / std).transpose(2, 0, 1))


def load_batch(
    paths: Sequence[str | Path], size_hw: tuple[int, int], normalisation: Normalisation
) -> np.ndarray:
    """Read images as one array (B, 3, H, W), float32, resized without keeping their ratio as TAO does.

    Raises:
        DataError: a file cannot be read.
    """
    return np.stack([normalisation.apply(resize_plain(read_image(path), size_hw)) for path in paths])


def cycling_source(
    paths: Sequence[str | Path], size_hw: tuple[int, int], normalisation: Normalisation
) -> Callable[[int], np.ndarray]:
    """Return a function from a batch size to a batch: the first files, repeated where they are too few."""

    def take(count: int) -> np.ndarray:
        return load_batch([paths[index % len(paths)] for index in range(count)], size_hw, normalisation)

    return take


# --- Signature and metadata ---

OUTPUT_NAMES = ("pred_logits", "pred_boxes")
META_KEY = "ddetr_mm"
"""Metadata key of our files; its value is a JSON object of class names, mean and standard deviation."""


@dataclass(frozen=True)
class GraphSignature:
    """Inputs and outputs of an exported detector, an ONNX file or a TensorRT engine.

    Attributes:
        path: the file.
        input_size_hw: height and width in pixels.
        batch_size: the fixed batch, or None for any.
        num_queries: Q, where known.
        num_classes: class columns C, where known.
        meta: the file's metadata; empty for files of other exporters.
        max_batch_size: the largest batch of an engine.
    """

    path: Path
    input_size_hw: tuple[int, int]
    batch_size: int | None
    num_queries: int | None
    num_classes: int | None
    meta: Mapping[str, Any]
    max_batch_size: int | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """A name for every class column, where the metadata has them."""
        names = self.meta.get("class_names")
        return tuple(str(name) for name in names) if isinstance(names, list) and names else None


_OTHER_KINDS: dict[str, tuple[str, str]] = {
    ".etlt": (
        "is an .etlt file, which TAO encrypts by a closed scheme",
        "export the .pth that it was made from: ddetr-mm export",
    ),
    **dict.fromkeys(
        (".engine", ".trt", ".plan"), ("is a TensorRT engine", "name the .onnx file that it was built from")
    ),
    **dict.fromkeys(
        (".pth", ".pt", ".ckpt", ".safetensors"), ("is a checkpoint", "export it first: ddetr-mm export")
    ),
}
"""Problem and hint for a file that is no ONNX, by its ending."""


def read_signature(path: str | Path, *, where: str | None = None) -> GraphSignature:
    """Read the signature of a Deformable DETR's ONNX file.

    Args:
        path: a file exported by this package or by TAO.
        where: the spec key that named it, for messages.

    Raises:
        WeightsError: the file is missing, not ONNX, or not such a detector.
    """
    onnx = require("onnx")
    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no graph")
    except Exception as error:  # protobuf's own errors share no base class
        known = _OTHER_KINDS.get(path.suffix.lower()) if path.is_file() else None
        what, hint = known or (f"cannot be read as ONNX: {error}", None)
        raise WeightsError(Problem(what, file=path, where=where, hint=hint)) from error
    _refuse_excess(model, path, where)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: _sizes(value) for value in model.graph.input if value.name not in constants}
    outputs = {value.name: _sizes(value) for value in model.graph.output}
    image = inputs.get("inputs", ())
    if list(inputs) != ["inputs"] or not set(OUTPUT_NAMES) <= set(outputs) or len(image) != 4:
        raise WeightsError(
            Problem(
                "is not a Deformable DETR exported by this package or TAO",
                file=path,
                where=where,
                value=f"inputs {sorted(map(str, inputs))}, outputs {sorted(map(str, outputs))}",
                allowed=f"input 'inputs' of 4 axes, outputs {', '.join(OUTPUT_NAMES)}",
            )
        )
    if image[2] is None or image[3] is None:
        raise WeightsError(Problem("has no fixed input height and width", file=path, where=where))
    if image[2] * image[3] > MAX_INPUT_PIXELS:
        raise WeightsError(
            Problem(
                "has an input that is too large",
                file=path,
                where=where,
                value=f"{image[3]}x{image[2]} pixels",
                allowed=f"at most {MAX_INPUT_PIXELS:,} pixels",
            )
        )
    logits = (*outputs["pred_logits"], None, None, None)
    return GraphSignature(path, (image[2], image[3]), image[0], logits[1], logits[2], read_meta(model))


MAX_INPUT_PIXELS = 2**26
MAX_CONSTANT_VALUES = 2**28
_LOOPS = ("Loop", "Scan")


def _refuse_excess(model: Any, path: Path, where: str | None) -> None:
    """Refuse a graph that could run for ever or ask for any memory: no exporter of ours or TAO's writes such.

    Raises:
        WeightsError: it has loops, or constants made by their size alone that are too large.
    """
    from onnx import numpy_helper

    shapes = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for one in node.attribute:
                if one.name == "value":
                    shapes[node.output[0]] = one.t
    for node in model.graph.node:
        if node.op_type in _LOOPS:
            what = f"has a {node.op_type}, which no exported Deformable DETR needs"
            raise WeightsError(Problem(what, file=path, where=where, value=node.name))
        if node.op_type not in ("ConstantOfShape", "Expand", "Tile"):
            continue
        tensor = shapes.get(node.input[-1])
        if tensor is None or (tensor.dims and tensor.dims[0] > 64):
            continue
        sizes = [abs(int(size)) for size in numpy_helper.to_array(tensor).reshape(-1)]
        if math.prod(sizes) > MAX_CONSTANT_VALUES:
            what = f"asks for {math.prod(sizes):,} values by one {node.op_type}"
            allowed = f"at most {MAX_CONSTANT_VALUES:,}"
            raise WeightsError(Problem(what, file=path, where=where, allowed=allowed))


def _sizes(value: Any) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims)


def write_meta(model: Any, meta: Mapping[str, Any]) -> None:
    """Write an object into the model's metadata."""
    entry = model.metadata_props.add()
    entry.key, entry.value = META_KEY, json.dumps(dict(meta))


def read_meta(model: Any) -> dict[str, Any]:
    """Read what :func:`write_meta` wrote; empty for other files."""
    for entry in model.metadata_props:
        if entry.key == META_KEY:
            try:
                meta = parse_json(entry.value)
            except ValueError:
                return {}
            return meta if isinstance(meta, dict) else {}
    return {}


# --- TensorRT and GridSample ---

FIRST_LINEAR_OPSET = 20
"""The opset that renamed GridSample's modes: TensorRT, up to 11.1, reads the new names as nearest."""

LINEAR_HINT = "write it with export.opset_version 17 to 19, or with plugin nodes (export.on_cpu: false)"


def linear_sampling_note(opset: int) -> str | None:
    """Return what TensorRT does to a graph of standard operators in this opset; None where it is right."""
    if opset < FIRST_LINEAR_OPSET:
        return None
    return (
        f"in opset {opset} TensorRT takes GridSample's `linear` for `nearest` and predicts other boxes"
        " (NVIDIA/TensorRT issue 4646)"
    )


def require_sampling_for_tensorrt(path: str | Path, *, where: str) -> None:
    """Refuse a graph whose GridSample nodes TensorRT reads wrongly, see :data:`FIRST_LINEAR_OPSET`.

    Args:
        path: an ONNX file.
        where: the spec key that named it, for messages.

    Raises:
        ExportError: it has such nodes.
    """
    model = require("onnx").load(str(path), load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if not entry.domain), default=0)
    modes = {
        attribute.s.decode()
        for node in model.graph.node
        if node.op_type == "GridSample"
        for attribute in node.attribute
        if attribute.name == "mode"
    }
    if modes & {"linear", "cubic"}:
        problem = f"cannot become an engine: {linear_sampling_note(max(opset, FIRST_LINEAR_OPSET))}"
        raise ExportError(Problem(problem, file=path, where=where, hint=LINEAR_HINT))


Q_TYPES = ("QuantizeLinear", "DequantizeLinear")

QUANTIZED_HINT = (
    "quantize it again with quantize.backend=modelopt.onnx, or onnxruntime with"
    " quantize.backend_kwargs={symmetric: true}"
)


def q_dq_formats(path: str | Path, *, where: str) -> tuple[str, ...]:
    """Return TensorRT's names of the formats of a graph's Q/DQ nodes, and refuse those it cannot read.

    TensorRT's formats are signed and symmetric (int8 or float8, zero point 0), and biases stay float.

    Args:
        path: an ONNX file.
        where: the spec key that named it, for messages.

    Returns:
        Of ``INT8``, ``FP8``, ``INT4`` and ``FP4`` those that occur; empty without Q/DQ nodes.

    Raises:
        ExportError: unsigned or asymmetric Q/DQ nodes, or quantized biases.
    """
    onnx = require("onnx")
    model = onnx.load(str(path), load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for each in node.attribute if node.op_type == "Constant" else ():
            if each.name == "value":
                constants[node.output[0]] = each.t
    types = onnx.TensorProto
    names = {"INT8": "INT8", "FLOAT8E4M3FN": "FP8", "INT4": "INT4", "FLOAT4E2M1": "FP4"}
    signed = {getattr(types, name): short for name, short in names.items() if hasattr(types, name)}
    formats: set[str] = set()
    found = [node for node in model.graph.node if node.op_type in Q_TYPES]
    for node in found:
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        number_format = zero.data_type if zero is not None else types.UNDEFINED
        if zero is None and node.op_type == "DequantizeLinear" and node.input[0] in constants:
            number_format = constants[node.input[0]].data_type
        if zero is None and node.op_type == "QuantizeLinear":
            chosen = [each.i for each in node.attribute if each.name == "output_dtype" and each.i]
            number_format = chosen[0] if chosen else types.UINT8  # ONNX's default
        reason = ""
        if number_format in signed:
            formats.add(signed[number_format])
        elif number_format != types.UNDEFINED:
            reason = f"has the format {types.DataType.Name(number_format).lower()}"
        if not reason and zero is not None and np.any(onnx.numpy_helper.to_array(zero).astype(np.float32)):
            reason = "has a zero point that is not 0"
        if reason:
            what = f"cannot become an engine: node {node.name or node.output[0]} ({node.op_type}) {reason}"
            allowed = "symmetric int8 or float8, as TensorRT reads Q/DQ nodes; float biases"
            raise ExportError(Problem(what, file=path, where=where, allowed=allowed, hint=QUANTIZED_HINT))
    return tuple(sorted(formats or {"INT8"})) if found else ()


# --- Running and checking ---


def ort_session(path: str | Path, providers: Sequence[str] | None = None) -> Any:
    """Open an onnxruntime session.

    Args:
        path: the file.
        providers: execution providers; by default CUDA where onnxruntime has it, and the CPU.

    Raises:
        StackError: onnxruntime is missing.
        WeightsError: onnxruntime cannot load the file.
    """
    onnxruntime = require("onnxruntime")
    if providers is None:
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=list(providers))
    except Exception as error:  # onnxruntime's errors share no public base class
        reason = str(error)
        hint = "export it with export.on_cpu=true" if "Plugin_TRT" in reason else None
        raise WeightsError(Problem(f"onnxruntime cannot load it: {reason}", file=path, hint=hint)) from error


def ort_forward(
    path: str | Path, providers: Sequence[str] | None = ("CPUExecutionProvider",)
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a file as a function: images (B, 3, H, W) → logits and boxes, see :func:`ort_session`."""
    session = ort_session(path, providers)

    def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, boxes_cxcywh = session.run(list(OUTPUT_NAMES), {"inputs": images})
        return logits, boxes_cxcywh

    return forward


def check_file(path: Path) -> int:
    """Run onnx's checker; returns the number of nodes.

    Raises:
        ExportError: the file is not valid.
    """
    onnx = require("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(Problem(f"the exported graph is not valid ONNX: {error}", file=path)) from error
    return len(onnx.load(str(path), load_external_data=False).graph.node)
