"""Any damage of checkpoints and ONNX files: one message, never code, in bounded memory."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fuzzing import damaged, few, memory_grows_less_than
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import save

from ddetr_mm.deploy.onnx_file import ort_session, read_signature
from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import inspect_checkpoint
from ddetr_mm.weights.load import require_resumable
from ddetr_mm.weights.read import read_checkpoint

STATE = {
    "transformer.level_embed": torch.zeros(2, 4),
    "query_embed.weight": torch.ones(3, 8),
    "class_embed.0.weight": torch.zeros(5, 4),
}


def torch_file(old_format: bool) -> bytes:
    """A checkpoint as torch.save writes it."""
    file = io.BytesIO()
    content = {"model": STATE, "epoch": 3, "args": {"lr": 0.1, "names": ["a", "b"]}}
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    return file.getvalue()


CHECKPOINTS = {
    "zip.pth": torch_file(old_format=False),
    "pickle.pth": torch_file(old_format=True),
    "tensors.safetensors": save(STATE, {"format": "pt"}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=few(60))
@given(data=st.data())
def test_damaged_checkpoint(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / f"fuzz_{Path(name).stem}"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.unlink(missing_ok=True)  # the file before may still be mapped
    path.write_bytes(data.draw(damaged(CHECKPOINTS[name])))
    with memory_grows_less_than(2**29):
        for read in (read_checkpoint, inspect_checkpoint, lambda file: require_resumable(file, where="here")):
            try:
                read(path)
            except WeightsError as error:
                assert name in str(error)
    assert [item.name for item in folder.iterdir()] == [name]


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["F32", "BF16", "pt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": HEADERS,
        "shape": st.lists(st.integers(-1, 2**40), max_size=3) | HEADERS,
        "data_offsets": st.lists(st.integers(-1, 2**40), min_size=2, max_size=2) | HEADERS,
    },
)


@given(
    header=st.dictionaries(st.text(max_size=8), TENSORS | HEADERS, max_size=3), length=st.integers(0, 2**63)
)
def test_header_of_safetensors(tmp_path_factory: pytest.TempPathFactory, header: dict, length: int):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.unlink(missing_ok=True)
    text = json.dumps(header).encode()
    for claimed in (len(text), length):
        path.write_bytes(claimed.to_bytes(8, "little") + text + bytes(16))
        with pytest.raises(WeightsError, match="header.safetensors"):
            read_checkpoint(path)


@given(config=HEADERS)
@settings(max_examples=few(60))
def test_config_of_a_hugging_face_folder(tmp_path_factory: pytest.TempPathFactory, config: object):
    folder = tmp_path_factory.getbasetemp() / "hf"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(CHECKPOINTS["tensors.safetensors"])
    with pytest.raises(WeightsError, match="hf"):
        read_checkpoint(folder)


def onnx_bytes() -> bytes:
    """A tiny graph with the inputs and outputs of an exported detector."""
    image = helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("pred_logits", TensorProto.FLOAT, ["batch", 2, 3])
    boxes = helper.make_tensor_value_info("pred_boxes", TensorProto.FLOAT, ["batch", 2, 4])
    weight = onnx.numpy_helper.from_array(np.ones((192, 6), np.float32), "weight")
    more = onnx.numpy_helper.from_array(np.ones((192, 8), np.float32), "more")
    shapes = [
        onnx.numpy_helper.from_array(np.array(shape, np.int64), name)
        for name, shape in (("flat", [0, -1]), ("three", [0, 2, 3]), ("four", [0, 2, 4]))
    ]
    nodes = [
        helper.make_node("Reshape", ["inputs", "flat"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "weight"], ["scores"]),
        helper.make_node("MatMul", ["pixels", "more"], ["corners"]),
        helper.make_node("Reshape", ["scores", "three"], ["pred_logits"]),
        helper.make_node("Reshape", ["corners", "four"], ["pred_boxes"]),
    ]
    graph = helper.make_graph(nodes, "g", [image], [logits, boxes], [weight, more, *shapes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    entry = model.metadata_props.add()
    entry.key, entry.value = "ddetr_mm", json.dumps({"class_names": ["background", "a", "b"]})
    return model.SerializeToString()


ONNX = onnx_bytes()


def test_the_graph_is_sound(tmp_path: Path):
    (tmp_path / "x.onnx").write_bytes(ONNX)
    assert read_signature(tmp_path / "x.onnx").input_size_hw == (8, 8)
    ort_session(tmp_path / "x.onnx")


@settings(max_examples=few(60))
@given(start=damaged(ONNX[:150]), end=damaged(ONNX[-500:]), which=st.booleans())
def test_damaged_onnx_file(tmp_path_factory: pytest.TempPathFactory, start: bytes, end: bytes, which: bool):
    path = tmp_path_factory.getbasetemp() / "fuzz.onnx"
    path.write_bytes(start + ONNX[150:] if which else ONNX[:-500] + end)
    with memory_grows_less_than(2**30):
        try:
            signature = read_signature(path)
            assert min(signature.input_size_hw) > 0
            assert signature.class_names is None or all(isinstance(n, str) for n in signature.class_names)
            ort_session(path, ["CPUExecutionProvider"])
        except WeightsError as error:
            assert "fuzz.onnx" in str(error)
