"""Dilated ResNet, channels of any mmdet backbone config, batch norms fused or folded into convolutions."""

from __future__ import annotations

import copy
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.models.backbones import ResNet
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.models.layers import ResLayer
from mmdet.registry import MODELS
from torch import Tensor, nn

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
        if isinstance(module, FoldedConv2d):
            module.unfold()
    for module in model.modules():
        if isinstance(module, ResNet):
            fuse_conv_bn(module)
    return before - _num_norms(model)


def _num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# --- Folding of frozen batch norms in training ---
# A frozen norm (running statistics, nothing of it trains) scales and shifts each channel by constants. The
# convolution before it multiplies its weight by the scale instead, which is small beside the activations: one
# pass over these less in both directions, and one copy less that is kept for the backward pass. Autograd
# gives the weight its gradient through the product. Parameters, buffers and their names stay, so that
# checkpoints, averaged weights and sharding know nothing of it.


def fold_frozen_norms(model: nn.Module) -> int:
    """Fold frozen batch norms of a model's ResNets into the convolutions before them, in place.

    A norm that trains, or computes statistics, in some later step is applied as before in that step; so are
    all while a graph is traced.

    Args:
        model: with its final choice of what trains.

    Returns:
        The number of folded norms.
    """
    pairs = [
        pair
        for module in model.modules()
        if isinstance(module, ResNet)
        for pair in _convolutions_with_norms(module)
    ]
    for convolution, norm in pairs:
        convolution.__class__, norm.__class__ = FoldedConv2d, FoldedBatchNorm2d
        # In a tuple, so that the norm is no submodule, whose keys would be there twice.
        convolution.norm_after = (norm,)
        convolution.folds_once = not convolution.weight.requires_grad
        convolution.known = {}
    return len(pairs)


def _convolutions_with_norms(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yield convolutions with the frozen norm that follows; a ResNet's blocks list them in that order."""
    last: nn.Conv2d | None = None
    for child in module.children():
        if type(child) is nn.Conv2d and child.padding_mode == "zeros":
            last = child
        elif type(child) is nn.BatchNorm2d:
            if last is not None and last.out_channels == child.num_features and is_frozen_norm(child):
                yield last, child
            last = None
        else:
            last = None if any(True for _ in child.parameters()) else last
            yield from _convolutions_with_norms(child)


def is_frozen_norm(norm: nn.BatchNorm2d) -> bool:
    """Return whether a batch norm is a constant scale and shift of each channel now."""
    has_all = norm.affine and norm.running_mean is not None and norm.running_var is not None
    return has_all and not (norm.training or norm.weight.requires_grad or norm.bias.requires_grad)


class FoldedConv2d(nn.Conv2d):
    """A convolution with the scale and shift of the frozen norm after it; :func:`fold_frozen_norms` makes it.

    Attributes:
        norm_after: the norm, in a tuple.
        folds_once: whether the weight is frozen too, so that the product is kept.
        known: what was computed for which tensors, see :meth:`_once`.
    """

    norm_after: tuple[nn.BatchNorm2d]
    folds_once: bool
    known: dict[str, tuple[tuple[Tensor, ...], list, tuple[Tensor, ...]]]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W), and scale and shift as the norm would."""
        if not _folds(self.norm_after[0]):
            return super().forward(input)
        norm = self.norm_after[0]
        constants = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        scale, shift = self._once("norm", constants, _scale_and_shift, norm)
        if self.folds_once:
            (weight,) = self._once("weight", (self.weight, scale), _scaled, self.weight, scale)
        else:
            (weight,) = _scaled(self.weight, scale)
        bias = shift if self.bias is None else torch.addcmul(shift, self.bias, scale)
        # On a CPU under autocast for bfloat16's kernels: see TAODeformableDETR.extract_feat.
        wanted = input.is_cuda or torch.is_autocast_enabled("cpu")
        if wanted and input.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return self._conv_forward(input, weight, bias)

    def unfold(self) -> None:
        """Make the convolution and its norm what they were."""
        self.norm_after[0].__class__ = nn.BatchNorm2d
        del self.norm_after, self.folds_once, self.known
        self.__class__ = nn.Conv2d

    def _once(
        self, name: str, sources: tuple[Tensor, ...], compute: Callable[..., tuple[Tensor, ...]], *given: Any
    ) -> tuple[Tensor, ...]:
        """Return ``compute(*given)``, kept until one of the frozen tensors that it reads changes."""
        if torch.compiler.is_compiling():  # cannot ask for versions; the compiler fuses the product
            return compute(*given)
        # A tensor of torch.inference_mode has no version, and is not written to outside of it.
        state = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in sources]
        if name in self.known:
            before, known_state, result = self.known[name]
            if known_state == state and all(map(operator.is_, before, sources)):
                return result
        with torch.inference_mode(False), torch.no_grad():
            result = compute(*given)
        self.known[name] = (sources, state, result)
        return result


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Each channel's factor and summand of a frozen norm, (C,) each."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _scaled(weight: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (weight * scale[:, None, None, None],)


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that does nothing while the convolution before it does its work."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, H, W) as it is, or normalised where the norm is not folded now."""
        return input if _folds(self) else super().forward(input)


def _folds(norm: nn.BatchNorm2d) -> bool:
    """Whether convolution and norm compute in the folded form now; both ask."""
    return is_frozen_norm(norm) and not torch.jit.is_tracing() and not torch.compiler.is_exporting()


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
