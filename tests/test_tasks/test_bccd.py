"""The first steps of the blood cell example, on a few of the real images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from golden_files import BCCD

from tests.test_tasks.conftest import ROOT, Project


@pytest.mark.parametrize("spec", ["bccd_resnet18_cpu", pytest.param("bccd_resnet50", marks=pytest.mark.slow)])
def test_degenerate_boxes_are_reported_and_the_run_can_start(tmp_path: Path, spec: str):
    project = Project(tmp_path)
    (tmp_path / "projects").mkdir()
    shutil.copytree(ROOT / "projects" / "bccd", tmp_path / "projects" / "bccd")
    done = project.run(
        "convert", "-e", str(ROOT / "configs" / "specs" / "bccd_convert.yaml"), f"data_root={BCCD}"
    )
    assert "2 x a box without width or height" in done.stderr
    report = json.loads((tmp_path / "results" / "bccd" / "coco" / "warnings.json").read_text())
    assert [problem["kind"] for problem in report["problems"]] == ["box_zero_area"] * 2
    done = project.run(
        "check",
        "-e",
        str(ROOT / "configs" / "specs" / f"{spec}.yaml"),
        f"dataset.train_data_sources.0.image_dir={BCCD}",
        f"dataset.val_data_sources.0.image_dir={BCCD}",
        "dataset.batch_size=2",  # a larger one needs more memory than some machines have
    )
    assert "the run can start" in done.stdout
    counts = json.loads(next((tmp_path / "results").glob("*/train/check.json")).read_text())["splits"]
    assert counts["train"]["num_images"] == 4 and counts["val"]["num_images"] == 3
    assert set(counts["val"]["boxes_by_class"]) == {"wbc", "rbc", "platelets"}
