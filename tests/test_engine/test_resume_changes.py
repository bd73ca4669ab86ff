"""Runs resumed with another spec than their checkpoint's: what holds is logged, or the run is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import CheckpointLoader
from tiny_runs import Line, Points, build_runner

from ddetr_mm.engine.checkpoint import TAOCheckpointHook
from ddetr_mm.engine.optimization import ScaledLearningRateHook
from ddetr_mm.engine.resume_changes import IMAGES_KEY
from ddetr_mm.engine.resume_state import ResumeHook
from ddetr_mm.errors import WeightsError


class Network(Line):
    """A line with a backbone, which learns at a rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str = "tensor") -> Any:
        return super().forward(self.backbone(x), y, mode)


def settings(
    lr: float = 0.04, backbone: float = 0.01, decay: float = 0.1, kind: str = "AdamW", **schedule: Any
) -> dict[str, Any]:
    groups = {"backbone": {"lr_mult": backbone / lr}}
    optimizer = {"type": kind, "lr": lr, "weight_decay": decay}
    return {
        "optim_wrapper": {"optimizer": optimizer, "paramwise_cfg": {"custom_keys": groups}},
        "param_scheduler": [schedule or {"type": "MultiStepLR", "milestones": [1], "gamma": 0.1}],
    }


def run(folder: Path, choice: str = "from_checkpoint", *, hooks: tuple = (), **options: Any) -> Any:
    every = [ResumeHook(choice), TAOCheckpointHook(), *hooks]
    return build_runner(folder, every, **{"model": Network(), **settings(), **options})


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_epochs")
    run(folder, epochs=2).train()
    return folder / "model_epoch_001.pth"


@pytest.fixture
def resumed(two_epochs: Path, tmp_path: Path, caplog) -> Callable[..., tuple[Any, list[str]]]:
    """Resume, and give the run after its third epoch and what it said of changes."""

    def go(choice: str = "from_checkpoint", **options: Any) -> tuple[Any, list[str]]:
        options = {"epochs": 3, "load_from": str(two_epochs), "resume": True, **options}
        runner = run(tmp_path / "more", choice, **options)
        runner.logger.addHandler(caplog.handler)
        with caplog.at_level(logging.WARNING):
            runner.train()
        lines = [one.getMessage() for one in caplog.records]
        return runner, [line for line in lines if line.startswith("Resuming with another")]

    return go


def rates(runner: Any) -> list[float]:
    """Rates of the line and of the backbone in the last epoch's checkpoint."""
    state = CheckpointLoader.load_checkpoint(str(Path(runner.work_dir) / "model_epoch_002.pth"), "cpu")
    groups = state["optimizer"]["param_groups"]
    assert [group["params"] for group in groups] == [[0], [1], [2], [3]]
    return [groups[0]["lr"], groups[2]["lr"]]


CHANGES: dict[str, tuple[dict[str, Any], dict[str, tuple[str, str]], list[float], list[float]]] = {
    # settings of the resumed run → fields with both values, rates kept, rates of the spec (in epoch 3, which
    # began at 0.1 of the initial rates: one milestone of two epochs done)
    "nothing": ({}, {}, [0.004, 0.001], [0.004, 0.001]),
    "lr": ({"lr": 0.08}, {"train.optim.lr": ("0.04", "0.08")}, [0.004, 0.001], [0.008, 0.001]),
    "lr_backbone": (
        {"backbone": 0.02},
        {"train.optim.lr_backbone": ("0.01", "0.02")},
        [0.004, 0.001],
        [0.004, 0.002],
    ),
    "weight decay": (
        {"decay": 0.3},
        {"train.optim.weight_decay": ("0.1", "0.3")},
        [0.004, 0.001],
        [0.004, 0.001],
    ),
    "lr_steps": (
        {"type": "MultiStepLR", "milestones": [5, 9], "gamma": 0.1},
        {"train.optim.lr_steps": ("[1]", "[5, 9]")},
        [0.004, 0.001],
        [0.04, 0.01],
    ),
    "lr_decay": (
        {"type": "MultiStepLR", "milestones": [1], "gamma": 0.5},
        {"train.optim.lr_decay": ("0.1", "0.5")},
        [0.004, 0.001],
        [0.02, 0.005],
    ),
    "scheduler": (
        {"type": "StepLR", "step_size": 2, "gamma": 0.1},
        {"train.optim.lr_scheduler": ("MultiStep", "StepLR")},
        [0.004, 0.001],
        [0.004, 0.001],
    ),
}


