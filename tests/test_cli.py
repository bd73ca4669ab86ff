"""Exit statuses of the command."""

from __future__ import annotations

import errno
import shlex
import signal

import pytest

import ddetr_mm.tasks.inspect
from ddetr_mm.cli import COMMANDS, INTERRUPTED, build_parser, main
from ddetr_mm.errors import SpecError, TrainingError
from ddetr_mm.spec.rules import REQUIREMENTS


def test_signals_interrupt_every_command(monkeypatch, capsys, ctrl_c):
    before = signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    for number, said in (
        (signal.SIGTERM, "interrupted by SIGTERM"),
        (signal.SIGHUP, "interrupted by SIGHUP"),
        (signal.SIGINT, "interrupted"),
    ):
        raise_it = lambda _, number=number: signal.raise_signal(number)  # noqa: E731
        monkeypatch.setattr(ddetr_mm.tasks.inspect, "run_spec", raise_it)
        assert main(["spec", "train"]) == INTERRUPTED == 130
        assert said in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGHUP, hangup)


def test_a_signal_that_is_ignored_stays_so(monkeypatch, capsys):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(ddetr_mm.tasks.inspect, "run_spec", lambda _: signal.raise_signal(signal.SIGHUP))
        assert main(["spec", "train"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error, status", [(SpecError("wrong"), 2), (TrainingError("diverged"), 1)])
def test_errors_are_one_message(monkeypatch, capsys, error, status):
    def fail(arguments):
        raise error

    monkeypatch.setattr(ddetr_mm.tasks.inspect, "run_spec", fail)
    assert main(["spec", "train"]) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_full_disk_is_one_message(monkeypatch, capsys):
    def fail(arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "/results/status.json")

    monkeypatch.setattr(ddetr_mm.tasks.inspect, "run_spec", fail)
    assert main(["spec", "train"]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith("error: /results/status.json: cannot be read or written: No space left")
        and told.count("\n") == 1
    )


SPEC_NAMES = ("-e", "--experiment_spec", "--experiment_spec_file")
REST = {
    "weights": ["a.pth", "b.pth", "--to", "tao"],
    "reproduce": ["batch.pth"],
    "translate": ["-o", "config.py"],
}
TAKE_A_SPEC = [
    "convert",
    "train",
    "evaluate",
    "inference",
    "export",
    "gen_trt_engine",
    "quantize",
    "automl",
    "translate",
    "check",
    "weights",
    "reproduce",
]


@pytest.mark.parametrize("command", TAKE_A_SPEC)
def test_the_spec_is_named_as_in_tao(command: str):
    for name in SPEC_NAMES:
        arguments = build_parser().parse_args([command, *REST.get(command, []), name, "spec.yaml"])
        assert arguments.experiment_spec == "spec.yaml"


def test_every_command_with_a_spec_is_tried():
    with_spec = {
        name
        for action in build_parser()._subparsers._group_actions
        for name, parser in action.choices.items()
        if "-e" in parser._option_string_actions
    }
    assert with_spec == set(TAKE_A_SPEC)


def test_a_contradicting_environment_is_one_message(monkeypatch, capsys, tmp_path):
    spec = tmp_path / "spec.yaml"
    source = "{image_dir: images, json_file: a.json}"
    spec.write_text(
        f"results_dir: {tmp_path}\ntrain: {{num_nodes: 4}}\n"
        f"dataset: {{train_data_sources: [{source}], val_data_sources: [{source}], num_classes: 3}}\n"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--experiment_spec_file", str(spec)]) == 2
    assert capsys.readouterr().err == (
        "error: train.num_nodes: contradicts WORLD_SIZE=2 in the environment (got 4);"
        " set train.num_nodes=2, or unset WORLD_SIZE\n"
    )


@pytest.mark.parametrize("command", [one.name for one in COMMANDS])
def test_help_has_examples_that_parse_and_says_where_results_go(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "-h"])
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.splitlines() if line.startswith(f"  ddetr-mm {command}")]
    assert len(examples) == 2 and "\nresults: " in text
    for line in examples:
        build_parser().parse_args(shlex.split(line.partition(" > ")[0])[1:])
    for one in REQUIREMENTS:
        if one.subtask == command and one.only_with is None:
            assert one.path in text, f"-h of {command} does not name {one.path}"
