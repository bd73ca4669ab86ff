"""A run keeps an epoch of every logged scalar, and ten of the loss; its checkpoints stop growing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from multiprocessing import util
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from tiny_runs import SeededPoints
from torch.utils.data import DataLoader

import ddetr_mm.engine.train_loop as stop_signals
from ddetr_mm.engine import train_loop
from ddetr_mm.engine.checkpoint import TAOCheckpointHook, find_latest_checkpoint, list_checkpoints
from ddetr_mm.engine.hooks import StatusHook
from ddetr_mm.engine.train_loop import (
    LEAST_KEPT,
    LONGEST_FOLDER,
    VALIDATED_NAME,
    StoppedBySignalError,
    StopSignals,
    bound_history,
    keep_socket_names_short,
    signal_proof_worker_init,
)

# ---  ---


class Seen(Hook):
    """Writes down every batch; can be killed, or told to stop, before or after a step."""

    priority = "VERY_HIGH"

    def __init__(self, seen, kill_before=None, signal_in=None, number=signal.SIGTERM):
        self.seen = seen
        self.kill_before = kill_before
        self.signal_in = signal_in
        self.number = number

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.kill_before:
            raise Killed
        self.seen[runner.iter] = (runner.epoch, batch_idx, data_batch["x"].tolist())
        if runner.iter == self.signal_in:
            signal.raise_signal(self.number)


class Killed(BaseException):
    """As SIGKILL: nothing is done about it."""


def end_of(folder: Path) -> dict:
    return torch.load(find_latest_checkpoint(folder), weights_only=True)


def assert_same_end(one: dict, other: dict):
    assert one["meta"]["iter"] == other["meta"]["iter"] and one["meta"]["epoch"] == other["meta"]["epoch"]
    for key, weights in one["state_dict"].items():
        assert torch.equal(weights, other["state_dict"][key]), key
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        states = (end["optimizer"]["state"] for end in (one, other))
        assert all(torch.equal(a[moment], b[moment]) for a, b in zip(*map(dict.values, states), strict=True))
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert one["param_schedulers"] == other["param_schedulers"]


def steps(interval=3):
    return TAOCheckpointHook(interval=interval, unit="step")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted_in_mid_epoch_ends_bit_equal(make_runner, tmp_path, num_workers):
    options = {"elastic": True, "epochs": 3, "validate": True}
    straight, seen = {}, {}
    make_runner([steps(), Seen(straight)], tmp_path / "a", **options).train()
    options["num_workers"] = num_workers
    with pytest.raises(Killed):
        make_runner([steps(), Seen(seen, kill_before=4)], tmp_path / "b", **options).train()
    assert end_of(tmp_path / "b")["meta"]["samples_done"] == 6
    # killed again in another epoch, and each time the process has drawn other numbers in between
    torch.rand(3)
    with pytest.raises(Killed):
        make_runner(
            [steps(), Seen(seen, kill_before=8)], tmp_path / "b", resume=True, **resumed(tmp_path, options)
        ).train()
    make_runner([steps(), Seen(seen)], tmp_path / "b", resume=True, **resumed(tmp_path, options)).train()
    assert seen == straight and len(seen) == 15
    assert_same_end(end_of(tmp_path / "a"), end_of(tmp_path / "b"))


def resumed(tmp_path: Path, options: dict) -> dict:
    return {**options, "load_from": str(find_latest_checkpoint(tmp_path / "b"))}


def test_resuming_seeks_and_never_replays(make_runner, tmp_path, monkeypatch):
    options = {"elastic": True, "epochs": 1}
    with pytest.raises(Killed):
        make_runner([steps(), Seen({}, kill_before=4)], tmp_path / "b", **options).train()
    made = []
    read = SeededPoints.__getitem__

    def counted(self, index):
        made.append(int(index))
        return read(self, index)

    monkeypatch.setattr(SeededPoints, "__getitem__", counted)
    make_runner([steps()], tmp_path / "b", resume=True, **resumed(tmp_path, options)).train()
    assert len(made) == 4  # of ten samples six were done


def test_continues_with_another_batch_size_where_the_epoch_stood(make_runner, tmp_path):
    whole, seen = {}, {}
    make_runner([Seen(whole)], tmp_path / "a", elastic=True, epochs=2).train()
    with pytest.raises(Killed):
        make_runner([steps(), Seen(seen, kill_before=3)], tmp_path / "b", elastic=True, epochs=2).train()
    options = {"elastic": True, "epochs": 2, "batch_size": 3, "resume": True}
    runner = make_runner([steps(), Seen(seen)], tmp_path / "b", **resumed(tmp_path, options))
    runner.train()

    def order(found):
        return [x for _, (epoch, _, xs) in sorted(found.items()) for x in xs]

    # 3 steps of 2 and 2 of up to 3 in the first epoch, 4 in the second
    assert runner.iter == runner.max_iters == 9
    assert [seen[step][1] for step in range(3, 9)] == [2, 3, 0, 1, 2, 3]
    assert order(seen) == order(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_step(make_runner, tmp_path, number, capfd, ctrl_c):
    straight, seen = {}, {}
    make_runner([TAOCheckpointHook(), Seen(straight)], tmp_path / "a", elastic=True).train()
    runner = make_runner(
        [TAOCheckpointHook(), Seen(seen, signal_in=6, number=number)], tmp_path / "b", elastic=True
    )
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignalError, match=rf"{name} after 7 steps.*epoch_001_step_00007\.pth"):
        runner.train()
    assert signal.getsignal(number) is before
    assert "once more" in capfd.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == [
        "model_epoch_000.pth",
        "model_epoch_001_step_00007.pth",
    ]
    options = {"elastic": True, "resume": True}
    make_runner([TAOCheckpointHook(), Seen(seen)], tmp_path / "b", **resumed(tmp_path, options)).train()
    assert seen == straight
    assert_same_end(end_of(tmp_path / "a"), end_of(tmp_path / "b"))


def test_a_signal_in_the_last_step_of_an_epoch_saves_its_end(make_runner, tmp_path):
    runner = make_runner([TAOCheckpointHook(interval=5), Seen({}, signal_in=4)], elastic=True, epochs=3)
    with pytest.raises(StoppedBySignalError, match=r"after 5 steps.*model_epoch_000\.pth"):
        runner.train()
    assert end_of(tmp_path / "train")["meta"]["epoch"] == 1


def test_a_second_signal_ends_at_once(make_runner, tmp_path, ctrl_c):
    class Twice(Seen):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        make_runner([TAOCheckpointHook(), Twice({})], elastic=True).train()
    assert not isinstance(stopped.value, StoppedBySignalError)
    assert not list_checkpoints(tmp_path / "train")


class SignalInValidation(Hook):
    def __init__(self, in_epoch):
        self.in_epoch = in_epoch

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == self.in_epoch:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_validation_saves_and_the_next_run_catches_up(make_runner, tmp_path):
    straight, seen, validated = {}, {}, []

    class Validated(Hook):
        def after_val_epoch(self, runner, metrics=None):
            validated.append(runner.epoch)

    options = {"elastic": True, "validate": True, "epochs": 3}
    make_runner([TAOCheckpointHook(), Seen(straight)], tmp_path / "a", **options).train()
    hooks = [TAOCheckpointHook(interval=9), Seen(seen), Validated()]
    with pytest.raises(StoppedBySignalError, match=r"model_epoch_001\.pth"):
        make_runner([*hooks, SignalInValidation(2)], tmp_path / "b", **options).train()
    assert validated == [1]
    make_runner(hooks, tmp_path / "b", resume=True, **resumed(tmp_path, options)).train()
    assert validated == [1, 2, 3]
    assert (tmp_path / "b" / VALIDATED_NAME).read_text() == "15\n"
    assert seen == straight
    assert_same_end(end_of(tmp_path / "a"), end_of(tmp_path / "b"))
    make_runner(hooks, tmp_path / "b", resume=True, **resumed(tmp_path, options)).train()
    assert validated == [1, 2, 3]


class Clock(Hook):
    """The time of :mod:`train_loop`: each step, checkpoint or validation takes some seconds."""

    priority = "LOWEST"

    def __init__(self, monkeypatch, step_s=0, checkpoint_s=0, validation_s=0):
        self.now = 0.0
        self.step_s, self.checkpoint_s, self.validation_s = step_s, checkpoint_s, validation_s
        monkeypatch.setattr(train_loop, "_LOADED_AT", 0.0)
        monkeypatch.setattr(train_loop, "_clock", lambda: self.now)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.now += self.step_s

    def before_save_checkpoint(self, runner, checkpoint):
        self.now += self.checkpoint_s

    def after_val_epoch(self, runner, metrics=None):
        self.now += self.validation_s


@pytest.mark.parametrize(
    ("costs", "max_hours", "name"),
    [
        # 4 steps, 2 kept free and a minute are 61 minutes.
        ({"step_s": 600}, 1.0, "model_epoch_000_step_00004.pth"),
        # 5 end the epoch; there is no time for its validation.
        ({"step_s": 600}, 1.1, "model_epoch_000.pth"),
        # An epoch of 50 s and a checkpoint of 400 s; 2 of these are kept free, which are known after it.
        ({"step_s": 10, "checkpoint_s": 400}, 0.35, "model_epoch_000.pth"),
        # A validation takes 1000 s: the first is expected to take 2 steps' time, the second as the first.
        ({"step_s": 10, "validation_s": 1000}, 0.5, "model_epoch_001.pth"),
        ({"step_s": 10}, 1.0, None),
    ],
)
def test_a_run_ends_before_its_time_limit(make_runner, tmp_path, monkeypatch, costs, max_hours, name):
    straight, seen, logged = {}, {}, []
    options = {"elastic": True, "validate": True, "epochs": 3}
    make_runner([TAOCheckpointHook(), Seen(straight)], tmp_path / "a", **options).train()
    loop = {"type": "ResumableTrainLoop", "max_epochs": 3, "max_hours": max_hours}
    with monkeypatch.context() as patch:
        clock = Clock(patch, **costs)
        hooks = [TAOCheckpointHook(), StatusHook(), Seen(seen), clock]
        runner = make_runner(hooks, tmp_path / "b", **options, train_cfg=loop)
        runner.logger.info = logged.append
        runner.train()
        assert clock.now < 3600 * max_hours
    status = (tmp_path / "b" / "status.json").read_text()
    if name is None:
        assert runner.train_loop.out_of_time is None and "Training loop complete." in status
    else:
        path = (tmp_path / "b" / name).resolve()
        assert find_latest_checkpoint(tmp_path / "b") == path
        text = f"Stopped before ddetr_mm.max_hours={max_hours:g} are over"
        assert text in status and runner.train_loop.out_of_time in logged
        assert runner.train_loop.out_of_time.startswith(text)
        assert str(name) in runner.train_loop.out_of_time
        options = resumed(tmp_path, options)
        make_runner([TAOCheckpointHook(), Seen(seen)], tmp_path / "b", resume=True, **options).train()
    assert seen == straight
    assert_same_end(end_of(tmp_path / "a"), end_of(tmp_path / "b"))


@pytest.mark.parametrize("val_interval", [1, 3])
def test_a_run_stops_after_the_epoch_that_is_asked_for(make_runner, tmp_path, val_interval):
    straight, seen, logged = {}, {}, []
    options = {"elastic": True, "validate": True, "epochs": 3}
    whole = {"type": "ResumableTrainLoop", "max_epochs": 3, "val_interval": val_interval}
    hooks = [TAOCheckpointHook(), Seen(straight)]
    make_runner(hooks, tmp_path / "a", **{**options, "train_cfg": whole}).train()
    for stop in (1, 2):
        # The second start resumes; a third with the same number would have nothing to do.
        again = resumed(tmp_path, options) | {"resume": True} if stop == 2 else options
        loop = {**whole, "stop_after_epoch": stop}
        hooks = [TAOCheckpointHook(), StatusHook(), Seen(seen)]
        runner = make_runner(hooks, tmp_path / "b", **{**again, "train_cfg": loop})
        runner.logger.info = logged.append
        runner.train()
        assert runner.epoch == stop and runner.val_evaluator.metrics[0].calls == 1
        path = (tmp_path / "b" / f"model_epoch_00{stop - 1}.pth").resolve()
        assert find_latest_checkpoint(tmp_path / "b") == path
        text = f"Stopped by ddetr_mm.stop_after_epoch={stop}: {stop} of 3 epochs trained"
        assert text in (tmp_path / "b" / "status.json").read_text()
        assert runner.train_loop.out_of_time.startswith(text) and runner.train_loop.out_of_time in logged
    options = resumed(tmp_path, options)
    hooks = [TAOCheckpointHook(), Seen(seen)]
    make_runner(hooks, tmp_path / "b", resume=True, **{**options, "train_cfg": whole}).train()
    assert seen == straight  # no step is repeated, with the rates that it has in one run
    assert_same_end(end_of(tmp_path / "a"), end_of(tmp_path / "b"))


def test_other_samplers_begin_the_epoch_anew_and_say_so(make_runner, tmp_path, caplog):
    loop = {"type": "ResumableTrainLoop", "max_epochs": 1}
    with pytest.raises(Killed):
        make_runner([steps(), Seen({}, kill_before=4)], tmp_path / "b", train_cfg=loop).train()
    seen = {}
    runner = make_runner(
        [steps(), Seen(seen)],
        tmp_path / "b",
        train_cfg=loop,
        resume=True,
        load_from=str(find_latest_checkpoint(tmp_path / "b")),
    )
    told = []
    runner.logger.warning = told.append
    runner.train()
    assert [batch for _, batch, _ in seen.values()] == [0, 1, 2, 3, 4]
    assert any("cannot seek" in text for text in told)


def test_accumulated_gradients_are_never_cut(make_runner, tmp_path):
    wrapper = {"optimizer": {"type": "AdamW", "lr": 0.05}, "accumulative_counts": 2}
    runner = make_runner([steps(1), Seen({}, signal_in=2)], elastic=True, optim_wrapper=wrapper)
    with pytest.raises(StoppedBySignalError, match="after 4 steps"):
        runner.train()
    assert [path.name for path in list_checkpoints(tmp_path / "train")] == [
        "model_epoch_000_step_00002.pth",
        "model_epoch_000_step_00004.pth",
    ]


@pytest.mark.parametrize(
    ("step_s", "steps"), [(0.0, 25), (0.001, 25), (0.1, 10), (0.3, 3), (0.6, 1), (1.0, 1), (30.0, 1)]
)
def test_ranks_exchange_about_once_a_second(step_s: float, steps: int) -> None:
    assert train_loop.steps_between_exchanges(step_s) == steps


@pytest.mark.parametrize(
    ("step_s", "accumulated", "after"),
    [
        (0.3, 1, 7),  # exchanged after steps 1, 4 and 7
        (2.0, 1, 5),
        (0.3, 2, 8),  # after 2 and 8: only where the weights have just changed
    ],
)
def test_several_ranks_stop_after_the_same_step(
    make_runner, tmp_path, monkeypatch, step_s, accumulated, after
):
    """Another rank, whose steps take as long, is asked to stop in step 5."""
    exchanged = []
    runner = make_runner(
        [TAOCheckpointHook(), Seen({}), Clock(monkeypatch, step_s=step_s)],
        elastic=True,
        batches=12,
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.05}, "accumulative_counts": accumulated},
    )

    def all_reduce(values: torch.Tensor, op: str) -> None:
        exchanged.append(runner.iter)
        assert op == "max" and values[2] == pytest.approx(step_s)
        values[0] = max(values[0], float(runner.iter >= 5))

    monkeypatch.setattr(train_loop, "get_world_size", lambda: 2)
    monkeypatch.setattr(train_loop, "all_reduce", all_reduce)
    with pytest.raises(
        StoppedBySignalError,
        match=rf"another process was asked to stop after {after} steps.*_{after:05}\.pth",
    ):
        runner.train()
    assert (
        exchanged == {(0.3, 1): [1, 4, 7], (2.0, 1): [1, 2, 3, 4, 5], (0.3, 2): [2, 8]}[step_s, accumulated]
    )


def test_one_process_looks_after_every_step(make_runner, monkeypatch):
    looked = []
    runner = make_runner([Clock(monkeypatch, step_s=0.01)], elastic=True, epochs=1, batches=6)
    reduce = train_loop.all_reduce

    def all_reduce(values: torch.Tensor, op: str) -> None:
        looked.append(runner.iter)
        reduce(values, op)

    monkeypatch.setattr(train_loop, "all_reduce", all_reduce)
    runner.train()
    assert looked == [1, 2, 3, 4, 5, 6]


# --- Copies of the next batch ---


class OnStream(torch.Tensor):
    """A tensor that writes down the streams that use it."""

    def record_stream(self, stream):
        self.users = [*getattr(self, "users", []), stream]


class FakePreprocessor:
    """Writes down what is copied and used, and when."""

    def __init__(self, events, device="cuda"):
        self.events, self.device = events, torch.device(device)

    def copy_to_device(self, batch):
        self.events.append(f"copy {batch}")
        return {"inputs": torch.zeros(1).as_subclass(OnStream)}

    def take_copied(self, batch, copied):
        self.events.append(f"use {batch} by {copied['inputs'].users}")


@pytest.fixture
def cuda_events(monkeypatch) -> list[str]:
    """Replaces CUDA's streams and events by what writes down how they are used."""
    events: list[str] = []

    class Done:
        def record(self, stream):
            events.append(f"record on {stream}")

    class Current:
        def wait_event(self, event):
            events.append("wait")

        def __repr__(self):
            return "current"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Done)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
    return events


