"""Dilated ResNet, channels of any mmdet backbone config, and fusing of batch norms."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.models.backbones import ResNet
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.models.layers import ResLayer
from mmdet.registry import MODELS
from torch import nn

from ddetr_mm.errors import Problem, SpecError

# --- Fusing of batch norms ---


def fuse_norms(model: nn.Module) -> int:
    """Fuse the batch norms of a model's ResNets into their convolutions, in place.

    This takes a quarter off the backbone's time on a CPU; results differ by float32's rounding. Other
    backbones are not changed: only in ResNets is a norm known to follow the convolution named before it. Nor
    are networks whose inputs of layers are quantized.

    Args:
        model: in eval mode, with its final weights. It cannot be trained afterwards, and its keys change.

    Returns:
        The number of fused norms.
    """
    quantization = getattr(model, "quantization", None)
    if quantization is not None and quantization.rounds_inputs:
        return 0  # fused weights would no longer be those that were rounded
    before = _num_norms(model)
    for module in model.modules():
        if isinstance(module, ResNet):
            fuse_conv_bn(module)
    return before - _num_norms(model)


def _num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# --- Dilated ResNet ---


@MODELS.register_module()
class TorchvisionDilatedResNet(ResNet):
    """mmdet's ResNet with torchvision's dilated stages, for TAO's ``dilation: True``.

    torchvision's ``replace_stride_with_dilation`` keeps the previous stage's dilation in the first block of a
    dilated stage; mmdet's ResNet dilates the first block too, so that its features differ for the same
    weights. By default the last stage is dilated and keeps stride 16. Parameter names are torchvision's and
    mmdet's.

    Args:
        depth: 50, 101 or 152; torchvision dilates no smaller one.
        strides: stride of each stage's first block.
        dilations: dilation of each stage's blocks but the first, which has the previous stage's.
        **kwargs: mmdet's.

    Raises:
        ValueError: dilation with a depth of 18 or 34.
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
        """Build one stage, its first block with the previous stage's dilation.

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


# --- Channels of a backbone config ---

_PROBE_SIZE = 128  # pixels; a multiple of the usual strides


def feature_channels(backbone_cfg: Mapping[str, Any]) -> list[int]:
    """Return the channels of a backbone config's outputs, for ``ChannelMapper.in_channels``.

    The backbone is built without pretrained weights and run once on the CPU on a small black image. Neither
    the config nor the random generator's state changes.

    Args:
        backbone_cfg: an mmdet backbone config, ``type`` included; a type of another package needs its scope
            (``mmpretrain.ConvNeXt``) and that package.

    Raises:
        SpecError: the type is unknown, an argument is wrong, the backbone does not run, or its outputs are
            not feature maps.
    """
    if not isinstance(backbone_cfg, Mapping) or "type" not in backbone_cfg:
        raise SpecError(
            Problem(
                "a backbone config needs a type",
                value=backbone_cfg,
                hint="give a mapping such as {type: ResNet, depth: 18, out_indices: [1, 2, 3]}",
            )
        )
    refuse_unregistered(backbone_cfg)
    cfg = copy.deepcopy(dict(backbone_cfg))
    for name in ("init_cfg", "pretrained"):  # no weights are needed for shapes
        cfg.pop(name, None)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            backbone = MODELS.build(cfg)
            backbone.eval()  # mmdet's ResNet.train returns nothing, so eval() does too
            features = backbone(torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE))
    except Exception as error:  # any error of a foreign backbone is due to its config
        raise SpecError(
            Problem(
                f"this backbone config cannot be built and run: {str(error).strip()}",
                value=dict(backbone_cfg),
                hint="check the type and its arguments in mmdet; for another package's backbone "
                "write its scope (mmpretrain.ConvNeXt) and install that package",
            )
        ) from error
    if not isinstance(features, (tuple, list)) or any(feature.dim() != 4 for feature in features):
        raise SpecError(
            Problem(
                "this backbone does not return a list of feature maps",
                value=dict(backbone_cfg),
                hint="use a detection backbone, and name its stages in out_indices",
            )
        )
    return [feature.shape[1] for feature in features]


def refuse_unregistered(cfg: Mapping[str, Any]) -> None:
    """Refuse a ``type`` that is not registered, which mmengine would import and call.

    Raises:
        SpecError: names the first such type.
    """
    for name in _type_names(cfg):
        scope, key = MODELS.split_scope_key(name)
        if not _is_registered(scope, key):
            raise SpecError(
                Problem(
                    "is not registered as a model",
                    where="ddetr_mm.backbone",
                    value=name,
                    allowed="a class of mmdet, or of another package with its scope: mmpretrain.ConvNeXt",
                    hint="check the spelling, or install the package that registers it",
                )
            )


def _type_names(cfg: Any) -> Iterator[str]:
    """Yield every ``type`` that is looked up among the models, so not those of initialisers."""
    if isinstance(cfg, Mapping):
        if "type" in cfg:
            yield str(cfg["type"])
        for key, value in cfg.items():
            if key != "init_cfg":
                yield from _type_names(value)
    elif isinstance(cfg, (list, tuple)):
        for item in cfg:
            yield from _type_names(item)


def _is_registered(scope: str | None, key: str) -> bool:
    registry = MODELS
    if scope not in (None, MODELS.scope):
        try:
            registry = importlib.import_module(f"{scope}.registry").MODELS
        except ImportError:
            return False
    while registry is not None:
        registry.import_from_location()
        if key in registry.module_dict:
            return True
        registry = registry.parent
    return False
