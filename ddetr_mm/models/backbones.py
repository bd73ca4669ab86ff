"""Backbones beside GCViT: dilated ResNet, channel counts of any backbone, fused batch norms."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.models.backbones import ResNet
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.models.layers import ResLayer
from mmdet.registry import MODELS
from torch import nn

from ddetr_mm.errors import Problem, SpecError

# --- Batch norms folded into the convolutions before them, for models that only predict ---


def fuse_norms(model: nn.Module) -> int:
    """Fold the batch norms of a model's ResNets into their convolutions, in place.

    In evaluation such a norm is a scale and a shift a channel, which the convolution can do on the way: a
    quarter less time of the backbone on a CPU, with differences in the order of float32's rounding. Other
    backbones stay as they are: only of ResNets is it known that a norm follows the convolution named before
    it.

    Args:
        model: in eval mode, with its final weights. It can no longer be trained, and its keys have changed.

    Returns:
        How many norms are gone.
    """
    before = _num_norms(model)
    for module in model.modules():
        if isinstance(module, ResNet):
            fuse_conv_bn(module)
    return before - _num_norms(model)


def _num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# --- ResNet whose dilated stages begin as torchvision's do ---
# torchvision's ``replace_stride_with_dilation`` keeps the previous stage's dilation in the first block
# of a dilated stage and dilates the others only; mmdet's ResNet dilates the first block too. With
# torchvision's weights the features differ, so the reference's ``dilation: True`` needs this class.


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


# --- What any mmdet backbone config puts out, learnt by building and running it ---

_PROBE_SIZE = 128  # pixels; a multiple of every usual stride


@dataclass(frozen=True)
class FeatureInfo:
    """The feature maps of a backbone, in its order.

    Attributes:
        channels: channels of each map.
        strides: pixels of the input per cell of each map.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]


def feature_info(backbone_cfg: Mapping[str, Any]) -> FeatureInfo:
    """Channels and strides of a backbone config's outputs.

    The backbone is built without pretrained weights and run once on the CPU on a small black image.
    The state of the random generator is left as it was, and so is the config.

    Args:
        backbone_cfg: an mmdet backbone config, ``type`` included; a type of another package needs
            its scope (``mmpretrain.ConvNeXt``) and that package.

    Returns:
        What it puts out.

    Raises:
        SpecError: if the type is unknown, an argument is wrong, the backbone does not run, or it
            does not put out feature maps.
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
    for name in ("init_cfg", "pretrained"):  # nothing is downloaded or read to learn shapes
        cfg.pop(name, None)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            backbone = MODELS.build(cfg)
            backbone.eval()  # mmdet's ResNet.train returns nothing, so eval() does too
            features = backbone(torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE))
    except Exception as error:  # whatever a foreign backbone raises, its config is the cause
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
                "this backbone does not put out a list of feature maps",
                value=dict(backbone_cfg),
                hint="use a detection backbone, and name its stages in out_indices",
            )
        )
    return FeatureInfo(
        channels=tuple(feature.shape[1] for feature in features),
        strides=tuple(round(_PROBE_SIZE / feature.shape[-1]) for feature in features),
    )


def refuse_unregistered(cfg: Mapping[str, Any]) -> None:
    """Refuse a ``type`` that mmengine would import and call without its being a registered class.

    Raises:
        SpecError: naming the first such type.
    """
    for name in _type_names(cfg):
        scope, key = MODELS.split_scope_key(name)
        if not _is_registered(scope, key):
            raise SpecError(
                Problem(
                    "is not registered, as mmdet's models are",
                    where="ddetr_mm.backbone",
                    value=name,
                    allowed="a class of mmdet, or of another package with its scope: mmpretrain.ConvNeXt",
                    hint="check the spelling, or install the package that registers it",
                )
            )


def _type_names(cfg: Any) -> Iterator[str]:
    """Every ``type`` that is looked up among the models: all but those of initialisers."""
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


def feature_channels(backbone_cfg: Mapping[str, Any]) -> list[int]:
    """Channels of a backbone config's outputs, as ``ChannelMapper.in_channels`` takes them.

    Arguments and errors are those of :func:`feature_info`.
    """
    return list(feature_info(backbone_cfg).channels)
