"""``tools/deploy.py`` on a tiny detector, and mmdeploy's own inference on what it leaves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

import ddetr_mm.register  # noqa: F401 - registers the detector
from ddetr_mm.errors import ExportError
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.runner import config_source

pytest.importorskip("mmdeploy")

from ddetr_mm.tasks.mmdeploy_tool import deploy_config, main, model_config, require_opset

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
    meta = dict(dataset_meta=dict(classes=("background", "a", "b", "c"), category_ids=(None, 1, 2, 3)))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / "model.pth")
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "a.png"), cv2.resize(picture, (120, 90)))
    return folder


def convert(folder, config, *more):
    arguments = [CONFIGS / f"{config}.py", folder / "model.py", folder / "model.pth", folder / "a.png"]
    return main([*map(str, arguments), "--work-dir", str(folder / config), *more])


@pytest.fixture(scope="module")
def converted(model_folder):
    """The folder of a deploy config's result, converted once."""
    done = {}

    def folder(config):
        if config not in done:
            more = ("--dump-info", "--test-img", str(model_folder / "a.png"))
            done[config] = convert(model_folder, config, *more)
        assert done[config] == 0
        return model_folder / config

    return folder


@pytest.mark.parametrize("config", ["onnxruntime_static", "onnxruntime_dynamic"])
def test_plain_onnxruntime_runs_it_and_mmdeploy_agrees_with_us(model_folder, converted, config):
    from mmdeploy.apis import inference_model

    folder = converted(config)
    # mmdeploy's visualize draws the same for the graph and for PyTorch.
    drawn = [cv2.imread(str(folder / f"output_{name}_a.jpg")) for name in ("onnxruntime", "pytorch")]
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() < 0.5
    assert np.abs(drawn[0].astype(int) - cv2.imread(str(model_folder / "a.png"))).mean() > 2
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


def plugin_arguments(model_folder, attention, folder):
    """Arguments of a conversion for TensorRT with one of the plugins."""
    text = (CONFIGS / "tensorrt_fp16.py").read_text()
    (folder / "trt.py").write_text(text.replace('attention="nvidia"', f'attention="{attention}"'))
    files = [
        folder / "trt.py",
        model_folder / "model.py",
        model_folder / "model.pth",
        model_folder / "a.png",
    ]
    return [*map(str, files), "--work-dir", str(folder)]


@pytest.mark.parametrize("attention", ["nvidia", "mmdeploy"])
def test_tensorrt_gets_a_graph_of_plugin_nodes(model_folder, attention, tmp_path, capsys):
    status = main(plugin_arguments(model_folder, attention, tmp_path))
    graph = onnx.load(str(tmp_path / "end2end.onnx")).graph
    plugins = [node.op_type for node in graph.node if node.domain]
    names = {"nvidia": "MultiscaleDeformableAttnPlugin_TRT", "mmdeploy": "MMCVMultiScaleDeformableAttention"}
    assert plugins == [names[attention]] * 3
    told = capsys.readouterr().err
    assert "plugin nodes in numpy, against PyTorch: scores within" in told
    if status != 0:  # where TensorRT is missing, the graph is there and one message says what to install
        assert status == 2 and "pip install tensorrt" in told


def test_a_plugin_graph_that_disagrees_is_not_left_there(model_folder, tmp_path, capsys, monkeypatch):
    from ddetr_mm.deploy import plugin

    computed = plugin.plugin_in_numpy
    monkeypatch.setattr(plugin, "plugin_in_numpy", lambda *inputs: 1.5 * computed(*inputs))
    assert main(plugin_arguments(model_folder, "mmdeploy", tmp_path)) == 2
    assert "does not compute what PyTorch computes" in capsys.readouterr().err
    assert not (tmp_path / "end2end.onnx").exists()


