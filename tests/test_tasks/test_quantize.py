"""``ddetr-mm quantize`` from a spec to files that evaluate, inference and export take, field by field."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import ddetr_mm.tasks.quantize as task
from ddetr_mm.cli import main
from ddetr_mm.deploy.onnx_file import read_meta
from ddetr_mm.spec import load_spec
from ddetr_mm.weights import read_checkpoint

from .test_exported_graphs import (
    CHECKPOINT,
    NAMES,
    ONNX,
    Project,
    exported,  # noqa: F401 - a fixture
    inside,
)

DATA = "dataset.quant_calibration_data_sources={image_dir: images, json_file: truth.json}"
STATIC = ("quantize.mode=static_ptq", DATA)
LOOSE = "ddetr_mm.quantize_max_ap_drop=100"


@dataclass(frozen=True)
class Result:
    """What a command left and said."""

    status: int
    folder: Path
    said: str

    @property
    def parity(self) -> dict:
        """The content of parity.json."""
        return json.loads((self.folder / "parity.json").read_text())


def run_quantize(
    project: Project, backend: str, folder: Path, *words: str, model: str = CHECKPOINT
) -> Result:
    """Run the command in this process."""
    given = [f"quantize.backend={backend}", f"quantize.model_path={model}", f"quantize.results_dir={folder}"]
    said = io.StringIO()
    with inside(project.folder), redirect_stdout(said), redirect_stderr(said):
        status = main(["quantize", "-e", project.spec, *given, *words])
    return Result(status, folder, said.getvalue())


@pytest.fixture
def quantize(exported: Project, tmp_path: Path):  # noqa: F811
    def run(backend: str, *words: str, model: str = CHECKPOINT, folder: Path = tmp_path) -> Result:
        return run_quantize(exported, backend, folder, *words, model=model)

    return run


def evaluated(project: Project, path: Path, tmp_path: Path, capsys, *words: str) -> float:
    """AP of a file by evaluate."""
    folder = tmp_path / "evaluated"
    with inside(project.folder):
        given = [f"evaluate.checkpoint={path}", f"evaluate.results_dir={folder}", *words]
        assert main(["evaluate", "-e", project.spec, *given]) == 0, capsys.readouterr().err
    capsys.readouterr()
    return json.loads((folder / "results.json").read_text())["AP"]


LINEAR = "quantize.layers=[{module_name: Linear, weights: {dtype: %s}}]"


TORCHAO_FILE = "quantized_model_torchao.pth"


@pytest.fixture(scope="module")
def torchao_result(exported: Project, tmp_path_factory) -> Result:  # noqa: F811
    """The checkpoint with INT8 weights of its linear layers."""
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("torchao")
    found = run_quantize(exported, "torchao", folder, LINEAR % "int8", LOOSE)
    assert found.status == 0 and (folder / TORCHAO_FILE).is_file(), found.said
    return found


def test_evaluate_agrees_with_the_certificate(exported, torchao_result, tmp_path, capsys):  # noqa: F811
    found, parity = torchao_result, torchao_result.parity
    path = found.folder / TORCHAO_FILE
    assert parity["certified"] and not parity["rejected"] and parity["algorithm"] is None
    assert parity["quantized_model"]["file"] == str(path)
    assert parity["quantized_model"]["size_bytes"] == path.stat().st_size
    assert parity["float_model"]["latency_ms"] > 0 and parity["quantized_model"]["latency_ms"] > 0
    assert parity["calibration_images"] == 0
    assert set(parity["layers"].values()) == {"weights int8, inputs native"}
    assert evaluated(exported, path, tmp_path, capsys) == pytest.approx(
        parity["quantized_model"]["ap"], abs=1e-3
    )
    drop = 100 * (parity["float_model"]["ap"] - parity["quantized_model"]["ap"])
    assert parity["ap_drop"] == pytest.approx(drop)
    read, before = read_checkpoint(path), read_checkpoint(exported.folder / CHECKPOINT)
    assert tuple(read.meta.class_names) == NAMES
    changed = {
        key for key, value in read.state_dict.items() if not torch.equal(value, before.state_dict[key])
    }
    assert changed == {f"{name}.weight" for name in parity["layers"]}
    report = (found.folder / "report.html").read_text()
    assert "Certified: AP" in report and TORCHAO_FILE in report
    status = [json.loads(line) for line in (found.folder / "status.json").read_text().splitlines()]
    assert status[-1]["status"] == "SUCCESS"
    assert float(status[-1]["kpi"]["quantized_mAP"]) == pytest.approx(parity["quantized_model"]["ap"])


def test_a_quantized_checkpoint_is_not_quantized_again(quantize, torchao_result):
    found = quantize("torchao", LINEAR % "int8", model=str(torchao_result.folder / TORCHAO_FILE))
    assert found.status == 2 and "is quantized already" in found.said


@pytest.mark.slow
def test_torchaos_file_is_detected_with_and_exported(exported, torchao_result, tmp_path):  # noqa: F811
    path = torchao_result.folder / TORCHAO_FILE
    with inside(exported.folder):
        words = [f"inference.checkpoint={path}", f"inference.results_dir={tmp_path / 'labels'}"]
        assert main(["inference", "-e", exported.spec, *words]) == 0
        words = [f"export.checkpoint={path}", f"export.onnx_file={tmp_path / 'q.onnx'}"]
        assert main(["export", "-e", exported.spec, *words]) == 0
    assert len(list((tmp_path / "labels" / "labels").glob("*.txt"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_weights_have_as_many_values(quantize, dtype: str):
    pytest.importorskip("torchao")
    found = quantize("torchao", LINEAR % dtype, "quantize.skip_names=['*decoder*', '*head*']", LOOSE)
    assert found.status == 0, found.said
    name = next(iter(found.parity["layers"]))
    assert not any("decoder" in one or "head" in one for one in found.parity["layers"])
    weight = read_checkpoint(found.folder / "quantized_model_torchao.pth").state_dict[f"{name}.weight"]
    row = weight[0] / weight[0].abs().max() * torch.finfo(getattr(torch, dtype.replace("fp8", "float8"))).max
    kind = getattr(torch, dtype.replace("fp8", "float8"))
    assert torch.allclose(row.to(kind).float(), row, rtol=1e-5)


ALL = "quantize.layers=[{module_name: '*', weights: {dtype: int8}, activations: {dtype: int8}}]"
BACKBONE = "quantize.layers=[{module_name: 'backbone.*', weights: {dtype: int8}, activations: {dtype: int8}}]"


@pytest.mark.slow
def test_modelopts_file_is_evaluated_with_rounded_inputs(exported, quantize, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("modelopt")
    words = (*STATIC, "quantize.algorithm=max", ALL, "quantize.skip_names=['*sampling_offsets*']", LOOSE)
    found = quantize("modelopt.pytorch", *words, "ddetr_mm.quantize_images=3")
    path = found.folder / "quantized_model_modelopt.pytorch.pth"
    assert found.status == 0 and path.is_file(), found.said
    parity = found.parity
    assert parity["calibration_images"] == 3 and parity["algorithm"] == "max" and parity["certified"]
    assert parity["float_layers"] == {"bbox_head.cls_branches.0": "no image reaches it"}
    assert not any("sampling_offsets" in name for name in parity["layers"])
    read = read_checkpoint(path)
    assert read.quantization.rounds_inputs and set(read.quantization.layers) == set(parity["layers"])
    assert read.quantization.layers["backbone.conv1"].weight_axis == 0
    assert evaluated(exported, path, tmp_path, capsys) == pytest.approx(
        parity["quantized_model"]["ap"], abs=1e-3
    )
    with inside(exported.folder):
        words = [f"export.checkpoint={path}", f"export.onnx_file={tmp_path / 'q.onnx'}"]
        assert main(["export", "-e", exported.spec, *words]) == 2
    said = capsys.readouterr().err
    assert "has quantized inputs" in said and "quantize its float graph" in said
    assert not (tmp_path / "q.onnx").exists()


def graph_of(path: Path) -> tuple[dict[str, list[str]], onnx.ModelProto]:
    """Layer → operators that feed it; and the graph."""
    model = onnx.load(str(path))
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    layers = {
        node.name: [makers.get(name, "") for name in node.input[:2]]
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm")
    }
    return layers, model


def quantized_layers(path: Path) -> set[str]:
    """The layers of a graph with quantized input and weight."""
    return {name for name, makers in graph_of(path)[0].items() if makers == ["DequantizeLinear"] * 2}


@pytest.mark.slow
def test_onnxruntime_exports_first_and_keeps_boxes_in_float(exported, quantize):  # noqa: F811
    found = quantize("onnxruntime", *STATIC, LOOSE)
    path = found.folder / "model.quant.onnx"
    assert found.status == 0 and (found.folder / "model.onnx").is_file(), found.said
    parity = found.parity
    assert parity["float_model"]["file"] == str(found.folder / "model.onnx")
    assert parity["calibration_images"] == 6 and parity["algorithm"] == "minmax"
    assert quantized_layers(path) == set(parity["layers"])
    kept = set(parity["float_layers"].values())
    assert kept == {"sampling offsets", "boxes"}
    assert all("reg_branches" in name for name, why in parity["float_layers"].items() if why == "boxes")


def test_named_layers_of_a_graph_are_quantized(exported, quantize, tmp_path, capsys):  # noqa: F811
    words = (
        "quantize.layers=[{module_name: 'backbone.*', weights: {dtype: int8}}]",
        "quantize.skip_names=['*layer2*']",
    )
    found = quantize("onnxruntime", *STATIC, *words, LOOSE, model=ONNX)
    path = found.folder / "chain.quant.onnx"
    assert found.status == 0 and not (found.folder / "chain.onnx").exists(), found.said
    layers, parity = quantized_layers(path), found.parity
    assert layers and all("backbone" in name and "layer2" not in name for name in layers)
    assert layers == set(parity["layers"])
    assert read_meta(graph_of(path)[1])["class_names"] == list(NAMES)
    assert evaluated(exported, path, tmp_path, capsys) == pytest.approx(
        parity["quantized_model"]["ap"], abs=1e-3
    )
    again = quantize("onnxruntime", *STATIC, model=str(path), folder=tmp_path / "again")
    assert again.status == 2 and "has Q/DQ nodes already" in again.said


def input_range(path: Path) -> float:
    """The width of the range of the graph's input."""
    model = graph_of(path)[1]
    scale = next(one for one in model.graph.initializer if one.name == "inputs_scale")
    return 255 * float(numpy_helper.to_array(scale))


