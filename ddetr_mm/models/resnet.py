"""ResNet whose dilated stages begin as torchvision's do.

torchvision's ``replace_stride_with_dilation`` keeps the previous stage's dilation in the first block
of a dilated stage and dilates the others only; mmdet's ResNet dilates the first block too. With
torchvision's weights the features differ, so the reference's ``dilation: True`` needs this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.models.backbones import ResNet
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.models.layers import ResLayer
from mmdet.registry import MODELS


@MODELS.register_module()
class TorchvisionDilatedResNet(ResNet):
    """mmdet's ResNet with the dilated stages of torchvision, by default the last one.

    The defaults are torchvision's ``replace_stride_with_dilation=[False, False, True]``: the last
    stage keeps stride 16. Parameter names are torchvision's and mmdet's.

    Args:
        depth: 50, 101 or 152; torchvision dilates no smaller one.
        strides: stride of each stage's first block.
        dilations: dilation of each stage's blocks but the first, which keeps the stage's before.
        **kwargs: mmdet's.

    Raises:
        ValueError: if a depth of 18 or 34 is to be dilated.
    """

    def __init__(
        self,
        depth: int,
        *,
        strides: Sequence[int] = (1, 2, 2, 1),
        dilations: Sequence[int] = (1, 1, 1, 2),
        **kwargs: Any,
    ) -> None:
        self._previous_dilation = 1
        super().__init__(depth, strides=strides, dilations=dilations, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> ResLayer:
        """Build one stage, its first block with the dilation of the stage before.

        Raises:
            ValueError: dilation with a depth below 50.
        """
        stage = super().make_res_layer(**kwargs)
        dilation = kwargs["dilation"]
        if dilation > 1 and not isinstance(stage[0], Bottleneck):
            raise ValueError(f"only depths from 50 up can be dilated, not {self.depth}")
        if dilation != self._previous_dilation:
            first = stage[0].conv2
            first.dilation = first.padding = (self._previous_dilation,) * 2
        self._previous_dilation = dilation
        return stage
