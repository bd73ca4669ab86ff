"""The Runner's loops tell how far they are, also between two log lines."""

from __future__ import annotations

import logging
import types

import pytest

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.runtime import progress
from ddetr_mm.runtime.progress_hook import ProgressHook


@pytest.fixture
def runner() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        max_iters=4,
        iter=0,
        logger=logging.getLogger("progress-test"),
        val_loop=None,
        val_dataloader=[0] * 3,
        test_dataloader=[0] * 2,
    )


def test_training_lines_come_by_time(runner, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    hook = ProgressHook()
    hook.before_train(runner)
    for runner.iter in range(4):
        hook.after_train_iter(runner, runner.iter)
    hook.before_val_epoch(runner)
    hook.after_val_iter(runner, 0)
    hook.after_val_epoch(runner)
    hook.after_train(runner)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 1/4 steps (25%)")
    assert lines[-1].startswith("training: 4/4 steps (100%)")
    assert not any(line.startswith("validating") for line in lines)


def test_testing_and_validating_alone(runner, capsys):
    hook = ProgressHook()
    hook.before_test_epoch(runner)
    hook.after_test_iter(runner, 1)
    hook.after_test_epoch(runner)
    hook.before_val_epoch(runner)
    hook.after_val_iter(runner, 2)
    hook.after_val_epoch(runner)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "testing: 2/2 batches (100%)",
        "validating: 3/3 batches (100%)",
    ]
