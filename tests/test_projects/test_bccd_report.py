"""projects/bccd: KITTI labels to a report by the README's commands, on drawn cells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from readme_runs import follow, prepared
from test_tasks.conftest import TINY

RADIUS = {"WBC": 40, "RBC": 24, "Platelets": 8}
COLOUR_RGB = {"WBC": (110, 60, 160), "RBC": (200, 130, 130), "Platelets": (120, 80, 190)}


def draw_cells(folder: Path, count: int, seed: int) -> None:
    """Pictures of discs with KITTI labels, in the classes and folders of the real data."""
    rng = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        picture = Image.fromarray(rng.integers(200, 230, (240, 320, 3), dtype=np.uint8))
        pen, lines = ImageDraw.Draw(picture), []
        for cell, name in enumerate(("WBC", "RBC", "Platelets", "RBC")):
            x, y = 40 + 80 * cell, int(rng.integers(45, 195))
            box_xyxy = [value + sign * RADIUS[name] for sign in (-1, 1) for value in (x, y)]
            pen.ellipse(box_xyxy, fill=COLOUR_RGB[name])
            lines.append(f"{name} 0 0 0 {' '.join(map(str, box_xyxy))} 0 0 0 0 0 0 0\n")
        lines += ["RBC 0 0 0 50 50 50 50 0 0 0 0 0 0 0\n"] if number == 0 else []
        picture.save(folder / "images" / f"{number}.jpg", quality=95)
        (folder / "labels" / f"{number}.txt").write_text("".join(lines))


@pytest.mark.slow
def test_the_readme_leads_from_labels_to_a_report(tmp_path: Path):
    folder = prepared(tmp_path)
    for seed, (split, count) in enumerate({"train": 12, "val": 5}.items()):
        draw_cells(folder / "data" / "bccd" / split, count, seed)
    assert follow("bccd", folder, TINY) == ["convert", "check", "train", "evaluate", "inference"]
    problems = json.loads((folder / "results" / "bccd" / "coco" / "warnings.json").read_text())["problems"]
    assert [problem["kind"] for problem in problems] == ["box_zero_area"] * 2
    results = folder / "results" / "bccd_cpu"
    assert (results / "train" / "check_batches_training.png").is_file()
    report = (results / "evaluate" / "report.html").read_text()
    assert all(name in report for name in ("wbc", "rbc", "platelets", "Confusion matrix"))
    assert len(list((results / "inference" / "images_annotated").iterdir())) == 5
