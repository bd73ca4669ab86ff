from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from mmengine.hooks import Hook

from ddetr_mm.engine.checkpoint import TAOCheckpointHook
from ddetr_mm.engine.hooks import StatusHook
from ddetr_mm.engine.status import FAILURE, STARTED, SUCCESS, StatusLog
from ddetr_mm.errors import DataError, SpecError


@pytest.fixture
def log(tmp_path):
    return StatusLog(tmp_path / "train" / "status.json")


def lines(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_fields_stand_in_the_documented_order(log):
    log.write("Training loop in progress", data={"epoch": 0, "eta": "0:15:04"}, kpi={"val_mAP": "0.4123"})
    (line,) = lines(log)
    assert list(line) == ["epoch", "eta", "date", "time", "status", "verbosity", "message", "kpi"]
    assert re.fullmatch(r"[1-9]\d?/[1-9]\d?/20\d\d", line["date"])
    assert re.fullmatch(r"(0|[1-9]\d?):(0|[1-9]\d?):(0|[1-9]\d?)", line["time"])
    assert (line["status"], line["verbosity"]) == ("RUNNING", "INFO")


def test_empty_groups_are_left_out_and_full_ones_come_before_kpi(log):
    log.write("a", graphical={}, categorical={"by class": {"car": 1}}, kpi={"x": 1})
    assert list(lines(log)[0])[-2:] == ["categorical", "kpi"]


def test_kpi_is_repeated_until_replaced(log):
    log.write("Eval metrics generated.", kpi={"val_mAP": "0.1"})
    log.write("b")
    log.write("c", kpi={"train_loss": 8.25})
    log.write("d")
    kpis = [line["kpi"] for line in lines(log)]
    assert kpis == [{"val_mAP": "0.1"}, {"val_mAP": "0.1"}, {"train_loss": 8.25}, {"train_loss": 8.25}]


def test_numpy_and_non_finite_values_stay_valid_json(log):
    log.write("a", kpi={"loss": float("nan"), "n": np.int64(3), "x": np.float32(0.5), "t": (1, float("inf"))})
    assert lines(log)[0]["kpi"] == {"loss": "nan", "n": 3, "x": 0.5, "t": [1, "inf"]}


def test_task_that_succeeds(log):
    with log.task("train") as inside:
        inside.write("Starting Training Loop.", STARTED)
    assert [(line["status"], line["message"]) for line in lines(log)] == [
        (STARTED, "Starting Deformable DETR train."),
        (STARTED, "Starting Training Loop."),
        (SUCCESS, "Train finished successfully."),
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SpecError("bad key"), "Configuration error: bad key"),
        (DataError("no image"), "Parameter validation error: no image"),
        (NotImplementedError("h5"), "Feature not implemented: h5"),
        (ValueError("3"), "Parameter validation error: 3"),
        (TypeError("4"), "Parameter validation error: 4"),
        (FileNotFoundError(2, "gone", "x.pth"), "File system error: [Errno 2] gone: 'x.pth'"),
        (KeyboardInterrupt(), "User/System interruption: Train was interrupted"),
        (SystemExit(143), "User/System interruption: Train was interrupted"),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
    ],
)
def test_task_that_fails_reports_why_and_passes_the_error_on(log, error, message):
    with pytest.raises(type(error)) as caught, log.task("train"):
        raise error
    assert caught.value is error
    assert (lines(log)[-1]["status"], lines(log)[-1]["message"]) == (FAILURE, message)


def test_exit_without_error_is_success(log):
    with pytest.raises(SystemExit), log.task("convert"):
        sys.exit(0)
    assert [line["message"] for line in lines(log)] == [
        "Starting DDETR/DINO dataset convert",
        "Dataset convert finished successfully",
    ]


