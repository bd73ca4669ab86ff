"""Progress bars and lines, and the time left."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
from mmengine.logging import HistoryBuffer

import ddetr_mm.engine.progress as progress_module
import ddetr_mm.register  # noqa: F401
from ddetr_mm.engine import progress
from ddetr_mm.engine.hooks import ProgressHook, validations_left
from ddetr_mm.engine.progress import Progress, is_live_terminal, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_plain_lines_every_few_seconds_and_at_the_end(clock):
    stream = io.StringIO()
    with Progress("reading", unit="images", stream=stream) as progress:
        for done in range(1, 101):
            clock.now += 0.25
            progress.update(done, 100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "reading: 20/100 images (20%), 4/s, 0:00:20 left"
    assert lines[-1] == "reading: 100/100 images (100%)"
    assert len(lines) == 6
    assert "\x1b" not in stream.getvalue()


def test_time_left_forgets_a_slow_start(clock):
    stream = io.StringIO()
    with Progress("training", total=1000, stream=stream) as progress:
        clock.now += 60  # warming up
        progress.advance()
        for _ in range(400):
            clock.now += 0.1
            progress.advance()
    left = re.findall(r"10/s, 0:0(\d):(\d\d) left", stream.getvalue())
    done = int(re.findall(r"training: (\d+)/1000 \(\d+%\), 10/s", stream.getvalue())[-1])
    assert int(left[-1][0]) * 60 + int(left[-1][1]) == pytest.approx((1000 - done) / 10, abs=1)


def test_unknown_total_counts_only(clock):
    stream = io.StringIO()
    with Progress("searching", stream=stream) as progress:
        clock.now += 6
        progress.update(7)
    assert stream.getvalue().splitlines()[0] == "searching: 7"


def test_a_failure_prints_no_last_line(clock):
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress("reading", 5, stream=stream) as progress:
        progress.advance()
        raise RuntimeError
    assert stream.getvalue() == ""


def test_only_the_first_rank_shows(clock, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    stream = io.StringIO()
    with Progress("reading", 5, stream=stream) as progress:
        clock.now += 60
        progress.advance()
    assert stream.getvalue() == ""


def test_track_yields_everything(capsys):
    assert list(track(range(5), "looping")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines()[-1] == "looping: 5/5 (100%)"
    assert list(track((x for x in "ab"), "looping")) == ["a", "b"]


CODE = """
import time
from ddetr_mm.engine.progress import track
for _ in track(range(30), 'looping', unit='things'):
    time.sleep(0.02)
