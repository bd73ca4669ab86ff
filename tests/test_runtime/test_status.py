from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ddetr_mm.errors import DataError, SpecError
from ddetr_mm.runtime.status import FAILURE, STARTED, SUCCESS, StatusLog


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
def test_task_that_fails_tells_why_and_passes_the_error_on(log, error, message):
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
    code = "import sys, ddetr_mm.runtime.status; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
