"""Exported graphs as mmdet detectors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from test_onnx_export import export_onnx, tiny_detector

import ddetr_mm.deploy.detectors  # noqa: F401 - registers OnnxDetector
from ddetr_mm.deploy.onnx_export import ExportOptions, export_half, half_file
from ddetr_mm.deploy.onnx_file import read_signature
from ddetr_mm.deploy.tensorrt import require_tensorrt
from ddetr_mm.errors import StackError, WeightsError
from ddetr_mm.tasks.runner import ExportedInput, set_graph_columns

SIZE_HW = (64, 96)


def batch_data(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, *SIZE_HW), dtype=np.uint8)
    samples = []
    for number in range(count):
        meta = dict(img_shape=SIZE_HW, ori_shape=(32, 24), scale_factor=(4.0, 2.0), img_path=f"{number}.png")
        samples.append(DetDataSample(metainfo=meta))
    return dict(inputs=list(torch.from_numpy(images)), data_samples=samples)


def onnx_detector(path, **changes):
    preprocessor = dict(
        type="FixedPadDetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    )
    values = dict(type="OnnxDetector", onnx_file=str(path), max_per_img=15, data_preprocessor=preprocessor)
    return MODELS.build(values | changes).eval()


@pytest.mark.parametrize("batch_size", [-1, 2])
def test_it_predicts_what_the_detector_predicts(tmp_path, batch_size):
    detector = tiny_detector(tmp_path)
    export_onnx(detector, tmp_path / "m.onnx", input_size_hw=SIZE_HW, batch_size=batch_size)
    exported = onnx_detector(tmp_path / "m.onnx", num_classes=6)
    detector.data_preprocessor = exported.data_preprocessor
    # Three images: with a fixed batch of two, the last batch is incomplete.
    with torch.no_grad():
        expected, found = (model.test_step(batch_data(3)) for model in (detector, exported))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one.pred_instances.scores, other.pred_instances.scores, atol=1e-5, rtol=0)
        assert (one.pred_instances.labels == other.pred_instances.labels).all()
        torch.testing.assert_close(one.pred_instances.bboxes, other.pred_instances.bboxes, atol=1e-2, rtol=0)
        assert other.pred_instances.labels.min() >= 1


def test_labels_follow_the_columns_that_are_set(tmp_path, capsys):
    export_onnx(tiny_detector(tmp_path), tmp_path / "m.onnx", input_size_hw=SIZE_HW, batch_size=-1)
    detector = onnx_detector(tmp_path / "m.onnx", num_classes=6)
    with torch.no_grad():
        before = detector.test_step(batch_data(1))[0].pred_instances
        names = ("background", "a", "b", "c", "d", "e")
        exported = ExportedInput(None, names)
        set_graph_columns(detector, exported, (None, "e", "d", "c", "b", "a"), "m.onnx")
        after = detector.test_step(batch_data(1))[0].pred_instances
    assert "5 are moved by name" in capsys.readouterr().err
    assert after.labels.tolist() == (6 - before.labels).tolist()
    assert after.scores.tolist() == before.scores.tolist()
    with torch.no_grad():
        set_graph_columns(detector, exported, (None, "x", None, None, None, "b"), "m.onnx")
        only = detector.test_step(batch_data(1))[0].pred_instances
    assert set(only.labels[only.scores > 1e-12].tolist()) == {5}  # x is never predicted


def test_wrong_files_sizes_and_classes_are_refused(tmp_path):
    export_onnx(tiny_detector(tmp_path, 2), tmp_path / "m.onnx", input_size_hw=SIZE_HW, batch_size=1)
    with pytest.raises(WeightsError, match=r"dataset\.num_classes.*got 91.*allowed: 6"):
        onnx_detector(tmp_path / "m.onnx", num_classes=91)
    with pytest.raises(WeightsError, match="fixed input size"):
        onnx_detector(tmp_path / "m.onnx").outputs(np.zeros((1, 3, 32, 32), np.float32))
    (tmp_path / "text.onnx").write_text("not a graph")
    (tmp_path / "empty.onnx").write_bytes(b"")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])),
        tmp_path / "relu.onnx",
    )
    for name, words in (
        ("text", "as ONNX"),
        ("empty", "as ONNX"),
        ("relu", "not a Deformable DETR"),
        ("no", "as ONNX"),
    ):
        with pytest.raises(WeightsError, match=words):
            read_signature(tmp_path / f"{name}.onnx", where="evaluate.checkpoint")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.etlt", "is an .etlt file, which TAO encrypts by a closed scheme; export the .pth that it was"),
        ("a.engine", "is a TensorRT engine; name the .onnx file that it was built from"),
        ("a.PLAN", "is a TensorRT engine"),
        ("a.pth", "is a checkpoint; export it first"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, text):
    (tmp_path / name).write_bytes(bytes(range(256)))
    with pytest.raises(WeightsError) as caught:
        read_signature(tmp_path / name, where="gen_trt_engine.onnx_file")
    assert f"{name}: gen_trt_engine.onnx_file: {text}" in str(caught.value)


@pytest.mark.parametrize("plugin", [False, True])
def test_half_precision_has_its_own_file_and_report(tmp_path, plugin):
    detector = tiny_detector(tmp_path)
    options = ExportOptions(input_size_hw=SIZE_HW, plugin=plugin)
    export_onnx(detector, tmp_path / "m.onnx", input_size_hw=SIZE_HW, plugin=plugin)
    report = export_half(detector, tmp_path / "m.onnx", options, log=lambda _: None)
    half = half_file(tmp_path / "m.onnx")
    assert half.name == "m.fp16.onnx" and (tmp_path / "m.fp16.parity.json").is_file()
    assert 0 < report.max_abs_diff_logits < report.tolerance_logits and report.top_agreement > 0.8
    model = onnx.load(str(half))
    types = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert types == {onnx.TensorProto.FLOAT}
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert weights and {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    assert half.stat().st_size < 0.7 * (tmp_path / "m.onnx").stat().st_size


def test_without_tensorrt_one_message_says_what_to_install():
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(StackError, match="pip install tensorrt"):
            require_tensorrt()
    else:
        pytest.skip("TensorRT is installed here")
