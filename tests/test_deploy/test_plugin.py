"""Graphs with TensorRT's plugin nodes: the node's contract, and the same numbers without TensorRT."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from test_onnx_export import LEVELS, export_onnx, tiny_detector

from ddetr_mm.deploy.onnx_file import ort_forward
from ddetr_mm.deploy.parity import generated_images
from ddetr_mm.deploy.plugin import (
    PLUGIN_ATTRIBUTES,
    PLUGIN_DOMAIN,
    level_tensors,
    plugin_graph_forward,
    plugin_in_numpy,
    plugin_nodes,
    require_plugin_contract,
)
from ddetr_mm.errors import ExportError, WeightsError

SIZES = [(5, 7), (3, 4)]


class MultiscaleDeformableAttnPlugin_TRT(OpRun):
    """The node for ONNX's reference evaluator."""

    op_domain = PLUGIN_DOMAIN

    def _run(self, *inputs, name=None, namespace=None, version=None):
        return (plugin_in_numpy(*inputs),)


def attention_inputs(batch=2, queries=6, heads=3, points=2, width=4):
    """Random inputs of the node; some locations lie outside."""
    rng = np.random.default_rng(0)
    shapes, starts = (tensor.numpy() for tensor in level_tensors(SIZES))
    value = rng.standard_normal((batch, 5 * 7 + 3 * 4, heads, width)).astype(np.float32)
    places = rng.uniform(-0.3, 1.3, (batch, queries, heads, 2, points, 2)).astype(np.float32)
    weights = rng.random((batch, queries, heads, 2, points)).astype(np.float32)
    return value, shapes, starts, places, weights


def test_numpy_computes_what_mmcv_computes():
    value, shapes, starts, places, weights = attention_inputs()
    tensors = [torch.from_numpy(array) for array in (value, shapes, places, weights)]
    expected = multi_scale_deformable_attn_pytorch(tensors[0], tensors[1].long(), *tensors[2:])
    result = plugin_in_numpy(value, shapes, starts, places, weights)
    assert result.shape == (2, 6, 3, 4)
    np.testing.assert_allclose(result.reshape(2, 6, 12), expected.numpy(), atol=2e-5)


def test_numpy_refuses_what_tensorrt_refuses():
    value, shapes, starts, places, weights = attention_inputs()
    with pytest.raises(ExportError, match="int32"):
        plugin_in_numpy(value, shapes.astype(np.int64), starts, places, weights)
    with pytest.raises(ExportError, match="ranks"):
        plugin_in_numpy(value[0], shapes, starts, places, weights)
    with pytest.raises(ExportError, match="one type"):
        plugin_in_numpy(value, shapes, starts, places, weights.astype(np.float16))


@pytest.mark.parametrize(("num_levels", "refine", "opset"), [(1, False, 12), (4, True, 17), (5, True, 16)])
def test_the_plugin_graph_equals_the_detector(tmp_path, num_levels, refine, opset):
    detector = tiny_detector(tmp_path, num_levels, refine)
    path = tmp_path / "m.onnx"
    report = export_onnx(detector, path, input_size_hw=(64, 96), plugin=True, opset=opset)
    assert [batch.batch_size for batch in report.batches] == [1, 2, 7]
    assert report.max_abs_diff_boxes < 1e-5 and report.max_abs_diff_logits < 1e-4
    model = onnx.load(str(path))
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset, "nvidia": opset}
    nodes = plugin_nodes(model)
    assert len(nodes) == 2 + 3 and "GridSample" not in {node.op_type for node in model.graph.node}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    levels = len(LEVELS[num_levels].split(","))
    for node in nodes:
        assert {entry.name: entry.s.decode() for entry in node.attribute} == PLUGIN_ATTRIBUTES
        shapes, starts = (constants[name] for name in node.input[1:3])
        assert shapes.dtype == starts.dtype == np.int32 and shapes.shape == (levels, 2)
        assert starts[0] == 0 and (np.diff(starts) == shapes.prod(1)[:-1]).all()


def test_onnx_reference_evaluator_agrees_with_the_cut_graph(tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(tiny_detector(tmp_path, 2), path, input_size_hw=(32, 32), plugin=True, batch_size=1)
    model = onnx.load(str(path))
    images = generated_images(1, (32, 32), seed=3)
    cut = plugin_graph_forward(model)(images)
    whole = ReferenceEvaluator(model, new_ops=[MultiscaleDeformableAttnPlugin_TRT]).run(
        None, {"inputs": images}
    )
    for one, other in zip(cut, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_broken_nodes_are_found(tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(tiny_detector(tmp_path, 2), path, input_size_hw=(32, 32), plugin=True, batch_size=1)
    model = onnx.load(str(path))
    require_plugin_contract(model)
    shapes = plugin_nodes(model)[0].input[1]
    for tensor in model.graph.initializer:
        if tensor.name == shapes:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.int64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, shapes))
    with pytest.raises(ExportError, match="int32 constants"):
        require_plugin_contract(model)


def test_onnxruntime_alone_says_what_to_do_with_a_plugin_graph(tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(tiny_detector(tmp_path, 2), path, input_size_hw=(32, 32), plugin=True, batch_size=1)
    with pytest.raises(WeightsError, match="on_cpu=true"):
        ort_forward(path)
