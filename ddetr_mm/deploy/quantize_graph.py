"""Quantize an ONNX graph: Q/DQ nodes around its convolutions and linear layers, by onnxruntime or ModelOpt.

Which layers stay in float by default follows from the graph: sampling offsets (they end in GridSample's
grid), weights of an attention (in Softmax), and the layers that compute boxes. Decoders that others exported
with them in INT8 found next to nothing.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddetr_mm.compat.versions import require
from ddetr_mm.deploy.onnx_file import META_KEY, OUTPUT_NAMES, Q_TYPES, ort_forward, read_meta, write_meta
from ddetr_mm.deploy.quantize import quiet, require_extra
from ddetr_mm.errors import ExportError, Problem

if TYPE_CHECKING:
    import onnx

LAYER_TYPES = ("Conv", "MatMul", "Gemm")

Batches = Sequence[np.ndarray]
"""Normalised images (B, 3, H, W), float32, of the graph's size and batch."""


# --- Layers of a graph ---


@dataclass
class GraphLayers:
    """The layers of a graph with constant weights.

    Attributes:
        names: node → its further names: path with dots, name of its weights, operator.
        groups: node → the part of the network that it belongs to.
        sensitive: node → why it stays in float by default.
    """

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    sensitive: dict[str, str] = field(default_factory=dict)


