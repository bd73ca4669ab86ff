"""Which layers a pattern names, what libraries make of them, and how their files are read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ddetr_mm.deploy import quantize_graph
from ddetr_mm.deploy.onnx_file import META_KEY, q_dq_formats, read_meta, write_meta
from ddetr_mm.deploy.quantize import (
    LayerRule,
    choose_layers,
    inside_attention,
    quantize_modelopt,
    quantize_torchao,
    torch_names,
)
from ddetr_mm.errors import ExportError, SpecError, WeightsError
from ddetr_mm.weights.quantized import (
    Quantization,
    QuantizedLayer,
    plain_content,
    quantize_inputs,
    round_to,
    weight_ranges,
)
from ddetr_mm.weights.safe_read import read_raw


def missing(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is missing")


needs_torchao = missing("torchao")


def needs_modelopt(test):
    """Skip without ModelOpt, and leave out of the default run: importing it takes 15 s."""
    return pytest.mark.slow(missing("modelopt")(test))


INT8 = LayerRule("*", "int8", "int8")


class Small(nn.Module):
    """A convolution, two linear layers and an attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 4)
        self.unused = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.last(self.first(self.conv(images).mean((2, 3))).relu())[:, None]
        return found + self.attention(found, found, found)[0]


NAMES = {
    "backbone.conv1": ("model.backbone.conv1", "Conv2d"),
    "backbone.bn1": ("BatchNorm2d",),
    "encoder.0.linear": ("model.transformer.encoder.layers.0.linear1", "Linear"),
    "bbox_head.cls": ("class_embed", "Linear"),
}
USABLE = {"backbone.conv1", "encoder.0.linear", "bbox_head.cls"}


# --- patterns ---


@pytest.mark.parametrize(
    ("patterns", "skip", "chosen"),
    [
        (["*"], [], ["backbone.conv1", "encoder.0.linear", "bbox_head.cls"]),
        (["Linear"], [], ["encoder.0.linear", "bbox_head.cls"]),
        (["encoder.*"], [], ["encoder.0.linear"]),
        (["*transformer.encoder*"], [], ["encoder.0.linear"]),  # the name in TAO
        (["*"], ["*head*", "BatchNorm2d"], ["backbone.conv1", "encoder.0.linear"]),
        (["*"], ["Conv2d"], ["encoder.0.linear", "bbox_head.cls"]),
        (["backbone.conv[12]"], [], ["backbone.conv1"]),
    ],
)
def test_patterns_name_layers_by_name_or_class(patterns, skip, chosen):
    rules = [LayerRule(pattern, "int8") for pattern in patterns]
    assert list(choose_layers(NAMES, USABLE, rules, skip)) == chosen


def test_the_first_entry_that_fits_decides():
    rules = [LayerRule("bbox_head.*"), LayerRule("Linear", "fp8_e4m3fn"), LayerRule("*", "int8")]
    found = choose_layers(NAMES, USABLE, rules, [])
    assert {name: rule.weights for name, rule in found.items()} == {
        "backbone.conv1": "int8",
        "encoder.0.linear": "fp8_e4m3fn",
    }


@pytest.mark.parametrize(
    ("rules", "skip", "words"),
    [
        (["linear"], [], "quantize.layers[0].module_name: fits no layer (got 'linear'); the nearest: Linear"),
        (
            ["*"],
            ["encodr.0.linear"],
            "quantize.skip_names[0]: fits no layer (got 'encodr.0.linear'); the nearest: encoder.0.linear",
        ),
        (["BatchNorm2d"], [], "quantizes no layer"),
        (["*"], ["*"], "quantizes no layer"),
    ],
)
def test_patterns_that_name_nothing_are_refused_with_the_nearest(rules, skip, words):
    with pytest.raises(SpecError) as caught:
        choose_layers(NAMES, USABLE, [LayerRule(one, "int8") for one in rules], skip)
    assert words in str(caught.value)


def test_classes_of_torch_may_be_skipped_though_the_network_has_none():
    said: list[str] = []
    found = choose_layers(NAMES, USABLE, [INT8], ["LSTM"], known_classes={"LSTM"}, log=said.append)
    assert len(found) == 3 and said == ["note: quantize.skip_names[0]: the network has no LSTM"]


