from __future__ import annotations

import json
import re
import time

import pytest
from mmengine.hooks import Hook

from ddetr_mm.runtime.checkpoint_hook import TAOCheckpointHook
from ddetr_mm.runtime.status_hook import StatusHook


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def seconds(text):
    hours, minutes, rest = re.fullmatch(r"(?:(?:\d+ days?, )?)(\d+):(\d\d):(\d\d(?:\.\d{6})?)", text).groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def test_lines_of_a_training_run(make_runner, tmp_path):
    path = tmp_path / "here" / "status.json"
    runner = make_runner([{"type": "StatusHook", "path": str(path)}], epochs=2, batches=4, validate=True)
    runner.train()
    written = lines(path)
    assert [(line["status"], line["message"]) for line in written] == [
        ("STARTED", "Starting Training Loop."),
        ("RUNNING", "Training loop in progress"),
        ("RUNNING", "Train metrics generated."),
        ("RUNNING", "Eval metrics generated."),
        ("RUNNING", "Training loop in progress"),
        ("RUNNING", "Train metrics generated."),
        ("RUNNING", "Eval metrics generated."),
        ("RUNNING", "Training loop complete."),
    ]
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert written[2]["kpi"] == {"train_loss": pytest.approx(losses[:4].mean())}
    assert written[3]["kpi"] == {"val_mAP": "0.1000", "val_mAP50": "0.2000"}
    assert written[4]["kpi"] == written[3]["kpi"]
    progress = [line for line in written if line["message"] == "Training loop in progress"]
    assert [(line["epoch"], line["step"], line["max_epoch"], line["max_step"]) for line in progress] == [
        (0, 4, 1, 8),
        (1, 8, 1, 8),
    ]
    assert list(progress[0])[:7] == [
        "epoch", "step", "max_epoch", "max_step", "time_per_epoch", "time_per_step", "eta",
    ]  # fmt: skip
    assert progress[1]["eta"] == "0:00:00"


class Slow(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        time.sleep(0.05)


def test_times_and_steps_within_an_epoch(make_runner, tmp_path):
    make_runner([Slow(), StatusHook(step_interval=3)], epochs=2, batches=6).train()
    progress = [line for line in lines(tmp_path / "train" / "status.json") if "step" in line]
    assert [line["step"] for line in progress] == [3, 6, 6, 9, 12, 12]
    for line in progress:
        per_step = seconds(line["time_per_step"])
        assert 0.05 <= per_step < 1
        assert seconds(line["time_per_epoch"]) == pytest.approx(6 * per_step, abs=1e-4)
        assert seconds(line["eta"]) == pytest.approx((12 - line["step"]) * per_step, abs=1e-4)


def test_resuming_is_told(make_runner, tmp_path):
    make_runner([TAOCheckpointHook()], epochs=1).train()
    latest = tmp_path / "train" / "model_epoch_000.pth"
    make_runner([StatusHook()], epochs=2, resume=True, load_from=str(latest)).train()
    first = lines(tmp_path / "train" / "status.json")[0]
    assert first["message"] == f"Resuming training from checkpoint: {latest}"


def test_metrics_without_known_names_write_nothing(make_runner, tmp_path):
    hook = StatusHook(tmp_path / "status.json")
    runner = make_runner([], epochs=1)
    hook.after_val_epoch(runner, {"accuracy": 1.0})
    assert not (tmp_path / "status.json").exists()
    hook.after_test_epoch(runner, {"coco/bbox_mAP": 0.5, "coco/bbox_mAP_50": -1.0, "loss": 7.5})
    (line,) = lines(tmp_path / "status.json")
    assert line["message"] == "Test metrics generated."
    assert line["kpi"] == {"test_mAP": "0.5000", "test_mAP50": "-1.0000", "test_loss": 7.5}
