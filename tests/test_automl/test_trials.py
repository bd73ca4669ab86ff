"""Trials: their specs, what is read of their runs, their processes' environment, their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from automl_project import make_project

from ddetr_mm.automl import trials
from ddetr_mm.automl.trials import (
    best_spec,
    failure_of,
    kind_of,
    read_history,
    remove_checkpoints,
    start_process,
    trial_spec,
    visible_devices,
)
from ddetr_mm.outputs import OWNED_NAME, protected_inputs
from ddetr_mm.spec import load_spec


@pytest.fixture
def spec(tmp_path: Path):
    """A user's spec with settings that a trial must not have."""
    path = make_project(tmp_path / "project")
    overrides = [
        *("encryption_key=secret", "ddetr_mm.max_hours=1", "train.results_dir=elsewhere", "wandb.run_id=abc"),
        *("ddetr_mm.automl.storage=postgresql://u:pa55@h/d", "train.validation_interval=2"),
    ]
    return load_spec(path, overrides, "automl").spec


def test_a_trial_has_a_spec_of_its_own(spec, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DDETR_MM_ENCRYPTION_KEY", "secret")
    folder = tmp_path / "automl" / "trial_003"
    text = trial_spec(spec, {"train.optim.lr": 0.002}, folder, heading="Trial 003", goal="max")
    assert text.startswith("# Trial 003\n") and "secret" not in text and "pa55" not in text
    (tmp_path / "spec.yaml").write_text(text)
    own = load_spec(tmp_path / "spec.yaml", (), "train").spec
    assert own.train.optim.lr == 0.002 and own.train.num_epochs == 4 and own.train.validation_interval == 2
    assert own.results_dir == str(folder) and own.train.results_dir is None
    assert own.encryption_key == "secret" and own.ddetr_mm.max_hours is None and own.wandb.run_id == ""
    assert own.train.checkpointer.monitor == "val_mAP50" and own.train.checkpointer.replace_periodic
    assert own.dataset == spec.dataset and own.model == spec.model


def test_the_best_spec_names_the_checkpoint_where_the_user_names_none(spec, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DDETR_MM_ENCRYPTION_KEY", "secret")
    spec.export.checkpoint = "mine.pth"
    text = best_spec(spec, {"train.optim.lr": 0.002}, Path("results/automl/best.pth"), heading="Best")
    (tmp_path / "best.yaml").write_text(text)
    best = load_spec(tmp_path / "best.yaml", (), "train").spec
    assert best.evaluate.checkpoint == best.inference.checkpoint == "results/automl/best.pth"
    assert best.export.checkpoint == "mine.pth" and best.results_dir == "results"
    assert best.train.num_epochs == 4 and best.train.optim.lr == 0.002


def test_history_of_a_run_that_was_killed_and_resumed(tmp_path: Path):
    def line(**entry: object) -> str:
        return json.dumps(entry) + "\n"

    path = tmp_path / "status.json"
    evaluated = "Eval metrics generated."
    path.write_text(
        line(status="STARTED", message="Starting")
        + line(epoch=0, time_per_epoch="1 day, 0:01:02.5", message="Training loop in progress")
        + line(message="Train metrics generated.", kpi={"train_loss": 2.0})
        + line(message=evaluated, kpi={"val_mAP50": "0.25", "val_loss": 3.0})
        + line(
            epoch=1, time_per_epoch="0:00:02", message="Training loop in progress", kpi={"val_mAP50": "0.25"}
        )
        + line(status="FAILURE", message="Training error: NaN")
        + '{"epoch": 2, "mess\n'
        + line(status="STARTED", message="Starting")
        + line(message=evaluated, kpi={"val_mAP50": "0.5", "val_mAP": "nan"})
    )
    history = read_history(path)
    assert history.trained == [1, 2] and history.epochs == 2 and history.failure == ""
    assert history.curve("val_mAP50") == {1: 0.25, 2: 0.5} and history.curve("val_mAP") == {}
    assert history.curve("train_loss") == {1: 2.0} and history.seconds_an_epoch == 2.0
    assert read_history(tmp_path / "none").epochs == 0


def test_reasons_of_failures(tmp_path: Path):
    history = read_history(tmp_path / "none")
    assert "SIGKILL" in failure_of(tmp_path, -9, history)
    (tmp_path / "log.txt").write_text("a\nerror: no such backbone\n\n")
    assert failure_of(tmp_path, 2, history) == "no such backbone"
    history.failure = "Training error: the loss is NaN"
    assert failure_of(tmp_path, 1, history) == "Training error: the loss is NaN"
    first, second = (
        "CUDA out of memory: 12.5 GiB, x/trial_001/train",
        "CUDA out of memory: 3 GiB, x/trial_020/b",
    )
    assert kind_of(first) == kind_of(second) != kind_of("Training error")


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a, GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d")]
)
def test_a_trial_sees_its_own_gpus(visible, expected):
    assert visible_devices([2, 3], visible) == expected


def test_a_trial_is_no_part_of_the_job_that_the_study_is(tmp_path: Path, monkeypatch):
    started = {}
    monkeypatch.setattr(
        trials.subprocess, "Popen", lambda command, **options: started.update(options, c=command)
    )
    jobs = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "NUM_GPU_PER_NODE")
    for name in jobs:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    start_process(tmp_path, stop_after=3, gpu_ids=[1], key="secret")
    environment = started["env"]
    assert not set(jobs) & set(environment) and environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert environment["DDETR_MM_ENCRYPTION_KEY"] == "secret" and "secret" not in " ".join(started["c"])
    assert "ddetr_mm.stop_after_epoch=3" in started["c"] and "train.gpu_ids=[1]" in started["c"]
    assert started["start_new_session"]


def test_only_checkpoints_that_our_runs_wrote_are_removed(tmp_path: Path):
    names = ["model_epoch_001.pth", "dd_model_best.pth", "status.json", "model_mine.pth"]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / OWNED_NAME).write_text("".join(json.dumps(name) + "\n" for name in names[:3]))
    with protected_inputs(()):
        assert remove_checkpoints(tmp_path) == ["dd_model_best.pth", "model_epoch_001.pth"]
        assert remove_checkpoints(tmp_path / "none") == []
    assert {path.name for path in tmp_path.iterdir()} == {"status.json", "model_mine.pth", OWNED_NAME}