def test_layers_that_a_backend_leaves_are_named():
    said: list[str] = []
    rules = [LayerRule("Conv2d", "int8"), LayerRule("Linear", "int8")]
    choose_layers(NAMES, {"encoder.0.linear", "bbox_head.cls"}, rules, [], log=said.append)
    assert said == ["note: 1 layers of class Conv2d are left as they are: the backend does not quantize them"]


def test_names_of_a_network():
    names = torch_names(Small())
    assert names["conv"][-1] == "Conv2d" and names["attention"][-1] == "MultiheadAttention"
    assert inside_attention(Small()) == {"attention.out_proj"}


# --- rounding ---


def test_int8_has_255_steps_and_cuts():
    values = torch.tensor([-3.0, -2.0, 0.0, 0.0078, 1.0, 2.0, 9.0])
    found = round_to(values, "int8", torch.tensor(2.0))
    step = 2 / 127
    assert torch.allclose(found, torch.tensor([-128 * step, -2.0, 0, 0, 64 * step, 2.0, 2.0]))


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp8_e4m3fn", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
def test_fp8_is_torchs_at_the_full_range_and_never_nan(dtype, kind):
    largest = torch.finfo(kind).max
    values = torch.linspace(-largest, largest, 1001)
    found = round_to(values, dtype, torch.tensor(largest))
    assert torch.equal(found, values.to(kind).float())
    assert round_to(torch.tensor([5.0]), dtype, torch.tensor(1.0)).item() == pytest.approx(1.0)


def test_a_range_of_zero_gives_zeros():
    assert torch.equal(round_to(torch.ones(3), "int8", torch.zeros(1)), torch.zeros(3))


def test_ranges_of_weights_are_per_output_or_whole():
    weight = torch.tensor([[1.0, -4.0], [0.5, 0.25]])
    assert weight_ranges(weight, 0).tolist() == [[4.0], [0.5]]
    assert weight_ranges(weight, None).tolist() == [[4.0]]


# --- torchao ---


@needs_torchao
@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3fn", "fp8_e5m2"])
def test_torchaos_file_is_read_without_torchao_as_it_computes(tmp_path: Path, monkeypatch, dtype: str):
    network = Small().eval()
    before = network.first.weight.detach().clone()
    content = quantize_torchao(network, {"first": LayerRule("first", dtype)})
    expected = network.first.weight.dequantize()
    torch.save({"state_dict": content, "meta": {"epoch": 1}}, tmp_path / "q.pth")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    raw = read_raw(tmp_path / "q.pth")
    assert "torchao" not in sys.modules
    read = raw.payload["state_dict"]
    assert torch.equal(read["first.weight"], expected) and not torch.equal(read["first.weight"], before)
    assert torch.equal(read["last.weight"], network.last.weight)
    assert raw.quantization == Quantization("torchao", {"first": QuantizedLayer(dtype, 0)})


@needs_torchao
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(scale=torch.ones(3, 1)), "scales of (3, 1) do not fit"),
        (dict(qdata=torch.zeros(2, 2, dtype=torch.int8)), "holds (2, 2) values"),
        (dict(qdata=torch.zeros(16, 8)), "values of torch.float32"),
        (dict(qdata=None), "lacks its values"),
        (dict(act_pre_scale=torch.ones(1)), "inputs are quantized"),
    ],
)
def test_damaged_quantized_tensors_are_refused(tmp_path: Path, change, words: str):
    network = Small().eval()
    content = quantize_torchao(network, {"first": LayerRule("first", "int8")})
    torch.save(content, tmp_path / "q.pth")
    from ddetr_mm.weights import safe_read

    payload = safe_read._read_torch_zip(tmp_path / "q.pth", (tmp_path / "q.pth").stat().st_size)
    payload["first.weight"].parts = payload["first.weight"].parts | change
    with pytest.raises(WeightsError, match="first.weight") as caught:
        plain_content(payload, tmp_path / "q.pth")
    assert words in str(caught.value)


