"""Every change of the learning rates is told, in one line and only then."""

from __future__ import annotations

import logging

from ddetr_mm.runtime.learning_rate_hook import LearningRateHook


class Lines(logging.Handler):
    """Keeps the messages that a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def told(runner) -> list[str]:
    lines = Lines()
    runner.logger.addHandler(lines)
    runner.train()
    return [text for text in lines.texts if text.startswith("Learning rates")]


def test_changes_are_told_once(make_runner, tmp_path):
    runner = make_runner(
        [LearningRateHook()],
        tmp_path,
        epochs=3,
        batches=2,
        param_scheduler=[{"type": "MultiStepLR", "milestones": [2], "gamma": 0.1}],
        log_level="INFO",
    )
    assert told(runner) == ["Learning rates: 0.05 = 0.05", "Learning rates after epoch 2: 0.05 = 0.005"]


def test_schedules_that_count_steps_are_told_by_step(make_runner, tmp_path):
    runner = make_runner(
        [LearningRateHook()],
        tmp_path,
        epochs=1,
        batches=3,
        param_scheduler=[{"type": "MultiStepLR", "milestones": [2], "gamma": 0.5, "by_epoch": False}],
        log_level="INFO",
    )
    assert told(runner) == ["Learning rates: 0.05 = 0.05", "Learning rates after step 2: 0.05 = 0.025"]
