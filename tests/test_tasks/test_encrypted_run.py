"""``encryption_key`` through the commands: nothing readable without it, and it stands in no file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from ddetr_mm.cli import main
from ddetr_mm.engine.checkpoint import find_latest_checkpoint
from ddetr_mm.weights.encryption import encryption_key, is_encrypted
from tests.test_tasks.conftest import TINY, Project

KEY = "battery-horse-9731"


@pytest.fixture
def command(data_project: Project, tmp_path: Path, monkeypatch):
    """``command(name, overrides…)``: run a subtask in this process."""
    monkeypatch.chdir(data_project.folder)

    def run(name: str, *overrides: str) -> int:
        arguments = [
            *TINY,
            "train.validation_interval=1",
            f"train.results_dir={tmp_path}",
            f"evaluate.results_dir={tmp_path / 'evaluate'}",
        ]
        return main([name, "-e", data_project.spec, *arguments, *overrides])

    return run


def test_an_encrypted_run_from_training_to_evaluation(command, data_project: Project, tmp_path: Path, capfd):
    assert command("train", "train.num_epochs=1", f"encryption_key={KEY}") == 0
    latest = find_latest_checkpoint(tmp_path)
    assert latest.name == "model_epoch_000.pth" and is_encrypted(latest)
    assert encryption_key() is None
    with pytest.raises(pickle.UnpicklingError):
        torch.load(latest, weights_only=True)

    # another key and none: told, in one message, before anything is touched
    written = latest.stat().st_mtime_ns
    capfd.readouterr()
    assert command("train", "train.num_epochs=2", "encryption_key=wrong") == 2
    assert "model_epoch_000.pth: encryption_key: cannot be decrypted with this key" in capfd.readouterr().err
    assert command("train", "train.num_epochs=2") == 2
    told = capfd.readouterr().err
    assert "is encrypted; give its key: encryption_key=" in told and "Traceback" not in told
    last = json.loads((tmp_path / "status.json").read_text().splitlines()[-1])
    assert last["status"] == "FAILURE" and "is encrypted" in last["message"]
    assert latest.stat().st_mtime_ns == written

    assert command("train", "train.num_epochs=2", f"encryption_key={KEY}") == 0
    assert find_latest_checkpoint(tmp_path).name == "model_epoch_001.pth"
    checkpoint = f"evaluate.checkpoint={tmp_path / 'dd_model_latest.pth'}"
    assert command("evaluate", checkpoint, f"encryption_key={KEY}") == 0
    assert "AP" in json.loads((tmp_path / "evaluate" / "results.json").read_text())
    capfd.readouterr()
    assert command("evaluate", checkpoint) == 2
    assert "is encrypted" in capfd.readouterr().err

    spec = tmp_path / "with_key.yaml"
    spec.write_text(Path(data_project.spec).read_text() + f"\nencryption_key: {KEY}\n")
    plain = tmp_path / "plain.pth"
    assert main(["weights", str(latest), str(plain), "--to", "tao", "-e", str(spec)]) == 0
    assert "state_dict" in torch.load(plain, weights_only=True)
    spec.unlink()

    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), f"{path} holds the key"
