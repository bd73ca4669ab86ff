"""Every subtask takes a checkpoint of any format, and of either numbering of classes, as it is."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

import ddetr_mm.register  # noqa: F401 - registers the detector
from ddetr_mm.cli import main
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.mmdet_tools import prepare_arguments
from ddetr_mm.tasks.runner import config_source
from ddetr_mm.weights import convert_checkpoint, inspect_checkpoint

NAMES = ("background", "triangle", "star", "unknown", "circle")
SPEC = """
results_dir: results
dataset:
  train_data_sources: [{image_dir: images, json_file: truth.json}]
  val_data_sources: [{image_dir: images, json_file: truth.json}]
  test_data_sources: {image_dir: images, json_file: truth.json}
  infer_data_sources: {image_dir: images}
  num_classes: 5
  batch_size: 2
  workers: 0
  augmentation: {scales: [64], random_resize_max_size: 96, test_random_resize: 64, fixed_padding: false}
model:
  num_feature_levels: 2
  return_interm_indices: [2, 3]
  hidden_dim: 32
  nheads: 8
  dim_feedforward: 32
  enc_layers: 1
  dec_layers: 2
  num_queries: 12
  num_select: 12
inference: {conf_threshold: 0.01}
export: {input_width: 96, input_height: 64, opset_version: 17}
ddetr_mm:
  device: cpu
  zero_padded_values: false
  backbone: {type: ResNet, depth: 18, out_indices: [2, 3]}