def test_other_classes_of_torchao_are_refused(tmp_path: Path):
    code = b"\x80\x02}X\x01\x00\x00\x00actorchao.quantization.evil\nrun_something\n)Rs."
    import zipfile

    with zipfile.ZipFile(tmp_path / "q.pth", "w") as archive:
        archive.writestr("q/data.pkl", code)
        archive.writestr("q/version", "3")
    with pytest.raises(WeightsError, match=r"asks to run or build torchao\.quantization\.evil"):
        read_raw(tmp_path / "q.pth")


# --- ModelOpt ---


def _images() -> torch.Tensor:
    torch.manual_seed(1)
    images = torch.randn(4, 3, 8, 8)
    images[0, 0, 0, 0] = 20.0  # an outlier, which an entropy calibration cuts
    return images


@needs_modelopt
@pytest.mark.parametrize(
    ("algorithm", "dtypes", "axis"),
    [
        ("max", ("int8", "int8"), None),
        ("max", ("fp8_e4m3fn", "fp8_e4m3fn"), None),
        ("minmax", ("fp8_e4m3fn", "int8"), 0),
        ("entropy", ("int8", "int8"), None),
    ],
)
def test_modelopts_file_is_read_as_its_network_computes(tmp_path: Path, algorithm, dtypes, axis):
    network, images = Small().eval(), _images()
    rules = {name: LayerRule(name, *dtypes, axis=axis) for name in ("conv", "first", "last", "unused")}
    content, lost = quantize_modelopt(network, rules, algorithm, lambda: network(images))
    assert lost == ["unused"]
    torch.save(content, tmp_path / "q.pth")
    raw = read_raw(tmp_path / "q.pth")
    assert set(raw.quantization.layers) == {"conv", "first", "last"}
    own_axis = 0 if dtypes[0] == "int8" or axis == 0 else None
    layer = raw.quantization.layers["conv"]
    assert (layer.weight_dtype, layer.weight_axis, layer.input_dtype) == (dtypes[0], own_axis, dtypes[1])
    if algorithm != "entropy":
        assert layer.input_amax == images.abs().max().item()
    else:
        assert 0 < layer.input_amax < images.abs().max().item()
    plain = Small().eval()
    plain.load_state_dict(raw.payload["state_dict"])
    assert quantize_inputs(plain, raw.quantization) == 3
    with torch.no_grad():
        expected, found, floats = network(images), plain(images), Small().eval()(images)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (floats - expected).abs().max() > 1e-4


def modelopt_content(**changed) -> dict:
    """A file as ModelOpt saves it: INT8 weights of `first` with a range for each row, inputs within 2."""
    weight = {"_num_bits": 8, "_disabled": False, "_block_sizes": None, "_dynamic": False} | changed
    quantizers = {
        "first.weight_quantizer": weight,
        "first.input_quantizer": {"_num_bits": 8, "_disabled": False},
        "first.output_quantizer": {"_num_bits": 8, "_disabled": True},
    }
    return {
        "modelopt_state": {
            "modelopt_state_dict": [("quantize", {"metadata": {"quantizer_state": quantizers}})],
            "modelopt_version": "0.47.0",
        },
        "model_state_dict": {
            "first.weight": torch.tensor([[1.0, 0.3], [-4.0, 0.3]]),
            "first.bias": torch.tensor([0.0, 1.0]),
            "first.weight_quantizer._amax": torch.tensor([[1.0], [4.0]]),
            "first.input_quantizer._amax": torch.tensor(2.0),
        },
    }


