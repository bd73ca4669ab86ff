"""Making an exported graph smaller without changing what it computes.

The TorchScript exporter leaves constants as nodes, copies of equal weights as ``Identity`` nodes, and asks
for shapes that are known once the input's size is fixed. Each function here removes one of these;
:func:`lean` runs them until nothing is left to remove.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

MOST_FOLDED_ELEMENTS = 1 << 20
"""Results of more numbers than this, and than the inputs have, stay computed, or the file would grow."""

_NEVER_FOLDED = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
)


def lean(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with fewer nodes; inputs, outputs and results stay.

    Args:
        model: changed in place.

    Returns:
        The same object.
    """
    constants_to_initializers(model)
    count = -1
    while count != len(model.graph.node):
        count = len(model.graph.node)
        drop_identities(model)
        fixed_sizes(model)
        fold_constants(model)
        merge_equal_initializers(model)
        merge_equal_nodes(model)
        drop_dead(model)
    del model.graph.value_info[:]
    return model


def constants_to_initializers(model: onnx.ModelProto) -> None:
    """``Constant`` nodes become initializers, which TensorRT and other optimizers see at once."""
    kept = []
    for node in model.graph.node:
        value = next((entry for entry in node.attribute if entry.name == "value"), None)
        if node.op_type == "Constant" and value is not None and not node.domain:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            kept.append(node)
    _set_nodes(model, kept)


def drop_identities(model: onnx.ModelProto) -> None:
    """Readers of an ``Identity`` read its input instead."""
    outputs, pinned = {output.name for output in model.graph.output}, _names_in_subgraphs(model)
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        _rename_inputs(node, renamed)
        free = node.output[0] not in outputs | pinned
        if node.op_type == "Identity" and not node.domain and free:
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _set_nodes(model, kept)


