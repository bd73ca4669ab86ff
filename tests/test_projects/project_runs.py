"""Runs of mmdet's tools on the configs under projects/, in the tests' own process."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ddetr_mm.cli import main as ddetr_mm_command
from ddetr_mm.tasks.mmdet_tools import main as mmdet_tool_command
from ddetr_mm.weights.safe_read import read_raw

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = ROOT / "projects"

# Two steps of two pictures, and no worker processes.
TINY = (
    "train_dataloader.batch_size=2",
    "train_dataloader.dataset.indices=4",
    "train_cfg.max_epochs=1",
    "train_cfg.val_interval=1",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.interval=1",
    *(
        f"{loader}_dataloader.{setting}"
        for loader in ("train", "val", "test")
        for setting in ("num_workers=0", "persistent_workers=False")
    ),
)

# A hundred steps of eight pictures.
TWO_EPOCHS_OF_ALL = (
    "train_cfg.max_epochs=2",
    "train_cfg.val_interval=2",
    "default_hooks.checkpoint.interval=2",
)


def draw_shapes(folder: Path, counts: dict[str, int]) -> Path:
    """Draw the pictures of projects/shapes below ``folder`` and convert their labels, as its README does."""
    source = importlib.util.spec_from_file_location("shapes_generate", PROJECTS / "shapes" / "generate.py")
    module = importlib.util.module_from_spec(source)
    sys.modules[source.name] = module  # its dataclasses look themselves up
    source.loader.exec_module(module)
    module.write_dataset(folder / "results" / "shapes" / "data", counts, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        spec = str(ROOT / "configs" / "specs" / "shapes_convert.yaml")
        assert ddetr_mm_command(["convert", "-e", spec]) == 0
    return folder


def run_tool(
    tool: str, folder: Path, work_dir: Path, config: Path, overrides: Sequence[str], *arguments: object
) -> None:
    """Run ``tools/train.py`` or ``tools/test.py`` in ``folder``, as the READMEs' commands do.

    Args:
        tool: ``"train"`` or ``"test"``.
        folder: the current folder of the run.
        work_dir: where its results go.
        config: the project's config.
        overrides: changes of the config, as ``key=value``.
        *arguments: further ones of the tool; ``test`` takes the checkpoint.
    """
    # mmengine keeps a visualizer by its name, and with it the folder of the first run in a process.
    options = ["--work-dir", work_dir, "--cfg-options", f"visualizer.name={work_dir}", *overrides]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        patch.syspath_prepend(str(ROOT))
        patch.setenv("LOCAL_RANK", "0")  # mmdet's tools set it for good
        patch.setattr(sys, "argv", [f"{tool}.py", *map(str, [config, *arguments, *options])])
        assert mmdet_tool_command(tool) == 0


def train_and_test(config: Path, folder: Path, work_dir: Path, *overrides: str, epochs: int) -> dict:
    """Train a config as its project tells, then test the last checkpoint.

    Returns:
        The test's metrics by name.
    """
    run_tool("train", folder, work_dir / "train", config, overrides)
    checkpoint = work_dir / "train" / f"epoch_{epochs}.pth"
    run_tool("test", folder, work_dir / "test", config, overrides, checkpoint)
    metrics = json.loads(next((work_dir / "test").glob("*/*.json")).read_text())
    assert -1 <= metrics["coco/bbox_mAP"] <= 1
    return metrics


def records(work_dir: Path) -> list[dict]:
    """What mmengine logged as numbers, step by step."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def losses(work_dir: Path) -> list[float]:
    """The loss of each training step, all of them finite."""
    found = [record["loss"] for record in records(work_dir) if "loss" in record]
    assert all(math.isfinite(loss) and loss > 0 for loss in found)
    return found


def assert_loss_falls(work_dir: Path) -> None:
    """The log's last loss (a mean over up to fifty steps) is a tenth below the first."""
    found = losses(work_dir)
    assert len(found) == 10
    assert found[-1] < 0.9 * found[0]


def weights(work_dir: Path, epoch: int = 1) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint."""
    return read_raw(work_dir / f"epoch_{epoch}.pth").payload["state_dict"]
