"""A config's text reads back as the config; the console is short and the log file complete."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from ddetr_mm.engine.hooks import ProgressHook
from ddetr_mm.engine.runner import ConsoleFilter, QuickTextConfig, QuietRunner, quiet_console

CONFIG = (
    Path(__file__).parents[2] / "configs/deformable_detr/deformable-detr-refine_gcvit-tiny_8xb4-50e_coco.py"
)

# --- Console ---


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


def test_a_progress_line_replaces_mmengines(tmp_path, capsys):
    from tiny_runs import build_runner

    options = {"runner_class": QuietRunner, "log_level": "INFO"}
    build_runner(tmp_path / "train", [ProgressHook()], epochs=2, **options).train()
    shown = capsys.readouterr()
    assert "Epoch(train)" not in shown.out and "training: " in shown.err and ", loss " in shown.err
    (log_file,) = (tmp_path / "train").rglob("*.log")
    assert "Epoch(train) [2]" in log_file.read_text()


def test_a_deterministic_run_leaves_the_next_one_free(tmp_path):
    """mmengine switches PyTorch to deterministic algorithms for the rest of the process."""
    from tiny_runs import build_runner

    class Switches(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append(torch.are_deterministic_algorithms_enabled())

    assert not torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    for deterministic in (True, False):
        seen: list[bool] = []
        options = {"runner_class": QuietRunner, "randomness": {"seed": 1, "deterministic": deterministic}}
        runner = build_runner(tmp_path / str(deterministic), [Switches()], epochs=1, **options)
        runner.train()
        assert seen == [deterministic] * 5
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark is benchmark and not torch.backends.cudnn.deterministic
        seen.clear()
        runner._train_loop._epoch = 0  # the same runner once more
        runner.train()
        assert seen == [deterministic] * 5


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    from tiny_runs import build_runner

    monkeypatch.setattr("mmengine.runner.runner.time.time", lambda: 1_700_000_000.0)
    folders = (tmp_path / "a", tmp_path / "a", tmp_path / "b")
    runners = [build_runner(folder, [], epochs=1, runner_class=QuietRunner) for folder in folders]
    assert len({runner.timestamp for runner in runners}) == 3
    assert len({runner.log_dir for runner in runners}) == 3


def test_the_log_file_takes_any_letter(tmp_path, monkeypatch):
    """In a locale of another encoding, mmengine's log file would be opened in that."""
    from tiny_runs import build_runner

    def open_latin(handler):
        return open(handler.baseFilename, handler.mode, encoding="latin-1")

    monkeypatch.setattr(logging.FileHandler, "_open", open_latin)
    runner = build_runner(tmp_path / "train", [], runner_class=QuietRunner, log_level="INFO")
    runner.logger.info("class 人")
    assert "class 人" in next(tmp_path.rglob("*.log")).read_text(encoding="utf-8")


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


# --- A config's text follows every change and reads back as the same config ---

CONTENT = "model = dict(type='A', layers=[1, 2])\nload_from = None\n"


def test_the_text_reads_back_as_the_config():
    plain = Config.fromfile(CONFIG)
    config = QuickTextConfig.of(plain)
    for again in (config, copy.deepcopy(config)):
        assert again.dump() == again.pretty_text
        assert Config.fromstring(again.pretty_text, ".py").to_dict() == plain.to_dict()
    assert config.filename == plain.filename


@pytest.mark.parametrize("content", ["a = float('inf')", "a = {1, 2}"])
def test_what_is_no_plain_data_is_written_by_mmengine(content: str):
    plain = Config.fromstring(CONTENT + content + "\n", ".py")
    assert QuickTextConfig.of(plain).pretty_text == plain.pretty_text


def test_a_change_is_seen():
    plain = Config.fromstring(CONTENT, ".py")
    config = QuickTextConfig.of(plain)
    before = config.pretty_text
    config.model.layers.append(3)
    config.work_dir = "here"
    assert config.pretty_text != before
    read = Config.fromstring(config.pretty_text, ".py")
    assert read.work_dir == "here" and read.model.layers == [1, 2, 3]
    assert plain.get("work_dir") is None
