"""projects/other_backbones: our Deformable DETR on backbones of mmdet, timm and mmpretrain."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config
from project_runs import (
    PROJECTS,
    ROOT,
    TINY,
    losses,
    train_and_test,
    weights,
)

from ddetr_mm.models import feature_channels
from ddetr_mm.spec import load_spec
from ddetr_mm.translate import to_config

FOLDER = PROJECTS / "other_backbones"
SWIN = FOLDER / "deformable-detr_swin_shapes.py"
CONVNEXT = FOLDER / "deformable-detr_convnext_shapes.py"
TIMM_CONVNEXT = FOLDER / "deformable-detr_timm-convnext_shapes.py"
SPEC = ROOT / "configs" / "specs" / "shapes_resnet18.yaml"

needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
needs_mmpretrain = pytest.mark.skipif(
    not importlib.util.find_spec("mmpretrain"), reason="mmpretrain is not installed: pip install mmpretrain"
)
configs = pytest.mark.parametrize(
    "config",
    [
        pytest.param(SWIN, id="swin"),
        pytest.param(TIMM_CONVNEXT, id="timm-convnext", marks=needs_timm),
        pytest.param(CONVNEXT, id="mmpretrain-convnext", marks=needs_mmpretrain),
    ],
)


@configs
def test_trains_and_runs_the_test_tool(config: Path, few_shapes: Path, tmp_path: Path):
    train_and_test(config, few_shapes, tmp_path, *TINY, epochs=1)
    assert len(losses(tmp_path / "train")) == 2
    keys = [key for key in weights(tmp_path / "train") if key.startswith("backbone.")]
    assert len(keys) > 50


@pytest.mark.parametrize(
    "name",
    [
        "swin-t",
        pytest.param("timm-convnext-t", marks=needs_timm),
        pytest.param("convnext-t", marks=needs_mmpretrain),
    ],
)
def test_the_neck_fits_the_full_backbone(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    model = Config.fromfile(str(FOLDER / f"deformable-detr_{name}_16xb2-50e_coco.py")).model
    assert model.type == "TAODeformableDETR" and model.with_box_refine
    assert feature_channels(model.backbone) == model.neck.in_channels


def test_the_convnext_config_reads_without_mmpretrain():
    config = Config.fromfile(str(CONVNEXT), import_custom_modules=False)
    assert "mmpretrain.models" in config.custom_imports.imports
    assert config.model.backbone.type == "mmpretrain.ConvNeXt"
    stand_in = dict(type="SwinTransformer", embed_dims=40, num_heads=(1, 2, 4, 8), out_indices=(1, 2, 3))
    assert feature_channels(stand_in) == config.model.neck.in_channels
    config.model.backbone = stand_in
    assert MODELS.build(config.model).bbox_head.num_classes == 4


def test_a_spec_says_the_same():
    """``ddetr_mm.backbone`` of a spec builds the backbone and the neck of the config."""
    model = Config.fromfile(str(SWIN)).model
    backbone = f"ddetr_mm.backbone={json.dumps(model.backbone.to_dict())}"
    loaded = load_spec(str(SPEC), [backbone], "train")
    draft = to_config(loaded, "train", look_up_channels=feature_channels)
    of_spec, of_config = (
        {
            key: tuple(value.shape)
            for key, value in MODELS.build(one).state_dict().items()
            if key.startswith("backbone.") or (key.startswith("neck.") and not key.endswith("conv.bias"))
        }
        for one in (draft.to_dict()["model"], model)
    )
    assert of_spec == of_config
