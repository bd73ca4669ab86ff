"""The spec that a search leaves is trained for its epochs: trials and training runs are real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from automl_project import trials_of

pytest.importorskip("optuna")


def run(project: Path, *arguments: str) -> str:
    """The command line in a process of its own; returns what it printed."""
    command = [sys.executable, "-m", "ddetr_mm", *arguments]
    done = subprocess.run(command, cwd=project, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_best_spec_trains_for_its_epochs(project):
    epochs = ("ddetr_mm.automl.max_trials=2", "ddetr_mm.automl.max_epochs=1")
    run(project, "automl", "-e", "spec.yaml", *epochs)
    folder = project / "results" / "automl"
    found = trials_of(folder)
    assert [one.state.name for one in found] == ["COMPLETE", "COMPLETE"]
    best = max(found, key=lambda one: (one.value, -one.number))
    spec = yaml.safe_load((folder / "best_spec.yaml").read_text())
    values = best.user_attrs["values"]
    assert spec["train"]["optim"]["lr"] == values["train.optim.lr"]
    assert spec["dataset"]["batch_size"] == values["dataset.batch_size"]

    run(project, "train", "-e", "results/automl/best_spec.yaml")
    train = project / "results" / "train"
    entries = [json.loads(line) for line in (train / "status.json").read_text().splitlines()]
    assert entries[-1]["status"] == "SUCCESS"
    assert sorted({entry["epoch"] for entry in entries if "epoch" in entry}) == list(
        range(spec["train"]["num_epochs"])
    )
    used = yaml.safe_load((train / "experiment.yaml").read_text())
    assert used["train"]["optim"]["lr"] == values["train.optim.lr"]
    assert used["train"]["pretrained_model_path"] in (None, "")  # from the start, not from best.pth

    own = folder / f"trial_{best.number:03d}" / "train" / "dd_model_best.pth"
    assert (folder / "best.pth").read_bytes() == own.read_bytes()
    # What evaluate reports of best.pth is what the study counted.
    run(
        project,
        "evaluate",
        "-e",
        "results/automl/best_spec.yaml",
        "dataset.test_data_sources={image_dir: images, json_file: train.json}",
    )
    entries = [
        json.loads(line) for line in (project / "results/evaluate/status.json").read_text().splitlines()
    ]
    kpi = [entry["kpi"] for entry in entries if "test_mAP50" in entry.get("kpi", {})][-1]
    assert float(kpi["test_mAP50"]) == pytest.approx(best.value, abs=1e-4)
