"""Figures of the GPU benchmarks as they come, and child processes that end in time whatever happens in them.

A figure is one line of JSON: the benchmark, its row (such as a batch size), the contestant and an event:
``begin``, ``end``, ``alone`` (what a contestant gives by itself), ``round`` and ``times`` (alternating),
``left_out`` (it failed, with the reason), ``skipped`` (no time was left), ``environment`` or ``note``. Every
line is written when it is known, so that a run that is killed leaves what it has found; a crash is seen as a
``begin`` without an end.

No torch here: the process that watches over the others must start at once and survive what ends them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_tree import PROC, descendants

BROKEN_CONTEXT = 75
"""Exit status of a child whose GPU context no longer works: the others need a new process."""

GRACE_S = 2.0
POLL_S = 0.1

# --- Figures ---


class Figures:
    """One benchmark's part of a file of figures.

    Args:
        path: the file; it is created, or appended to.
        benchmark: name of the script.
        row: what its contestants share in this part, such as ``batch 8``.
    """

    def __init__(self, path: Path, benchmark: str, row: str = "") -> None:
        self.path, self.benchmark, self.row = Path(path), benchmark, row

    def of_row(self, row: str) -> Figures:
        """The same file and benchmark for another row."""
        return Figures(self.path, self.benchmark, row)

    def append(self, event: str, contestant: str = "", **values: Any) -> None:
        """Write a figure, and have the system keep it.

        Args:
            event: see the module.
            contestant: whose it is, if anyone's.
            **values: what JSON can hold; anything else is written as text.
        """
        line = {"benchmark": self.benchmark, "row": self.row, "contestant": contestant, "event": event}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **values}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All figures of this benchmark and row so far."""
        wanted = {"benchmark": self.benchmark, "row": self.row}
        return [one for one in read_figures(self.path) if wanted.items() <= one.items()]

    def left_out(self) -> set[str]:
        """Contestants of this row that failed before."""
        return {one["contestant"] for one in self.events() if one["event"] == "left_out"}


def read_figures(path: Path) -> list[dict[str, Any]]:
    """All figures of a file; empty where there is none. A last line that was cut off is skipped."""
    if not Path(path).exists():
        return []
    found = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def unfinished(figures: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The last ``begin`` that has neither an ``end`` nor a ``left_out`` after it."""
    begun: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in figures:
        key = (one["benchmark"], one["row"], one["contestant"])
        if one["event"] == "begin":
            begun[key] = one
        elif one["event"] in ("end", "left_out"):
            begun.pop(key, None)
    return list(begun.values())[-1] if begun else None


class Deadline:
    """A point in time.

    Args:
        seconds: from now; None for never.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = float("inf") if seconds is None else seconds
        self._began = time.monotonic()

    def left_s(self, share: float = 1.0) -> float:
        """Seconds until a share of the time is over, at least 0; infinite without a limit."""
        return max(0.0, share * self._seconds - (time.monotonic() - self._began))

    def has_passed(self, share: float = 1.0) -> bool:
        """Whether the time, or a share of it (0..1), is over."""
        return self.left_s(share) <= 0


# --- Child processes ---


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every GPU benchmark has for its processes and its record."""
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants that take part")
    parser.add_argument("--seconds", type=float, help="no contestant begins later; default: no limit")
    parser.add_argument("--record", action="store_true", help="write the record to benchmarks/records")
    parser.add_argument(
        "--figures", type=Path, help="append figures to this file, measure in this process, write no record"
    )


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: exit status, negative for a signal; None where it was killed because its time was over.
        seconds: it ran.
    """

    status: int | None
    seconds: float

    @property
    def reason(self) -> str:
        """In words."""
        if self.status is None:
            return f"still ran after {self.seconds:.0f} s"
        if self.status < 0:
            return f"the process ended by {signal.Signals(-self.status).name}"
        return f"the process ended with status {self.status}"


def run_child(command: Sequence[str], limit_s: float, log: Path, quiet: bool = False) -> Ended:
    """Run a command for a limited time, its output in a log and on the console; then end all it started.

    Args:
        command: program and arguments.
        limit_s: after these seconds it is killed.
        log: file that its output is appended to.
        quiet: no output on the console.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    seen: dict[int, str] = {}
    with log.open("ab") as output, log.open("rb") as shown:
        shown.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        )
        looked = 0.0
        try:
            while child.poll() is None and time.monotonic() - began < limit_s:
                if time.monotonic() - looked > 1:
                    seen |= {pid: _started(pid) for pid in descendants(child.pid)}
                    looked = time.monotonic()
                time.sleep(POLL_S)
                _show(shown, quiet)
        finally:
            status = child.poll()
            seen |= {pid: _started(pid) for pid in descendants(child.pid)}
            _end(child, seen)
            _show(shown, quiet)
    return Ended(status, time.monotonic() - began)


def _show(file: Any, quiet: bool) -> None:
    text = file.read()
    if text and not quiet:
        sys.stdout.write(text.decode("utf-8", "replace"))
        sys.stdout.flush()


def _started(pid: int) -> str:
    """When a process began, as the system counts it, so that a reused number is not taken for it; '' if it
    is gone.
    """
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _end(child: subprocess.Popen, seen: dict[int, str]) -> None:
    """End a child and whatever it started: politely, then at once."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        alive = [pid for pid, started in seen.items() if started and _started(pid) == started]
        for pid in alive:
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):
                continue
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            child.poll()  # a dead child that is not waited for still has its number
            if not any(_is_running(pid, started) for pid, started in seen.items()):
                return
            time.sleep(0.05)