def test_the_next_batch_is_copied_while_a_step_runs(cuda_events):
    events = cuda_events
    preprocessor = FakePreprocessor(events)
    for batch in train_loop.CopiedAhead([1, 2, 3], preprocessor):
        # The copy of the next one has been handed to the thread; it ends whenever it likes.
        for _ in range(500):
            if f"copy {min(batch + 1, 3)}" in events:
                break
            time.sleep(0.01)
        events.append(f"step {batch}")
    assert [event for event in events if event.startswith(("copy", "step"))] == [
        "copy 1", "copy 2", "step 1", "copy 3", "step 2", "step 3",
    ]  # fmt: skip
    for batch in (1, 2, 3):
        assert events.index(f"copy {min(batch + 1, 3)}") < events.index(f"step {batch}")
        assert events.index(f"use {batch} by [current]") < events.index(f"step {batch}")
    assert events.count("wait") == events.count("record on side") == 3
    assert list(train_loop.CopiedAhead([], preprocessor)) == []


def test_a_copy_that_fails_ends_the_step_that_needs_it(cuda_events):
    class Full(FakePreprocessor):
        def copy_to_device(self, batch):
            if batch == 2:
                raise RuntimeError("CUDA out of memory")
            return super().copy_to_device(batch)

    seen = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for batch in train_loop.CopiedAhead([1, 2, 3], Full(cuda_events)):
            seen.append(batch)
    assert seen == [1]


