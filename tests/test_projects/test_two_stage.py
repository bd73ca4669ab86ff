"""projects/two_stage: our Deformable DETR with mmdet's ``as_two_stage`` and TAO's pipeline."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from project_runs import PROJECTS, TINY, TWO_EPOCHS_OF_ALL, assert_loss_falls, losses, records, train_and_test

FOLDER = PROJECTS / "two_stage"
RECIPE = FOLDER / "deformable-detr-refine-twostage_tao_r50_16xb2-50e_coco.py"
SHAPES = FOLDER / "deformable-detr-refine-twostage_shapes.py"


def test_trains_and_runs_the_test_tool(few_shapes: Path, tmp_path: Path):
    train_and_test(SHAPES, few_shapes, tmp_path, *TINY, epochs=1)
    assert len(losses(tmp_path / "train")) == 2
    first = next(record for record in records(tmp_path / "train") if "loss" in record)
    assert {"enc_loss_cls", "enc_loss_bbox", "enc_loss_iou"} <= first.keys()


def small_recipe() -> ConfigDict:
    """The COCO recipe's network with a small backbone and few layers; mmdet's own needs the 256 channels."""
    recipe, small = Config.fromfile(str(RECIPE)).model, Config.fromfile(str(SHAPES)).model
    recipe.backbone = small.backbone
    recipe.neck.in_channels = small.neck.in_channels
    recipe.encoder.num_layers, recipe.decoder.num_layers, recipe.num_queries = 1, 2, 20
    return recipe


def stock_twin(model: ConfigDict) -> ConfigDict:
    """The same network as mmdet builds it."""
    twin = copy.deepcopy(model)
    twin.type, twin.bbox_head.type = "DeformableDETR", "DeformableDETRHead"
    del twin.zero_padded_values
    return twin


def test_is_mmdets_two_stage_network():
    """mmdet's weights fit by name, and give the same boxes for images with padding."""
    model = small_recipe()
    torch.manual_seed(0)
    stock = MODELS.build(stock_twin(model)).eval()
    stock.init_weights()
    ours = MODELS.build(model).eval()
    ours.load_state_dict(stock.state_dict())
    samples = [
        DetDataSample(metainfo=dict(img_shape=size_hw, batch_input_shape=(96, 128)))
        for size_hw in ((96, 100), (80, 128))
    ]
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected = stock(images, samples, mode="tensor")
        found = ours(images, samples, mode="tensor")
    for one, other in zip(found, expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_recipe_is_two_stage_with_our_pipeline():
    config = Config.fromfile(str(RECIPE))
    assert config.model.type == "TAODeformableDETR"
    assert config.model.as_two_stage and config.model.with_box_refine
    types = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert types[0] == "TAOLoadImageFromFile" and types[-1] == "TAOPackDetInputs"
    for dataset in (config.train_dataloader.dataset, config.val_dataloader.dataset):
        assert dataset.type == "SerializedCocoDataset"


@pytest.mark.slow
def test_learns_the_shapes(all_shapes: Path, tmp_path: Path):
    train_and_test(SHAPES, all_shapes, tmp_path, *TWO_EPOCHS_OF_ALL, epochs=2)
    assert_loss_falls(tmp_path / "train")