@pytest.mark.slow
def test_algorithm_and_arguments_change_the_ranges(quantize, tmp_path):
    words = (*STATIC, "quantize.layers=[{module_name: '*conv1', weights: {dtype: int8}}]", LOOSE)
    widths = {}
    for algorithm, more in (
        ("minmax", ()),
        ("percentile", ("quantize.backend_kwargs={percentile: 90}",)),
    ):
        folder = tmp_path / algorithm
        found = quantize(
            "onnxruntime", *words, f"quantize.algorithm={algorithm}", *more, model=ONNX, folder=folder
        )
        assert found.status == 0 and found.parity["algorithm"] == algorithm, found.said
        widths[algorithm] = input_range(folder / "chain.quant.onnx")
    assert widths["percentile"] < 0.9 * widths["minmax"]


@pytest.mark.slow
def test_sensitivity_puts_groups_back_until_the_loss_is_within_the_limit(quantize, monkeypatch):
    aps = iter([0.9, 0.5, *[0.88] * 40])  # float; the first group; then all others

    def measure(loaded, session, path, name):
        measure.names.append(name)
        return (next(aps), 0.9)

    measure.names = []
    monkeypatch.setattr(task, "measure_ap", measure)
    words = ("quantize.backend_kwargs={sensitivity: true}", "ddetr_mm.quantize_max_ap_drop=100")
    found = quantize("onnxruntime", *STATIC, *words, model=ONNX)
    assert found.status == 0, found.said
    table = found.parity["sensitivity"]
    assert found.parity["sensitivity_of"] == "loss of AP in points"
    assert table[0]["loss"] == pytest.approx(40) and all(row["loss"] == pytest.approx(2) for row in table[1:])
    assert {"backbone.stem", "encoder.0", "decoder.1", "neck"} <= {row["group"] for row in table}
    assert measure.names[0] == "float" and set(measure.names[1:]) == {"group"}
    assert "Sensitivity" in (found.folder / "report.html").read_text()


