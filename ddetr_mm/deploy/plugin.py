"""TensorRT's plugin for deformable attention: its node, its contract, and how to run it without TensorRT.

The node is ``nvidia::MultiscaleDeformableAttnPlugin_TRT`` (version 1) with five inputs and one output:

====================  =========================  =======================================
input                 shape                      type
====================  =========================  =======================================
value                 (N, S, M, D)               float32 or float16
spatial_shapes        (L, 2) as (height, width)  int32
level_start_index     (L,)                       int32
sampling_locations    (N, Lq, M, L, P, 2), 0..1  as value; (x, y)
attention_weights     (N, Lq, M, L, P)           as value; after the softmax
output                (N, Lq, M, D)              as value
====================  =========================  =======================================

N images · S feature points of all levels · M heads · D channels of a head · L levels · Lq queries · P points

mmdeploy's library has its own plugin, ``mmdeploy::MMCVMultiScaleDeformableAttention``: the same inputs,
the output as (N, Lq, M * D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from torch import Tensor

from ddetr_mm.errors import ExportError, Problem

if TYPE_CHECKING:
    import onnx

PLUGIN_NAME = "MultiscaleDeformableAttnPlugin_TRT"
PLUGIN_DOMAIN = "nvidia"
MMDEPLOY_PLUGIN = "MMCVMultiScaleDeformableAttention"
MMDEPLOY_DOMAIN = "mmdeploy"
PLUGIN_OPERATORS = ((PLUGIN_DOMAIN, PLUGIN_NAME), (MMDEPLOY_DOMAIN, MMDEPLOY_PLUGIN))
PLUGIN_ATTRIBUTES = {"name": PLUGIN_NAME, "version": "1", "namespace": ""}
MMDEPLOY_ATTRIBUTES = {"im2col_step": 64}
INPUT_RANKS = (4, 2, 1, 6, 5)


def level_tensors(sizes_hw: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return ``spatial_shapes`` (L, 2) and ``level_start_index`` (L,), int32."""
    counts = [height * width for height, width in sizes_hw]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    return torch.tensor(sizes_hw, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


class _PluginFunction(torch.autograd.Function):
    """Deformable attention, exported as one node of TensorRT's plugin."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Tensor, starts: Tensor, places: Tensor, weights: Tensor
    ) -> Tensor:
        attended = multi_scale_deformable_attn_pytorch(value, shapes.long(), places, weights)
        return attended.reshape(*attended.shape[:2], *value.shape[2:])

    @staticmethod
    def symbolic(g: Any, value: Any, shapes: Any, starts: Any, places: Any, weights: Any) -> Any:
        named = {f"{key}_s": text for key, text in PLUGIN_ATTRIBUTES.items()}
        node = g.op(f"{PLUGIN_DOMAIN}::{PLUGIN_NAME}", value, shapes, starts, places, weights, **named)
        value_sizes, place_sizes = value.type().varyingSizes(), places.type().varyingSizes()
        if value_sizes and place_sizes:
            node.setType(value.type().with_sizes([value_sizes[0], place_sizes[1], *value_sizes[2:]]))
        return node


class _MmdeployFunction(torch.autograd.Function):
    """Deformable attention, exported as one node of mmdeploy's plugin; the output is (N, Lq, M * D)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Tensor, starts: Tensor, places: Tensor, weights: Tensor
    ) -> Tensor:
        return multi_scale_deformable_attn_pytorch(value, shapes.long(), places, weights)

    @staticmethod
    def symbolic(g: Any, value: Any, shapes: Any, starts: Any, places: Any, weights: Any) -> Any:
        named = {f"{key}_i": number for key, number in MMDEPLOY_ATTRIBUTES.items()}
        return g.op(f"{MMDEPLOY_DOMAIN}::{MMDEPLOY_PLUGIN}", value, shapes, starts, places, weights, **named)


PLUGIN_FORMS = {"nvidia": _PluginFunction, "mmdeploy": _MmdeployFunction}


def plugin_attention(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    places: Tensor,
    weights: Tensor,
    form: str = "nvidia",
) -> Tensor:
    """Compute deformable attention; the exporter writes it as one plugin node.

    Args:
        value: this and the next four as in the module's table.
        spatial_shapes: see there.
        level_start_index: see there.
        places: the sampling locations.
        weights: the attention weights.
        form: ``nvidia``, or ``mmdeploy`` with the last two axes of the output flattened.
    """
    return PLUGIN_FORMS[form].apply(value, spatial_shapes, level_start_index, places, weights)