@pytest.mark.parametrize(
    ("device", "workers", "ours", "ahead"),
    [("cuda", 2, True, True), ("cpu", 2, True, False), ("cuda", 0, True, False), ("cuda", 2, False, False)],
)
def test_batches_are_copied_ahead_where_that_changes_nothing(device, workers, ours, ahead):
    loader = SimpleNamespace(num_workers=workers)
    model = SimpleNamespace(data_preprocessor=FakePreprocessor([], device) if ours else object())
    for wrapped in (model, SimpleNamespace(module=model)):
        found = train_loop.batches_for(wrapped, loader)
        assert (found is not loader) is ahead
        assert not ahead or (type(found) is train_loop.CopiedAhead and found.loader is loader)


def test_validates_as_often_as_asked(make_runner):
    loop = {"type": "ResumableTrainLoop", "max_epochs": 5, "val_interval": 2}
    runner = make_runner([], elastic=True, validate=True, train_cfg=loop)
    runner.train()
    assert runner.val_evaluator.metrics[0].calls == 3


# ---  ---


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


# --- Data workers hand tensors over wherever the temporary folder lies ---


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes a temporary folder with a name of so many bytes the one in use."""

    def use(num_bytes: int) -> Path:
        folder = Path("/tmp/" + "x" * (num_bytes - len("/tmp/")))
        folder.mkdir()
        made.append(folder)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        return folder

    made: list[Path] = []
    yield use
    for folder in made:
        folder.rmdir()


def test_a_long_temporary_folder_is_passed_over(temporary):
    temporary(LONGEST_FOLDER + 1)
    keep_socket_names_short()
    assert len(tempfile.gettempdir()) <= LONGEST_FOLDER


def test_the_longest_folder_still_takes_a_socket(temporary, monkeypatch):
    folder = temporary(LONGEST_FOLDER)
    keep_socket_names_short()
    assert tempfile.gettempdir() == str(folder)
    with tempfile.TemporaryDirectory(prefix="pymp-") as sockets:
        monkeypatch.setattr(util, "get_temp_dir", lambda: sockets)
        Listener(family="AF_UNIX").close()


def test_without_any_short_folder_the_variable_is_named(temporary, monkeypatch):
    temporary(LONGEST_FOLDER + 1)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OSError, match=r"TMPDIR=/tmp/x+ is too long .* set TMPDIR to a folder"):
        keep_socket_names_short()


def test_batches_arrive_from_below_a_long_folder(temporary):
    temporary(120)
    loader = DataLoader(
        torch.arange(8.0), batch_size=4, num_workers=1, worker_init_fn=signal_proof_worker_init, timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), torch.arange(8.0))


# --- A run keeps an epoch of every logged scalar, and ten of the loss; its checkpoints stop growing ---


def test_older_values_go_and_the_mean_of_an_epoch_stays():
    hub = MessageHub.get_instance("history", log_scalars={}, runtime_info={}, resumed_keys={})
    for name, steps in (("train/loss", 12_000), ("train/lr", 3_000)):
        for step in range(steps):
            hub.update_scalar(name, float(step))
    bound_history(hub, steps_an_epoch=500)
    hub.update_scalar("train/loss", 12_000.0)
    hub.update_scalar("train/lr", 3_000.0)
    lengths = {name: len(buffer.data[0]) for name, buffer in hub.log_scalars.items()}
    assert lengths == {"train/loss": 5_000, "train/lr": LEAST_KEPT}
    assert hub.get_scalar("train/lr").mean(500) == pytest.approx(2_750.5)
    assert hub.get_scalar("train/loss").data[0][0] == 12_000 - 4_999


def test_checkpoints_of_a_long_run_hold_no_more(make_runner, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train_loop, "LEAST_KEPT", 2)
    monkeypatch.setattr(train_loop, "EPOCHS_OF_LOSS", 2)
    runner = make_runner([TAOCheckpointHook(interval=1)], tmp_path, elastic=True, epochs=6)
    runner.train()
    steps = len(runner.train_dataloader)
    files = sorted(tmp_path.glob("model_epoch_*.pth"))
    assert len(files) == 6
    kept = [
        {
            name: len(buffer["values"])
            for name, buffer in torch.load(file, weights_only=True)["message_hub"]["log_scalars"].items()
        }
        for file in files
    ]
    assert kept[-1] == kept[-2] == kept[-3]
    assert kept[-1]["train/loss"] == 2 * steps and kept[-1]["train/lr"] == max(2, steps)


# --- a checkpoint where an error ends the run ---


class Failing(Hook):
    """Raises at a point of the fourth step (the second of epoch 2)."""

    def __init__(self, point: str) -> None:
        self.point = point

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 4 and self.point != "after":
            if self.point == "before":
                raise RuntimeError("broken\nhere")
            if self.point == "nan":
                runner.model.linear.weight.data[0, 0] = float("nan")
                raise RuntimeError("broken")
            if self.point == "step":
                runner.optim_wrapper.optimizer.register_step_pre_hook(self.fail)

    def fail(self, *_):
        raise RuntimeError("broken")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 4 and self.point == "after":
            raise RuntimeError("broken")

    def before_val(self, runner):
        if self.point == "validation":
            raise RuntimeError("broken")


def fail_at(make_runner, folder: Path, point: str, caplog, **options) -> str:
    runner = make_runner(
        [TAOCheckpointHook(interval=5), Failing(point)], folder, batches=3, elastic=True, **options
    )
    runner.logger.addHandler(caplog.handler)
    with pytest.raises(RuntimeError, match="broken"):
        runner.train()
    (line,) = [one.getMessage() for one in caplog.records if "Training ends by an error" in one.getMessage()]
    return line


@pytest.mark.parametrize(
    ("point", "steps", "batches", "epoch"),
    [("before", 4, 1, 1), ("after", 5, 2, 1), ("validation", 3, 0, 1)],
)
def test_an_error_leaves_a_checkpoint_that_resumes(
    point: str, steps: int, batches: int, epoch: int, make_runner, tmp_path, caplog
):
    line = fail_at(make_runner, tmp_path / "train", point, caplog, validate=point == "validation")
    path = find_latest_checkpoint(tmp_path / "train")
    shown = "broken\\nhere" if point == "before" else "broken"
    assert line.endswith(
        f". Its state after {steps} steps is in {path}, which the same command resumes from."
    )
    assert line.startswith(f"Training ends by an error (RuntimeError: '{shown}'). Its state")
    meta = torch.load(path, weights_only=True)["meta"]
    assert (meta["iter"], meta["batches_done"], meta["epoch"]) == (steps, batches, epoch)
    options = {"batches": 3, "elastic": True, "load_from": str(path), "resume": True}
    runner = make_runner([TAOCheckpointHook()], tmp_path / "train", **options)
    runner.train()
    whole = make_runner([TAOCheckpointHook()], tmp_path / "whole", batches=3, elastic=True)
    whole.train()
    assert (runner.iter, runner.epoch) == (6, 2)
    assert torch.equal(runner.model.linear.weight, whole.model.linear.weight)


@pytest.mark.parametrize("point", ["nan", "step"])
def test_a_state_that_is_not_sound_is_not_saved(point: str, make_runner, tmp_path, caplog):
    line = fail_at(make_runner, tmp_path / "train", point, caplog)
    assert line.endswith("; its state cannot be saved; the newest checkpoint is missing.")
    assert not list_checkpoints(tmp_path / "train")
