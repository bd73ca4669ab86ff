"""Stretches of a step add up to it, on a clock that the test moves; a real run leaves table and file."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from mmengine.logging import MMLogger

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.engine.time_ledger import STAGES, TimeLedger, TimeLedgerHook, ledger_table
from ddetr_mm.models.stages import listening, stage


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_step(ledger: TimeLedger, clock: Clock, scale: float = 1.0) -> None:
    def work(seconds: float) -> None:
        clock.now += scale * seconds

    ledger.begin("data")
    work(1)
    ledger.switch("idle")
    work(2)
    with stage("backbone"):
        work(4)
    with stage("loss"):
        work(8)
        with stage("matching"):
            work(16)
        work(32)
    ledger.end()


def test_inner_stretches_are_taken_off_outer_ones() -> None:
    clock = Clock()
    ledger = TimeLedger(torch.device("cpu"), clock)
    with listening(ledger.stage):
        run_step(ledger, clock)
    summary = ledger.summary()
    assert summary["steps"] == 1
    times = {name: round(ms / 1e3) for name, ms in summary["host_ms"].items()}
    expected = dict.fromkeys(STAGES, 0)
    expected |= {"data": 1, "idle": 2, "backbone": 4, "loss": 40, "matching": 16, "step": 63}
    assert times == expected
    assert "device_ms" not in summary


def test_medians_leave_out_the_first_steps() -> None:
    clock = Clock()
    ledger = TimeLedger(torch.device("cpu"), clock)
    with listening(ledger.stage):
        for scale in (100, 1, 3, 2):
            run_step(ledger, clock, scale)
        ledger.begin("data")
        ledger.drop()
    assert ledger.summary(skip=1)["steps"] == 3
    assert ledger.summary(skip=1)["host_ms"]["step"] == pytest.approx(126e3)
    assert ledger.summary(skip=9)["steps"] == 1
    table = ledger_table(ledger.summary(skip=1))
    assert ["matching", "32000.0", "25%"] in [line.split() for line in table.splitlines()]
    assert len(table.splitlines()) == 1 + len(STAGES) + 1


def test_an_error_in_a_stretch_closes_it() -> None:
    clock = Clock()
    ledger = TimeLedger(torch.device("cpu"), clock)
    with listening(ledger.stage):
        ledger.begin("data")
        with pytest.raises(ZeroDivisionError), stage("loss"):
            raise ZeroDivisionError
        clock.now += 5
        ledger.end()
    assert ledger.summary()["host_ms"]["data"] == pytest.approx(5e3)


def test_stretches_without_a_listener_or_step_count_for_nothing() -> None:
    with stage("loss"):
        pass
    ledger = TimeLedger(torch.device("cpu"))
    with listening(ledger.stage):
        with stage("loss"):
            pass
        with pytest.raises(RuntimeError, match="a listener already"), listening(ledger.stage):
            pass
    assert ledger.num_steps == 0


def test_a_run_leaves_table_and_file_and_everything_as_it_was(make_runner, tmp_path, caplog) -> None:
    hook = TimeLedgerHook(skip=1)
    runner = make_runner([hook], epochs=2, batches=4)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    wrapper = runner.optim_wrapper
    try:
        with caplog.at_level(logging.INFO):
            runner.train()
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text.count("Time of a training step") == 2
    ledger = json.loads(next(tmp_path.rglob("time_ledger.json")).read_text())
    assert ledger["steps"] == 7 and ledger["device"] == "cpu"
    times = ledger["host_ms"]
    assert all(times[name] > 0 for name in ("data", "backward", "optimizer", "idle"))
    assert times["step"] >= max(times[name] for name in STAGES)
    assert times["encoder"] == 0  # the little model has no such part
    for owner, names in ((runner.optim_wrapper or wrapper, ("backward", "step", "zero_grad")),):
        assert not set(names) & set(vars(owner))
    assert "forward" not in vars(runner.model.data_preprocessor)
    with listening(lambda name: stage(name)):  # nobody listens any more
        pass
