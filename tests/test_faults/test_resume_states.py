"""Broken training states: each is refused with one message before any of it reaches the optimizer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import CheckpointLoader
from tiny_runs import build_runner

from ddetr_mm.engine.checkpoint import TAOCheckpointHook
from ddetr_mm.engine.resume_state import OPTIMIZER_KEY, ResumeHook, check_scaler
from ddetr_mm.errors import WeightsError

Break = Callable[[dict[str, Any]], None]
WEIGHT = "linear.weight"


def hooks() -> list[Any]:
    return [ResumeHook(), TAOCheckpointHook()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of two epochs of a tiny run."""
    folder = tmp_path_factory.mktemp("resume_states")
    build_runner(folder, hooks(), epochs=2).train()
    return CheckpointLoader.load_checkpoint(str(folder / "model_epoch_001.pth"), map_location="cpu")


def resume(folder: Path, checkpoint: Any, **options: Any) -> Any:
    """A run that has resumed from a checkpoint and trained one more epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.pth"
    torch.save(checkpoint, path)
    runner = build_runner(
        folder / "more", hooks(), **{"epochs": 3, **options}, load_from=str(path), resume=True
    )
    try:
        runner.train()
    except WeightsError:
        assert not runner.optim_wrapper.optimizer.state
        raise
    return runner


def entry(name: str, value: Any) -> Break:
    """Replace an entry of the first parameter's state; a function is called with what was there."""

    def change(checkpoint: dict[str, Any]) -> None:
        state = checkpoint["optimizer"]["state"][0]
        state[name] = value(state[name]) if callable(value) else value

    return change