def graph_layers(model: onnx.ModelProto) -> GraphLayers:
    """Return the convolutions and linear layers of a graph; nodes without a name get one.

    Args:
        model: a Deformable DETR; changed where nodes have no name.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    readers: dict[str, list[tuple[Any, int]]] = {}
    makers = {}
    taken = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        if not node.name:
            node.name = next(
                name
                for name in (f"{node.op_type}_{index}", f"{node.op_type}_{index}_node")
                if name not in taken
            )
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
        makers.update(dict.fromkeys(node.output, node))
    found = GraphLayers()
    layers = {
        node.name: node
        for node in graph.node
        if node.op_type in LAYER_TYPES and len(node.input) > 1 and node.input[1] in constants
    }
    for name, node in layers.items():
        path = re.sub(r"/[^/]*$", "", name).strip("/").replace("/", ".")
        named = _weight_name(node, readers, constants)
        found.names[name] = tuple(dict.fromkeys(one for one in (path, named, node.op_type) if one))
        found.groups[name] = _group(named or path)
        reason = _sensitive_end(node, readers, layers)
        if reason:
            found.sensitive[name] = reason
    for name in [name for name, reason in found.sensitive.items() if reason == BOXES]:
        for before in _layers_before(layers[name], makers, layers, constants):
            found.sensitive.setdefault(before, BOXES)
    return found


GRID, SOFTMAX, BOXES = "sampling offsets", "attention weights", "boxes"


def _sensitive_end(
    node: Any, readers: Mapping[str, list[tuple[Any, int]]], layers: Mapping[str, Any]
) -> str | None:
    """Return what the output of a layer ends in before the next layer, if it is something sensitive."""
    waiting, seen, softmax = list(node.output), set(), False
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name == OUTPUT_NAMES[1]:
            return BOXES
        for reader, position in readers.get(name, ()):
            if reader.op_type == "GridSample":
                if position == 1:
                    return GRID
            elif (
                reader.op_type.startswith("MultiscaleDeformableAttn")
                or "MultiscaleDeformable" in reader.op_type
            ):
                if position in (3, 4):
                    return GRID if position == 3 else SOFTMAX
            elif reader.op_type == "Softmax":
                softmax = True
            elif reader.name not in layers and reader.op_type not in ("MatMul", "LayerNormalization"):
                waiting += reader.output
    return SOFTMAX if softmax else None


def _layers_before(
    node: Any, makers: Mapping[str, Any], layers: Mapping[str, Any], constants: set[str]
) -> Iterable[str]:
    """Yield the layers of the same chain of linear layers, before a node."""
    waiting = [node.input[0]]
    while waiting:
        name = waiting.pop()
        before = makers.get(name)
        if before is None:
            continue
        if before.name in layers:
            yield before.name
            waiting.append(before.input[0])
        elif before.op_type in ("Relu", "Add") and sum(one not in constants for one in before.input) == 1:
            waiting += [one for one in before.input if one not in constants]


def _weight_name(node: Any, readers: Mapping[str, list[tuple[Any, int]]], constants: set[str]) -> str:
    """Return the name of the module whose weight or bias a node reads, empty where the exporter lost it."""
    values = list(node.input[1:])
    for reader, _ in readers.get(node.output[0], ()):
        if reader.op_type == "Add":
            values += [one for one in reader.input if one in constants]
    for value in values:
        match = re.fullmatch(r"(?:detector\.|model\.)*(.+)\.(weight|bias)", value)
        if match and "::" not in value:
            return match[1]
    return ""


def _group(name: str) -> str:
    """Return the part of the network that a layer belongs to, by its name."""
    match = re.search(r"backbone\.(?:body\.)?(?:layer|stages?\.?|levels\.)(\d+)", name)
    if match:
        return f"backbone.{match[1]}"
    if "backbone" in name:
        return "backbone.stem"
    match = re.search(r"(encoder|decoder)(?:\.layers|_attention)\.(\d+)", name)
    if match:
        return f"{match[1]}.{match[2]}"
    for part, words in {
        "neck": ("neck", "input_proj"),
        "bbox_head": ("branches", "class_embed", "bbox_embed"),
    }.items():
        if any(word in name for word in words):
            return part
    return "other layers"


def quantized_nodes(model: onnx.ModelProto) -> int:
    """Return the number of QuantizeLinear and DequantizeLinear nodes of a graph."""
    return sum(node.op_type in Q_TYPES for node in model.graph.node)


# --- onnxruntime ---


@dataclass(frozen=True)
class StaticOptions:
    """How onnxruntime's static quantizer works.

    Attributes:
        method: ``minmax``, ``entropy`` or ``percentile``.
        percentile: share of the values of an input that its range keeps, in percent, for ``percentile``.
        per_channel: one scale for each output channel of a weight.
        symmetric: symmetric int8 ranges of inputs, as TensorRT needs; else uint8, which CPUs compute best.
        reduce_range: 7 bits of weights, for CPUs without VNNI, where 8 bits can overflow.
    """

    method: str = "minmax"
    percentile: float = 99.99
    per_channel: bool = True
    symmetric: bool = False
    reduce_range: bool = False


class StaticQuantizer:
    """onnxruntime's static quantizer with the ranges of one graph, found once.

    Args:
        model: a graph of standard operators; its nodes have names.
        layers: the layers that may be quantized.
        options: see the class.

    Raises:
        StackError: onnxruntime is missing.
    """

    def __init__(self, model: onnx.ModelProto, options: StaticOptions) -> None:
        self.model = model
        self.options = options
        self._ranges: Any = None

    def calibrate(self, batches: Iterable[np.ndarray]) -> int:
        """Find the ranges of all inputs of layers; returns the number of batches.

        Raises:
            ExportError: there is no image.
        """
        calibrate = require("onnxruntime.quantization.calibrate")
        methods = calibrate.CalibrationMethod
        method = {"minmax": methods.MinMax, "entropy": methods.Entropy, "percentile": methods.Percentile}
        extra: dict[str, Any] = {"symmetric": self.options.symmetric}
        if self.options.method == "percentile":
            extra["percentile"] = self.options.percentile
        count = 0
        with tempfile.TemporaryDirectory(prefix="ddetr_mm_") as folder, quiet():
            source = Path(folder) / "graph.onnx"
            require("onnx").save(self._inferred(), str(source))
            calibrator = calibrate.create_calibrator(
                str(source),
                list(LAYER_TYPES),
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=method[self.options.method],
                extra_options=extra,
            )
            for batch in batches:
                # One batch at a time: the calibrators keep the inputs of all layers until they are summed up.
                calibrator.collect_data(_OneBatch(batch))
                count += 1
            if not count:
                raise ExportError(
                    Problem("no image to calibrate with", where="dataset.quant_calibration_data_sources")
                )
            self._ranges = calibrator.compute_data()
        return count

    def write(self, nodes: Sequence[str], target: Path) -> int:
        """Write the graph with these nodes quantized; returns the number of Q/DQ nodes.

        Args:
            nodes: names of layers.
            target: the file, overwritten; it keeps the graph's metadata.
        """
        quantization = require("onnxruntime.quantization")
        quantizer = require("onnxruntime.quantization.qdq_quantizer")
        types = quantization.QuantType
        with quiet():
            worker = quantizer.QDQQuantizer(
                self._inferred(),
                self.options.per_channel,
                self.options.reduce_range,
                types.QInt8,
                types.QInt8 if self.options.symmetric else types.QUInt8,
                self._ranges,
                list(nodes),
                [],
                list(LAYER_TYPES),
                {
                    "ActivationSymmetric": self.options.symmetric,
                    # TensorRT adds biases in float; onnxruntime would make them int32.
                    "QuantizeBias": not self.options.symmetric,
                    "MatMulConstBOnly": True,
                    # MatMul's weights are (inputs, outputs): one scale an output.
                    "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1, "Gemm": 0},
                },
            )
            worker.quantize_model()
            worker.model.topological_sort()  # the quantizer appends its nodes at the end
        written = worker.model.model
        keep_meta(self.model, written)
        require("onnx").save(written, str(target))
        return quantized_nodes(written)

    def _inferred(self) -> Any:
        """Return a copy with the sizes and types of inner values, marked as prepared."""
        onnx_package = require("onnx")
        copied = type(self.model).FromString(self.model.SerializeToString())
        if max(entry.version for entry in copied.opset_import if not entry.domain) < 13:
            copied = onnx_package.version_converter.convert_version(copied, 13)
        inferred = onnx_package.shape_inference.infer_shapes(copied)
        props = {prop.key: prop.value for prop in inferred.metadata_props}
        props |= {"onnx.infer": "onnxruntime.quant", "onnx.quant.pre_process": "onnxruntime.quant"}
        onnx_package.helper.set_model_props(inferred, props)
        return inferred


class _OneBatch:
    """A reader of calibration data that gives one batch."""

    def __init__(self, batch: np.ndarray) -> None:
        self._waiting: list[np.ndarray] = [batch]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the batch as the graph's input, then None."""
        return {"inputs": self._waiting.pop()} if self._waiting else None


