"""GCViT, the Global Context Vision Transformer, as a backbone for any mmdet detector.

Source: A. Hatamizadeh et al., "Global Context Vision Transformers", arXiv 2206.09959.

Licences: this file, ``gcvit_blocks.py`` and ``gcvit_weights.py`` are Apache-2.0. They were written
from the paper and from measured outputs, not from the authors' code, which is licensed for
non-commercial use only. So are the weights the authors publish (CC BY-NC-SA 4.0) and weights
derived from them, timm's among them: whoever loads a file is bound by that file's licence.

Shapes: B images, H x W tokens, C channels; stage i has stride 4 * 2**i and dim * 2**i channels.

Deliberate differences from the classifier of the paper:

- One LayerNorm ``norm{i}`` for each returned stage instead of the classifier's ``norm`` and
  ``head``. The feature is taken before the stage's reduction.
- Any image size: windows are padded with zeros, and a global query that does not come out as one
  window is resized bicubically.
- A stage cuts its map into windows once, not in every block. The numbers are the same.
- ``relative_position_index`` follows from the window and is not stored; where a checkpoint holds
  it, it is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ddetr_mm.errors import Problem, SpecError

from .gcvit_blocks import Stage, Stem, WindowAttention, query_pyramid
from .gcvit_weights import BackboneLoadReport, convert_backbone_state_dict

NUM_STAGES = 4


@dataclass(frozen=True)
class GCViTVariant:
    """The architecture of one published size; tuples have one entry for each stage."""

    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[int, ...]
    dim: int
    mlp_ratio: float
    layer_scale: float | None

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.dim * 2**stage for stage in range(NUM_STAGES))


_WINDOWS, _WINDOWS_384 = (7, 7, 14, 7), (12, 12, 24, 12)
_DEEP = (3, 4, 19, 5)
VARIANTS: dict[str, GCViTVariant] = {
    "xxtiny": GCViTVariant((2, 2, 6, 2), (2, 4, 8, 16), _WINDOWS, 64, 3.0, None),
    "xtiny": GCViTVariant((3, 4, 6, 5), (2, 4, 8, 16), _WINDOWS, 64, 3.0, None),
    "tiny": GCViTVariant(_DEEP, (2, 4, 8, 16), _WINDOWS, 64, 3.0, None),
    "small": GCViTVariant(_DEEP, (3, 6, 12, 24), _WINDOWS, 96, 2.0, 1e-5),
    "base": GCViTVariant(_DEEP, (4, 8, 16, 32), _WINDOWS, 128, 2.0, 1e-5),
    "large": GCViTVariant(_DEEP, (6, 12, 24, 48), _WINDOWS, 192, 2.0, 1e-5),
    "large_384": GCViTVariant(_DEEP, (6, 12, 24, 48), _WINDOWS_384, 192, 2.0, 1e-5),
}


@MODELS.register_module()
class GCViT(BaseModule):
    """GCViT backbone: images in, one feature map for each chosen stage out.

    Parameter names follow the paper's module tree (``patch_embed``, ``levels.N.blocks.M``,
    ``norm{i}``), so a TAO checkpoint's backbone fits after its prefix is cut off. An ONNX graph traced
    from it has standard operators only; its batch may vary, its height and width are the traced ones.

    Args:
        variant: a key of :data:`VARIANTS`: xxtiny, xtiny, tiny, small, base, large, large_384.
        out_indices: stages to return, increasing, each 0..3 (strides 4, 8, 16, 32). Stages after
            the last one keep their parameters, so that checkpoints fit, but are neither run nor
            trained.
        frozen_stages: -1 trains all; 0 freezes the stem; k freezes the stem and the first k
            stages with their reductions and output norms; 4 freezes the whole backbone, which is
            ``train_backbone: False`` of a spec. Frozen parts also stay in evaluation mode (no
            drop path). There is no ``norm_eval``: LayerNorm keeps no statistics.
        drop_path_rate: probability of skipping a branch in the last block, 0..1; it grows
            linearly from 0 in the first.
        with_cp: recompute blocks in the backward pass. Less memory, the same gradients.
        windows: side of each stage's window in tokens; None for the variant's.
        resolution: image side in pixels that the global-query pyramids are laid out for. It fixes
            how many blocks they have; images of any size may come in. The reference uses 224 for
            every variant, large_384 included.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` loads FILE (a path or URL) by
            :meth:`load_backbone_state_dict`; ``prefix`` names the backbone inside it where that
            is not unique. None for random weights.

    Raises:
        SpecError: an argument is out of range.
    """

    def __init__(
        self,
        variant: str = "xxtiny",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        drop_path_rate: float = 0.2,
        with_cp: bool = False,
        windows: Sequence[int] | None = None,
        resolution: int = 224,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        _check(variant, out_indices, frozen_stages, drop_path_rate, windows, resolution)
        arch = VARIANTS[variant]
        self.variant, self.frozen_stages = variant, frozen_stages
        self.out_indices = tuple(out_indices)
        self.out_channels = tuple(arch.channels[stage] for stage in self.out_indices)
        self.patch_embed = Stem(3, arch.dim)
        num_blocks = sum(arch.depths)
        rates = [drop_path_rate * index / max(1, num_blocks - 1) for index in range(num_blocks)]
        self.levels = nn.ModuleList()
        for stage, window in enumerate(windows or arch.windows):
            first = sum(arch.depths[:stage])
            self.levels.append(
                Stage(
                    arch.channels[stage],
                    arch.num_heads[stage],
                    window,
                    arch.mlp_ratio,
                    rates[first : first + arch.depths[stage]],
                    arch.layer_scale,
                    query_pyramid(resolution // (4 * 2**stage), window, stage),
                    reduce=stage < NUM_STAGES - 1,
                    with_cp=with_cp,
                )
            )
        for stage in self.out_indices:
            self.add_module(f"norm{stage}", nn.LayerNorm(arch.channels[stage]))
        self.apply(_init_parameters)
        self._freeze()

    def forward(self, images_bchw: Tensor) -> tuple[Tensor, ...]:
        """Features of the chosen stages.

        Args:
            images_bchw: (B, 3, height, width), normalised, of any size and memory format.

        Returns:
            For each stage i of ``out_indices`` a (B, C_i, ceil(height / s), ceil(width / s)) map
            of stride s = 4 * 2**i, channels-last in memory.
        """
        features = []
        x_bhwc = self.patch_embed(images_bchw)
        for stage, level in enumerate(self.levels):
            x_bhwc = level(x_bhwc)
            if stage in self.out_indices:
                features.append(getattr(self, f"norm{stage}")(x_bhwc).permute(0, 3, 1, 2))
            if stage == self.out_indices[-1]:
                break
            x_bhwc = level.downsample(x_bhwc)
        return tuple(features)

    def train(self, mode: bool = True) -> GCViT:
        """Switch to training or evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def init_weights(self) -> None:
        """Load the file of ``init_cfg``; without one the weights drawn on construction stay.

        Raises:
            WeightsError: the file cannot be read or is not a GCViT checkpoint.
        """
        if not self.init_cfg or self.init_cfg.get("type") != "Pretrained":
            super().init_weights()
            return
        path = self.init_cfg["checkpoint"]
        report = self.load_backbone_state_dict(_read(path), self.init_cfg.get("prefix"))
        print_log(f"GCViT from {path}: {report}", logger="current")
        self._is_init = True

    def load_backbone_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str | None = None
    ) -> BackboneLoadReport:
        """Load weights of any layout that :func:`convert_backbone_state_dict` recognises.

        Args:
            state_dict: a state dict or a checkpoint that wraps one; not changed.
            prefix: what stands before the backbone's own keys; None finds it.

        Returns:
            What was loaded, missing, unexpected, reshaped and skipped.

        Raises:
            WeightsError: no GCViT is in there, or several are and ``prefix`` names none.
        """
        converted, report = convert_backbone_state_dict(state_dict, self.state_dict(), prefix)
        self.load_state_dict(converted, strict=False)
        return report

    def _frozen_modules(self) -> list[nn.Module]:
        modules: list[nn.Module] = [self.patch_embed] if self.frozen_stages >= 0 else []
        for stage in range(max(0, self.frozen_stages)):
            modules.append(self.levels[stage])
            if stage in self.out_indices:
                modules.append(getattr(self, f"norm{stage}"))
        return modules

    def _freeze(self) -> None:
        last = self.out_indices[-1]
        unused = [self.levels[last].downsample, *self.levels[last + 1 :]]
        for module in self._frozen_modules() + [module for module in unused if module is not None]:
            module.requires_grad_(False)


def _read(location: str) -> Mapping[str, Any]:
    """A checkpoint at a path or URL, of any format we read, without running code from it."""
    from ddetr_mm.weights.fetch import local_file  # the package of weights builds on models
    from ddetr_mm.weights.safe_read import read_raw

    return read_raw(local_file(location)).payload


def _init_parameters(module: nn.Module) -> None:
    """Swin's: normal of deviation 0.02 (its cut at 2 is a hundred deviations away), biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.normal_(module.relative_position_bias_table, std=0.02)


def _check(
    variant: str,
    out_indices: Sequence[int],
    frozen_stages: int,
    drop_path_rate: float,
    windows: Sequence[int] | None,
    resolution: int,
) -> None:
    """Raise one SpecError that names every argument out of range."""
    indices = list(out_indices)
    checks = [
        ("variant", variant, variant in VARIANTS, list(VARIANTS)),
        (
            "out_indices",
            indices,
            bool(indices) and indices == sorted(set(indices)) and set(indices) <= set(range(NUM_STAGES)),
            "an increasing selection of 0, 1, 2, 3",
        ),
        ("frozen_stages", frozen_stages, frozen_stages in range(-1, NUM_STAGES + 1), "-1 to 4"),
        ("drop_path_rate", drop_path_rate, 0 <= drop_path_rate < 1, "0 <= rate < 1"),
        (
            "windows",
            windows,
            windows is None or (len(windows) == NUM_STAGES and all(window >= 1 for window in windows)),
            "None or four sizes of at least 1",
        ),
        ("resolution", resolution, resolution >= 32, "at least 32"),
    ]
    SpecError.collect(
        Problem("is not an option of the backbone", where=f"GCViT.{name}", value=value, allowed=allowed)
        for name, value, ok, allowed in checks
        if not ok
    )
