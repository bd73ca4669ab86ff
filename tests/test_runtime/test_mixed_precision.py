"""Mixed precision on a machine without a GPU, in real runs."""

from __future__ import annotations

import pytest
import torch

import ddetr_mm.register  # noqa: F401 - registers the wrapper
from ddetr_mm.runtime.mixed_precision import MixedPrecisionOptimWrapper


def wrapper(layer: torch.nn.Module, **settings) -> MixedPrecisionOptimWrapper:
    return MixedPrecisionOptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1), **settings)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_trains_near_float32(make_runner, tmp_path, dtype: str):
    finals = {}
    for kind, options in (
        ("plain", {}),
        # From a small scale, so that no step is left out until it fits.
        (
            "mixed",
            {"type": "MixedPrecisionOptimWrapper", "dtype": dtype, "loss_scale": {"init_scale": 64.0}},
        ),
    ):
        optimizer = {"optimizer": {"type": "SGD", "lr": 0.05}}
        runner = make_runner([], tmp_path / kind, epochs=2, batches=4, optim_wrapper=optimizer | options)
        runner.train()
        finals[kind] = runner.model.linear.weight.detach()
    assert finals["mixed"].dtype == torch.float32
    assert not torch.equal(finals["mixed"], finals["plain"])
    torch.testing.assert_close(finals["mixed"], finals["plain"], rtol=0.05, atol=0.02)


def test_only_float16_scales_its_losses():
    layer = torch.nn.Linear(2, 1)
    for dtype, scaled in (("float16", True), ("bfloat16", False)):
        one = wrapper(layer, dtype=dtype, loss_scale=8.0)
        one.backward(layer(torch.ones(1, 2)).sum())
        assert layer.weight.grad.tolist() == ([[8.0, 8.0]] if scaled else [[1.0, 1.0]])
        one.step()
        one.zero_grad()


def test_a_step_with_infinite_gradients_is_left_out_and_the_scale_halved():
    layer = torch.nn.Linear(2, 1)
    one = wrapper(layer, dtype="float16", loss_scale={"init_scale": 64.0}, clip_grad={"max_norm": 1.0})
    before = layer.weight.detach().clone()
    one.backward(layer(torch.full((1, 2), float("inf"))).sum())
    one.step()
    assert torch.equal(layer.weight, before)
    assert one.loss_scaler.get_scale() == 32.0


def test_the_scale_goes_into_checkpoints_and_back():
    layer = torch.nn.Linear(2, 1)
    one = wrapper(layer, dtype="float16", loss_scale={"init_scale": 64.0})
    one.update_params(layer(torch.ones(1, 2)).sum())
    other = wrapper(layer, dtype="float16")
    other.load_state_dict(one.state_dict())
    assert other.loss_scaler.get_scale() == 64.0
    plain = wrapper(layer, dtype="bfloat16")
    plain.load_state_dict(plain.state_dict())


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="float16, bfloat16"):
        wrapper(torch.nn.Linear(2, 1), dtype="float64")
