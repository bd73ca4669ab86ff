"""projects/gcvit_dino: mmdet's DINO on GCViT, trained and tested by mmdet's tools."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from project_runs import PROJECTS, TINY, losses, train_and_test, weights

from ddetr_mm.weights.gcvit import VARIANTS

SHAPES = PROJECTS / "gcvit_dino" / "dino_gcvit-xxtiny_shapes.py"


def test_trains_and_runs_the_test_tool(few_shapes: Path, tmp_path: Path):
    train_and_test(SHAPES, few_shapes, tmp_path, *TINY, epochs=1)
    assert len(losses(tmp_path / "train")) == 2
    backbone = {k: v for k, v in weights(tmp_path / "train").items() if k.startswith("backbone.")}
    assert "backbone.levels.3.blocks.1.attn.relative_position_bias_table" in backbone
    # Biases start at zero: training moved the backbone's in every stage.
    assert all(backbone[f"backbone.levels.{i}.blocks.1.attn.qkv.bias"].abs().max() > 0 for i in range(4))


def test_the_larger_backbone_fits_the_neck():
    model = Config.fromfile(str(PROJECTS / "gcvit_dino" / "dino_gcvit-tiny_8xb2-12e_coco.py")).model
    assert model.type == "DINO" and model.backbone.variant == "tiny"
    channels = VARIANTS["tiny"].channels
    assert list(model.neck.in_channels) == [channels[stage] for stage in model.backbone.out_indices]
