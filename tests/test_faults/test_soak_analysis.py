"""The soak tells a leak from noise, and sees what a process tree holds."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
slope = runpy.run_path(str(BENCHMARKS / "soak_analysis.py"))["slope"]
HOURS = np.linspace(0.5, 2.0, 500)


def noise(seed: int = 0) -> np.ndarray:
    """Memory that goes up and down around 1,000 MB, neighbours alike."""
    steps = np.random.default_rng(seed).normal(0, 1, len(HOURS))
    return 1000 + np.convolve(steps, np.ones(20) / 4, mode="same")


def test_noise_and_peaks_are_flat():
    values = noise()
    values[::50] += 400
    found = slope(HOURS, values)
    assert found["flat"] and abs(found["growth_share"]) < 0.01


@pytest.mark.parametrize("per_hour", [20.0, 200.0])
def test_a_leak_is_found_with_its_size(per_hour: float):
    found = slope(HOURS, noise() + per_hour * HOURS)
    low, high = found["per_hour_95"]
    assert not found["flat"] and low <= per_hour <= high


def test_one_descriptor_after_the_other_is_found():
    assert not slope(HOURS, 400.0 + np.arange(len(HOURS)) // 25)["flat"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_the_whole_tree_is_seen():
    sample_tree = runpy.run_path(str(BENCHMARKS / "process_tree.py"))["sample_tree"]
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while len(sample_tree(process.pid).pids) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        sample = sample_tree(process.pid)
        assert sample.processes == 2 and process.pid in sample.pids and os.getpid() not in sample.pids
        assert 0 < sample.pss_mb <= sample.rss_mb and 0 < sample.root_rss_mb < sample.rss_mb
        assert sample.descriptors >= 6
        process.stdin.write(b"\n")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_own_memory_is_what_no_file_stands_behind(tmp_path: Path):
    sample_tree = runpy.run_path(str(BENCHMARKS / "process_tree.py"))["sample_tree"]
    (tmp_path / "file").write_bytes(bytes(40 << 20))
    code = (
        "import mmap, sys\n"
        "handle = open(sys.argv[1], 'rb')\n"
        "view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "touched = sum(view[::4096])\n"
        "print('file', flush=True); input()\n"
        "memory = bytearray(b'x') * (60 << 20)\n"
        "print('memory', flush=True); input()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before = sample_tree(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        after = sample_tree(process.pid)
        process.stdin.write(b"\n")
    assert 0 < before.pss_own_mb < 40  # a bare interpreter's, without the mapped file
    assert 55 < after.pss_own_mb - before.pss_own_mb < 65
