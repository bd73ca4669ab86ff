"""Training in bfloat16: autocast and nothing else."""

from __future__ import annotations

import torch

import ddetr_mm.register  # noqa: F401 - before mmdet


def test_the_model_runs_in_bfloat16_and_weights_stay_float32(make_runner) -> None:
    seen = []
    runner = make_runner(
        [], epochs=1, optim_wrapper=dict(type="Bf16OptimWrapper", optimizer=dict(type="SGD", lr=0.01))
    )
    runner.model.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = runner.model.linear.weight.detach().clone()
    runner.train()
    assert set(seen) == {torch.bfloat16}
    assert runner.model.linear.weight.dtype == torch.float32
    assert not torch.equal(runner.model.linear.weight, before)


def test_the_state_of_mmengines_wrapper_loads(make_runner) -> None:
    wrapper = make_runner(
        [], epochs=1, optim_wrapper=dict(type="Bf16OptimWrapper", optimizer=dict(type="AdamW", lr=0.01))
    )
    wrapper.train()
    state = wrapper.optim_wrapper.state_dict()
    wrapper.optim_wrapper.load_state_dict({**state, "loss_scaler": {"scale": 65536.0}})
    assert wrapper.optim_wrapper.state_dict()["state"].keys() == state["state"].keys()