@pytest.mark.slow
def test_groups_go_back_to_float(exported, quantize, monkeypatch):  # noqa: F811
    def measure(loaded, session, path, name):
        quantized = quantized_layers(path) if name == "group" else set()
        return (0.9 - 0.05 * any("backbone/layer3" in one for one in quantized), 0.9)

    monkeypatch.setattr(task, "measure_ap", measure)
    found = quantize("onnxruntime", *STATIC, "quantize.backend_kwargs={sensitivity: true}", LOOSE, model=ONNX)
    assert found.status == 0 and "backbone.3 stays in float" not in found.said  # 5 points are within 100
    found = quantize(
        "onnxruntime",
        *STATIC,
        "quantize.backend_kwargs={sensitivity: true}",
        "ddetr_mm.quantize_max_ap_drop=4.9",
        model=ONNX,
    )
    assert "all others together lose 5.00 points: backbone.3 stays in float" in found.said
    parity = found.parity
    back = {name for name, why in parity["float_layers"].items() if why == "sensitivity: group backbone.3"}
    assert back and all("backbone/layer3" in name for name in back)
    assert not back & set(parity["layers"])


@contextmanager
def aps(monkeypatch, *values: float):
    """Have evaluations find these AP, one after the other."""
    waiting = iter(values)

    class Found:
        def __init__(self, runner) -> None:
            self.runner = runner

        def __getattr__(self, name):
            return getattr(self.runner, name)

        def test(self):
            return {"coco/bbox_mAP": next(waiting), "coco/bbox_mAP_50": 0.9}

    original = task.evaluating_runner
    with monkeypatch.context() as patched:
        patched.setattr(task, "evaluating_runner", lambda *given: Found(original(*given)))
        yield