def _is_running(pid: int, started: str) -> bool:
    if not started or _started(pid) != started:
        return False
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run_group(
    script: Path, options: Sequence[str], figures: Path, limit_s: float, log: Path, quiet: bool = False
) -> list[Ended]:
    """Run a benchmark's child; after a crash run it again without the contestant that crashed it.

    Args:
        script: the benchmark, which takes ``--figures`` and ``--seconds``.
        options: further arguments.
        figures: the file of figures.
        limit_s: for all attempts together; the child is asked to end some seconds before.
        log: for the output.
        quiet: no output on the console.

    Returns:
        How each attempt ended; the last one with status 0 where all went well.
    """
    deadline, ended = Deadline(limit_s), []
    name = script.stem
    while deadline.left_s() > 2 * GRACE_S:
        before = len(read_figures(figures))
        # Ending a child may take twice the grace.
        limit = deadline.left_s() - 2 * GRACE_S
        command = [sys.executable, str(script), *options, "--figures", str(figures)]
        if limit < float("inf"):
            command += ["--seconds", f"{max(1.0, 0.92 * limit - 3):.1f}"]
        ended.append(run_child(command, limit, log, quiet))
        status = ended[-1].status
        new = [one for one in read_figures(figures)[before:] if one["benchmark"] == name]
        crashed = None if status == 0 else unfinished(new)
        if crashed is not None:
            part = Figures(figures, name, crashed["row"])
            part.append("left_out", crashed["contestant"], reason=ended[-1].reason)
        elif status not in (0, BROKEN_CONTEXT):
            Figures(figures, name).append("note", text=f"{name} {' '.join(options)}: {ended[-1].reason}")
        if status in (0, None) or (crashed is None and status != BROKEN_CONTEXT):
            break
        if crashed is None and not any(one["event"] == "left_out" for one in new):
            break  # nothing would be different the next time
    return ended


def run_and_record(script: Path, groups: Sequence[Sequence[str]], args: argparse.Namespace) -> int:
    """Run the groups of a benchmark one after the other, print the record, and keep it with ``--record``.

    Args:
        script: the benchmark.
        groups: for each process the arguments that differ.
        args: the parsed command line; the rest of it is handed on.

    Returns:
        0 where every process ended well, else 1; the record has what there is.
    """
    import gpu_summary
    from environment import report

    record = script.parent / "records" / script.stem if args.record else None
    given = [one for one in sys.argv[1:] if one != "--record"]
    deadline, statuses = Deadline(args.seconds), []
    with tempfile.TemporaryDirectory() as temporary:
        figures = record.with_suffix(".jsonl") if record else Path(temporary, "figures.jsonl")
        figures.unlink(missing_ok=True)
        for number, group in enumerate(groups):
            limit = deadline.left_s() / (len(groups) - number)
            log = Path(temporary, "log.txt")
            ended = run_group(script, [*given, *group], figures, limit, log)
            statuses += [one.status for one in ended[-1:]]
        found = gpu_summary.fold(read_figures(figures)).get(script.stem)
    if found is None:
        return 1
    report(found, "\n".join(gpu_summary.record_lines(script.stem, found)) + "\n", record)
    return int(any(status != 0 for status in statuses))
