import multiprocessing
import os
import signal
import threading

import pytest

import ddetr_mm.runtime.stop_signals as stop_signals
from ddetr_mm.runtime.stop_signals import StoppedBySignalError, StopSignals, signal_proof_worker_init


@pytest.mark.parametrize("number, reason", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_the_first_signal_is_a_wish_and_the_second_ends(number, reason, ctrl_c):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested and stop.reason == reason
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_ignored(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested


def test_a_block_that_may_be_left_anywhere():
    with StopSignals() as stop:
        with pytest.raises(StoppedBySignalError, match="SIGTERM"), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the signal was not met")
        with pytest.raises(StoppedBySignalError), stop.at_once():
            raise AssertionError("a wish from before was not met")


def test_other_threads_change_no_handlers():
    seen = []

    def work():
        with StopSignals() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGTERM), False)]


def worker(ready, go_on):
    signal_proof_worker_init(0)
    ready.set()
    go_on.wait()
    threading.Event().wait()


def test_a_worker_outlives_ctrl_c_and_ends_by_itself_after_sigterm(monkeypatch):
    monkeypatch.setattr(stop_signals, "WORKER_GRACE_S", 1)
    context = multiprocessing.get_context("fork")
    ready, go_on = context.Event(), context.Event()
    process = context.Process(target=worker, args=(ready, go_on), daemon=True)
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGINT)
    go_on.set()
    process.join(0.2)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
