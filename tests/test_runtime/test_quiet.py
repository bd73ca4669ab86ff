from __future__ import annotations

import logging

import pytest

from ddetr_mm.runtime.quiet import ConsoleFilter, QuietRunner, quiet_console


def test_console_is_short_and_the_file_complete(tmp_path, capsys):
    from tiny_runs import build_runner

    options = {"runner_class": QuietRunner, "log_level": "INFO", "cfg": {"note": "whole config"}}
    runner = build_runner(tmp_path / "train", [], epochs=1, **options)
    runner.train()
    shown = capsys.readouterr().out
    (log_file,) = (tmp_path / "train").rglob("*.log")
    logged = log_file.read_text()
    for wall in ("System environment", "Hooks will be executed", "Config:", "Exp name"):
        assert wall not in shown
        assert wall in logged
    assert "Epoch(train)" in shown
    assert len(shown.splitlines()) < 10 < len(logged.splitlines())


def test_errors_always_pass():
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "Config:\nbroken", (), None)
    assert ConsoleFilter().filter(record)


def test_filter_is_put_on_once_and_not_on_files(tmp_path):
    logger = logging.Logger("quiet")
    logger.addHandler(logging.StreamHandler())
    logger.addHandler(logging.FileHandler(tmp_path / "log"))
    quiet_console(logger)
    quiet_console(logger)
    assert [len(handler.filters) for handler in logger.handlers] == [1, 0]


@pytest.mark.parametrize(
    "message", ["loss: 3", "", "Saved checkpoint model_epoch_000.pth.", "Configs differ"]
)
def test_ordinary_messages_pass(message):
    assert ConsoleFilter().filter(logging.LogRecord("x", logging.INFO, "f", 1, message, (), None))
