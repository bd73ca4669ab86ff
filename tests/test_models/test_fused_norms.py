"""A detector without batch norms of its own predicts what it predicted."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

import ddetr_mm.register  # noqa: F401
from ddetr_mm.models.fused_norms import fuse_norms

sys.path.append(str(Path(__file__).resolve().parent))
from detr_builders import detector_config, padded_batch


def with_moved_norms(model: nn.Module) -> nn.Module:
    """Statistics and weights that a training might have left."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(0.2 * torch.rand(tensor.shape, generator=generator) + 0.5)
    model.eval()  # mmdet's ResNet returns nothing here
    return model


@pytest.mark.parametrize(
    "backbone",
    [
        dict(type="ResNet", depth=18, base_channels=8, num_stages=4, norm_eval=False),
        dict(type="ResNet", depth=50, base_channels=4, num_stages=4, deep_stem=True, avg_down=True),
        dict(type="TorchvisionDilatedResNet", depth=50, base_channels=4, num_stages=4),
    ],
    ids=["18", "50 with a deep stem", "dilated"],
)
def test_features_stay(backbone):
    config = dict(backbone, out_indices=(1, 2, 3), norm_cfg=dict(type="BN"), style="pytorch")
    model = with_moved_norms(MODELS.build(config))
    fused = copy.deepcopy(model)
    assert fuse_norms(fused) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 0
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(fused(images), model(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert fuse_norms(fused) == 0


def test_a_detector_predicts_the_same_and_others_are_left_alone():
    torch.manual_seed(0)
    model = with_moved_norms(MODELS.build(detector_config()))
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    images, samples = padded_batch()
    data = {"inputs": list((images * 50).to(torch.uint8)), "data_samples": samples}
    with torch.no_grad():
        for one, other in zip(model.test_step(data), fused.test_step(data), strict=True):
            torch.testing.assert_close(one.pred_instances.scores, other.pred_instances.scores)
            torch.testing.assert_close(one.pred_instances.bboxes, other.pred_instances.bboxes)
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert fuse_norms(plain) == 0


def test_the_order_of_values_in_memory_changes_no_feature():
    torch.manual_seed(0)
    model = with_moved_norms(MODELS.build(detector_config()))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        levels = model.extract_feat(images)
        expected = model.neck(model.backbone(images))
    for ours, theirs in zip(levels, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert levels[0].is_contiguous(memory_format=torch.channels_last)
    assert model.extract_feat(images)[0].is_contiguous()  # in training, see there
