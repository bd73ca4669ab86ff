"""``tools/deploy.py`` on a tiny detector, and mmdeploy's own inference on what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

import ddetr_mm.register  # noqa: F401 - registers the detector
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.runner import config_source

pytest.importorskip("mmdeploy")

from ddetr_mm.tasks.mmdeploy_tool import deploy_config, main, model_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deploy"
OVERRIDES = (
    "model.num_feature_levels=2",
    "model.return_interm_indices=[1,2]",
    *(
        "model.enc_layers=1",
        "model.dec_layers=2",
        "model.hidden_dim=32",
        "model.nheads=4",
        "model.num_queries=12",
    ),
    *(
        "model.num_select=12",
        "model.dim_feedforward=32",
        "dataset.num_classes=4",
        "model.with_box_refine=true",
    ),
    *("export.input_width=96", "export.input_height=64"),
    "ddetr_mm.backbone={type: ResNet, depth: 18, base_channels: 8, out_indices: [1, 2]}",
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A config, a checkpoint and a picture."""
    folder = tmp_path_factory.mktemp("mmdeploy")
    (folder / "spec.yaml").write_text("results_dir: results\n")
    loaded = load_spec(folder / "spec.yaml", list(OVERRIDES))
    (folder / "model.py").write_text(config_source(loaded, "export"))
    config = model_config(str(folder / "model.py"), "", folder)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    meta = dict(dataset_meta=dict(classes=("background", "a", "b", "c")))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / "model.pth")
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "a.png"), cv2.resize(picture, (120, 90)))
    return folder


def convert(folder, config, *more):
    arguments = [CONFIGS / f"{config}.py", folder / "model.py", folder / "model.pth", folder / "a.png"]
    return main([*map(str, arguments), "--work-dir", str(folder / config), *more])


@pytest.mark.parametrize("config", ["onnxruntime_static", "onnxruntime_dynamic"])
def test_plain_onnxruntime_runs_it_and_mmdeploy_agrees_with_us(model_folder, config):
    from mmdeploy.apis import inference_model

    assert convert(model_folder, config, "--dump-info") == 0
    folder = model_folder / config
    graph = onnx.load(str(folder / "end2end.onnx")).graph
    assert {node.domain for node in graph.node} == {""}
    assert [value.name for value in graph.output] == ["dets", "labels"]
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch" if config.endswith("dynamic") else batch.dim_value == 1

    deploy = json.loads((folder / "deploy.json").read_text())
    assert deploy["models"][0]["net"] == "end2end.onnx" and deploy["models"][0]["backend"] == "onnxruntime"
    pipeline = json.loads((folder / "pipeline.json").read_text())["pipeline"]
    assert [task["name"] for task in pipeline["tasks"]] == ["Preprocess", "taodeformabledetr", "postprocess"]
    assert json.loads((folder / "detail.json").read_text())["codebase"]["codebase"] == "mmdet"

    model_cfg = model_config(str(model_folder / "model.py"), "", folder)
    deploy_cfg = deploy_config(str(CONFIGS / f"{config}.py"), model_cfg)
    image = str(model_folder / "a.png")
    files = [str(folder / "end2end.onnx")]
    found = inference_model(model_cfg, deploy_cfg, files, image, "cpu")[0].pred_instances
    expected = ours(model_cfg, model_folder, image)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bboxes, expected.bboxes, atol=0.05, rtol=0)
    assert (found.labels == expected.labels).all() and found.labels.min() >= 1


def ours(model_cfg, folder, image):
    """mmdet's own inference with the PyTorch model."""
    from mmcv.transforms import Compose
    from mmengine.dataset import pseudo_collate

    from ddetr_mm.weights import load_for_model

    model = MODELS.build(model_cfg.model).eval()
    load_for_model(model, folder / "model.pth", strict=True)
    data = Compose(model_cfg.test_pipeline)(dict(img_path=image, img_id=0))
    with torch.no_grad():
        return model.test_step(pseudo_collate([data]))[0].pred_instances


@pytest.mark.parametrize("attention", ["nvidia", "mmdeploy"])
def test_tensorrt_gets_a_graph_of_plugin_nodes(model_folder, attention, tmp_path, capsys):
    pytest.importorskip("mmdeploy")
    text = (
        (CONFIGS / "tensorrt_fp16.py").read_text().replace('attention="nvidia"', f'attention="{attention}"')
    )
    (tmp_path / "trt.py").write_text(text)
    arguments = [
        tmp_path / "trt.py",
        model_folder / "model.py",
        model_folder / "model.pth",
        model_folder / "a.png",
    ]
    status = main([*map(str, arguments), "--work-dir", str(tmp_path)])
    graph = onnx.load(str(tmp_path / "end2end.onnx")).graph
    plugins = [node.op_type for node in graph.node if node.domain]
    names = {"nvidia": "MultiscaleDeformableAttnPlugin_TRT", "mmdeploy": "MMCVMultiScaleDeformableAttention"}
    assert plugins == [names[attention]] * 3
    if status != 0:  # where TensorRT is missing, the graph is there and one message says what to install
        assert status == 2 and "pip install tensorrt" in capsys.readouterr().err


def test_wrong_input_is_one_message(model_folder, tmp_path, capsys):
    arguments = [str(CONFIGS / "onnxruntime_static.py"), "missing.py", "missing.pth", "missing.png"]
    assert main([*arguments, "--work-dir", str(tmp_path)]) == 2
    assert "missing.py: model_cfg: does not exist" in capsys.readouterr().err


def test_the_mends_are_undone():
    from mmdeploy.core import SYMBOLIC_REWRITER
    from mmdeploy.core.rewriters import function_rewriter

    from ddetr_mm.stack.mmdeploy_mends import mended_mmdeploy

    before = (torch.onnx.export, function_rewriter._wrapped_fns_to_patch)
    with mended_mmdeploy(17):
        assert isinstance(function_rewriter._wrapped_fns_to_patch, list)
        assert "grid_sampler" not in SYMBOLIC_REWRITER._registry._rewrite_records
    assert before == (torch.onnx.export, function_rewriter._wrapped_fns_to_patch)
    assert "grid_sampler" in SYMBOLIC_REWRITER._registry._rewrite_records
    with mended_mmdeploy(11):
        assert "grid_sampler" in SYMBOLIC_REWRITER._registry._rewrite_records
