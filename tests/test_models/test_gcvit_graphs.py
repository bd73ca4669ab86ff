"""GCViT as a graph: torch.compile without breaks, ONNX of standard operators."""

from __future__ import annotations

import io

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from ddetr_mm.models import GCViT
from ddetr_mm.models.gcvit import VARIANTS, GCViTVariant


@pytest.fixture(autouse=True)
def thin_variant(monkeypatch) -> None:
    """Local and global attention and layer scale, at a size that traces fast; nothing traced before."""
    thin = GCViTVariant((2, 2, 2, 2), (1, 2, 4, 8), (7, 7, 14, 7), 32, 2.0, 0.5)
    monkeypatch.setitem(VARIANTS, "thin", thin)
    torch.compiler.reset()


def thin(**kwargs) -> GCViT:
    """The thin variant with tables that matter, in evaluation mode."""
    torch.manual_seed(0)
    model = GCViT("thin", **kwargs).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_compiles_to_one_graph() -> None:
    model = thin()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images(1, 61, 90)  # padded in every stage, every global query resized
    with torch.no_grad():
        for got, expected in zip(compiled(x), model(x), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)


def test_compiles_forward_and_backward_with_checkpointing() -> None:
    model = thin(out_indices=(1,), with_cp=True, drop_path_rate=0.0).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(1, 32, 48)
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(x)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, traced in zip(*gradients, strict=True):
        assert torch.allclose(plain, traced, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_sizes_that_change_compile_to_one_dynamic_graph() -> None:
    model = thin(drop_path_rate=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size_hw in ((64, 96), (100, 76)):
            x = images(2, *size_hw)
            for got, expected in zip(compiled(x), model(x), strict=True):
                assert torch.allclose(got, expected, atol=1e-5)
    model.train()
    features = torch.compile(model, backend="eager", fullgraph=True)(images(1, 61, 90))  # drop path too
    assert all(feature.isfinite().all() for feature in features)


@pytest.mark.parametrize("size_hw", [(224, 224), (75, 130)])
def test_exports_to_standard_onnx_with_any_batch(size_hw) -> None:
    model = thin()
    buffer = io.BytesIO()
    names = [f"stage{index}" for index in range(4)]
    torch.onnx.export(
        model,
        (images(1, *size_hw),),
        buffer,
        dynamo=False,
        opset_version=17,
        input_names=["images"],
        output_names=names,
        dynamic_axes={name: {0: "batch"} for name in ["images", *names]},
    )
    graph = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""}
    assert {opset.domain for opset in graph.opset_import} == {""}
    # At 224 x 224 every global query comes out as one window: nothing to resize.
    resizes = sum(node.op_type == "Resize" for node in graph.graph.node)
    assert resizes == (0 if size_hw == (224, 224) else 4)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = images(batch, *size_hw)
        with torch.no_grad():
            expected = model(x)
        for got, feature in zip(session.run(None, {"images": x.numpy()}), expected, strict=True):
            assert torch.allclose(torch.from_numpy(got), feature, atol=1e-4)
