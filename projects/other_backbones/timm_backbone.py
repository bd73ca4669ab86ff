"""Any timm model with feature maps as a backbone of mmdet.

Named in a config as ``custom_imports = dict(imports=["projects.other_backbones.timm_backbone"])``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor


@MODELS.register_module()
class TimmFeatures(BaseModule):
    """The feature maps of a timm model.

    Args:
        model_name: timm's name, for instance ``"convnext_tiny.in12k_ft_in1k"``.
        out_indices: which of timm's feature levels to put out. For most transformers and for ConvNeXt
            0 to 3 are strides 4 to 32; for ResNets 0 is stride 2.
        pretrained: load timm's weights, over the network at first use.
        init_cfg: mmengine's; None leaves the weights as timm makes them.
        **kwargs: arguments of the timm model, for instance ``drop_path_rate``.

    Raises:
        ImportError: timm is not installed.
        RuntimeError: timm has no such model, or it has no feature maps.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (1, 2, 3),
        pretrained: bool = False,
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        import timm

        self.body = timm.create_model(
            model_name, features_only=True, out_indices=tuple(out_indices), pretrained=pretrained, **kwargs
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps (B, C, h, w), one for each of ``out_indices``, of images (B, 3, H, W)."""
        return tuple(self.body(images))
