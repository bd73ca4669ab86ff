"""Child processes of the GPU benchmarks: figures survive crashes, what hangs is ended in time."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

import gpu_call  # noqa: E402
import gpu_summary  # noqa: E402
from gpu_process import Deadline, Figures, read_figures, run_child, run_group, unfinished  # noqa: E402

CHILD = """
import argparse, os, signal, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from gpu_process import Figures
parser = argparse.ArgumentParser()
parser.add_argument("--figures", type=Path)
parser.add_argument("--seconds", type=float)
parser.add_argument("--only", nargs="+")
args, _ = parser.parse_known_args()
figures = Figures(args.figures, Path(__file__).stem)
for name in args.only:
    if name in figures.left_out():
        continue
    figures.append("begin", name)
    if name == "hangs":
        sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path(args.figures).with_name("sleeper").write_text(str(sleeper.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "breaks the context":
        figures.append("left_out", name, reason="illegal memory access")
        raise SystemExit(75)
    figures.append("alone", name, alone_ms=float(len(name)))
    figures.append("end", name)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A benchmark whose contestants do what their name says."""
    path = tmp_path / "train_gpu.py"
    path.write_text(CHILD.format(benchmarks=str(REPO / "benchmarks")))
    return path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_figures_are_lines_that_survive_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    figures = Figures(path, "train_gpu", "batch 8")
    figures.append("alone", "ours, fp32", alone_ms=2.5)
    figures.of_row("batch 1").append("left_out", "ours, fp32", reason="no memory")
    with path.open("a") as file:
        file.write('{"benchmark": "train_gpu", "row": "batch 8", "conte')
    assert [one["event"] for one in read_figures(path)] == ["alone", "left_out"]
    assert figures.events() == [
        {
            "benchmark": "train_gpu",
            "row": "batch 8",
            "contestant": "ours, fp32",
            "event": "alone",
            "alone_ms": 2.5,
        }
    ]
    assert figures.left_out() == set() and figures.of_row("batch 1").left_out() == {"ours, fp32"}
    assert read_figures(tmp_path / "missing") == []


def test_a_begin_without_an_end_is_a_crash() -> None:
    def line(event: str, contestant: str) -> dict:
        return {"benchmark": "b", "row": "", "event": event, "contestant": contestant}

    begun = [line("begin", "a"), line("end", "a"), line("begin", "b")]
    assert unfinished(begun) == line("begin", "b")
    assert unfinished([*begun, line("left_out", "b")]) is None
    assert unfinished([]) is None


def test_a_deadline_has_shares() -> None:
    assert Deadline(None).left_s() == float("inf") and not Deadline(None).has_passed()
    assert 99 < Deadline(100).left_s() <= 100 and 49 < Deadline(100).left_s(0.5) <= 50
    assert Deadline(0).has_passed() and Deadline(100).has_passed(0.0)


def test_a_child_that_ignores_signals_is_ended_with_all_it_started(script: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.jsonl"
    ended = run_group(script, ["--only", "first", "hangs", "never"], figures, 8, tmp_path / "log")
    assert [one.status for one in ended] == [None]
    found = gpu_summary.fold(read_figures(figures))["train_gpu"]
    assert found["rows"][""] == {"first": {"alone_ms": 5.0}}
    ((row, name, reason),) = found["left_out"]
    assert (row, name) == ("", "hangs") and reason.startswith("still ran after")
    assert not is_alive(int((tmp_path / "sleeper").read_text()))


def test_after_a_crash_the_others_continue(script: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.jsonl"
    names = ["a", "crashes", "bb", "breaks the context", "ccc"]
    ended = run_group(script, ["--only", *names], figures, 60, tmp_path / "log")
    assert [one.status for one in ended] == [-11, 75, 0]
    found = gpu_summary.fold(read_figures(figures))["train_gpu"]
    assert found["rows"][""] == {name: {"alone_ms": float(len(name))} for name in ("a", "bb", "ccc")}
    assert found["left_out"] == [
        ["", "crashes", "the process ended by SIGSEGV"],
        ["", "breaks the context", "illegal memory access"],
    ]


def test_a_child_that_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "train_gpu.py"
    script.write_text("import no_such_module\n")
    figures = tmp_path / "figures.jsonl"
    ended = run_group(script, ["--quick"], figures, 30, tmp_path / "log")
    assert [one.status for one in ended] == [1]
    assert gpu_summary.fold(read_figures(figures))["train_gpu"]["notes"] == [
        "train_gpu --quick: the process ended with status 1"
    ]
    assert "no_such_module" in (tmp_path / "log").read_text()


def test_output_is_shown_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ended = run_child([sys.executable, "-c", "print('shown', flush=True)"], 30, tmp_path / "log")
    assert ended.status == 0 and ended.reason == "the process ended with status 0"
    assert (tmp_path / "log").read_text() == capsys.readouterr().out == "shown\n"


# --- The call ---


def stage(name: str, seconds: float, *contestants: str) -> gpu_call.Stage:
    return gpu_call.Stage(name, "train_gpu", seconds, ("--only", *contestants))


def test_a_stage_gets_its_share_and_what_others_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, clock = [], [0.0]

    class Ended:
        status, reason = 0, "well"

    def run_group(script: Path, options: tuple, figures: Path, limit_s: float, log: Path) -> list:
        limits.append(round(limit_s))
        clock[0] += {"fast": 10, "slow": limit_s}[options[1]]
        return [Ended()]

    monkeypatch.setattr(gpu_call, "run_group", run_group)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stages = [
        stage("one", 300, "slow"),
        stage("two", 120, "fast"),
        stage("three", 120, "slow"),
        stage("rest", 60, "fast"),
        stage("never", 60, "slow"),
    ]
    # 540 s, of which 3 are for the summary; the last two have only what is left.
    assert gpu_call.run(tmp_path, 543, (), stages) == ["rest", "never"]
    assert limits == [300, 120, 230]
    clock[0], limits[:] = 0.0, []
    assert gpu_call.run(tmp_path, 273, (), stages[:3]) == []
    assert limits == [150, 60, 110]


def test_the_call_ends_in_time_and_leaves_what_it_has(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_call, "FOLDER", script.parent)
    out = tmp_path / "out"
    stages = [
        stage("one", 1, "mmdet, fp32"),
        stage("two", 1, "hangs"),
        stage("three", 1, "ours, fp32"),
    ]
    began = time.monotonic()
    incomplete = gpu_call.run(out, 30, (), stages, least_s=2)
    assert time.monotonic() - began < 30
    assert incomplete == ["two"]
    found = json.loads((out / "summary.json").read_text())["train_gpu"]
    assert set(found["rows"][""]) == {"mmdet, fp32", "ours, fp32"}
    text = (out / "summary.md").read_text()
    # 11 and 10 letters: 11 ms against 10 ms
    assert "| Training on a GPU | ours, fp32 | mmdet, fp32 | 1.10 |" in text
    assert "- hangs: still ran after" in text
    assert "== two\n" in (out / "log.txt").read_text()
    # Few files, as some machines give back only a few; the sleeper is the test's own.
    names = {path.name for path in out.iterdir()} - {"sleeper"}
    assert names == {"figures.jsonl", "summary.md", "summary.json", "log.txt"}


def test_a_stage_without_time_is_said(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_call, "FOLDER", script.parent)
    stages = [stage("one", 1, "hangs"), stage("two", 1, "ours, fp32")]
    assert gpu_call.run(tmp_path, 14, (), stages, least_s=10) == ["one", "two"]
    assert "- two: not begun, " in (tmp_path / "summary.md").read_text()


def test_stages_name_contestants_that_exist() -> None:
    """Read from the scripts' text: importing them takes torch."""
    for one in gpu_call.STAGES:
        text = (REPO / "benchmarks" / f"{one.script}.py").read_text()
        names = one.options[one.options.index("--only") + 1 :] if "--only" in one.options else ()
        for name in names:
            whose = name.split(", ", 1)[0]
            assert f'"{name}"' in text or f'f"{whose}, {{precision}}' in text or name == gpu_summary.YARDSTICK
    assert len({one.name for one in gpu_call.STAGES}) == len(gpu_call.STAGES)


def test_the_ratio_is_of_rounds_where_both_alternated() -> None:
    times = {"median_ms": 5.0, "min_ms": 4.0, "max_ms": 6.0, "speedup": 2.1, "yardstick": "mmdet, fp32"}
    row = {
        "mmdet, fp32": {"times": {**times, "median_ms": 10.0, "speedup": 1.0}},
        "ours, fp32": {"times": times, "alone_ms": 9.0},
        "ours, bf16, compile": {"rounds_ms": [2.0, 4.0, 3.0]},
        "ours, bf16": {"alone_ms": 4.0},
        "mmdet, bf16": {},
    }
    assert gpu_summary.ratio(row, "ours, fp32", "mmdet, fp32") == 2.1
    assert gpu_summary.ratio(row, "ours, bf16, compile", "mmdet, fp32") == pytest.approx(10 / 3)
    assert gpu_summary.ratio(row, "ours, bf16", "mmdet, fp32") == 2.5
    assert gpu_summary.ratio(row, "ours, bf16", "mmdet, bf16") is None
    lines = gpu_summary.ratio_lines({"train_gpu": {"rows": {"": row}}})
    assert "| Training on a GPU | ours, bf16, compile | mmdet, fp32 | 3.33 |" in lines
    table = gpu_summary.train_table({"environment": {"batch": 8}, "rows": {"": row}})
    assert any(line.startswith("| ours, fp32 | 5.00 (4.00 to 6.00) | 1600.0 | 2.10 |") for line in table)
    assert any(line.startswith("| ours, bf16 | 4.00* | 2000.0 | 2.50† |") for line in table)


def test_a_yardstick_of_a_second_process_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    for benchmark in ("train_gpu", "pipeline_gpu"):
        for ms in (5.0, 7.0):
            figures = Figures(path, benchmark)
            figures.append("alone", "mmdet, fp32", alone_ms=ms)
            figures.append("times", "mmdet, fp32", median_ms=ms)
    found = gpu_summary.fold(read_figures(path))
    assert found["train_gpu"]["rows"][""]["mmdet, fp32"] == {"alone_ms": 5.0, "times": {"median_ms": 5.0}}
    # There the means of a run are written again and again.
    assert found["pipeline_gpu"]["rows"][""]["mmdet, fp32"]["alone_ms"] == 7.0


def test_all_tables_stand_partial_figures(tmp_path: Path) -> None:
    """What a run that was killed leaves at any moment can be shown."""
    path = tmp_path / "figures.jsonl"
    values: list[tuple[str, str, str, str, dict]] = [
        ("train_gpu", "", "environment", "", {"device": "a GPU", "batch": 8}),
        ("train_gpu", "", "begin", "mmdet, fp32", {}),
        ("train_gpu", "", "alone", "mmdet, fp32", {"losses": [2.0, 1.0]}),
        ("inference_gpu", "batch 8", "alone", "ours, bf16", {"agreement": {}}),
        ("inference_gpu", "batch 8", "round", "ours, bf16", {"number": 0, "ms": 3.0}),
        ("attention_gpu", "encoder, 1,000 float32 forward", "alone", "mmcv", {"differs": 1.0, "wrong": True}),
        ("attention_gpu", "encoder, 1,000 float32 forward", "alone", "PyTorch form", {"alone_ms": 4.0}),
        ("attention_gpu", "encoder, 1,000 float32 forward", "alone", "triton 32x4", {"alone_ms": 1.0}),
        ("pipeline_gpu", "", "alone", "ours, bf16", {"alone_ms": 3.0}),
        ("pipeline_gpu", "", "skipped", "mmdet, fp32", {"reason": "no time was left"}),
        ("call", "", "note", "", {"text": "attention: not begun"}),
    ]
    for number in range(len(values) + 1):
        path.unlink(missing_ok=True)
        for benchmark, row, event, contestant, more in values[:number]:
            Figures(path, benchmark, row).append(event, contestant, **more)
        lines = gpu_summary.summary_lines(read_figures(path))
    text = "\n".join(lines)
    assert "- device: a GPU" in text
    assert "| encoder, 1,000 | float32 | forward | mmcv | differs |  | 1.0e+00 |  |" in text
    assert "| Sampling, encoder, 1,000 float32 forward | triton 32x4 | PyTorch form | 4.00 |" in text
    assert "- mmdet, fp32: no time was left" in text and "- attention: not begun" in text


def test_the_watching_process_needs_no_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(REPO / 'benchmarks')!r}); import gpu_call; "
        "assert not {'torch', 'mmengine'} & set(sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_the_wheels_of_the_page_are_those_of_the_pinned_set() -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if "==" in line]

    listed = lines((REPO / "benchmarks/gpu_wheels.txt").read_text())
    page = (REPO / "docs/gpu-run.md").read_text()
    assert lines(page.split("```text")[1].split("```")[0]) == listed
    pinned = {
        line.split(" ;")[0]
        for line in lines((REPO / "tools/env/torch2.11.txt").read_text())
        if "< '3.11'" not in line
    }
    assert set(listed) <= pinned


def test_the_stages_of_the_page_are_those_of_the_call() -> None:
    page = (REPO / "docs/gpu-run.md").read_text()
    seconds = {name: int(number) for name, number in re.findall(r"^\| `([^`]+)` \| (\d+) \|", page, re.M)}
    own = {stage.name: stage.seconds for stage in gpu_call.STAGES}
    for name, shown in seconds.items():
        whole = [value for stage, value in own.items() if stage.startswith(name.removesuffix("…").strip())]
        assert shown == (sum(whole) if name.endswith("…") else own[name]), name
    assert sum(seconds.values()) == gpu_call.WHOLE_S