def test_weights_and_inputs_of_modelopts_file_are_rounded(tmp_path: Path):
    torch.save(modelopt_content(), tmp_path / "q.pth")
    raw = read_raw(tmp_path / "q.pth")
    layer = QuantizedLayer("int8", 0, "int8", 2.0)
    assert raw.quantization == Quantization("modelopt.pytorch", {"first": layer})
    weights = raw.payload["state_dict"]
    assert set(weights) == {"first.weight", "first.bias"}
    expected = torch.tensor([[1.0, 38 / 127], [-4.0, 10 * 4 / 127]])
    assert torch.allclose(weights["first.weight"], expected)
    network = nn.Sequential()
    network.add_module("first", nn.Linear(2, 2))
    network.load_state_dict(weights)
    assert quantize_inputs(network, raw.quantization) == 1
    step = 2 / 127  # 1.0 becomes 64 steps, and 5.0 is cut
    inputs = torch.tensor([64 * step, 2.0])
    assert torch.allclose(network(torch.tensor([1.0, 5.0])), expected @ inputs + torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("_num_bits", 4, "num_bits 4 is not read"),
        ("_num_bits", [2, 1], "num_bits [2, 1] is not read"),
        ("_block_sizes", {-1: 16}, "_block_sizes is not read"),
        ("_dynamic", True, "_dynamic is not read"),
    ],
)
def test_quantizers_of_other_kinds_are_refused(key, value, words):
    with pytest.raises(
        WeightsError, match="holds a quantizer that is not read: first.weight_quantizer"
    ) as caught:
        plain_content(modelopt_content(**{key: value}), Path("q.pth"))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight_quantizer", None, "it has no range"),
        ("weight_quantizer", torch.tensor([[1.0], [float("nan")]]), "it has no range"),
        ("weight_quantizer", torch.tensor([[1.0], [-1.0]]), "its range is not one of this kind"),
        ("weight_quantizer", torch.ones(3, 1), "it does not fit its layer"),
        ("input_quantizer", torch.ones(2), "its range is not one of this kind"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(name, value, words):
    content = modelopt_content()
    content["model_state_dict"][f"first.{name}._amax"] = value
    with pytest.raises(WeightsError, match=f"first.{name}: {words}"):
        plain_content(content, Path("q.pth"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"modelopt_state": {}}, "without model_state_dict"),
        ({"modelopt_state": {"modelopt_state_dict": 3}, "model_state_dict": {}}, "without quantizers"),
        (
            {"modelopt_state": {"modelopt_state_dict": [("fastnas", {})]}, "model_state_dict": {}},
            "was changed by ModelOpt's 'fastnas'",
        ),
    ],
)
def test_other_files_of_modelopt_are_refused(content, words):
    with pytest.raises(WeightsError, match=words.replace("'", ".")):
        plain_content(content, Path("q.pth"))


# --- graphs ---


