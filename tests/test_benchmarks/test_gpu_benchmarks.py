"""The GPU benchmarks run through on a CPU, tiny: what they compare agrees, and the report has every row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddetr_mm.models.triton_attention import LAUNCHES, has_triton

REPO = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes of processor time, which may be shared
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_attention() -> None:
    answer = run("attention_gpu.py", "--device", "cpu", "--quick", TRITON_INTERPRET="1")
    assert answer.returncode == 0, answer.stderr[-2000:]
    report = answer.stdout.split("# Deformable sampling on a GPU")[1]
    assert "| differs | |" not in report  # nobody was left out
    for part in ("encoder, 10", "decoder, 3"):
        for dtype in ("float32", "float16", "bfloat16"):
            rows = [line for line in report.splitlines() if line.startswith(f"| {part} | {dtype}")]
            assert sum("| forward | triton" in row for row in rows) == len(LAUNCHES)
            assert sum("| backward | triton gather" in row for row in rows) == len(LAUNCHES)
            assert sum("PyTorch form" in row for row in rows) == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes of processor time, which may be shared
@pytest.mark.parametrize("script", ["inference_gpu.py", "train_gpu.py"])
def test_detectors(script: str) -> None:
    pytest.importorskip("transformers")
    answer = run(script, "--device", "cpu", "--quick")
    assert answer.returncode == 0, answer.stderr[-2000:]
    report = answer.stdout[answer.stdout.index("on a GPU\n") :]
    for name in ("mmdet, fp32", "Hugging Face, fp32", "ours, fp32"):
        assert f"| {name} |" in report
    if script == "train_gpu.py":
        assert "Ledger of ours, fp32" in report and "matching" in report


def test_a_gpu_that_is_not_there_is_named() -> None:
    answer = run("run.py", "nonsense_gpu")
    assert answer.returncode == 2
    assert "attention_gpu" in answer.stderr and "train_gpu" in answer.stderr
