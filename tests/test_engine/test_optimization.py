"""Mixed precision on a machine without a GPU, in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

import ddetr_mm.register  # noqa: F401
from ddetr_mm.engine.checkpoint import TAOCheckpointHook
from ddetr_mm.engine.optimization import (
    AccumulationHook,
    MixedPrecisionOptimWrapper,
    ScaledLearningRateHook,
    learning_rate_factor,
)

# --- Gradient accumulation by epoch, and learning rates that follow the effective batch ---


class Recorder(Hook):
    """Weights and learning rate after every step."""

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.rates: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.weights.append(runner.model.linear.weight.detach().clone())
        self.rates.append(runner.optim_wrapper.param_groups[0]["lr"])

    def changed(self) -> list[bool]:
        return [
            bool((one != other).any()) for one, other in zip(self.weights, self.weights[1:], strict=False)
        ]


def accumulating(steps: int) -> dict:
    return {"optimizer": {"type": "SGD", "lr": 0.05}, "accumulative_counts": steps}


def test_every_epoch_ends_with_a_change_of_the_weights(make_runner):
    recorder = Recorder()
    make_runner([AccumulationHook(), recorder], batches=5, epochs=2, optim_wrapper=accumulating(2)).train()
    # Steps 2, 4 and 5 of each epoch; the list begins with step 2.
    assert recorder.changed() == [True, False, True, True, False, True, False, True, True]


def test_a_short_accumulation_counts_by_its_own_size(make_runner):
    """One epoch of three batches, two of them summed up: the third must act with its whole gradient."""
    recorder = Recorder()
    runner = make_runner([AccumulationHook(), recorder], batches=3, epochs=1, optim_wrapper=accumulating(2))
    gradients: list[torch.Tensor] = []
    runner.model.linear.weight.register_hook(lambda grad: gradients.append(grad.clone()))
    runner.train()
    change = recorder.weights[2] - recorder.weights[1]
    torch.testing.assert_close(change, -0.05 * gradients[2])


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_rates_follow_the_effective_batch(make_runner, rule: str, factor: float):
    recorder = Recorder()
    hook = ScaledLearningRateHook(batch_size=2, base_batch_size=1, rule=rule)
    make_runner([hook, recorder], batches=2, epochs=2, optim_wrapper=accumulating(2)).train()
    # MultiStepLR decays after the first epoch, from the scaled rate.
    assert recorder.rates == pytest.approx([0.05 * factor] * 2 + [0.005 * factor] * 2)
    assert learning_rate_factor(32, 8, rule) == factor


def test_a_run_resumed_with_another_effective_batch_takes_its_rates(make_runner, tmp_path: Path):
    first = [ScaledLearningRateHook(batch_size=2, base_batch_size=2), TAOCheckpointHook()]
    make_runner(first, tmp_path / "a", batches=2, epochs=1).train()
    recorder = Recorder()
    second = [ScaledLearningRateHook(batch_size=2, base_batch_size=1), recorder]
    checkpoint = str(tmp_path / "a" / "model_epoch_000.pth")
    make_runner(second, tmp_path / "b", batches=2, epochs=2, load_from=checkpoint, resume=True).train()
    assert recorder.rates == pytest.approx([0.05 * 2] * 2)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="cubic"):
        ScaledLearningRateHook(1, 1, rule="cubic")


# --- Mixed precision on a machine without a GPU, in real runs ---


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