def fold_constants(model: onnx.ModelProto) -> None:
    """Nodes whose inputs are all constants are computed now, by ONNX's reference implementation."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    arrays = _LazyArrays(model.graph.initializer)
    outputs = {output.name for output in model.graph.output}
    kept = []
    for node in model.graph.node:
        if not _foldable(node, arrays, outputs):
            kept.append(node)
            continue
        feeds = {name: arrays[name] for name in node.input if name}
        results = ReferenceEvaluator(node, opsets=opsets).run(None, feeds)
        most = max(MOST_FOLDED_ELEMENTS, *(array.size for array in feeds.values()), 0)
        if any(not isinstance(result, np.ndarray | np.generic) or result.size > most for result in results):
            kept.append(node)
            continue
        for name, result in zip(node.output, results, strict=False):
            if name:
                arrays.add(name, np.ascontiguousarray(result).reshape(np.shape(result)))
    model.graph.initializer.extend(arrays.new())
    _set_nodes(model, kept)


def _foldable(node: onnx.NodeProto, arrays: _LazyArrays, outputs: set[str]) -> bool:
    return (
        node.domain in ("", "ai.onnx")
        and node.op_type not in _NEVER_FOLDED
        and bool([name for name in node.input if name])
        and all(name in arrays for name in node.input if name)
        and not any(name in outputs for name in node.output)
        and not any(entry.HasField("g") or entry.graphs for entry in node.attribute)
    )


class _LazyArrays:
    """Initializers by name, unpacked when asked for."""

    def __init__(self, tensors: Iterable[onnx.TensorProto]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._arrays: dict[str, np.ndarray] = {}
        self._added: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._arrays or name in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def add(self, name: str, array: np.ndarray) -> None:
        self._arrays[name] = array
        self._added.append(name)

    def new(self) -> list[onnx.TensorProto]:
        return [numpy_helper.from_array(self._arrays[name], name) for name in self._added]


def fixed_sizes(model: onnx.ModelProto) -> None:
    """Sizes that are known become constants.

    A ``Shape`` of a value with known axes is a constant, and so is the target of a ``Reshape`` whose result
    is known but for one axis (-1 stands for that).
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    outputs, pinned = {output.name for output in model.graph.output}, _names_in_subgraphs(model)
    shapes = [node for node in model.graph.node if node.op_type == "Shape" and not node.attribute]
    reshapes = [
        node for node in model.graph.node if node.op_type == "Reshape" and node.input[1] not in constants
    ]
    if not shapes and not reshapes:
        return
    sizes = _known_sizes(model)
    folded = []
    for node in shapes:
        known = sizes.get(node.input[0])
        if known is not None and None not in known and node.output[0] not in outputs | pinned:
            model.graph.initializer.append(numpy_helper.from_array(np.array(known, np.int64), node.output[0]))
            folded.append(node.output[0])
    for node in reshapes:
        target = sizes.get(node.output[0])
        if target is None or sum(size is None for size in target) > 1 or 0 in target:
            continue
        name = f"{node.output[0]}_sizes"
        values = np.array([-1 if size is None else size for size in target], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
        node.input[1] = name
    _set_nodes(model, [node for node in model.graph.node if node.output[0] not in folded])


def _known_sizes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Sizes of the values that shape inference knows, None for an unknown axis.

    The exporter's own notes are not used: of a traced batch they hold the example's size.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    sizes = {}
    for value in inferred.graph.value_info:
        if value.type.tensor_type.HasField("shape"):
            sizes[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else None
                for dim in value.type.tensor_type.shape.dim
            )
    return sizes


def merge_equal_initializers(model: onnx.ModelProto) -> None:
    """Equal constants are stored once."""
    first: dict[tuple, str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for tensor in model.graph.initializer:
        content = numpy_helper.to_array(tensor)
        digest = hashlib.sha256(np.ascontiguousarray(content).tobytes()).digest()
        key = (tensor.data_type, content.shape, digest)
        if key in first:
            renamed[tensor.name] = first[key]
        else:
            first[key] = tensor.name
            kept.append(tensor)
    if not renamed or _names_in_subgraphs(model) & set(renamed):
        return
    for node in model.graph.node:
        _rename_inputs(node, renamed)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def merge_equal_nodes(model: onnx.ModelProto) -> None:
    """Of nodes that compute the same from the same, the first stays."""
    outputs, pinned = {output.name for output in model.graph.output}, _names_in_subgraphs(model)
    first: dict[tuple, onnx.NodeProto] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        _rename_inputs(node, renamed)
        attributes = tuple(sorted(entry.SerializeToString(deterministic=True) for entry in node.attribute))
        key = (node.domain, node.op_type, tuple(node.input), attributes, len(node.output))
        twin = first.setdefault(key, node)
        if twin is node or node.op_type in _NEVER_FOLDED or set(node.output) & (outputs | pinned):
            kept.append(node)
        else:
            renamed.update(zip(node.output, twin.output, strict=True))
    _set_nodes(model, kept)


def drop_dead(model: onnx.ModelProto) -> None:
    """Nodes and constants that no output depends on go."""
    needed = {output.name for output in model.graph.output} | _names_in_subgraphs(model)
    kept = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    _set_nodes(model, kept[::-1])
    constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)


def sort_nodes(model: onnx.ModelProto) -> None:
    """Put the nodes into the order that ONNX demands: none before those it reads from.

    Raises:
        ValueError: the graph has a circle.
    """
    known = {tensor.name for tensor in model.graph.initializer} | {value.name for value in model.graph.input}
    made = {name for node in model.graph.node for name in node.output}
    waiting = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    placed: list[onnx.NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            if all(name in known or name not in made for name in node.input):
                known.update(node.output)
                placed.append(node)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError("the graph has a circle")
        waiting = later
    del model.graph.node[:]
    model.graph.node.extend(placed)


def _rename_inputs(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for position, name in enumerate(node.input):
        while name in renamed:
            name = renamed[name]
        node.input[position] = name


def _set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    if len(nodes) != len(model.graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def _names_in_subgraphs(model: onnx.ModelProto) -> set[str]:
    """Names that bodies of If, Loop and Scan read or hold; they are left as they are."""
    return {name for node in model.graph.node for body in _bodies(node) for name in _names_in(body)}


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for entry in node.attribute:
        if entry.HasField("g"):
            yield entry.g
        yield from entry.graphs


def _names_in(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for body in _bodies(node):
            yield from _names_in(body)
