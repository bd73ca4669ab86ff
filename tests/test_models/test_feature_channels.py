from __future__ import annotations

import copy

import pytest
import torch

from ddetr_mm.errors import SpecError
from ddetr_mm.models import FeatureInfo, feature_channels, feature_info


@pytest.mark.parametrize(
    ("config", "channels", "strides"),
    [
        ({"type": "ResNet", "depth": 18, "base_channels": 16}, (16, 32, 64, 128), (4, 8, 16, 32)),
        ({"type": "ResNet", "depth": 50, "out_indices": (1, 3)}, (512, 2048), (8, 32)),
        (
            {"type": "SwinTransformer", "embed_dims": 24, "depths": (1, 1, 1, 1), "out_indices": (1, 2, 3)},
            (48, 96, 192),
            (8, 16, 32),
        ),
        ({"type": "TorchvisionDilatedResNet", "depth": 50, "out_indices": (2, 3)}, (1024, 2048), (16, 16)),
    ],
)
def test_channels_and_strides(config, channels, strides) -> None:
    assert feature_info(config) == FeatureInfo(channels, strides)
    assert feature_channels(config) == list(channels)


def test_convnext_of_mmpretrain() -> None:
    pytest.importorskip("mmpretrain.models")
    config = {
        "type": "mmpretrain.ConvNeXt",
        "arch": "atto",
        "out_indices": (1, 2, 3),
        "gap_before_final_norm": False,
    }
    assert feature_info(config).strides == (8, 16, 32)


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
    assert error.value.problems[0].mend


def test_other_outputs_than_feature_maps_are_refused() -> None:
    from mmdet.registry import MODELS

    @MODELS.register_module(force=True)
    class OneVector(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image.mean((2, 3))]

    with pytest.raises(SpecError, match="does not put out a list of feature maps"):
        feature_channels({"type": "OneVector"})
