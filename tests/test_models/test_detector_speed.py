"""Options that make the detector faster change nothing but rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from detr_builders import detector_config, padded_batch
from mmdet.registry import MODELS

import ddetr_mm.register  # noqa: F401
from ddetr_mm.models.deformable_attention import DeformableAttention


def build(**options):
    torch.manual_seed(0)
    model = MODELS.build(detector_config(**options))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def step(model) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of one batch."""
    images, samples = padded_batch()
    losses = model.train().loss(images, copy.deepcopy(samples))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def test_only_the_parts_asked_for_are_compiled_and_names_stay() -> None:
    plain = build()
    for compiled, parts in (
        ("none", set()),
        ("backbone", {"backbone"}),
        ("all", {"backbone", "neck", "encoder", "decoder"}),
    ):
        model = build(compiled=compiled)
        assert model.state_dict().keys() == plain.state_dict().keys()
        found = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
        assert found == parts
    with pytest.raises(ValueError, match="compiled must be one of"):
        build(compiled="head")


SHALLOW = {
    "backbone": {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "num_stages": 1,
        "strides": (1,),
        "dilations": (1,),
        "out_indices": (0,),
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": False,
    },
    "in_channels": (8,),
}
"""One stage of a ResNet, and the second level from the neck: of every kind of layer one is compiled."""


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a C++ compiler runs some fifty times
@pytest.mark.parametrize(
    ("backend", "options"), [("aot_eager", {}), ("inductor", SHALLOW)], ids=["aot_eager", "inductor"]
)
def test_a_compiled_detector_has_the_same_losses_and_gradients(backend: str, options: dict) -> None:
    torch._dynamo.reset()
    expected_losses, expected = step(build(**options))
    losses, gradients = step(build(compiled="all", compile_options={"backend": backend}, **options))
    for name, loss in expected_losses.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_predictions_in_half_precision_are_close_and_float32(dtype: str) -> None:
    images, samples = padded_batch()
    plain, half = build().eval(), build(predict_dtype=dtype).eval()
    seen = []
    half.encoder.layers[0].ffn.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        expected = plain.predict(images, copy.deepcopy(samples))
        found = half.predict(images, copy.deepcopy(samples))
    assert set(seen) <= {getattr(torch, dtype), torch.float32} and seen
    for one, other in zip(found, expected, strict=True):
        assert one.pred_instances.scores.dtype == one.pred_instances.bboxes.dtype == torch.float32
        torch.testing.assert_close(
            one.pred_instances.scores, other.pred_instances.scores, rtol=0.05, atol=0.02
        )
    with pytest.raises(ValueError, match="predict_dtype must be"):
        build(predict_dtype="int8")


def test_the_attention_reaches_every_module() -> None:
    model = build(attention="torch")
    found = {module.implementation for module in model.modules() if isinstance(module, DeformableAttention)}
    assert found == {"torch"}
    images, samples = padded_batch()
    ours, reference = build().eval(), model.eval()
    with torch.no_grad():
        for one, other in zip(
            ours._forward(images, samples), reference._forward(images, samples), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention must be one of"):
        build(attention="flash")