def at(path: str, value: Any) -> Break:
    """Replace what a path leads to: keys and list positions, with dots between them."""

    def change(checkpoint: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        target: Any = checkpoint
        for part in parents:
            target = target[part]
        target[last] = value(target[last]) if callable(value) else value

    return change


def without(path: str) -> Break:
    def change(checkpoint: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        target: Any = checkpoint
        for part in parents:
            target = target[part]
        del target[last]

    return change


def weight(value: Any) -> Break:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][WEIGHT] = value(checkpoint["state_dict"][WEIGHT])

    return change


def no_weight(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"][WEIGHT]


def share(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["optimizer"]["state"][0]
    state["exp_avg"] = state["exp_avg_sq"]


FIRST = "optimizer.state, linear.weight"
STATES: dict[str, tuple[Break, str]] = {
    "short exp_avg": (entry("exp_avg", lambda t: t[:, :2].clone()), f"{FIRST}, exp_avg has shape [1, 2]"),
    "long exp_avg_sq": (entry("exp_avg_sq", torch.zeros(1, 400)), f"{FIRST}, exp_avg_sq has shape"),
    "empty exp_avg": (entry("exp_avg", torch.zeros(0)), f"{FIRST}, exp_avg has shape [0]"),
    "flat exp_avg": (entry("exp_avg", torch.zeros(4)), f"{FIRST}, exp_avg has shape [4], not [1, 4]"),
    "half exp_avg": (entry("exp_avg", lambda t: t.half()), f"{FIRST}, exp_avg is float16, not float32"),
    "whole numbers": (entry("exp_avg", lambda t: t.long()), f"{FIRST}, exp_avg is int64, not float32"),
    "complex exp_avg": (entry("exp_avg", lambda t: t.to(torch.complex64)), f"{FIRST}, exp_avg is no dense"),
    "sparse exp_avg": (entry("exp_avg", lambda t: t.to_sparse()), f"{FIRST}, exp_avg is no dense"),
    "zero strides": (
        entry("exp_avg", torch.zeros(1).as_strided((1, 4), (0, 0))),
        f"{FIRST}, exp_avg is no dense tensor covered by its storage",
    ),
    "gaps": (entry("exp_avg", torch.zeros(1, 8)[:, ::2]), f"{FIRST}, exp_avg has strides [8, 2]"),
    "overlap": (entry("exp_avg", torch.zeros(9).as_strided((1, 4), (4, 2))), "exp_avg has strides [4, 2]"),
    "shared memory": (share, "shares its memory with"),
    "nan": (entry("exp_avg", lambda t: t * float("nan")), "exp_avg has values that are NaN or infinite"),
    "infinite": (entry("exp_avg_sq", lambda t: t + float("inf")), "exp_avg_sq has values that are NaN"),
    "negative squares": (entry("exp_avg_sq", lambda t: -t - 1), "exp_avg_sq has values below 0"),
    "a list": (entry("exp_avg", [0.0] * 4), f"{FIRST}, exp_avg is a list, not a tensor"),
    "negative step": (entry("step", torch.tensor(-1.0)), f"{FIRST}, step is -1.0, not within 0 and 10"),
    "late step": (entry("step", torch.tensor(1e9)), f"{FIRST}, step is 1000000000.0"),
    "nan step": (entry("step", torch.tensor(float("nan"))), f"{FIRST}, step is nan"),
    "steps": (entry("step", torch.zeros(2)), f"{FIRST}, step is a float32"),
    "step is true": (entry("step", True), f"{FIRST}, step is a bool"),
    "no exp_avg": (without("optimizer.state.0.exp_avg"), f"{FIRST}, exp_avg is missing"),
    "no step": (without("optimizer.state.0.step"), f"{FIRST}, step is missing"),
    "odd entry": (
        at("optimizer.state.0", lambda s: {**s, "more": torch.zeros(1)}),
        "more is no entry of AdamW",
    ),
    "no state of one": (without("optimizer.state.1"), "optimizer.state, linear.bias is missing"),
    "state of none": (at("optimizer.state", lambda s: {**s, 7: {}}), "has an entry 7"),
    "state is a list": (at("optimizer.state", []), "optimizer.state is a list, not a dictionary"),
    "no groups": (at("optimizer.param_groups", []), "optimizer.param_groups has 0 groups"),
    "groups missing": (without("optimizer.param_groups"), "optimizer.param_groups is missing"),
    "two groups": (at("optimizer.param_groups", lambda g: g * 2), "has 2 groups, this run's optimizer 1"),
    "other parameters": (at("optimizer.param_groups.0.params", [1, 0]), "params names other parameters"),
    "too few parameters": (at("optimizer.param_groups.0.params", [0]), "params names other parameters"),
    "parameters are text": (at("optimizer.param_groups.0.params", "01"), "params is not a list"),
    "nan rate": (at("optimizer.param_groups.0.lr", float("nan")), "optimizer.param_groups[0].lr is nan"),
    "negative rate": (at("optimizer.param_groups.0.lr", -1.0), "optimizer.param_groups[0].lr is -1.0"),
    "rate is text": (at("optimizer.param_groups.0.lr", "0.1"), "optimizer.param_groups[0].lr is a str"),
    "no rate": (without("optimizer.param_groups.0.lr"), "optimizer.param_groups[0].lr is missing"),
    "one beta": (at("optimizer.param_groups.0.betas", (0.9,)), "betas is not a pair"),
    "beta of 1": (at("optimizer.param_groups.0.betas", (0.9, 1.0)), "betas is 1"),
    "negative decay": (at("optimizer.param_groups.0.weight_decay", -0.1), "weight_decay is -0.1"),
    "amsgrad": (at("optimizer.param_groups.0.amsgrad", True), "amsgrad is True, in this run False"),
    "no schedules": (without("param_schedulers"), "param_schedulers is missing"),
    "too few schedules": (at("param_schedulers", []), "param_schedulers has 0 schedules, this run 1"),
    "schedule is a list": (at("param_schedulers.0", []), "param_schedulers[0] is a list"),
    "no last_step": (without("param_schedulers.0.last_step"), "param_schedulers[0].last_step is missing"),
    "last_step is text": (at("param_schedulers.0.last_step", "2"), "param_schedulers[0].last_step is a str"),
    "late last_step": (at("param_schedulers.0.last_step", 10**18), "last_step is 1000000000000000000"),
    "milestones": (at("param_schedulers.0.milestones", [1]), "milestones is a list, not a dictionary"),
    "base values": (at("param_schedulers.0.base_values", [0.1] * 5), "base_values has 5 values"),
    "method replaced": (at("param_schedulers.0", lambda s: {**s, "step": 1}), "step is no entry"),
    "gamma": (at("param_schedulers.0.gamma", float("inf")), "param_schedulers[0].gamma is inf"),
    "epoch of 10^18": (at("meta.epoch", 10**18), "meta.epoch is 1000000000000000000, not within"),
    "negative epoch": (at("meta.epoch", -1), "meta.epoch is -1"),
    "epoch is true": (at("meta.epoch", True), "meta.epoch is a bool, not a whole number"),
    "more epochs than steps": (at("meta.epoch", 11), "meta.epoch is 11, more than the steps done"),
    "negative steps": (at("meta.iter", -5), "meta.iter is -5"),
    "steps are a float": (at("meta.iter", 10.0), "meta.iter is a float"),
    "samples": (at("meta.samples_done", "all"), "meta.samples_done is a str"),
    "seed": (at("meta.seed", 2**70), "meta.seed is"),
    "classes": (at("meta.dataset_meta", {"classes": [1, 2]}), "meta.dataset_meta.classes has entries"),
    "no hub": (without("message_hub"), "message_hub is missing"),
    "no scalars": (without("message_hub.log_scalars"), "message_hub.log_scalars is missing"),
    "resumed keys": (at("message_hub.resumed_keys", {"a": 3}), "message_hub.resumed_keys.a is a int"),
    "history": (at("message_hub.log_scalars.train/loss.counts", torch.zeros(1).long()), "counts is int64"),
    "history length": (at("message_hub.log_scalars.train/loss.max_length", 0), "max_length is 0"),
    "random states": (at("rng_states", {}), "rng_states is a dict, not a list"),
    "python's": (at("rng_states.0.python.internal", [1, 2]), "python.internal has 2 numbers, not 625"),
    "python's version": (at("rng_states.0.python.version", 9), "python.version is 9, not 3"),
    "numpy's": (at("rng_states.0.numpy.keys", torch.zeros(3).long()), "numpy.keys is int64"),
    "numpy's position": (at("rng_states.0.numpy.position", 5000), "numpy.position is 5000, not within"),
    "torch's type": (at("rng_states.0.torch", lambda t: t.float()), "rng_states[0].torch is float32"),
    "torch's size": (at("rng_states.0.torch", lambda t: t[:9].clone()), "rng_states[0].torch is uint8"),
    "torch's content": (at("rng_states.0.torch", lambda t: t | 255), "is no state of torch's generator"),
    "no torch": (without("rng_states.0.torch"), "rng_states[0].torch is missing"),
    "weights of another shape": (weight(lambda t: t[:, :2].clone()), "state_dict, linear.weight has shape"),
    "whole weights": (weight(lambda t: t.long()), "state_dict, linear.weight is int64, not float32"),
    "weights without values": (weight(lambda t: t.to("meta")), "state_dict, linear.weight is no dense"),
    "nan weights": (weight(lambda t: t / 0 * 0), "state_dict, linear.weight has values that are NaN"),
    "a weight missing": (no_weight, "state_dict, linear.weight is missing"),
    "a weight too many": (at("state_dict", lambda s: {**s, "x": torch.ones(1)}), "state_dict, x is not in"),
    "averages": (
        at("ema_state_dict", {"steps": torch.tensor(3), "module.linear.weight": torch.ones(4)}),
        "ema_state_dict, linear.weight has shape [4]",
    ),
    "steps of averages": (at("ema_state_dict", {"steps": torch.tensor(-3)}), "ema_state_dict, steps is not"),
    "layout": (at(f"meta.{OPTIMIZER_KEY}.trained", 5), "trained is a int, not a list"),
}


@pytest.mark.parametrize("name", STATES)
def test_broken_state(name: str, saved: dict[str, Any], tmp_path: Path):
    change, words = STATES[name]
    checkpoint = copy.deepcopy(saved)
    change(checkpoint)
    with pytest.raises(WeightsError, match=re.escape(words)) as error:
        resume(tmp_path, checkpoint)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'state.pth'}: cannot be resumed: ") and "\n" not in message
    assert ("checkpoint" in message and "train.pretrained_model_path" in message) or "earlier" in message


def test_a_sound_state_resumes_and_code_in_it_does_not_run(saved: dict[str, Any], tmp_path: Path):
    checkpoint = copy.deepcopy(saved)
    checkpoint["meta"]["config"] = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    runner = resume(tmp_path, checkpoint)
    assert runner.epoch == 3 and runner.optim_wrapper.optimizer.state
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_an_earlier_version_resumes(saved: dict[str, Any], tmp_path: Path):
    checkpoint = copy.deepcopy(saved)
    del checkpoint["meta"][OPTIMIZER_KEY], checkpoint["rng_states"]
    assert resume(tmp_path, checkpoint).epoch == 3


SCALER = {
    "scale": 1024.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 9,
    "_growth_tracker": 0,
}


@pytest.mark.parametrize(
    "state", [{"scale": 0.0}, {"scale": float("nan")}, {"growth_interval": 0}, {"_growth_tracker": "1"}, []]
)
def test_scaler(state: Any):
    check_scaler(SCALER)
    check_scaler({})
    with pytest.raises(Exception, match=r"optimizer\.loss_scaler"):
        check_scaler({**SCALER, **state} if state else state or None)