def plugin_in_numpy(
    value: np.ndarray,
    spatial_shapes: np.ndarray,
    level_start_index: np.ndarray,
    sampling_locations: np.ndarray,
    attention_weights: np.ndarray,
) -> np.ndarray:
    """Compute what the plugin computes, with its checks of the inputs.

    Every sample is interpolated from its four neighbours, which are zero outside the level. Locations 0 and 1
    are the level's outer edges.

    Returns:
        (N, Lq, M, D), the type of ``value``.

    Raises:
        ExportError: TensorRT's plugin would refuse the ranks or types.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    ranks = tuple(array.ndim for array in inputs)
    if ranks != INPUT_RANKS:
        raise ExportError(
            Problem(f"{PLUGIN_NAME} refuses the ranks of its inputs", value=ranks, allowed=INPUT_RANKS)
        )
    if {spatial_shapes.dtype, level_start_index.dtype} != {np.dtype(np.int32)}:
        raise ExportError(Problem(f"{PLUGIN_NAME} takes its two shape inputs as int32 only"))
    if not value.dtype == sampling_locations.dtype == attention_weights.dtype:
        raise ExportError(Problem(f"{PLUGIN_NAME} takes value, locations and weights of one type only"))
    batch, _, heads, width = value.shape
    image = np.arange(batch)[:, None, None, None]
    head = np.arange(heads)[None, None, :, None]
    total = np.zeros((batch, sampling_locations.shape[1], heads, width), value.dtype)
    for level, (size_hw, start) in enumerate(
        zip(spatial_shapes.tolist(), level_start_index.tolist(), strict=True)
    ):
        height, length = size_hw
        x = sampling_locations[:, :, :, level, :, 0] * length - 0.5
        y = sampling_locations[:, :, :, level, :, 1] * height - 0.5
        left, top = np.floor(x), np.floor(y)
        for column, across in ((left, left + 1 - x), (left + 1, x - left)):
            for row, down in ((top, top + 1 - y), (top + 1, y - top)):
                inside = (column >= 0) & (column < length) & (row >= 0) & (row < height)
                place = np.where(inside, row * length + column, 0).astype(np.int64) + start
                share = np.where(inside, across * down, 0) * attention_weights[:, :, :, level]
                total += np.einsum("nqmp,nqmpd->nqmd", share.astype(value.dtype), value[image, place, head])
    return total


def plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes of either plugin."""
    return [node for node in model.graph.node if (node.domain, node.op_type) in PLUGIN_OPERATORS]


def require_plugin_contract(model: onnx.ModelProto) -> None:
    """Check every plugin node: attributes, number of inputs, shapes as int32 constants.

    Raises:
        ExportError: the plugin would refuse a node.
    """
    import onnx

    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t.data_type
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    for node in plugin_nodes(model):
        found = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        found = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
        expected = PLUGIN_ATTRIBUTES if node.domain == PLUGIN_DOMAIN else MMDEPLOY_ATTRIBUTES
        if found != expected or len(node.input) != 5 or len(node.output) != 1:
            raise ExportError(Problem("is not the node its plugin expects", where=node.name, value=found))
        if any(constants.get(name) != onnx.TensorProto.INT32 for name in node.input[1:3]):
            raise ExportError(Problem("needs its two shape inputs as int32 constants", where=node.name))


def plugin_graph_forward(model: onnx.ModelProto) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a graph with plugin nodes as a function.

    The graph is cut at every plugin node: onnxruntime runs the parts, :func:`plugin_in_numpy` the plugin
    nodes. (onnxruntime-extensions would run them in one session, but passes results as Python lists of
    floats: 620 MB for one encoder layer at 544x960 and a batch of 7.)

    Args:
        model: a graph with one input, the images, and two outputs.

    Returns:
        Images (B, 3, H, W) → the graph's two outputs.
    """
    import onnxruntime

    steps: list[tuple[Any, Any, list[str], list[str]]] = []
    for part in split_at_plugins(model):
        if hasattr(part, "op_type"):
            steps.append((None, part, list(part.input), list(part.output)))
        else:
            session = onnxruntime.InferenceSession(
                part.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            inputs, outputs = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]
            steps.append((session, None, inputs, outputs))
    constants = _constants_of_plugins(model)
    (images_name,) = {value.name for value in model.graph.input} - {
        tensor.name for tensor in model.graph.initializer
    }

    def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = {images_name: images, **constants}
        for session, node, inputs, outputs in steps:
            if session is None:
                attended = plugin_in_numpy(*(known[name] for name in inputs))
                flat = node.domain == MMDEPLOY_DOMAIN
                known[outputs[0]] = attended.reshape(*attended.shape[:2], -1) if flat else attended
            else:
                results = session.run(outputs, {name: known[name] for name in inputs})
                known.update(zip(outputs, results, strict=True))
        first, second = (known[output.name] for output in model.graph.output)
        return first, second

    return forward


def _constants_of_plugins(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    wanted = {name for node in plugin_nodes(model) for name in node.input}
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in wanted
    }


def split_at_plugins(model: onnx.ModelProto) -> list[onnx.ModelProto | onnx.NodeProto]:
    """Split a graph into models of standard operators and plugin nodes, in order."""
    import onnx

    types = _value_types(model)
    plugins = {node.output[0] for node in plugin_nodes(model)}
    runs: list[list[onnx.NodeProto]] = [[]]
    for node in model.graph.node:
        if node.output[0] in plugins:
            runs += [[node], []]
        else:
            runs[-1].append(node)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    parts: list[onnx.ModelProto | onnx.NodeProto] = []
    for index, run in enumerate(runs):
        if not run:
            continue
        if run[0].output[0] in plugins:
            parts.append(run[0])
            continue
        made = [name for node in run for name in node.output if name]
        used = list(dict.fromkeys(name for node in run for name in node.input if name))
        later = {name for other in runs[index + 1 :] for node in other for name in node.input}
        later |= {output.name for output in model.graph.output}
        graph = onnx.helper.make_graph(
            run,
            f"part{index}",
            [
                onnx.helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.FLOAT), None)
                for name in used
                if name not in made and name not in initializers
            ],
            [
                onnx.helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.FLOAT), None)
                for name in made
                if name in later
            ],
            [initializers[name] for name in used if name in initializers],
        )
        domains = {domain for domain, _ in PLUGIN_OPERATORS}
        opsets = [entry for entry in model.opset_import if entry.domain not in domains]
        parts.append(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version))
    return parts


def _value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value that shape inference knows."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}
