"""ONNX files that are no sound export: one message, within seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bad_input_project import assert_told, run_here
from onnx import TensorProto, helper, numpy_helper

from ddetr_mm.deploy.onnx_file import META_KEY, read_signature
from ddetr_mm.errors import WeightsError

SPEC = ("-e", "spec.yaml")


def with_nan(model: Any) -> None:
    """The class bias becomes NaN behind the graph's last node."""
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_before" if name == output else name for name in node.output]
        node.input[:] = [f"{name}_before" if name == output else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.float32("nan").reshape(1), "nan"))
    model.graph.node.append(helper.make_node("Add", [f"{output}_before", "nan"], [output]))


def with_nested_metadata(model: Any) -> None:
    entry = next(one for one in model.metadata_props if one.key == META_KEY)
    entry.value = '{"a":' * 5000 + "1" + "}" * 5000


def with_huge_input(model: Any) -> None:
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 10**6


def with_huge_constant(model: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**20, 2**20], np.int64), "huge"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["huge"], ["values"]))


def with_endless_loop(model: Any) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62, np.int64), "rounds"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("Loop", ["rounds", "yes"], [], body=body))


def with_other_shapes(model: Any) -> None:
    """The boxes get another number of queries at run time than the logits."""
    output = model.graph.output[1].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_before" if name == output else name for name in node.output]
    for name, value in (("start", [1]), ("end", [3]), ("axis", [1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    model.graph.node.append(helper.make_node("Slice", [f"{output}_before", "start", "end", "axis"], [output]))
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_param = "any"


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "nan": (with_nan, "NaN or infinite"),
    "huge input": (with_huge_input, "too large"),
    "huge constant": (with_huge_constant, "ConstantOfShape"),
    "endless loop": (with_endless_loop, "Loop"),
    "other shapes": (with_other_shapes, "other shapes"),
}


def changed(project: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(str(project / "random.onnx"))
    change(model)
    path = project / "changed.onnx"
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("command", ["inference", "evaluate", "predict"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_is_no_sound_export_is_refused(name, command, own_project):
    change, words = REFUSED[name]
    changed(own_project, change)
    line = {
        "predict": ("predict", "changed.onnx", "data/val/images", "--out", "p"),
        "inference": ("inference", *SPEC, "inference.checkpoint=changed.onnx"),
        "evaluate": ("evaluate", *SPEC, "evaluate.checkpoint=changed.onnx"),
    }[command]
    ended = run_here(own_project, *line, timeout=120)
    assert_told(ended, words)


def test_nested_metadata_are_no_metadata(own_project):
    assert read_signature(changed(own_project, with_nested_metadata)).meta == {}


def test_a_network_that_gives_nan_is_refused(own_project):
    content = torch.load(own_project / "random.pth", weights_only=False)
    scale = "encoder.layers.0.norms.0.weight"
    content["state_dict"][scale] = torch.full_like(content["state_dict"][scale], 3e38)
    torch.save(content, own_project / "diverged.pth")
    for command in ("inference", "evaluate"):
        ended = run_here(own_project, command, *SPEC, f"{command}.checkpoint=diverged.pth")
        assert_told(ended, "NaN or infinite")


def test_a_missing_opset_is_a_message(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\x08\x07" * 50)
    with pytest.raises(WeightsError, match=r"x\.onnx"):
        read_signature(path)
