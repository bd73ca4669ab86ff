"""The spec section ``train``: what optimizer, schedule, precision and switches do to a step."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

WATCHED = "encoder.layers.0.ffn.layers.0.0.weight"


def wrapper_of(config: Any, model: nn.Module) -> Any:
    """The optimizer wrapper that a Runner would build."""
    return build_optim_wrapper(model, config.optim_wrapper)


def group_rates(model: nn.Module, wrapper: Any) -> dict[str, float]:
    """Learning rate of every trained parameter."""
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


def step_with(wrapper: Any, model: nn.Module, gradient: float) -> None:
    """One optimizer step with the same gradient for every number."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    wrapper.optimizer.step()


@pytest.fixture
def parts(tiny_config, tiny_model):
    """Network and optimizer wrapper of a spec."""

    def build(*overrides: str) -> tuple[nn.Module, Any]:
        model = tiny_model(*overrides)
        return model, wrapper_of(tiny_config(*overrides), model)

    return build


def test_sgd_follows_its_formula(parts):
    model, wrapper = parts(
        "train.optim.optimizer=SGD",
        "train.optim.lr=0.1",
        "train.optim.momentum=0.8",
        "train.optim.weight_decay=0.01",
    )
    watched = model.get_parameter(WATCHED)
    expected = watched.detach().clone()
    velocity = torch.zeros_like(expected)
    for _ in range(2):
        step_with(wrapper, model, 0.5)
        velocity = 0.8 * velocity + 0.5 + 0.01 * expected
        expected -= 0.1 * velocity
    torch.testing.assert_close(watched.detach(), expected)


def test_adamw_follows_its_formula(parts):
    model, wrapper = parts("train.optim.lr=0.01", "train.optim.weight_decay=0.1", "train.optim.momentum=0.1")
    watched = model.get_parameter(WATCHED)
    before = watched.detach().clone()
    step_with(wrapper, model, 0.5)
    # The first step of Adam has the length of the rate, whatever the gradient; the decay is apart from it.
    torch.testing.assert_close(watched.detach(), before * (1 - 0.01 * 0.1) - 0.01, rtol=1e-4, atol=1e-6)


def test_rates_of_backbone_and_projections(parts):
    model, wrapper = parts(
        "train.optim.lr=2e-3", "train.optim.lr_backbone=3e-4", "train.optim.lr_linear_proj_mult=0.5"
    )
    rates = group_rates(model, wrapper)
    assert rates["backbone.layer3.0.conv1.weight"] == pytest.approx(3e-4)
    assert rates["encoder.layers.0.self_attn.sampling_offsets.weight"] == pytest.approx(1e-3)
    assert rates["reference_points_fc.weight"] == pytest.approx(1e-3)
    assert rates[WATCHED] == pytest.approx(2e-3)


def test_groups_are_chosen_by_the_references_names(parts):
    model, wrapper = parts(
        "train.optim.lr=1e-3",
        "train.optim.lr_backbone=1e-4",
        "train.optim.lr_linear_proj_mult=0.1",
        "model.backbone_names=[input_proj]",
        "model.linear_proj_names=[class_embed]",
    )
    rates = group_rates(model, wrapper)
    assert rates["neck.convs.0.conv.weight"] == pytest.approx(1e-4)
    assert rates["bbox_head.cls_branches.0.weight"] == pytest.approx(1e-4)
    assert rates["backbone.layer3.0.conv1.weight"] == pytest.approx(1e-3)
    assert rates["reference_points_fc.weight"] == pytest.approx(1e-3)


@pytest.mark.parametrize("limit", [0.1, 2.0, 0.0])
def test_gradients_are_clipped_and_not_at_zero(parts, limit: float):
    model, wrapper = parts(f"train.clip_grad_norm={limit}", "train.optim.optimizer=SGD")
    norms = []

    def watch(*_: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    wrapper.optimizer.register_step_pre_hook(watch)
    wrapper.update_params(sum((100 * parameter).sum() for parameter in model.parameters()))
    (norm,) = norms
    if limit:
        assert norm == pytest.approx(limit, rel=1e-3)
    else:
        assert norm > 1e4


@pytest.mark.parametrize(
    ("precision", "dtype", "scaled"),
    [("fp32", torch.float32, False), ("fp16", torch.float16, True), ("bf16", torch.bfloat16, False)],
)
def test_precision_of_a_training_step(parts, training_batch, precision: str, dtype, scaled: bool):
    model, wrapper = parts(f"train.precision={precision}")
    seen = []
    model.encoder.layers[0].ffn.layers[0][0].register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    before = model.get_parameter(WATCHED).detach().clone()
    found = model.train().train_step(training_batch(), wrapper)
    assert seen == [dtype]
    assert torch.isfinite(found["loss"])
    assert model.get_parameter(WATCHED).dtype == torch.float32
    assert not torch.equal(model.get_parameter(WATCHED), before)
    scaler = getattr(wrapper, "loss_scaler", None)
    assert (scaler is not None and scaler.is_enabled()) is scaled


def test_a_step_that_the_loss_scaler_leaves_out_never_reaches_the_optimizer(parts):
    model, wrapper = parts("train.precision=fp16")
    steps = []
    wrapper.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    wrapper.update_params(model.get_parameter(WATCHED).sum() * float("inf"))
    assert not steps  # what watches for broken gradients would take it for a fault
    wrapper.update_params(model.get_parameter(WATCHED).sum())
    assert steps


def rates_by_epoch(tiny_config: Any, epochs: int, *overrides: str) -> list[float]:
    """The learning rate during each epoch."""
    config = tiny_config("train.optim.lr=1.0", f"train.num_epochs={epochs}", *overrides)
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=config.optim_wrapper.optimizer.lr)
    (settings,) = config.param_scheduler
    scheduler = PARAM_SCHEDULERS.build(dict(settings), default_args=dict(optimizer=optimizer))
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_multistep_decays_at_its_steps(tiny_config):
    rates = rates_by_epoch(
        tiny_config, 6, "train.optim.lr_steps=[2,5]", "train.optim.lr_decay=0.5", "train.optim.lr_step_size=1"
    )
    assert rates == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.25])


def test_steplr_decays_at_every_step(tiny_config):
    rates = rates_by_epoch(
        tiny_config,
        6,
        "train.optim.lr_scheduler=StepLR",
        "train.optim.lr_step_size=2",
        "train.optim.lr_decay=0.1",
        "train.optim.lr_steps=[1]",
    )
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("benchmark", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_switches(tiny_config, monkeypatch, benchmark: bool, deterministic: bool):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not deterministic)
    config = tiny_config(f"train.cudnn.benchmark={benchmark}", f"train.cudnn.deterministic={deterministic}")
    (settings,) = [hook for hook in config.custom_hooks if hook.type == "CudnnHook"]
    HOOKS.build(settings).before_run(types.SimpleNamespace(deterministic=False))
    assert torch.backends.cudnn.benchmark is benchmark
    assert torch.backends.cudnn.deterministic is deterministic
    HOOKS.build(settings).before_run(types.SimpleNamespace(deterministic=True))
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_learning_rates_are_told_only_with_verbose(tiny_config):
    def hooks(*overrides: str) -> set[str]:
        return {hook.type for hook in tiny_config(*overrides).custom_hooks}

    assert hooks("train.verbose=True") - hooks() == {"LearningRateHook"}
