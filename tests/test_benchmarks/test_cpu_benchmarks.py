"""The CPU benchmarks run through, tiny: a record that cannot be taken again says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TINY = {
    "annotation_shards": "--images 40 80",
    "attention": "--sizes 64x96 --batch 1 --rounds 1 --threads 1",
    "coco_eval": "--images 8",
    "convert": "--sizes 40 --rounds 1 --baseline-images 40 --workers 1 --folder {folder}",
    "cpu_precision": "--size 64 96 --rounds 1 --threads 1 --epochs 0",
    "dataset_memory": "--images 200 --ranks 1 --workers 1 --samples 20 --repeats 1 --work-dir {folder}",
    "detectors_cpu": "--size 64x96 --boxes 2 --rounds 1 --threads 1",
    "fsdp_memory": "",
    "gcvit": "--variants xxtiny --batches 1 --rounds 1 --threads 1",
    "kill_resume": "--kills 1 --epochs 2 --workers 0",
    "onnx_latency": "--height 64 --width 96 --rounds 1 --threads 1",
    "pipeline": "--images 2 --rounds 1 --sizes 640x480 --work-dir {folder}",
    "sampler_scale": "--images 1000 --ranks 2 --shards 2",
    "scaling": "--rounds 1 --threads 1",
    "start": "--images 70 --rounds 1",
    "thread_waiting": "--rounds 1",
}
NEEDS_MORE = ("attention_kernels", "quantize", "soak")
"""Triton, a trained checkpoint, hours: run by tests of their own, or by hand."""


def names() -> set[str]:
    found = subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / "run.py"), "-h"],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = found.stdout.strip().splitlines()[-1].removeprefix("There are: ").split(", ")
    return {name for name in listed if not name.endswith("_gpu")}


def test_every_benchmark_is_run_here() -> None:
    assert names() == {*TINY, *NEEDS_MORE}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of processor time, which may be shared
@pytest.mark.parametrize("name", TINY)
def test_it_runs(name: str, tmp_path: Path) -> None:
    records = {path: path.read_bytes() for path in (REPO / "benchmarks" / "records").iterdir()}
    words = TINY[name].format(folder=tmp_path / "work").split()
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(REPO / "benchmarks" / f"{name}.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert records == {path: path.read_bytes() for path in (REPO / "benchmarks" / "records").iterdir()}
