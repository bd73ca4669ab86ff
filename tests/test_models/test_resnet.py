from __future__ import annotations

import pytest
import torch
from mmdet.registry import MODELS
from torchvision.models import resnet50

from ddetr_mm.models.resnet import TorchvisionDilatedResNet


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