def keep_meta(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    """Give a graph the metadata of the one it was made from, and no marks of a quantizer."""
    meta = read_meta(source)
    kept = [(prop.key, prop.value) for prop in source.metadata_props if prop.key != META_KEY]
    del target.metadata_props[:]
    for key, value in kept:
        entry = target.metadata_props.add()
        entry.key, entry.value = key, value
    if meta:
        write_meta(target, meta)


# --- ModelOpt ---


def quantize_by_modelopt(
    source: Path,
    target: Path,
    nodes: Sequence[str],
    batches: Batches,
    *,
    mode: str,
    algorithm: str | None,
    device: str = "cpu",
    high_precision_dtype: str = "fp32",
    block_size: int | None = None,
) -> int:
    """Write an ONNX graph quantized by ModelOpt; returns the number of Q/DQ nodes.

    Args:
        source: the graph, whose nodes have names.
        target: the file, overwritten; it keeps the graph's metadata.
        nodes: names of the layers to quantize.
        batches: calibration images.
        mode: ``int8``, ``fp8`` or ``int4``.
        algorithm: ModelOpt's ``calibration_method``; None: its own choice.
        device: ``cpu``, ``cuda:N`` or ``trt``: what calibrates; the CPU where it is missing.
        high_precision_dtype: of what is not quantized.
        block_size: of int4 weights.

    Raises:
        StackError: ModelOpt is missing.
        ExportError: ModelOpt fails on the graph.
    """
    onnx_package = require("onnx")
    with quiet():
        modelopt = require_extra("modelopt.onnx.quantization", "nvidia-modelopt")
    first = {"trt": ["trt", "cuda:0"], "cpu": []}.get(device, [device if ":" in device else f"{device}:0"])
    escaped = [f"^{re.escape(name)}$" for name in nodes]
    with tempfile.TemporaryDirectory(prefix="ddetr_mm_") as folder:
        copied, made = Path(folder) / "graph.onnx", Path(folder) / "quantized.onnx"
        shutil.copyfile(source, copied)
        try:
            with quiet():
                modelopt.quantize(
                    str(copied),
                    quantize_mode=mode,
                    calibration_data={"inputs": np.concatenate(list(batches))} if len(batches) else None,
                    calibration_method=algorithm,
                    calibration_eps=[*first, "cpu"],
                    op_types_to_quantize=list(LAYER_TYPES) if mode != "int4" else None,
                    nodes_to_quantize=escaped,
                    output_path=str(made),
                    high_precision_dtype=high_precision_dtype,
                    mha_accumulation_dtype="fp32",
                    block_size=block_size,
                    log_level="ERROR",
                )
            written = onnx_package.load(str(made))
        except Exception as error:  # whatever ModelOpt's passes raise on a graph
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ExportError(Problem(f"ModelOpt cannot quantize it: {reason}", file=source)) from error
    count = quantized_nodes(written)
    if not count and mode != "int4":
        what = f"ModelOpt quantized none of {len(nodes)} layers to {mode}"
        hint = "it leaves layers of few channels; name others, or use int8"
        raise ExportError(Problem(what, file=source, where="quantize.layers", hint=hint))
    keep_meta(onnx_package.load(str(source), load_external_data=False), written)
    onnx_package.save(written, str(target))
    return count


# --- Sensitivity ---


@dataclass(frozen=True)
class GroupLoss:
    """What quantizing one group of layers alone costs.

    Attributes:
        group: part of the network.
        num_layers: layers that are quantized.
        loss: loss of AP in points, or root mean square difference of the logits where AP cannot be measured.
    """

    group: str
    num_layers: int
    loss: float


def group_losses(
    nodes: Sequence[str],
    groups: Mapping[str, str],
    write: Callable[[Sequence[str], Path], Any],
    loss: Callable[[Path], float],
    log: Callable[[str], None],
) -> list[GroupLoss]:
    """Quantize one group of layers at a time; returns the losses, the largest first.

    Args:
        nodes: the layers to quantize.
        groups: layer → its group.
        write: writes the graph with some layers quantized.
        loss: of a file.
        log: receives a line for each group.
    """
    members: dict[str, list[str]] = {}
    for name in nodes:
        members.setdefault(groups[name], []).append(name)
    found = []
    with tempfile.TemporaryDirectory(prefix="ddetr_mm_") as folder:
        for group, names in members.items():
            path = Path(folder) / "group.onnx"
            write(names, path)
            found.append(GroupLoss(group, len(names), loss(path)))
            log(f"sensitivity: {group} ({len(names)} layers): {found[-1].loss:.3g}")
    return sorted(found, key=lambda one: -one.loss)


def output_error(float_file: Path, batches: Batches) -> Callable[[Path], float]:
    """Return a function from a graph to the root mean square difference of its logits."""
    runner = ort_forward(float_file)
    expected = [runner(batch)[0] for batch in batches]

    def error(path: Path) -> float:
        run = ort_forward(path)
        squares = [
            np.square(run(batch)[0] - logits).mean() for batch, logits in zip(batches, expected, strict=True)
        ]
        return float(np.sqrt(np.mean(squares)))

    return error
