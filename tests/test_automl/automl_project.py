"""A small project for searches, and a quick stand-in for training runs that writes what they write.

Run as a script it is either ``train``, the stand-in, or the command line with trials that are the stand-in.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve()

SPEC = """
results_dir: results
dataset:
  train_data_sources: [{image_dir: images, json_file: train.json}]
  val_data_sources: [{image_dir: images, json_file: train.json}]
  num_classes: 2
  batch_size: 4
  workers: 0
  augmentation: {scales: [64], random_resize_max_size: 96, train_random_resize: [64],
    train_random_crop_min: 48, train_random_crop_max: 64, test_random_resize: 64, fixed_padding: false}
model: {num_queries: 12, num_select: 12, hidden_dim: 32, nheads: 4, dim_feedforward: 32, enc_layers: 1,
  dec_layers: 1, num_feature_levels: 1, return_interm_indices: [3]}
train: {num_epochs: 2, optim: {lr: 1.0e-3}}
ddetr_mm:
  device: cpu
  backbone: {type: ResNet, depth: 18, base_channels: 8, num_stages: 4, out_indices: [3], style: pytorch}
  automl:
    max_trials: 4
    max_epochs: 4
    default_parameters: false
    parameters:
      - {field: train.optim.lr, range: [1.0e-5, 1.0e-2]}
      - {field: dataset.batch_size, choices: [2, 4]}
"""


def make_project(folder: Path) -> Path:
    """Eight pictures, their annotations and ``spec.yaml``; returns the spec."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, 9):
        picture = Image.new("RGB", (96, 64), (90, 90 + 8 * number, 120))
        left, top = 8 * number, 20
        picture.paste((220, 40, 40), (left, top, left + 20, top + 24))
        picture.save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [left, top, 20, 24], "area": 480}
            | {"iscrowd": 0}
        )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "spec.yaml").write_text(SPEC)
    return folder / "spec.yaml"


# --- the stand-in ---


def value_of(spec: dict, epoch: int) -> float:
    """The metric after an epoch: best at a learning rate of 1e-3."""
    distance = abs(math.log10(float(spec["train"]["optim"]["lr"])) + 3)
    return round((1 - distance / 4) * epoch / (epoch + 2), 6)


def holds(epoch: int) -> bool:
    """Whether an epoch has to wait; no time decides."""
    together = os.environ.get("STAND_IN_TOGETHER")
    if together and len(glob.glob(together)) < 2:
        return True
    return epoch == int(os.environ.get("STAND_IN_HOLD_AT", "-1"))


def train(arguments: list[str]) -> int:
    """Write epochs into ``status.json``, resuming after those that are there, until told to stop.

    ``STAND_IN_HOLD_AT`` is an epoch at which it waits to be stopped; ``STAND_IN_TOGETHER`` a pattern of
    ``status.json``, of which two must exist before it trains; ``STAND_IN_FAILS`` a condition on the spec (as
    ``s``) under which it fails, with ``STAND_IN_REASON``.
    """
    spec_path = Path(arguments[arguments.index("-e") + 1])
    spec = yaml.safe_load(spec_path.read_text())
    overrides = dict(one.split("=", 1) for one in arguments if "=" in one)
    stop = int(overrides["ddetr_mm.stop_after_epoch"])
    folder = Path(spec["results_dir"]) / "train"
    study = int(os.environ["DDETR_MM_STUDY_PID"])
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    folder.mkdir(parents=True, exist_ok=True)
    status = folder / "status.json"
    lock = (folder / ".ddetr_mm_lock").open("a")
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lines = status.read_text().splitlines() if status.exists() else []
    done = max((json.loads(line).get("epoch", -1) for line in lines), default=-1) + 1

    def write(**entry: object) -> None:
        with status.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    write(status="STARTED", message="Starting", devices=os.environ.get("CUDA_VISIBLE_DEVICES"))
    if eval(os.environ.get("STAND_IN_FAILS", "False"), {"s": spec}):
        reason = os.environ.get("STAND_IN_REASON", "RuntimeError: CUDA out of memory, 12.5 GiB")
        write(status="FAILURE", message=f"{reason} in {spec_path.parent.name}")
        return 1
    for epoch in range(done, stop):
        while holds(epoch):
            if asked or os.getppid() != study:
                return 130
            time.sleep(0.02)
        write(epoch=epoch, time_per_epoch="0:00:01.5", status="RUNNING", message="Training loop in progress")
        value = value_of(spec, epoch + 1)
        kpi = {"val_mAP50": str(value), "val_loss": 1 - value}
        write(status="RUNNING", message="Eval metrics generated.", kpi=kpi)
        for name in (f"model_epoch_{epoch:03d}.pth", "dd_model_best.pth"):
            (folder / name).write_text(f"weights of {folder.parent.name}")
            with (folder / ".ddetr_mm_files").open("a") as owned:
                owned.write(json.dumps(name) + "\n")
    write(status="SUCCESS", message="Train finished successfully.")
    return 0


def with_stand_in() -> None:
    """Have trials of this process start the stand-in."""
    from ddetr_mm.automl import trials

    trials.python_module = lambda module, *arguments: [sys.executable, str(HERE), *arguments]


def trials_of(folder: Path, url: str | None = None) -> list[Any]:
    """The trials in a study's storage."""
    import optuna

    storage = url or f"sqlite:///{folder / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def epochs_of(folder: Path, number: int) -> list[int]:
    """The epochs that a trial trained, in order."""
    lines = (folder / f"trial_{number:03d}" / "train" / "status.json").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry["epoch"] for entry in entries if "epoch" in entry]


if __name__ == "__main__":
    if sys.argv[1] == "train":
        sys.exit(train(sys.argv[2:]))
    with_stand_in()
    from ddetr_mm.cli import main
    from ddetr_mm.tasks import automl

    automl.check_data = lambda loaded: None  # it loads torch; tests in one process check the data

    sys.exit(main(sys.argv[1:]))
