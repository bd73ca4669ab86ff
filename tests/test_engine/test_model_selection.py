"""Best checkpoints, early stopping and averaged weights, in runs of a linear model."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from tiny_runs import build_runner

from ddetr_mm.engine.checkpoint import TAOCheckpointHook
from ddetr_mm.engine.hooks import StatusHook
from ddetr_mm.engine.model_selection import (
    STATE_NAME,
    AveragedWeightsHook,
    BestCheckpointHook,
    ResumableEarlyStoppingHook,
)
from ddetr_mm.errors import DataError, InputError
from ddetr_mm.outputs import protected_inputs

EPOCHS = 6
VALUES = (0.2, 0.5, 0.3, 0.5, float("nan"), 0.4)  # mAP50 after each epoch


class ValueOfEpoch(BaseMetric):
    """Gives a figure that depends on the steps done alone, as a repeated validation does."""

    default_prefix = "coco"
    runner = None

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return {"bbox_mAP_50": VALUES[self.runner.epoch - 1], "bbox_mAP": 0.0}


class Killed(BaseException):
    """Not an Exception, after which a run would save."""


class KillAt(Hook):
    """Ends a run at a step, or after the validation of an epoch is judged but not yet noted as done."""

    priority = "LOWEST"

    def __init__(self, step=None, epoch=None):
        self.step, self.epoch = step, epoch

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.step:
            raise Killed

    def after_val_epoch(self, runner, metrics=None):
        if runner.epoch == self.epoch:
            raise Killed


def runner_of(folder: Path, hooks, **options):
    """A run of 3 steps an epoch, validated after each by :class:`ValueOfEpoch`."""
    metric = ValueOfEpoch()
    options = {"epochs": EPOCHS, "batches": 3, "elastic": True, **options}
    runner = build_runner(
        folder,
        [TAOCheckpointHook(), StatusHook(), *hooks],
        validate=True,
        **options,
    )
    metric.runner = runner
    runner._val_evaluator = Evaluator([metric])
    return runner


def train(folder: Path, *hooks, **options):
    runner_of(folder, hooks, **options).train()
    return folder


def resume(folder: Path, *hooks, **options):
    load_from = os.path.realpath(folder / "dd_model_latest.pth")
    return train(folder, *hooks, load_from=load_from, resume=True, **options)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*best*.pth") if not path.is_symlink())


def load(path):
    return torch.load(path, weights_only=True)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]


# --- best checkpoints ---


@pytest.mark.parametrize(
    ("options", "names", "best"),
    [
        ({}, ["model_best_001.pth"], "model_best_001.pth"),
        ({"save_top_k": 2}, ["model_best_001.pth", "model_best_003.pth"], "model_best_001.pth"),
        ({"mode": "min"}, ["model_best_000.pth"], "model_best_000.pth"),
        (
            {"mode": "min", "save_top_k": 2},
            ["model_best_000.pth", "model_best_002.pth"],
            "model_best_000.pth",
        ),
        (
            {"filename": "best_{step}_{val_mAP50:.2f}", "save_top_k": 3},
            ["best_12_0.50.pth", "best_18_0.40.pth", "best_6_0.50.pth"],
            "best_6_0.50.pth",
        ),
        ({"filename": "best_{epoch:03d}", "auto_insert_metric_name": True}, ["best_epoch=001.pth"], None),
        ({"filename": "best.pth"}, ["best.pth"], "best.pth"),
    ],
)
def test_the_best_files_are_kept(tmp_path, options, names, best):
    folder = train(tmp_path / "a", BestCheckpointHook(**options))
    assert kept(folder) == names
    assert os.readlink(folder / "dd_model_best.pth") == (best or names[0])
    assert os.readlink(folder / "dd_model_latest.pth") == "model_epoch_005.pth"
    assert len(list(folder.glob("model_epoch_*.pth"))) == EPOCHS
    file = load(folder / "dd_model_best.pth")
    expected = 0.2 if options.get("mode") else 0.5
    remark = {"monitor": "val_mAP50", "mode": options.get("mode", "max"), "value": expected}
    assert file["meta"]["ddetr_mm"]["best"] == remark
    epochs = VALUES.index(expected) + 1
    assert (file["meta"]["epoch"], file["meta"]["iter"]) == (epochs, 3 * epochs)
    periodic = load(folder / f"model_epoch_{epochs - 1:03d}.pth")
    assert "best" not in periodic["meta"]["ddetr_mm"]
    torch.testing.assert_close(file["state_dict"], periodic["state_dict"], rtol=0, atol=0)


def test_losses_are_best_when_small(tmp_path):
    folder = train(tmp_path / "a", BestCheckpointHook(monitor="train_loss"), epochs=3)
    best = [line["best_checkpoint"] for line in lines(folder) if "best_checkpoint" in line]
    losses = [
        line["kpi"]["train_loss"] for line in lines(folder) if line["message"].startswith("Train metrics")
    ]
    falling = [loss for index, loss in enumerate(losses) if loss == min(losses[: index + 1])]
    assert [one["value"] for one in best] == pytest.approx(falling)
    assert load(folder / "dd_model_best.pth")["meta"]["ddetr_mm"]["best"]["mode"] == "min"


def test_status_has_the_values(tmp_path):
    folder = train(tmp_path / "a", BestCheckpointHook(save_top_k=2))
    found = [line["best_checkpoint"] for line in lines(folder) if "best_checkpoint" in line]
    assert [(Path(one["file"]).name, one["value"], one["place"]) for one in found] == [
        ("model_best_000.pth", 0.2, 1),
        ("model_best_001.pth", 0.5, 1),
        ("model_best_002.pth", 0.3, 2),
        ("model_best_003.pth", 0.5, 2),
    ]
    assert {one["monitor"] for one in found} == {"val_mAP50"}


def test_another_folder(tmp_path):
    folder = train(tmp_path / "a", BestCheckpointHook(dirpath=tmp_path / "best" / "ones"), epochs=2)
    assert kept(folder) == []
    assert kept(tmp_path / "best" / "ones") == ["model_best_001.pth"]
    assert os.readlink(tmp_path / "best" / "ones" / "dd_model_best.pth") == "model_best_001.pth"


def test_an_unknown_metric_is_named(tmp_path):
    with pytest.raises(InputError, match="val_mAP50"):
        train(tmp_path / "a", BestCheckpointHook(monitor="mAP50"), epochs=1)


def test_files_of_others_stay(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model_best_001.pth").write_bytes(b"mine")
    with protected_inputs([]), pytest.raises(DataError, match="no run of ours wrote it"):
        train(tmp_path / "a", BestCheckpointHook(), epochs=2)
    assert (tmp_path / "a" / "model_best_001.pth").read_bytes() == b"mine"


@pytest.mark.parametrize("kill", [{"step": 10}, {"step": 12}, {"epoch": 2}, {"epoch": 4}], ids=str)
def test_a_resumed_run_keeps_the_same_files(tmp_path, kill):
    straight = train(tmp_path / "a", BestCheckpointHook(save_top_k=2), ResumableEarlyStoppingHook(patience=9))
    with pytest.raises(Killed):
        hooks = BestCheckpointHook(save_top_k=2), ResumableEarlyStoppingHook(patience=9), KillAt(**kill)
        train(tmp_path / "b", *hooks)
    resumed = resume(tmp_path / "b", BestCheckpointHook(save_top_k=2), ResumableEarlyStoppingHook(patience=9))
    assert kept(resumed) == kept(straight) == ["model_best_001.pth", "model_best_003.pth"]
    assert os.readlink(resumed / "dd_model_best.pth") == "model_best_001.pth"
    states = [json.loads((folder / STATE_NAME).read_text()) for folder in (straight, resumed)]
    for state in states:
        for one in state.values():
            assert len(one.pop("run")) == 16
    assert states[0] == states[1]
    for name in kept(straight):
        torch.testing.assert_close(
            load(straight / name)["state_dict"], load(resumed / name)["state_dict"], rtol=0, atol=0
        )


def test_resuming_elsewhere_counts_the_files_that_are_there(tmp_path):
    train(tmp_path / "a", BestCheckpointHook(), epochs=3)
    options = {"load_from": str(tmp_path / "a" / "model_epoch_002.pth"), "resume": True}
    again = train(tmp_path / "b", BestCheckpointHook(), epochs=4, **options)
    assert kept(again) == ["model_best_003.pth"]
    assert kept(tmp_path / "a") == ["model_best_001.pth"]


def test_a_best_file_can_be_resumed_from(tmp_path):
    train(tmp_path / "a", BestCheckpointHook(), ResumableEarlyStoppingHook(patience=9), epochs=3)
    options = {"load_from": str(tmp_path / "a" / "model_best_001.pth"), "resume": True}
    train(tmp_path / "a", BestCheckpointHook(), ResumableEarlyStoppingHook(patience=9), epochs=3, **options)
    state = json.loads((tmp_path / "a" / STATE_NAME).read_text())
    assert [one["file"] for one in state["best_checkpoints"]["best"]] == ["model_best_001.pth"]
    assert (state["early_stopping"]["waited"], state["early_stopping"]["step"]) == (1, 9)


def test_only_the_newest_of_every_interval_stays(tmp_path):
    folder = tmp_path / "a"
    with pytest.raises(Killed):
        runner = build_runner(
            folder, [TAOCheckpointHook(max_keep=1), KillAt(step=7)], epochs=4, batches=3, elastic=True
        )
        runner.train()
    options = {"load_from": str(folder / "model_epoch_001.pth"), "resume": True}
    build_runner(
        folder, [TAOCheckpointHook(max_keep=1)], epochs=4, batches=3, elastic=True, **options
    ).train()
    assert [path.name for path in folder.glob("model_epoch_*")] == ["model_epoch_003.pth"]


# --- early stopping ---


def test_training_stops_when_nothing_improves(tmp_path):
    folder = train(tmp_path / "a", ResumableEarlyStoppingHook(patience=2))
    assert load(folder / "dd_model_latest.pth")["meta"]["epoch"] == 4  # 0.5 after 2, then 0.3 and 0.5
    assert any("Training stops early (val_mAP50)" in line["message"] for line in lines(folder))
    resume(folder, ResumableEarlyStoppingHook(patience=2))
    assert load(folder / "dd_model_latest.pth")["meta"]["epoch"] == 4
    assert lines(folder)[-2]["message"].startswith("Nothing to do: training had stopped early")
    resume(folder, ResumableEarlyStoppingHook(patience=3))  # the next value is NaN, which ends it too
    assert load(folder / "dd_model_latest.pth")["meta"]["epoch"] == 5


@pytest.mark.parametrize("kill", [{"step": 10}, {"epoch": 3}, {"epoch": 4}], ids=str)
def test_a_resumed_run_stops_at_the_same_epoch(tmp_path, kill):
    with pytest.raises(Killed):
        train(tmp_path / "b", ResumableEarlyStoppingHook(patience=2), KillAt(**kill))
    resume(tmp_path / "b", ResumableEarlyStoppingHook(patience=2))
    assert load(tmp_path / "b" / "dd_model_latest.pth")["meta"]["epoch"] == 4


@pytest.mark.parametrize(
    ("options", "epochs"), [({"min_delta": 0.4}, 3), ({"mode": "min"}, 3), ({"min_delta": 0.25}, 4)]
)
def test_an_improvement_has_a_size_and_a_direction(tmp_path, options, epochs):
    folder = train(tmp_path / "a", ResumableEarlyStoppingHook(patience=2, **options))
    assert load(folder / "dd_model_latest.pth")["meta"]["epoch"] == epochs


# --- averaged weights ---


def test_averaged_weights_follow_their_formula(tmp_path):
    seen = []

    class Watch(Hook):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append(runner.model.linear.weight.detach().clone())

    folder = train(tmp_path / "a", AveragedWeightsHook(momentum=0.1), Watch(), epochs=2)
    average = seen[0]
    for steps, weight in enumerate(seen[1:], start=1):
        share = 0.9 * math.exp(-(1 + steps) / 2000) + 0.1
        average = (1 - share) * average + share * weight
    file = load(folder / "dd_model_latest.pth")
    torch.testing.assert_close(file["state_dict"]["linear.weight"], average)
    torch.testing.assert_close(file["ema_state_dict"]["module.linear.weight"], seen[-1], rtol=0, atol=0)


def test_both_sets_resume_exactly_and_are_in_the_best_file(tmp_path):
    straight = train(tmp_path / "a", AveragedWeightsHook(0.1), BestCheckpointHook(), epochs=4)
    with pytest.raises(Killed):
        train(tmp_path / "b", AveragedWeightsHook(0.1), BestCheckpointHook(), KillAt(step=7), epochs=4)
    resumed = resume(tmp_path / "b", AveragedWeightsHook(0.1), BestCheckpointHook(), epochs=4)
    for name in ("dd_model_latest.pth", "dd_model_best.pth"):
        one, other = load(straight / name), load(resumed / name)
        for part in ("state_dict", "ema_state_dict"):
            torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
        assert not torch.equal(
            one["state_dict"]["linear.weight"], one["ema_state_dict"]["module.linear.weight"]
        )
    periodic = load(straight / "model_epoch_001.pth")
    best = load(straight / "dd_model_best.pth")
    for part in ("state_dict", "ema_state_dict"):
        torch.testing.assert_close(best[part], periodic[part], rtol=0, atol=0)
