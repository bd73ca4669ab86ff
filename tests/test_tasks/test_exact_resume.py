"""A training that is stopped by signals, again and again, ends as one that never was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddetr_mm.cli import main
from ddetr_mm.engine.checkpoint import find_latest_checkpoint, is_whole, list_checkpoints
from tests.test_tasks.conftest import TINY, Project

EXACT = (
    *TINY,
    "ddetr_mm.deterministic=true",
    "train.checkpoint_interval_unit=step",
    "train.checkpoint_interval=2",
)


def last_status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text().splitlines()[-1])


class Session:
    """``ddetr-mm train`` in this process, with every batch written down."""

    def __init__(self, project: Project, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.project, self.folder, self.monkeypatch = project, folder, monkeypatch
        self.seen: dict[int, tuple] = {}

    def train(self, *overrides: str, sigterm_in_step: int | None = None) -> int:
        from ddetr_mm.engine.hooks import ProgressHook

        def write_down(hook, runner, batch_idx, data_batch=None, outputs=None):
            samples = data_batch["data_samples"]
            paths = [Path(sample.img_path).name for sample in samples]
            pixels = [float(image.double().sum()) for image in data_batch["inputs"]]
            self.seen[runner.iter] = (runner.epoch, batch_idx, paths, pixels)
            if runner.iter == sigterm_in_step:
                signal.raise_signal(signal.SIGTERM)

        self.monkeypatch.chdir(self.project.folder)
        self.monkeypatch.setattr(ProgressHook, "after_train_iter", write_down)
        return main(
            ["train", "-e", self.project.spec, *EXACT, f"train.results_dir={self.folder}", *overrides]
        )

    def end(self) -> dict:
        return torch.load(find_latest_checkpoint(self.folder), weights_only=True)


def same(one: object, other: object) -> bool:
    """Whether two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_training_stopped_twice_ends_bit_equal(data_project: Project, tmp_path: Path, monkeypatch, capsys):
    straight = Session(data_project, tmp_path / "straight", monkeypatch)
    assert straight.train() == 0
    stopped = Session(data_project, tmp_path / "stopped", monkeypatch)
    assert stopped.train(sigterm_in_step=0) == 130
    assert "stopped by SIGTERM after 1 steps" in capsys.readouterr().err
    told = last_status(stopped.folder)
    assert told["status"] == "FAILURE" and "User/System interruption" in told["message"]
    assert stopped.train("dataset.workers=2", sigterm_in_step=4) == 130
    assert stopped.train() == 0
    assert last_status(stopped.folder)["status"] == "SUCCESS"
    assert stopped.seen == straight.seen and sorted(straight.seen) == list(range(6))
    ends = straight.end(), stopped.end()
    for part in ("state_dict", "optimizer", "param_schedulers", "rng_states"):
        assert same(ends[0][part], ends[1][part]), part


def test_killed_it_continues_with_the_same_command(data_project: Project, tmp_path: Path):
    """One kill of the real command; benchmarks/kill_resume.py does fifty at random moments."""
    folder, log = tmp_path / "train", tmp_path / "log"
    command = [sys.executable, "-m", "ddetr_mm", "train", "-e", data_project.spec, *TINY]
    command += [f"train.results_dir={folder}", "train.checkpoint_interval_unit=step", "train.num_epochs=40"]
    with log.open("wb") as output:
        run = subprocess.Popen(command, cwd=data_project.folder, stdout=output, stderr=output)
    while len(list_checkpoints(folder)) < 2:
        assert run.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    run.kill()
    run.wait()
    written = list_checkpoints(folder)
    assert all(is_whole(path) for path in written)
    latest = find_latest_checkpoint(folder)
    assert latest == (folder / "dd_model_latest.pth").resolve() and latest in written[-2:]
    done = torch.load(latest, weights_only=True)["meta"]["iter"]
    epochs = done // 3 + 2
    subprocess.run(
        [*command, f"train.num_epochs={epochs}"], cwd=data_project.folder, check=True, capture_output=True
    )
    assert last_status(folder)["status"] == "SUCCESS"
    end = torch.load(find_latest_checkpoint(folder), weights_only=True)
    assert end["meta"]["iter"] == 3 * epochs
    assert not [path for path in folder.iterdir() if path.name.startswith(".tmp-")]


def test_the_link_decides_between_resuming_and_beginning_anew(
    data_project: Project, tmp_path: Path, monkeypatch, capsys
):
    session = Session(data_project, tmp_path / "train", monkeypatch)
    folder, link = session.folder, session.folder / "dd_model_latest.pth"

    def said(steps: list[int], *overrides: str) -> str:
        session.seen.clear()
        assert (
            session.train(
                *TINY, "train.checkpoint_interval_unit=epoch", "train.validation_interval=1", *overrides
            )
            == 0
        )
        assert sorted(session.seen) == steps
        return capsys.readouterr().out

    assert f"Training begins anew, without pretrained weights: {folder} has no checkpoint" in said(
        [0, 1, 2, 3, 4, 5]
    )
    before = torch.load(folder / "model_epoch_000.pth", weights_only=True)
    link.unlink()
    weights = folder / "model_epoch_001.pth"
    log = said([0, 1, 2], "train.num_epochs=1", "train.seed=7")
    assert f"{folder} has no dd_model_latest.pth; to resume the earlier run, set" in log
    assert link.resolve().name == "model_epoch_000.pth"
    assert not same(session.end()["state_dict"], before["state_dict"])
    # Truncated: of the two files only the earlier run's is complete.
    link.resolve().write_bytes(link.read_bytes()[:1000])
    log = said([6, 7, 8], "train.num_epochs=3")
    assert f"{link} points at model_epoch_000.pth, which is incomplete (1,000 bytes)" in log
    assert f"Training resumes from {weights} (the newest complete checkpoint); to begin anew, remove" in log


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_message_and_keeps_the_last_good_checkpoint(
    data_project: Project, small_disk: Path, monkeypatch, capsys
):
    # The disk is too small to start with; it is to fill up in the middle of the run.
    monkeypatch.setattr("ddetr_mm.preflight.resources.LEAST_FREE", 0)
    session = Session(data_project, small_disk / "train", monkeypatch)
    assert session.train("train.checkpoint_interval=1") == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "no space left" in told and "the last good checkpoint is" in told
    assert [path.name for path in list_checkpoints(session.folder)] == ["model_epoch_000_step_00001.pth"]
    assert session.end()["meta"]["iter"] == 1
    last = last_status(session.folder)
    assert last["status"] == "FAILURE" and "no space left" in last["message"]