"""
FORMATS = ("tao", "official", "hf", "tao.safetensors", "zoo", "hf-by-position")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures, their annotations, a spec, and the same weights in every format."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "images").mkdir()
    (folder / "spec.yaml").write_text(SPEC)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(3):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        size_wh = (96, 72) if number else (72, 96)  # a batch with padding
        cv2.imwrite(str(folder / "images" / f"{number}.png"), cv2.resize(coarse, size_wh))
        images.append(dict(id=number, file_name=f"{number}.png", width=size_wh[0], height=size_wh[1]))
        box = dict(id=number + 1, image_id=number, category_id=(1, 2, 4)[number], bbox=[5, 5, 60, 60])
        annotations.append(box | dict(area=3600, iscrowd=0))
    categories = [dict(id=column, name=NAMES[column]) for column in (1, 2, 4)]
    truth = dict(images=images, annotations=annotations, categories=categories)
    (folder / "truth.json").write_text(json.dumps(truth))
    write_formats(folder)
    return folder


def write_formats(folder: Path) -> None:
    """``ours.pth`` with random weights that find something everywhere, and its conversions."""
    loaded = load_spec(folder / "spec.yaml", [], None)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(Config.fromstring(config_source(loaded, "evaluate"), ".py").model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    state_dict = model.state_dict()
    meta = dict(dataset_meta=dict(classes=NAMES, category_ids=(None, 1, 2, None, 4)))
    torch.save(dict(state_dict=state_dict, meta=meta), folder / "ours.pth")
    for to in ("tao", "official"):
        convert_checkpoint(folder / "ours.pth", folder / f"{to}.pth", to)
    convert_checkpoint(folder / "ours.pth", folder / "tao.safetensors", "tao")
    convert_checkpoint(folder / "ours.pth", folder / "hf", "hf")
    # As stock mmdet would have trained it: no background, no gap, another order.
    rows = [4, 1, 2]
    by_position = {
        key: value[rows] if ".cls_branches." in key else value for key, value in state_dict.items()
    }
    meta = dict(dataset_meta=dict(classes=tuple(NAMES[row] for row in rows)))
    torch.save(dict(state_dict=by_position, meta=meta), folder / "zoo.pth")
    convert_checkpoint(folder / "zoo.pth", folder / "hf-by-position", "hf")
    config = folder / "hf-by-position" / "config.json"
    plain = json.loads(config.read_text())
    del plain["ddetr_mm"]  # as somebody else's tool would have written it
    config.write_text(json.dumps(plain))


def path_of(name: str) -> str:
    return name if "." in name or name.startswith("hf") else f"{name}.pth"


def run(folder: Path, monkeypatch, *words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([words[0], "-e", "spec.yaml", *words[1:]]) == 0


def predictions(folder: Path) -> list[tuple]:
    found = json.loads((folder / "predictions.json").read_text())
    assert {entry["category_id"] for entry in found} <= {1, 2, 3, 4}
    return sorted((entry["image_id"], entry["category_id"], round(entry["score"], 5)) for entry in found)


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> list[tuple]:
    """What the weights predict as our own checkpoint, column 3 (which no category has) aside."""
    results = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(
            folder, monkeypatch, "evaluate", "evaluate.checkpoint=ours.pth", f"evaluate.results_dir={results}"
        )
    return predictions(results)


def with_average(folder: Path, name: str) -> Path:
    """``ours.pth`` as the weights of the last step, beside an average with other class logits."""
    content = torch.load(folder / "ours.pth", weights_only=True)
    averaged = {
        key: -value if ".cls_branches." in key else value for key, value in content["state_dict"].items()
    }
    torch.save({**content, "state_dict_ema": averaged}, folder / name)
    return folder / name


def test_averaged_weights_are_evaluated_unless_the_spec_says_otherwise(
    folder, expected, tmp_path, monkeypatch, capfd
):
    with_average(folder, "averaged.pth")
    for number, (options, averaged) in enumerate(
        [
            ([], True),
            (["ddetr_mm.use_ema=false"], False),
            (["ddetr_mm.checkpoint_entry=state_dict"], False),
            (["ddetr_mm.use_ema=true"], True),
        ]
    ):
        results = tmp_path / str(number)
        arguments = ["evaluate.checkpoint=averaged.pth", f"evaluate.results_dir={results}", *options]
        run(folder, monkeypatch, "evaluate", *arguments)
        assert (predictions(results) == expected) != averaged
        taken, other = ("'state_dict_ema' (averaged)", "'state_dict'")[:: 1 if averaged else -1]
        text = capfd.readouterr().err
        assert f"2 sets of weights: {taken} is read" in text and f", not {other};" in text
    arguments = ["weights", "averaged.pth", str(tmp_path / "x.pth"), "--to", "mmdet", "--ema"]
    for ema in ("true", "false"):
        assert main([*arguments, ema]) == 0
        written = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
        source = "state_dict_ema" if ema == "true" else "state_dict"
        read = torch.load(folder / "averaged.pth", weights_only=True)[source]
        assert all(torch.equal(written[key], value) for key, value in read.items())
    assert main([*arguments[:-1], "--entry", "nowhere"]) == 2
    assert "allowed: 'state_dict', 'state_dict_ema' (averaged)" in capfd.readouterr().err


@pytest.mark.parametrize("name", FORMATS)
def test_evaluate(name, folder, expected, tmp_path, monkeypatch):
    run(
        folder,
        monkeypatch,
        "evaluate",
        f"evaluate.checkpoint={path_of(name)}",
        f"evaluate.results_dir={tmp_path}",
    )
    found = predictions(tmp_path)
    if name in ("zoo", "hf-by-position"):
        # The gap's column has no counterpart there: detections of a real class take its place.
        assert all(category != 3 for _image, category, _score in found)
        assert {entry for entry in expected if entry[1] != 3} <= set(found)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ["hf", "zoo"])
def test_inference_names_the_classes(name, folder, tmp_path, monkeypatch):
    words = (f"inference.checkpoint={path_of(name)}", f"inference.results_dir={tmp_path}")
    run(folder, monkeypatch, "inference", *words)
    lines = [line for path in (tmp_path / "labels").glob("*.txt") for line in path.read_text().splitlines()]
    scores = {line.split(" ")[0]: float(line.split(" ")[-1]) for line in lines}
    assert lines and set(scores) <= {"triangle", "star", "circle", "unknown"}
    assert max(scores.values()) > 0.05


@pytest.mark.parametrize("name", ["official", "hf-by-position"])
def test_export(name, folder, tmp_path, monkeypatch):
    onnx_file = tmp_path / "model.onnx"
    words = (f"export.checkpoint={path_of(name)}", f"export.onnx_file={onnx_file}")
    run(folder, monkeypatch, "export", *words, f"export.results_dir={tmp_path}", "export.on_cpu=true")
    assert json.loads((tmp_path / "model.parity.json").read_text())["passed"]


@pytest.mark.parametrize("name", ["ours", *FORMATS])
def test_check_loads_it_as_training_does(name, folder, tmp_path, monkeypatch):
    """The class columns go to the data's ids, whatever the file's numbering; column 3 has no class."""
    from ddetr_mm.preflight import network

    built = []
    monkeypatch.setattr(network, "check_round_trip", lambda model, *_, **__: built.append(model) or [])
    monkeypatch.setattr(network, "check_training_step", lambda *_: [])
    for path in (folder / "images").iterdir():  # other images than those of training
        cv2.imwrite(str(tmp_path / path.name), cv2.imread(str(path))[:, ::-1])
    words = (f"train.pretrained_model_path={path_of(name)}", f"train.results_dir={tmp_path}")
    run(folder, monkeypatch, "check", *words, f"dataset.val_data_sources.0.image_dir={tmp_path}")
    start = torch.load(folder / "ours.pth", weights_only=True)["state_dict"]
    loaded = built[0].state_dict()
    for key in ("bbox_head.cls_branches.0.weight", "bbox_head.cls_branches.1.bias"):
        assert torch.equal(loaded[key][[1, 2, 4]], start[key][[1, 2, 4]])
    assert torch.equal(loaded["backbone.conv1.weight"], start["backbone.conv1.weight"])


@pytest.mark.parametrize("name", ["hf", "zoo"])
def test_train_starts_from_it(name, folder, tmp_path, monkeypatch):
    """With a learning rate of nothing, what is trained is what was loaded."""
    rates = [f"train.optim.{rate}=1.0e-30" for rate in ("lr", "lr_backbone")]
    run(
        folder,
        monkeypatch,
        "train",
        f"train.pretrained_model_path={path_of(name)}",
        f"train.results_dir={tmp_path}",
        "train.num_epochs=1",
        "train.optim.weight_decay=0",
        "train.activation_checkpoint=false",
        *rates,
    )
    trained = torch.load(tmp_path / "model_epoch_000.pth", weights_only=False)["state_dict"]
    start = torch.load(folder / "ours.pth", weights_only=True)["state_dict"]
    rows = [1, 2, 4]
    for key, value in start.items():
        if "num_batches" in key or "running_" in key:
            continue
        if ".cls_branches." in key:
            assert torch.allclose(trained[key][rows], value[rows], rtol=0, atol=1e-20), key
        else:
            assert torch.allclose(trained[key], value, rtol=0, atol=1e-20), key


@pytest.mark.parametrize("name", ["tao", "zoo"])
def test_mmdet_s_test_tool_gets_what_the_spec_s_network_needs(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    config, checkpoint, *_rest = prepare_arguments(
        "test", ["spec.yaml", path_of(name), f"--work-dir={tmp_path}"]
    )
    model = MODELS.build(Config.fromfile(config).model)
    content = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(content["state_dict"], strict=True)
    weight = "bbox_head.cls_branches.0.weight"
    start = torch.load("ours.pth", weights_only=True)["state_dict"][weight]
    assert torch.equal(content["state_dict"][weight][[1, 2, 4]], start[[1, 2, 4]])
    assert inspect_checkpoint(checkpoint).meta.label_mode == "category_id"


def test_the_translated_config_carries_what_the_origin_demands(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for name, zeroed in (("zoo.pth", True), ("tao.pth", True), ("ours.pth", True)):
        words = [f"inference.checkpoint={name}", "ddetr_mm.zero_padded_values=null"]
        output = tmp_path / "config.py"
        assert main(["translate", "-e", "spec.yaml", "-o", str(output), "--for", "inference", *words]) == 0
        config = Config.fromfile(str(output))
        assert config.model.zero_padded_values is zeroed
        classes = config.test_dataloader.dataset.metainfo.classes
        if name == "zoo.pth":
            assert tuple(classes) == ("background", "circle", "triangle", "star", "unknown")
        else:
            assert tuple(classes) == NAMES
