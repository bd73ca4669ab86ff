"""A mixed config: mmdet's Faster R-CNN on GCViT, trained and tested by mmdet's tools.

DINO on GCViT: tests/test_projects/test_gcvit_dino.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ddetr_mm.weights.safe_read import read_raw

PROJECT = Path(__file__).resolve().parents[2]
FASTER_RCNN = PROJECT / "configs" / "gcvit" / "faster-rcnn_gcvit-xxtiny_fpn_1x_coco.py"
CLASSES = ("square", "disc")
NUM_IMAGES, STEPS, HEIGHT, WIDTH = 6, 3, 64, 96

# What makes a run short: small pictures, few steps, no worker processes.
SHORT_RUN = """
_base_ = {base!r}

_classes = {classes!r}
_dataset = dict(data_root={root!r}, ann_file="boxes.json", data_prefix=dict(img=""),
                metainfo=dict(classes=_classes))
_load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
         dict(type="Resize", scale=({width}, {height}), keep_ratio=True)]
_meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
_test_set = dict(pipeline=_load + [dict(type="PackDetInputs", meta_keys=_meta)], **_dataset)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(filter_cfg=dict(min_size=1), **_dataset,
                 pipeline=_load + [dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]))
val_cfg = val_dataloader = val_evaluator = None
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_test_set)
test_evaluator = dict(ann_file={annotations!r})
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
model = {model}
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """A folder with a few pictures of squares and discs and their boxes in COCO format."""
    root = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(NUM_IMAGES):
        picture = Image.fromarray(random.integers(90, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        for label in range(len(CLASSES)):
            side = int(random.integers(16, 28))
            x, y = int(random.integers(0, 20)) + 48 * label, int(random.integers(0, HEIGHT - 28))
            box_xyxy = [x, y, x + side, y + side]
            (draw.ellipse if label else draw.rectangle)(box_xyxy, fill=(250, 40 + 180 * label, 30))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                }
            )
        picture.save(root / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": HEIGHT, "width": WIDTH})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (root / "boxes.json").write_text(text)
    return root


# mmdet's tools import mmdet first, which beside mmcv-lite needs ddetr_mm before it. One process for both
# tools: importing everything takes longer than the training.
LAUNCHER = """
import json, runpy, sys
import ddetr_mm
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_tools(*calls: list[object]) -> None:
    """Run mmdet's own tools, as its wheel carries them, one after the other in a process of their own."""
    tools = Path(importlib.util.find_spec("mmdet").origin).parent / ".mim" / "tools"
    if not tools.is_dir():
        pytest.skip("this mmdet was not installed as a wheel: it carries no tools")
    arguments = [[str(tools / f"{tool}.py"), *map(str, rest)] for tool, *rest in calls]
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def records(work_dir: Path) -> list[dict]:
    """What mmengine logged as numbers, step by step."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


SMALL_FASTER_RCNN = """dict(
    roi_head=dict(bbox_head=dict(num_classes=2, fc_out_channels=64)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=50)),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0)))"""


def test_trains_and_runs_the_test_tool(shapes, tmp_path) -> None:
    config = tmp_path / "short.py"
    config.write_text(
        SHORT_RUN.format(
            base=str(FASTER_RCNN),
            classes=CLASSES,
            root=str(shapes),
            width=WIDTH,
            height=HEIGHT,
            annotations=str(shapes / "boxes.json"),
            model=SMALL_FASTER_RCNN,
        )
    )
    checkpoint, found = tmp_path / "train" / "epoch_1.pth", tmp_path / "found.pkl"
    run_tools(
        ["train", config, "--work-dir", tmp_path / "train"],
        ["test", config, checkpoint, "--work-dir", tmp_path / "test", "--out", found],
    )
    logged = records(tmp_path / "train")
    losses = [record["loss"] for record in logged if "loss" in record]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)

    weights = read_raw(checkpoint).payload["state_dict"]
    backbone = {key: value for key, value in weights.items() if key.startswith("backbone.")}
    assert "backbone.levels.3.blocks.1.attn.relative_position_bias_table" in backbone
    # Biases start at zero: training moved the backbone's in every stage.
    assert all(backbone[f"backbone.levels.{i}.blocks.1.attn.qkv.bias"].abs().max() > 0 for i in range(4))

    with found.open("rb") as file:
        detections = pickle.load(file)
    assert len(detections) == NUM_IMAGES
    assert all(detection["pred_instances"]["bboxes"].shape[1] == 4 for detection in detections)
    metrics = json.loads(next((tmp_path / "test").glob("*/*.json")).read_text())
    assert -1 <= metrics["coco/bbox_mAP"] <= 1