@pytest.mark.parametrize("choice", ["from_checkpoint", "from_spec"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_logged_with_both_values_and_what_holds(name: str, choice: str, resumed):
    changed, fields, kept, taken = CHANGES[name]
    runner, lines = resumed(choice, **settings(**changed))
    holds = {
        "from_checkpoint": "the checkpoint's holds; ddetr_mm.resume_optimizer: from_spec takes the spec's.",
        "from_spec": "the spec's holds (ddetr_mm.resume_optimizer: from_spec).",
    }[choice]
    assert lines == [
        f"Resuming with another {field}: {saved} in the checkpoint, {ours} in the spec; {holds}"
        for field, (saved, ours) in fields.items()
    ]
    assert rates(runner) == pytest.approx(kept if choice == "from_checkpoint" else taken)
    decay = changed.get("decay", 0.1) if choice == "from_spec" else 0.1
    assert {group["weight_decay"] for group in runner.optim_wrapper.optimizer.param_groups} == {decay}


def test_a_schedule_of_another_kind_goes_on_as_the_checkpoints(resumed):
    later = {"type": "StepLR", "step_size": 1, "gamma": 0.5}
    runner, _ = resumed(**settings(**later), epochs=4)
    assert "milestones" in runner.param_schedulers[0].state_dict()
    assert runner.optim_wrapper.param_groups[0]["lr"] == pytest.approx(0.004)


@pytest.mark.parametrize(
    "schedule",
    [
        {"type": "MultiStepLR", "milestones": [2], "gamma": 0.1},
        {"type": "MultiStepLR", "milestones": [3], "gamma": 0.1},
        {"type": "StepLR", "step_size": 2, "gamma": 0.1},
        {"type": "StepLR", "step_size": 3, "gamma": 0.1},
    ],
)
def test_a_longer_run_has_the_decays_after_the_earlier_end(schedule: dict[str, Any], tmp_path: Path):
    late = settings(**schedule)
    run(tmp_path / "first", epochs=2, **late).train()
    path = str(tmp_path / "first" / "model_epoch_001.pth")
    runner = run(tmp_path / "more", epochs=4, load_from=path, resume=True, **late)
    runner.train()
    whole = run(tmp_path / "whole", epochs=4, **late)
    whole.train()
    ends = [[group["lr"] for group in one.optim_wrapper.param_groups] for one in (runner, whole)]
    assert ends[0] == pytest.approx(ends[1]) and ends[0][0] == pytest.approx(0.004)


def test_the_state_of_the_optimizer_is_kept_with_the_specs_settings(resumed, two_epochs: Path):
    runner, _ = resumed("from_spec", **settings(lr=0.08))
    saved = CheckpointLoader.load_checkpoint(str(two_epochs), "cpu")["optimizer"]["state"][0]["step"]
    state = next(iter(runner.optim_wrapper.optimizer.state.values()))
    assert float(state["step"]) == float(saved) + 5


def test_scaled_rates_are_compared_before_scaling(two_epochs: Path, resumed):
    hook = ScaledLearningRateHook(batch_size=2, base_batch_size=1)
    runner, lines = resumed("from_spec", hooks=(hook,))
    assert not lines and rates(runner) == pytest.approx([0.008, 0.002])


def freeze(model: Any) -> Any:
    model.backbone.requires_grad_(False)
    return model


def test_other_frozen_parts_are_refused(resumed):
    with pytest.raises(
        WeightsError, match=r"backbone\.bias and 1 other parameters: trained in the ch"
    ) as error:
        resumed(model=freeze(Network()))
    message = str(error.value)
    assert "train.freeze: cannot be resumed" in message and "train.pretrained_model_path" in message


def test_parts_that_were_frozen_are_refused(tmp_path: Path):
    run(tmp_path / "frozen", epochs=1, model=freeze(Network())).train()
    path = str(tmp_path / "frozen" / "model_epoch_000.pth")
    with pytest.raises(WeightsError, match=r"frozen in the checkpoint and trained in this run"):
        run(tmp_path / "more", load_from=path, resume=True).train()


def test_another_optimizer_is_refused(resumed):
    with pytest.raises(WeightsError, match=r"was trained with AdamW, this run has SGD") as error:
        resumed(**settings(kind="SGD"))
    assert "train.optim.optimizer: cannot be resumed" in str(error.value)


@pytest.mark.parametrize(("ours", "saved"), [("SGD", "Adam or AdamW"), ("AdamW", "SGD")])
def test_another_optimizer_of_an_earlier_version_is_refused(ours: str, saved: str, tmp_path: Path):
    kind = "AdamW" if ours == "SGD" else "SGD"
    run(tmp_path / "first", epochs=1, **settings(kind=kind)).train()
    state = CheckpointLoader.load_checkpoint(str(tmp_path / "first" / "model_epoch_000.pth"), "cpu")
    del state["meta"]["optimizer_layout"]
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=f"was trained with {saved}, this run has {ours}"):
        run(
            tmp_path / "more", load_from=str(tmp_path / "old.pth"), resume=True, **settings(kind=ours)
        ).train()


class Pictures(Points):
    """Points with names."""

    def __init__(self, size: int, digest: str = "abc") -> None:
        super().__init__(size)
        self.image_digest = lambda: digest


@pytest.mark.parametrize(
    ("size", "digest", "words"),
    [
        (8, "abc", "there are 8 training images, at the checkpoint there were 10"),
        (12, "abc", "there are 12 training images, at the checkpoint there were 10"),
        (10, "abd", "the 10 training images are others than the checkpoint's, or in another order"),
        (10, "abc", None),
    ],
)
def test_other_images_are_refused(size: int, digest: str, words: str | None, tmp_path: Path):
    def loader(data: Pictures) -> dict[str, Any]:
        sampler = {"type": "DefaultSampler", "shuffle": True}
        collate = {"type": "default_collate"}
        return {"dataset": data, "sampler": sampler, "batch_size": 2, "num_workers": 0, "collate_fn": collate}

    run(tmp_path / "first", epochs=1, train_dataloader=loader(Pictures(10))).train()
    path = str(tmp_path / "first" / "model_epoch_000.pth")
    assert CheckpointLoader.load_checkpoint(path, "cpu")["meta"][IMAGES_KEY] == {
        "number": 10,
        "digest": "abc",
    }
    data = loader(Pictures(size, digest))
    runner = run(tmp_path / "more", load_from=path, resume=True, train_dataloader=data)
    if words is None:
        runner.train()
        return
    with pytest.raises(WeightsError, match=words) as error:
        runner.train()
    assert str(error.value).startswith(f"{path}: dataset.train_data_sources: cannot be resumed: ")
    assert "train.pretrained_model_path" in str(error.value)
