"""Channels of backbone configs, dilated ResNet and fused batch norms."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from detr_builders import detector_config, padded_batch
from mmdet.registry import MODELS
from torch import nn
from torchvision.models import resnet50

import ddetr_mm.register  # noqa: F401
from ddetr_mm.errors import SpecError
from ddetr_mm.models import feature_channels
from ddetr_mm.models.backbones import TorchvisionDilatedResNet, fuse_norms


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        ({"type": "ResNet", "depth": 18, "base_channels": 16}, [16, 32, 64, 128]),
        ({"type": "ResNet", "depth": 50, "out_indices": (1, 3)}, [512, 2048]),
        (
            {"type": "SwinTransformer", "embed_dims": 24, "depths": (1, 1, 1, 1), "out_indices": (1, 2, 3)},
            [48, 96, 192],
        ),
        ({"type": "TorchvisionDilatedResNet", "depth": 50, "out_indices": (2, 3)}, [1024, 2048]),
    ],
)
def test_channels(config, channels) -> None:
    assert feature_channels(config) == channels


def test_convnext_of_mmpretrain() -> None:
    pytest.importorskip("mmpretrain.models")
    config = {
        "type": "mmpretrain.ConvNeXt",
        "arch": "atto",
        "out_indices": (1, 2, 3),
        "gap_before_final_norm": False,
    }
    assert feature_channels(config) == [80, 160, 320]


def test_config_pretrained_weights_and_random_state_are_left_alone() -> None:
    config = {
        "type": "ResNet",
        "depth": 18,
        "init_cfg": {"type": "Pretrained", "checkpoint": "no/such/file.pth"},
    }
    before = copy.deepcopy(config)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert feature_channels(config) == [64, 128, 256, 512]
    assert torch.equal(torch.rand(4), expected)
    assert config == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "ResNett", "depth": 18}, "is not registered.*ResNett"),
        ({"type": "ResNet", "depth": 19}, "invalid depth 19"),
        ({"type": "ResNet", "depth": 18, "colour": "red"}, "unexpected keyword argument 'colour'"),
        ({"type": "mmnosuch.Backbone"}, "is not registered"),
        ({"type": "os.system", "command": "true"}, "is not registered"),
        ({"type": "ResNet", "depth": 18, "norm_cfg": {"type": "builtins.print"}}, "is not registered"),
        ({"depth": 18}, "needs a type"),
        ("ResNet", "needs a type"),
        ({"type": "L1Loss"}, "cannot be built and run"),
    ],
)
def test_wrong_configs_are_explained(config, message) -> None:
    with pytest.raises(SpecError, match=message) as error:
        feature_channels(config)
    assert error.value.problems[0].hint


def test_other_outputs_than_feature_maps_are_refused() -> None:
    from mmdet.registry import MODELS

    @MODELS.register_module(force=True)
    class OneVector(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image.mean((2, 3))]

    with pytest.raises(SpecError, match="does not return a list of feature maps"):
        feature_channels({"type": "OneVector"})


# --- Fused batch norms ---

sys.path.append(str(Path(__file__).resolve().parent))


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


@pytest.mark.parametrize(
    ("dilated", "strides", "dilations"),
    [
        ([False, False, True], (1, 2, 2, 1), (1, 1, 1, 2)),
        ([False, True, True], (1, 2, 1, 1), (1, 1, 2, 4)),
        ([False, False, False], (1, 2, 2, 2), (1, 1, 1, 1)),
    ],
)
def test_equals_torchvision(dilated, strides, dilations) -> None:
    torch.manual_seed(0)
    theirs = resnet50(weights=None, replace_stride_with_dilation=dilated).eval()
    ours = MODELS.build(
        {"type": "TorchvisionDilatedResNet", "depth": 50, "strides": strides, "dilations": dilations}
    )
    ours.eval()  # mmdet's ResNet does not return itself
    weights = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours.load_state_dict(weights)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        found = ours(image)
        for stage, feature in zip(
            (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), found, strict=True
        ):
            features = stage(features)
            torch.testing.assert_close(feature, features, rtol=1e-4, atol=1e-5)


def test_the_last_stage_is_dilated_by_default() -> None:
    model = TorchvisionDilatedResNet(depth=50)
    convolutions = [(block.conv2.stride, block.conv2.dilation, block.conv2.padding) for block in model.layer4]
    assert convolutions == [((1, 1), (1, 1), (1, 1)), *[((1, 1), (2, 2), (2, 2))] * 2]


def test_small_depths_are_refused() -> None:
    with pytest.raises(ValueError, match="only depths from 50 up can be dilated, not 18"):
        TorchvisionDilatedResNet(depth=18)
