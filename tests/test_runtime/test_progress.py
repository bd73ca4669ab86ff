from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

import ddetr_mm.runtime.progress as progress_module
from ddetr_mm.runtime.progress import Progress, is_live_terminal, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told."""

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
from ddetr_mm.runtime.progress import track
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