def test_unwritable_failure_keeps_the_first_error(log, caplog):
    caplog.set_level(logging.ERROR)
    with pytest.raises(RuntimeError, match="the cause"), log.task("train"):
        log.path.unlink()
        log.path.mkdir()
        raise RuntimeError("the cause")
    assert "could not write the failure" in caplog.text


def test_a_line_cut_off_by_a_kill_does_not_swallow_the_next(log):
    log.write("whole")
    with log.path.open("a") as file:
        file.write('{"date": "11/2')
    StatusLog(log.path).write("after")
    texts = log.path.read_text().splitlines()
    assert len(texts) == 3
    assert json.loads(texts[2])["message"] == "after"


def test_only_the_first_rank_writes(log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log.write("from rank 1")
    assert not log.path.exists()
    monkeypatch.setenv("RANK", "0")
    log.write("from rank 0")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    log.write("from Slurm's second")
    assert [line["message"] for line in lines(log)] == ["from rank 0"]


def test_one_log_a_file(tmp_path):
    log = StatusLog.at(tmp_path / "status.json")
    assert StatusLog.at(tmp_path / "x" / ".." / "status.json") is log
    assert StatusLog.at(tmp_path / "other.json") is not log


def test_lines_of_many_writers_never_mix(log):
    def write_many(writer):
        for number in range(50):
            StatusLog(log.path).write("x" * 2000, data={"writer": writer, "number": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_many, range(8)))
    assert len({(line["writer"], line["number"]) for line in lines(log)}) == 400


def test_unknown_status_is_refused(log):
    with pytest.raises(ValueError, match="STARTED, RUNNING, SUCCESS"):
        log.write("x", "DONE")


def test_module_needs_no_torch():
    code = "import sys, ddetr_mm.engine.status; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def hook_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def seconds(text):
    hours, minutes, rest = re.fullmatch(r"(?:(?:\d+ days?, )?)(\d+):(\d\d):(\d\d(?:\.\d{6})?)", text).groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def test_lines_of_a_training_run(make_runner, tmp_path):
    path = tmp_path / "here" / "status.json"
    runner = make_runner([{"type": "StatusHook", "path": str(path)}], epochs=2, batches=4, validate=True)
    runner.train()
    written = hook_lines(path)
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
    assert written[3]["kpi"] == {"val_mAP": "0.1", "val_mAP50": "0.2"}
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
    progress = [line for line in hook_lines(tmp_path / "train" / "status.json") if "step" in line]
    assert [line["step"] for line in progress] == [3, 6, 6, 9, 12, 12]
    for line in progress:
        per_step = seconds(line["time_per_step"])
        assert 0.05 <= per_step < 1
        assert seconds(line["time_per_epoch"]) == pytest.approx(6 * per_step, abs=1e-4)
        assert seconds(line["eta"]) == pytest.approx((12 - line["step"]) * per_step, abs=1e-4)


def test_resuming_is_reported(make_runner, tmp_path):
    make_runner([TAOCheckpointHook()], epochs=1).train()
    latest = tmp_path / "train" / "model_epoch_000.pth"
    make_runner([StatusHook()], epochs=2, resume=True, load_from=str(latest)).train()
    first = hook_lines(tmp_path / "train" / "status.json")[0]
    assert first["message"] == f"Resuming training from checkpoint: {latest}"


def test_metrics_without_known_names_write_nothing(make_runner, tmp_path):
    hook = StatusHook(tmp_path / "status.json")
    runner = make_runner([], epochs=1)
    hook.after_val_epoch(runner, {"accuracy": 1.0})
    assert not (tmp_path / "status.json").exists()
    hook.after_test_epoch(runner, {"coco/bbox_mAP": 1 / 3, "coco/bbox_mAP_50": -1.0, "loss": 7.5})
    (line,) = hook_lines(tmp_path / "status.json")
    assert line["message"] == "Test metrics generated."
    assert line["kpi"] == {"test_mAP": "0.3333333333333333", "test_mAP50": "-1.0", "test_loss": 7.5}
