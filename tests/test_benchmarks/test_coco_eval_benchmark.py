"""The benchmark of COCO evaluation: every backend that is installed gives pycocotools' figures."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BACKENDS = {
    "pycocotools": "pycocotools",
    "faster-coco-eval": "faster_coco_eval",
    "ultrafast-pycocotools": "ultrafast_pycocotools",
    "hotcoco (ours)": "hotcoco",
}


def test_backends_agree_and_missing_ones_are_named() -> None:
    answer = subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / "coco_eval.py"), "--images", "20"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    for name, module in BACKENDS.items():
        rows = [line for line in answer.stdout.splitlines() if line.startswith(f"| {name} |")]
        if importlib.util.find_spec(module) is None:
            assert rows == [] and f"{name}: left out, since {module} is not installed" in answer.stdout
        else:
            (row,) = rows
            assert float(row.split("|")[4]) < 1e-12