def small_graph() -> onnx.ModelProto:
    """A graph shaped as a detector's: features, offsets into GridSample's grid, weights, boxes and logits."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 3, name)

    nodes = [
        helper.make_node(
            "Conv", ["inputs", "backbone.conv1.weight"], ["f"], "/backbone/conv1/Conv", pads=[1] * 4
        ),
        helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("Conv", ["r", "onnx::Conv_1"], ["o"], "/encoder_attention.0/Conv"),
        helper.make_node("Transpose", ["o"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("GridSample", ["r", "grid"], ["s"], mode="bilinear"),
        helper.make_node("ReduceMean", ["s"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Reshape", ["m", "shape"], ["q"]),
        helper.make_node("MatMul", ["q", "w0"], ["a"], "/reg_branches.0/reg_branches.0.0/MatMul"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["c"], "/reg_branches.0/reg_branches.0.2/MatMul"),
        helper.make_node("Sigmoid", ["c"], ["pred_boxes"]),
        helper.make_node("MatMul", ["q", "w2"], ["t"], "/att/MatMul"),
        helper.make_node("Softmax", ["t"], ["u"], axis=-1),
        helper.make_node("Mul", ["q", "u"], ["v"]),
        helper.make_node("MatMul", ["v", "w3"], ["pred_logits"], ""),
    ]
    constants = [
        weight("backbone.conv1.weight", 8, 3, 3, 3),
        weight("onnx::Conv_1", 2, 8, 1, 1),
        numpy_helper.from_array(np.array([-1, 1, 8], np.int64), "shape"),
        weight("w0", 8, 8),
        weight("w1", 8, 4),
        weight("w2", 8, 8),
        weight("w3", 8, 5),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [value("inputs", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [
            value("pred_logits", TensorProto.FLOAT, ["batch", 1, 5]),
            value("pred_boxes", TensorProto.FLOAT, ["batch", 1, 4]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    write_meta(model, {"class_names": ["background", "a"]})
    return model


def test_layers_of_a_graph_and_what_stays_in_float():
    model = small_graph()
    found = quantize_graph.graph_layers(model)
    assert found.sensitive == {
        "/encoder_attention.0/Conv": "sampling offsets",
        "/reg_branches.0/reg_branches.0.0/MatMul": "boxes",
        "/reg_branches.0/reg_branches.0.2/MatMul": "boxes",
        "/att/MatMul": "attention weights",
    }
    assert found.names["/backbone/conv1/Conv"] == ("backbone.conv1", "Conv")
    assert found.groups["/backbone/conv1/Conv"] == "backbone.stem"
    assert found.groups["/encoder_attention.0/Conv"] == "encoder.0"
    assert found.groups["/reg_branches.0/reg_branches.0.2/MatMul"] == "bbox_head"
    assert model.graph.node[-1].name in found.names  # it had none


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("backbone.layer2.0.conv1", "backbone.2"),
        ("decoder.layers.1.ffn.layers.0.0", "decoder.1"),
        ("decoder_attention.1", "decoder.1"),
        ("neck.convs.0.conv", "neck"),
        ("bbox_head.cls_branches.1", "bbox_head"),
        ("MatMul", "other layers"),
    ],
)
def test_groups_of_layers(name: str, group: str):
    assert quantize_graph._group(name) == group


def _batches(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, 3, 8, 8)).astype(np.float32) for _ in range(count)]


def _types(path: Path) -> dict[str, list[str]]:
    """Operators that feed each layer of a graph."""
    graph = onnx.load(str(path)).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    return {
        node.name: [makers.get(name, "constant") for name in node.input[:2]]
        for node in graph.node
        if node.op_type in ("Conv", "MatMul")
    }


def _zero_points(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(str(path)).graph.initializer
        if tensor.name.endswith("zero_point")
    }


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_onnxruntime_quantizes_the_chosen_layers_and_keeps_metadata(tmp_path: Path, method: str):
    model = small_graph()
    layers = quantize_graph.graph_layers(model)
    nodes = [name for name in layers.names if name not in layers.sensitive]
    quantizer = quantize_graph.StaticQuantizer(model, quantize_graph.StaticOptions(method, percentile=99.0))
    assert quantizer.calibrate(_batches()) == 3
    assert quantizer.write(nodes, tmp_path / "q.onnx") > 0
    types = _types(tmp_path / "q.onnx")
    for name in layers.names:
        quantized = types[name] == ["DequantizeLinear", "DequantizeLinear"]
        assert quantized is (name in nodes), name
    written = onnx.load(str(tmp_path / "q.onnx"))
    onnx.checker.check_model(written, full_check=True)
    assert read_meta(written) == {"class_names": ["background", "a"]}
    assert [prop.key for prop in written.metadata_props] == [META_KEY]
    onnx.save(model, str(tmp_path / "f.onnx"))
    error = quantize_graph.output_error(tmp_path / "f.onnx", _batches())
    assert 0 < error(tmp_path / "q.onnx") < 0.1
    assert error(tmp_path / "f.onnx") == 0


@pytest.mark.parametrize(
    ("options", "weight_scales", "input_type"),
    [({}, 8, np.uint8), ({"per_channel": False}, 1, np.uint8), ({"symmetric": True}, 8, np.int8)],
)
def test_options_of_onnxruntime(tmp_path: Path, options, weight_scales, input_type):
    model = small_graph()
    quantize_graph.graph_layers(model)
    quantizer = quantize_graph.StaticQuantizer(model, quantize_graph.StaticOptions(**options))
    quantizer.calibrate(_batches(1))
    quantizer.write(["/backbone/conv1/Conv"], tmp_path / "q.onnx")
    points = _zero_points(tmp_path / "q.onnx")
    weights = points["backbone.conv1.weight_zero_point"]
    assert weights.size == weight_scales and weights.dtype == np.int8
    inputs = points["inputs_zero_point"]
    assert inputs.dtype == input_type and (inputs == 0) == bool(options.get("symmetric"))


@pytest.mark.parametrize("change", ["none", "unsigned", "offset", "no zero point"])
def test_only_symmetric_int8_graphs_become_engines(tmp_path: Path, change: str):
    model = small_graph()
    quantize_graph.graph_layers(model)
    options = quantize_graph.StaticOptions(symmetric=change != "unsigned")
    quantizer = quantize_graph.StaticQuantizer(model, options)
    quantizer.calibrate(_batches(1))
    path = tmp_path / "q.onnx"
    quantizer.write(["/backbone/conv1/Conv"], path)
    written = onnx.load(str(path))
    node = next(node for node in written.graph.node if node.op_type == "QuantizeLinear")
    if change == "offset":
        zero = next(one for one in written.graph.initializer if one.name == node.input[2])
        zero.CopyFrom(numpy_helper.from_array(np.int8(3), zero.name))
    if change == "no zero point":  # ONNX's default is uint8
        del node.input[2]
    onnx.save(written, str(path))
    if change == "none":
        assert q_dq_formats(path, where="key") == ("INT8",)
        # TensorRT reads no int32 biases.
        assert not any(zero.dtype == np.int32 for zero in _zero_points(path).values())
        onnx.save(model, str(tmp_path / "f.onnx"))
        assert q_dq_formats(tmp_path / "f.onnx", where="key") == ()
        return
    words = "zero point that is not 0" if change == "offset" else "format uint8"
    with pytest.raises(ExportError, match=words) as caught:
        q_dq_formats(path, where="gen_trt_engine.onnx_file")
    problem = caught.value.problems[0]
    assert problem.where == "gen_trt_engine.onnx_file" and "symmetric: true" in problem.hint


def test_percentile_and_reduced_range_narrow(tmp_path: Path):
    def scale(name: str, **options) -> np.ndarray:
        model = small_graph()
        quantize_graph.graph_layers(model)
        quantizer = quantize_graph.StaticQuantizer(model, quantize_graph.StaticOptions(**options))
        quantizer.calibrate(_batches())
        quantizer.write(["/backbone/conv1/Conv"], tmp_path / "q.onnx")
        graph = onnx.load(str(tmp_path / "q.onnx")).graph
        return next(numpy_helper.to_array(one) for one in graph.initializer if one.name == name)

    wide, narrow = (scale("inputs_scale", method="percentile", percentile=share) for share in (99.99, 80))
    assert narrow < 0.8 * wide
    full, reduced = (scale("backbone.conv1.weight_scale", reduce_range=flag) for flag in (False, True))
    assert np.allclose(reduced, full * 127 / 63, rtol=0.02)


@needs_modelopt
@pytest.mark.parametrize("algorithm", ["max", "entropy"])
def test_modelopt_quantizes_the_named_nodes_and_keeps_metadata(tmp_path: Path, algorithm: str):
    model = small_graph()
    quantize_graph.graph_layers(model)
    source, target = tmp_path / "f.onnx", tmp_path / "q.onnx"
    onnx.save(model, str(source))
    node = "/backbone/conv1/Conv"
    count = quantize_graph.quantize_by_modelopt(
        source, target, [node], _batches(), mode="int8", algorithm=algorithm
    )
    written = onnx.load(str(target))
    onnx.checker.check_model(written)
    assert count == quantize_graph.quantized_nodes(written) >= 2
    assert read_meta(written) == {"class_names": ["background", "a"]}
    assert _types(target)[node][0] == "DequantizeLinear"
    assert _types(target)["/att/MatMul"][0] != "DequantizeLinear"


@needs_modelopt
def test_a_graph_of_which_modelopt_quantizes_nothing_is_refused(tmp_path: Path):
    model = small_graph()  # ModelOpt leaves convolutions of few channels out of FP8
    quantize_graph.graph_layers(model)
    source = tmp_path / "f.onnx"
    onnx.save(model, str(source))
    with pytest.raises(ExportError, match="ModelOpt quantized none of 1 layers"):
        quantize_graph.quantize_by_modelopt(
            source, tmp_path / "q.onnx", ["/backbone/conv1/Conv"], _batches(), mode="fp8", algorithm="max"
        )


def test_groups_are_quantized_one_at_a_time_and_sorted_by_their_loss(tmp_path: Path):
    written: list[list[str]] = []

    def write(names, path):
        written.append(list(names))
        path.write_text(names[0])

    losses = quantize_graph.group_losses(
        ["a", "b", "c"],
        {"a": "one", "b": "two", "c": "one"},
        write,
        lambda path: {"a": 0.5, "b": 2.0}[path.read_text()],
        lambda line: None,
    )
    assert written == [["a", "c"], ["b"]]
    assert [(one.group, one.num_layers, one.loss) for one in losses] == [("two", 1, 2.0), ("one", 2, 0.5)]
