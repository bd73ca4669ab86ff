"""projects/rtmdet_serialized: mmdet's RTMDet on our dataset and metric."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from project_runs import (
    PROJECTS,
    TINY,
    losses,
    records,
    run_tool,
)

FOLDER = PROJECTS / "rtmdet_serialized"
SHAPES = FOLDER / "rtmdet_tiny_shapes.py"
# Two epochs of one step; the second is without mosaic and mix-up.
TWO_EPOCHS = (
    *TINY,
    "train_dataloader.dataset.indices=2",
    "train_cfg.max_epochs=2",
    "train_cfg.val_interval=2",
    "custom_hooks.1.switch_epoch=1",
)
# The same run with mmdet's dataset, which takes one file where ours takes a folder of them.
ONE_SHARD = "results/shapes/coco/train/train-shard-00000-of-00002.json"
STOCK = """
_base_ = {base!r}
train_dataloader = dict(
    dataset=dict(type="CocoDataset", metainfo=dict(classes=("circle", "rectangle", "star", "triangle")))
)
"""


def test_trains_as_with_mmdets_dataset(few_shapes: Path, tmp_path: Path):
    stock = tmp_path / "stock.py"
    stock.write_text(STOCK.format(base=str(SHAPES)))
    shard = f"train_dataloader.dataset.ann_file={ONE_SHARD}"
    run_tool("train", few_shapes, tmp_path / "stock", stock, [*TWO_EPOCHS, shard])
    run_tool("train", few_shapes, tmp_path / "ours", SHAPES, [*TWO_EPOCHS, shard])
    ours = losses(tmp_path / "ours")
    assert len(ours) == 2
    assert ours == losses(tmp_path / "stock")
    scores = [record for record in records(tmp_path / "ours") if "coco/bbox_mAP" in record]
    assert len(scores) == 1 and -1 <= scores[0]["coco/bbox_mAP_50"] <= 1


def test_the_recipe_changes_names_alone(tmp_path: Path):
    base = tmp_path / "base.py"
    base.write_text('_base_ = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"')
    stock = Config.fromfile(str(base))
    ours = Config.fromfile(str(FOLDER / "rtmdet_tiny_serialized_8xb32-300e_coco.py"))
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        assert ours[loader].dataset.type == "SerializedCocoDataset"
        ours[loader].dataset.type = "CocoDataset"
        assert ours[loader] == stock[loader]
    assert ours.model == stock.model
    assert ours.val_evaluator.ann_file == stock.val_evaluator.ann_file