"""


def terminal_output(**environment):
    """What a real pseudo-terminal gets to see on standard error."""
    main, worker = pty.openpty()
    keep = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stderr=worker, env=keep | {"COLUMNS": "100"} | environment
    )
    os.close(worker)
    seen = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end has closed
            break
        if not part:
            break
        seen += part
    os.close(main)
    assert process.wait() == 0
    return seen.decode()


def test_a_terminal_gets_a_bar():
    seen = terminal_output(TERM="xterm-256color")
    assert "30/30" in seen and re.search(r"\d/s", seen)
    assert "\x1b[38;" in seen or "\x1b[3" in seen
    plain = terminal_output(TERM="xterm-256color", NO_COLOR="1")
    assert "30/30" in plain
    assert not re.search(r"\x1b\[(3|9)\d", plain)


def test_a_dumb_terminal_gets_lines():
    seen = terminal_output(TERM="dumb")
    assert "looping: 30/30 things (100%)" in seen
    assert "\x1b" not in seen


def test_a_file_is_no_terminal(tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert not is_live_terminal(file)


# --- the hook ---


@pytest.fixture
def runner() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        max_iters=4,
        iter=0,
        logger=logging.getLogger("progress-test"),
        val_loop=None,
        val_dataloader=[0] * 3,
        test_dataloader=[0] * 2,
        message_hub=types.SimpleNamespace(log_scalars={"train/loss": HistoryBuffer([2.53125], [1])}),
        optim_wrapper=types.SimpleNamespace(
            optimizer=types.SimpleNamespace(param_groups=[{"lr": 2e-5}, {"lr": 2e-4}])
        ),
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


def test_the_first_step_has_its_line_at_once(runner, capsys):
    hook = ProgressHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"training: 1/4 steps \(25%\), loss 2\.531, lr 0\.0002, [0-9.]+ [MG]iB", line)
    hook.before_val_epoch(runner)
    hook.after_val_epoch(runner, {"coco/bbox_mAP": 0.41249, "coco/bbox_mAP_50": 0.7})
    runner.iter = 3
    hook.after_train_iter(runner, 3)
    hook.after_train(runner)
    assert ", loss 2.531, AP 0.412, lr" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("unit", "one"), [("steps", "step"), ("batches", "batch"), ("images", "image")])
def test_slow_steps_are_seconds_a_step(clock, unit, one):
    stream = io.StringIO()
    with Progress("working", total=10, unit=unit, stream=stream) as progress:
        for _ in range(3):
            clock.now += 12.5
            progress.advance()
    assert f"working: 3/10 {unit} (30%), 12.5 s/{one}, 0:01:28 left" in stream.getvalue().splitlines()


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


# --- The time left, on simulated step times ---

Steps = Callable[[np.random.Generator, int], np.ndarray]


def steady(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.normal(0.5, 0.05, count).clip(0.1)


def scales(rng: np.random.Generator, count: int) -> np.ndarray:
    """Multi-scale training: short sides of 480 to 800 pixels, time by area."""
    return 1.5 * (rng.integers(480, 801, count) / 640) ** 2


def long_steps(rng: np.random.Generator, count: int) -> np.ndarray:
    """A large model on a CPU: five seconds a step."""
    return 5 * rng.normal(1, 0.15, count).clip(0.3)


def slow_start(rng: np.random.Generator, count: int) -> np.ndarray:
    """A first step that compiles for half a minute."""
    times = rng.normal(0.8, 0.08, count)
    times[0] = 30
    return times


def slow_workers(rng: np.random.Generator, count: int) -> np.ndarray:
    """Every eighth step waits for the data."""
    times = rng.normal(0.3, 0.03, count)
    times[::8] += 1.5
    return times


@pytest.mark.parametrize("steps", [steady, scales, long_steps, slow_start, slow_workers])
@pytest.mark.parametrize("pause_s", [0.0, 45.0])
def test_the_time_left_is_within_a_fifth(clock, steps, pause_s):
    """Checked each half minute from the first minute, with pauses from the first pause on."""
    times = steps(np.random.default_rng(0), 1_000)
    every = len(times) // 10
    num_pauses = 10 if pause_s else 0
    end = clock.now + times.sum() + pause_s * num_pauses
    checked = 0
    with Progress("training", total=len(times), stream=io.StringIO()) as progress:
        progress.pauses_left = num_pauses
        next_check = clock.now + 60
        for done, step_s in enumerate(times, start=1):
            clock.now += step_s
            progress.update(done)
            if pause_s and done % every == 0:
                progress.pause()
                clock.now += pause_s
                progress.resume()
            ready = not pause_s or done > every
            if ready and clock.now >= next_check and done < 0.9 * len(times):
                hours, minutes, seconds = map(int, progress._left_text().split(":"))
                left = 3600 * hours + 60 * minutes + seconds
                assert left == pytest.approx(end - clock.now, rel=0.2), f"after {done} steps"
                checked += 1
                next_check = clock.now + 30
    assert checked >= 3


def test_a_machine_that_gets_busy_is_followed(clock):
    with Progress("training", total=3000, stream=io.StringIO()) as progress:
        for done in range(1, 2001):
            clock.now += 0.1 if done <= 1000 else 0.4
            progress.update(done)
        assert progress._left_text() == "0:06:40"


def test_nothing_is_known_at_first(clock):
    with Progress("training", total=10, stream=io.StringIO()) as progress:
        assert progress._left_text() == "" == progress._rate_text()


@pytest.mark.parametrize(
    "epochs, interval, begin, expected",
    [(10, 1, 1, 10), (10, 3, 1, 4), (10, 5, 1, 2), (10, 2, 6, 3), (2, 5, 1, 1)],
)
def test_validations_left_are_those_that_run(make_runner, epochs, interval, begin, expected):
    from mmengine.hooks import Hook

    class Counter(Hook):
        seen, before = 0, None

        def before_train(self, runner):
            self.before = validations_left(runner)

        def after_val_epoch(self, runner, metrics=None):
            self.seen += 1

    counter = Counter()
    cfg = {"by_epoch": True, "max_epochs": epochs, "val_interval": interval, "val_begin": begin}
    make_runner([counter], batches=1, validate=True, train_cfg=cfg).train()
    assert counter.before == counter.seen == expected