@pytest.mark.parametrize(("limit", "status"), [(1.9, 2), pytest.param(2.1, 0, marks=pytest.mark.slow)])
def test_a_loss_beyond_the_limit_is_rejected_and_kept_under_another_name(
    quantize, monkeypatch, limit, status
):
    with aps(monkeypatch, 0.9, 0.88):
        found = quantize("onnxruntime", *STATIC, f"ddetr_mm.quantize_max_ap_drop={limit}", model=ONNX)
    assert found.status == status, found.said
    names = {path.name for path in found.folder.iterdir() if "quant" in path.name and path.is_file()}
    assert names == {"chain.quant.onnx.rejected" if status else "chain.quant.onnx"}
    parity = found.parity
    assert parity["rejected"] is bool(status) and parity["ap_drop"] == pytest.approx(2)
    assert parity["max_ap_drop"] == limit
    if status:
        assert "loses too much: AP falls from 0.900 to 0.880" in found.said
        assert "2.00 points" in found.said and "allowed: at most 1.9" in found.said
        assert "Rejected: " in (found.folder / "report.html").read_text()


def test_without_validation_data_the_model_is_not_certified(quantize):
    found = quantize("onnxruntime", *STATIC, "dataset.val_data_sources=null", model=ONNX)
    assert found.status == 0 and (found.folder / "chain.quant.onnx").is_file(), found.said
    parity = found.parity
    assert not parity["certified"] and not parity["rejected"] and parity["ap_drop"] is None
    assert parity["reason"] == "there are no validation data: give dataset.val_data_sources"
    assert "Not certified: there are no validation data" in found.said


@pytest.mark.parametrize(
    ("backend", "words", "message"),
    [
        ("onnxruntime", (), "quantize.mode (default): is not a mode of onnxruntime"),
        (
            "onnxruntime",
            ("quantize.mode=null",),
            ": is needed for onnxruntime and not given; give image_dir and json_file",
        ),
        ("torchao", (), "quantize.layers (default): names no format, and torchao quantizes nothing without"),
        ("torchao", ("quantize.mode=static_ptq", LINEAR % "int8"), "allowed: weight_only_ptq"),
        (
            "torchao",
            ("quantize.model_path=nothing.pth", LINEAR % "int8"),
            "nothing.pth: quantize.model_path: does not exist",
        ),
        (
            "torchao",
            ("quantize.model_path=''", LINEAR % "int8"),
            "quantize.model_path, override: is needed for quantize",
        ),
        (
            "torchao",
            ("quantize.layers=[{module_name: 'backbone.layer9*', weights: {dtype: int8}}]",),
            "quantize.layers[0].module_name: fits no layer (got 'backbone.layer9*'); the nearest: ",
        ),
        (
            "onnxruntime",
            ("quantize.mode=null", "dataset.quant_calibration_data_sources={image_dir: images}"),
            "quant_calibration_data_sources.json_file",
        ),
        (
            "onnxruntime",
            (
                "quantize.mode=null",
                "dataset.quant_calibration_data_sources={image_dir: images, json_file: no.json}",
            ),
            "no.json: annotation file does not exist",
        ),
    ],
)
def test_one_message_for_wrong_values(quantize, backend, words, message):
    found = quantize(backend, *words)
    assert found.status == 2 and message in found.said, found.said
    assert not list(found.folder.glob("*quant*"))


