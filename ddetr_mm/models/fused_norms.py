"""Batch norms folded into the convolutions before them, for models that only predict."""

from __future__ import annotations

from mmcv.cnn import fuse_conv_bn
from mmdet.models.backbones import ResNet
from torch import nn


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
