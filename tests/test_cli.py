"""Exit statuses of the command."""

from __future__ import annotations

import errno
import signal

import pytest

import ddetr_mm.tasks.inspect
from ddetr_mm.cli import INTERRUPTED, main
from ddetr_mm.errors import SpecError, TrainingError


def test_sigterm_and_ctrl_c_interrupt_every_command(monkeypatch, capsys, ctrl_c):
    before = signal.getsignal(signal.SIGTERM)
    for number, said in ((signal.SIGTERM, "interrupted by SIGTERM"), (signal.SIGINT, "interrupted")):
        raise_it = lambda _, number=number: signal.raise_signal(number)  # noqa: E731
        monkeypatch.setattr(ddetr_mm.tasks.inspect, "run_spec", raise_it)
        assert main(["spec", "train"]) == INTERRUPTED == 130
        assert said in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


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