@pytest.mark.slow
def test_a_file_of_others_is_not_replaced_without_force(quantize, tmp_path):
    (tmp_path / "chain.quant.onnx").write_text("mine")
    found = quantize("onnxruntime", *STATIC, model=ONNX)
    assert found.status == 2 and "no run of ours wrote it" in found.said
    assert (tmp_path / "chain.quant.onnx").read_text() == "mine"
    found = quantize("onnxruntime", *STATIC, LOOSE, "--force", model=ONNX)
    assert found.status == 0 and quantized_layers(tmp_path / "chain.quant.onnx")


@pytest.mark.parametrize(
    ("device", "backend", "notes"),
    [
        ("cuda", "torchao", ["note: quantize.device cuda: there is no GPU, the CPU is used"]),
        ("cuda:3", "torchao", ["note: quantize.device cuda:3: there is no GPU, the CPU is used"]),
        ("cpu", "torchao", []),
        (
            "trt",
            "torchao",
            [
                "note: quantize.device trt is for modelopt.onnx: torchao takes cuda",
                "note: quantize.device trt: there is no GPU, the CPU is used",
            ],
        ),
        ("trt", "modelopt.onnx", ["note: quantize.device trt: there is no GPU, the CPU is used"]),
    ],
)
def test_a_device_that_is_missing_is_the_cpu(tmp_path, monkeypatch, capsys, device, backend, notes):
    (tmp_path / "spec.yaml").write_text("")
    words = [
        f"quantize.device={device}",
        f"quantize.backend={backend}",
        "quantize.mode=null",
        "quantize.algorithm=null",
    ]
    loaded = load_spec(tmp_path / "spec.yaml", words, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    task.choose_quantize_device(loaded)
    assert capsys.readouterr().err.splitlines() == notes
    assert loaded.spec.ddetr_mm.device == "cpu"


def test_calibration_images_are_those_of_a_validation(exported, tmp_path):  # noqa: F811
    with inside(exported.folder):
        loaded = load_spec(exported.spec, [DATA, "ddetr_mm.quantize_images=4"], None)
        graph = list(task.graph_batches(loaded, Path(ONNX), tmp_path))
        images = list(task.calibration_batches(loaded, Path(CHECKPOINT), tmp_path))
    assert sum(len(batch) for batch in graph) == 4 and graph[0].shape[1:] == (3, 64, 96)
    assert graph[0].dtype == np.float32 and abs(float(graph[0].mean())) < 2
    names = [Path(sample.img_path).name for batch in images for sample in batch["data_samples"]]
    assert names == ["0.png", "1.png", "3.png", "5.png"]  # evenly spread
    assert {tuple(one.shape[1:]) for batch in images for one in batch["inputs"]} == {(64, 85)}


def test_the_template_of_nvidia_is_translated_to_rules():
    path = Path(__file__).resolve().parents[1] / "test_spec/assets/templates/quantize_template.yaml"
    spec = load_spec(path, (), "quantize").spec
    rules = task.layer_rules(spec)
    assert [(one.pattern, one.weights, one.activations, one.axis) for one in rules] == [
        ("*", "fp8_e4m3fn", "fp8_e4m3fn", None)
    ]
    assert task.target_name(spec) == "quantized_model_modelopt.pytorch.pth"
    layer = "{module_name: a, weights: {dtype: native, quant_axis: 0}, activations: {dtype: int8}}"
    native = f"quantize.layers=[{layer}]"
    rule = task.layer_rules(load_spec(path, [native], "quantize").spec)[0]
    assert (rule.weights, rule.activations, rule.axis) == (None, "int8", 0)


@pytest.mark.slow
def test_modelopts_graph_backend_takes_an_onnx_file(quantize):
    pytest.importorskip("modelopt")
    words = ("quantize.algorithm=max", "quantize.layers=[{module_name: Conv, weights: {dtype: int8}}]")
    found = quantize("modelopt.onnx", *STATIC, *words, "quantize.skip_names=['*encoder*']", LOOSE, model=ONNX)
    path = found.folder / "chain.quant.onnx"
    assert found.status == 0, found.said
    parity = found.parity
    assert parity["algorithm"] == "max" and set(parity["layers"].values()) == {"int8"}
    assert not any("encoder" in name for name in parity["layers"])
    assert quantized_layers(path) <= set(parity["layers"]) and len(quantized_layers(path)) > 5
    assert read_meta(graph_of(path)[1])["class_names"] == list(NAMES)