def test_the_sdk_wheel_runs_the_result(model_folder, converted):
    if importlib.util.find_spec("mmdeploy_runtime") is None:
        pytest.skip("mmdeploy-runtime is not installed (it has no wheel for Python 3.12)")
    folder = converted("onnxruntime_static")
    # In a process of its own: the wheel brings another onnxruntime.
    code = (
        "import cv2, json, sys\n"
        "from mmdeploy_runtime import Detector\n"
        "found = Detector(model_path=sys.argv[1], device_name='cpu', device_id=0)(cv2.imread(sys.argv[2]))\n"
        "json.dump([part.tolist() for part in found[:2]], open(sys.argv[3], 'w'))\n"
    )
    image, target = str(model_folder / "a.png"), folder / "sdk.json"
    subprocess.run([sys.executable, "-c", code, str(folder), image, str(target)], check=True, timeout=120)
    boxes_and_scores, labels = map(np.array, json.loads(target.read_text()))
    picture = cv2.cvtColor(cv2.imread(image), cv2.COLOR_BGR2RGB)
    mean, std = (np.float32(values) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    inputs = ((cv2.resize(picture, (96, 64)).astype(np.float32) - mean) / std).transpose(2, 0, 1)[None]
    session = onnxruntime.InferenceSession(str(folder / "end2end.onnx"))
    (dets,), (expected_labels,) = session.run(["dets", "labels"], {"input": np.ascontiguousarray(inputs)})
    boxes = (dets[:, :4] * [120 / 96, 90 / 64, 120 / 96, 90 / 64]).clip(
        0, [119, 89, 119, 89]
    )  # to the last pixel
    np.testing.assert_allclose(boxes_and_scores[:, 4], dets[:, 4], atol=2e-3)
    np.testing.assert_allclose(boxes_and_scores[:, :4], boxes, atol=0.5)
    if labels.tolist() != expected_labels.tolist():
        # Seen since the random network of this test predicts several classes: mmdeploy-runtime 1.3.1, with
        # its own older onnxruntime, gives all detections one class, where onnxruntime gives each its own.
        pytest.xfail(f"mmdeploy-runtime gives the classes {labels.tolist()}, onnxruntime {expected_labels}")


def test_calibration_images_are_written_as_mmdeploy_reads_them(model_folder, tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    images = [dict(id=1, file_name="a.png", width=120, height=90)]
    categories = [dict(id=number, name=name) for number, name in enumerate("abc", 1)]
    truth = dict(images=images, annotations=[], categories=categories)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    dataset = dict(
        type="CocoDataset",
        ann_file=str(tmp_path / "truth.json"),
        data_prefix=dict(img=str(model_folder)),
        metainfo=dict(classes=("a", "b", "c")),
        test_mode=True,
    )
    loader = dict(num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dataset)
    (tmp_path / "data.py").write_text(f"val_dataloader = {loader!r}\n")
    arguments = [CONFIGS / "tensorrt_int8.py", model_folder / "model.py", model_folder / "model.pth"]
    more = ["--work-dir", tmp_path, "--calib-dataset-cfg", tmp_path / "data.py"]
    status = main([*map(str, [*arguments, model_folder / "a.png", *more])])
    assert status == 0 or (status == 2 and "pip install tensorrt" in capsys.readouterr().err)
    with h5py.File(tmp_path / "calib_data.h5") as file:
        (name,) = file["calib_data/end2end/input"]
        found = file[f"calib_data/end2end/input/{name}"][:]
    picture = Image.open(model_folder / "a.png").convert("RGB").resize((96, 64), Image.BILINEAR)
    mean, std = (np.float32(values) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    expected = ((np.asarray(picture, np.float32) - mean) / std).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_calibration_without_images_or_without_effect_is_refused(model_folder, tmp_path, capsys):
    status = convert(
        model_folder, "onnxruntime_static", "--calib-dataset-cfg", str(model_folder / "model.py")
    )
    assert status == 2 and "--calib-dataset-cfg" in capsys.readouterr().err
    if importlib.util.find_spec("h5py") is not None:
        assert convert(model_folder, "tensorrt_int8") == 2
        assert "names no images for the calibration" in capsys.readouterr().err


def test_wrong_input_is_one_message(model_folder, tmp_path, capsys):
    arguments = [str(CONFIGS / "onnxruntime_static.py"), "missing.py", "missing.pth", "missing.png"]
    assert main([*arguments, "--work-dir", str(tmp_path)]) == 2
    assert "missing.py: model_cfg: does not exist" in capsys.readouterr().err


def test_wrong_values_are_one_message(model_folder, tmp_path, capsys):
    files = [model_folder / "model.py", model_folder / "model.pth", model_folder / "a.png"]
    static = CONFIGS / "onnxruntime_static.py"
    (tmp_path / "old.py").write_text(static.read_text().replace("opset_version=17", "opset_version=11"))
    (tmp_path / "text.pth").write_text("no checkpoint")
    for config, checkpoint, folder, words in (
        (tmp_path / "old.py", files[1], tmp_path, ("onnx_config.opset_version", "16 to 20")),
        (static, tmp_path / "text.pth", tmp_path, ("text.pth",)),
        (static, files[1], tmp_path / "text.pth", ("--work-dir", "cannot be written to")),
    ):
        arguments = [config, files[0], checkpoint, files[2], "--work-dir", folder]
        assert main([str(word) for word in arguments]) == 2
        told = capsys.readouterr().err
        assert all(word in told for word in words) and told.count("error:") == 1
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize(
    ("backend", "attention", "opset", "refused"),
    [
        ("tensorrt", "standard", 20, True),
        ("tensorrt", "standard", 19, False),
        ("tensorrt", "plugin", 20, False),
        ("onnxruntime", "standard", 20, False),
    ],
)
def test_an_opset_that_tensorrt_reads_wrongly(backend, attention, opset, refused):
    config = Config(
        dict(
            backend_config=dict(type=backend),
            codebase_config=dict(attention=attention),
            onnx_config=dict(opset_version=opset),
        )
    )
    if refused:
        with pytest.raises(ExportError, match="d.py: onnx_config.opset_version: .*issue 4646.*17 to 19"):
            require_opset(config, "d.py")
    else:
        require_opset(config, "d.py")


def test_the_patches_are_undone():
    from mmdeploy.core import SYMBOLIC_REWRITER
    from mmdeploy.core.rewriters import function_rewriter

    from ddetr_mm.tasks.mmdeploy_tool import patched_mmdeploy

    before = (torch.onnx.export, function_rewriter._wrapped_fns_to_patch)
    with patched_mmdeploy(17):
        assert isinstance(function_rewriter._wrapped_fns_to_patch, list)
        assert "grid_sampler" not in SYMBOLIC_REWRITER._registry._rewrite_records
    assert before == (torch.onnx.export, function_rewriter._wrapped_fns_to_patch)
    assert "grid_sampler" in SYMBOLIC_REWRITER._registry._rewrite_records
    with patched_mmdeploy(11):
        assert "grid_sampler" in SYMBOLIC_REWRITER._registry._rewrite_records


def test_on_an_old_torch_the_patches_do_nothing(monkeypatch):
    from mmdeploy.core.rewriters import function_rewriter

    from ddetr_mm.tasks.mmdeploy_tool import patched_mmdeploy

    def old_export(model, args, f):  # as before torch 2.5: no `dynamo`
        return None

    old_table: list = []
    monkeypatch.setattr(torch.onnx, "export", old_export)
    monkeypatch.setattr(function_rewriter, "_wrapped_fns_to_patch", old_table)
    with patched_mmdeploy(11):
        assert torch.onnx.export is old_export
        assert function_rewriter._wrapped_fns_to_patch is old_table
