"""The machine's failures: no GPU, read-only folders, full disks, killed workers, too little memory."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from bad_input_project import ROOT, assert_told, run_here

SPEC = ("-e", "spec.yaml")
GIVEN = {
    "evaluate": ("evaluate.checkpoint=random.pth",),
    "inference": ("inference.checkpoint=random.pth",),
    "train": (),
}


@pytest.mark.parametrize("command", GIVEN)
def test_a_gpu_is_demanded_and_there_is_none(project: Path, tmp_path: Path, command: str, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ended = run_here(
        project, command, *SPEC, *GIVEN[command], "ddetr_mm.device=cuda", f"results_dir={tmp_path}"
    )
    assert_told(ended, "ddetr_mm.device", "cuda", "nvidia-smi")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take away the right to write, from root too where the file system knows how."""
    if os.geteuid() == 0:
        done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip("root may write everywhere here")
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        else:
            folder.chmod(0o755)


WRITERS = {
    "convert": ("convert", "-e", "convert.yaml", "results_dir=locked/coco"),
    "train": ("train", *SPEC, "results_dir=locked/results"),
    "evaluate": ("evaluate", *SPEC, *GIVEN["evaluate"], "results_dir=locked/results"),
    "inference": ("inference", *SPEC, *GIVEN["inference"], "results_dir=locked/results"),
    "export": ("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=locked/x.onnx"),
    "check": ("check", *SPEC, "results_dir=locked/results"),
    "translate": ("translate", *SPEC, "-o", "locked/x.py"),
    "weights": ("weights", "random.pth", "locked/x.pth", "--to", "tao"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_may_not_be_written_to(own_project: Path, command: str):
    locked = own_project / "locked"
    locked.mkdir()
    with read_only(locked):
        ended = run_here(own_project, *WRITERS[command])
    assert_told(ended, "locked")
    assert not list(locked.iterdir())


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A limit on the size of files: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


LARGE = {
    "train": (("train", *SPEC), "model_epoch_000.pth"),
    "export": (("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=x.onnx"), "x.onnx"),
    "weights": (("weights", "random.pth", "x.pth", "--to", "tao"), "x.pth"),
    "weights safetensors": (("weights", "random.pth", "x.safetensors", "--to", "tao"), "x.safetensors"),
}


@pytest.mark.parametrize("command", LARGE)
def test_a_file_that_cannot_be_written_to_its_end(own_project: Path, command: str):
    arguments, name = LARGE[command]
    with files_of_at_most(200_000):
        ended = run_here(own_project, *arguments, fork=command != "train")
    assert_told(ended, name)
    if command != "export":  # its size is known when it is written
        assert re.search(r"[0-9.]+ MiB wanted, [0-9.]+ \w+ free in ", ended.message), ended.message


FULL_DISK = """
mount -t tmpfs -o size=300k tmpfs {folder} || exit 77
cd {project}
{python} -m ddetr_mm {arguments}
status=$?
ls -A {folder} {folder}/train 1>&2
exit $status
"""


@pytest.mark.slow
def test_a_disk_that_is_full(own_project: Path, tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    script = FULL_DISK.format(
        folder=folder,
        project=own_project,
        python=sys.executable,
        arguments=f"train -e spec.yaml results_dir={folder}",
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode in (77, 1) and "Traceback" not in done.stderr and "error:" not in done.stderr:
        pytest.skip("no file system of one's own can be mounted here")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "free some space" in done.stderr
    assert ".tmp-" not in done.stderr and "model_epoch_000.pth\n" not in done.stderr.partition("error:")[2]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker in /proc")
def test_a_data_worker_that_is_killed(own_project: Path):
    killed: list[int] = []
    stop = threading.Event()

    def kill_a_worker() -> None:
        seen: set[int] = set()
        while not stop.is_set() and not killed:
            training = (own_project / "results/train/curves.html").exists()
            workers = set(grandchildren(os.getpid())) if training else set()
            for pid in sorted(workers & seen):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break
            seen = workers
            time.sleep(0.1)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    try:
        ended = run_here(
            own_project,
            "train",
            *SPEC,
            "dataset.workers=1",
            "train.num_epochs=100",
            "train.checkpoint_interval=100",
            # Torch may lose the signal of a worker's end; it then looks when a batch is late.
            "ddetr_mm.data_timeout_s=60",
            fork=False,
        )
    finally:
        stop.set()
        killer.join()
    assert killed
    # The state after the last step is saved, as it is sound: that is no half result.
    saved = {
        name
        for name in ended.new
        if re.search(r"/(model_epoch_\d+\w*\.pth|dd_model_latest\.pth|last_checkpoint)$", name)
    }
    ended = replace(ended, new=ended.new - saved)
    assert_told(ended, "a data worker was killed", str(killed[0]), "dataset.workers", status=1)
    last = (own_project / "results/train/status.json").read_text().splitlines()[-1]
    assert json.loads(last)["status"] == "FAILURE" and "was killed" in json.loads(last)["message"]


def grandchildren(pid: int) -> list[int]:
    """Forks whose parent's parent is ``pid``: the data workers of a command.

    Programs that a command starts, such as the compiler that mmengine asks for its version, are others.
    """
    return [inner for child in children(pid) for inner in children(child) if same_program(child, inner)]


def same_program(pid: int, other: int) -> bool:
    """Whether both run the same command line."""
    try:
        one, two = (Path(f"/proc/{number}/cmdline").read_bytes() for number in (pid, other))
    except (FileNotFoundError, ProcessLookupError):
        return False
    return one == two


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(entry.name)] if parent == pid else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_model_larger_than_the_memory(own_project: Path):
    ended = run_here(own_project, "train", *SPEC, "model.num_queries=900000000000")
    assert_told(ended, "memory", "dataset.batch_size", status=1)


def test_another_rank_that_is_no_number(project: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    ended = run_here(project, "convert", "-e", "convert.yaml", f"results_dir={tmp_path / 'coco'}")
    assert_told(ended, "RANK", "first")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_open_files_do_not_grow_with_runs_in_one_process(own_project: Path):
    code = (
        "import gc, os, sys\nfrom ddetr_mm.cli import main\nfor run in range(4):\n"
        "    assert main(['evaluate', '-e', 'spec.yaml', 'evaluate.checkpoint=random.pth']) == 0\n"
        "    gc.collect()\n    print('open', len(os.listdir('/proc/self/fd')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=own_project, capture_output=True, text=True, timeout=280, check=True
    )
    counts = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("open ")]
    assert len(counts) == 4 and counts[1] == counts[2] == counts[3], counts
