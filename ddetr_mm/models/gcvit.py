"""GCViT, the Global Context Vision Transformer, as a backbone for any mmdet detector.

Source: A. Hatamizadeh et al., "Global Context Vision Transformers", arXiv 2206.09959.

Licences: this file is Apache-2.0. It was written from the paper and from measured outputs, not from the
authors' code, which is licensed for non-commercial use only. So are the weights that the authors publish (CC
BY-NC-SA 4.0) and weights derived from them, timm's among them: users of a file are bound by its licence.

Module names follow the paper's module tree, which published and TAO checkpoints share, so that their keys
fit by prefix. The sizes and the conversion of other layouts are in :mod:`ddetr_mm.weights.gcvit`.

Shapes: B images, H x W tokens, C channels, w window side, N = w * w tokens of a window, L windows of an
image, h heads, d channels of a head; stage i has stride 4 * 2**i and dim * 2**i channels. Maps are
channels-last (B, H, W, C); convolutions use the same memory as a channels-last (B, C, H, W) view, so that
nothing is copied.

Differences from the paper's classifier:

- One LayerNorm ``norm{i}`` for each returned stage instead of the classifier's ``norm`` and ``head``. The
  feature is taken before the stage's reduction.
- Any image size: windows are padded with zeros, and a global query that is not exactly one window is resized
  bicubically.
- A stage partitions its map into windows once, not in every block. The numbers are the same.
- ``relative_position_index`` follows from the window and is not stored; in a checkpoint it is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.weights import load_backbone
from ddetr_mm.weights.gcvit import NUM_STAGES, VARIANTS, relative_position_index
from ddetr_mm.weights.read import local_file

# --- Windows ---


def query_pyramid(side_tokens: int, window: int, stage: int) -> tuple[int, bool]:
    """Return how a stage's map is reduced to the global query, a window of tokens.

    Args:
        side_tokens: side of the stage's map at the resolution for which the model is designed.
        window: side of the window in tokens.
        stage: 0..3.

    Returns:
        The number of convolutional blocks (at least 1), and whether each is followed by a pooling that
        halves the map. As in TAO, stage 2 (index) pools once unless its map is exactly one window, even
        where its map is smaller than the window.
    """
    halvings = max(0, math.ceil(math.log2(side_tokens / window)))
    if stage == 2 and side_tokens != window:
        halvings = max(1, halvings)
    return max(1, halvings), halvings > 0


def partition_windows(x_bhwc: Tensor, window: int) -> tuple[Tensor, Tensor | None]:
    """Partition a map into windows, zero-padded at the right and bottom to a multiple of the window.

    Args:
        x_bhwc: (B, H, W, C).
        window: side of the window in tokens.

    Returns:
        (B, L, N, C), windows in row-major order, and a bool mask (L, N, 1), true on the padding, or None
        without padding.
    """
    height, width = x_bhwc.shape[1:3]
    rows, columns = _windows_along(height, window), _windows_along(width, window)
    pad_bottom, pad_right = rows * window - height, columns * window - width
    if pad_bottom == 0 and pad_right == 0:
        return _to_windows(x_bhwc, window), None
    inside = x_bhwc.new_zeros((1, height, width, 1), dtype=torch.bool)
    padded = F.pad(inside, (0, 0, 0, pad_right, 0, pad_bottom), value=True)
    x_bhwc = F.pad(x_bhwc, (0, 0, 0, pad_right, 0, pad_bottom))
    return _to_windows(x_bhwc, window), _to_windows(padded, window)[0]


def _windows_along(tokens: int, window: int) -> int:
    # Not -(-tokens // window): in a traced ONNX graph // rounds towards zero.
    return (tokens + window - 1) // window


def _to_windows(x_bhwc: Tensor, window: int) -> Tensor:
    rows, columns, channels = x_bhwc.shape[1] // window, x_bhwc.shape[2] // window, x_bhwc.shape[3]
    x = x_bhwc.reshape(-1, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(-1, rows * columns, window * window, channels)


def merge_windows(x_blnc: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo :func:`partition_windows`: (B, L, N, C) to (B, H, W, C) without the padding."""
    rows, columns = _windows_along(height, window), _windows_along(width, window)
    channels = x_blnc.shape[-1]
    x = x_blnc.reshape(-1, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(-1, rows * window, columns * window, channels)
    return x[:, :height, :width].contiguous()


# --- Modules ---


class SqueezeExcitation(nn.Module):
    """Scales channels by a gate computed from their global means. No biases."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = channels // reduction
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        gate_bc = self.fc(x_bchw.mean((2, 3)))
        return x_bchw * gate_bc[:, :, None, None]


class ResidualConv(nn.Module):
    """x + pointwise(squeeze-excitation(GELU(depthwise(x)))), optionally halved by max pooling.

    One step of the global-query pyramid, and the front of :class:`Reduction`.
    """

    def __init__(self, channels: int, pool: bool = False) -> None:
        super().__init__()
        self.pool = pool
        self.conv = _conv_branch(channels)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape, or with ``pool`` to (B, C, ceil(H/2), ceil(W/2))."""
        x_bchw = x_bchw + self.conv(x_bchw)
        return F.max_pool2d(x_bchw, 3, stride=2, padding=1) if self.pool else x_bchw


def _conv_branch(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.GELU(),
        SqueezeExcitation(channels),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


class Reduction(nn.Module):
    """Halves a map: norm, residual convolutions, 3x3 convolution of stride 2, norm."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv_branch(channels)
        self.reduction = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(out_channels)
        self.norm1 = nn.LayerNorm(channels)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), out_channels)."""
        x_bchw = self.norm1(x_bhwc).permute(0, 3, 1, 2)
        x_bchw = self.reduction(x_bchw + self.conv(x_bchw))
        return self.norm2(x_bchw.permute(0, 2, 3, 1))


class Stem(nn.Module):
    """The image to tokens of stride 4: a 3x3 convolution of stride 2 and a :class:`Reduction`."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.conv_down = Reduction(channels, channels)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, ceil(height/4), ceil(width/4), C)."""
        images_bchw = images_bchw.contiguous(memory_format=torch.channels_last)
        return self.conv_down(self.proj(images_bchw).permute(0, 2, 3, 1))


class GlobalQuery(nn.Module):
    """A stage's global query: its input map reduced to one window of tokens.

    Args:
        channels: C.
        num_heads: h.
        window: side of the window in tokens.
        num_blocks: convolutional blocks.
        pool: whether each block halves the map.
    """

    def __init__(self, channels: int, num_heads: int, window: int, num_blocks: int, pool: bool) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.to_q_global = nn.Sequential(*(ResidualConv(channels, pool) for _ in range(num_blocks)))

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) to the query of every window of the image, (B, h, N, d)."""
        q = self.to_q_global(x_bhwc.permute(0, 3, 1, 2))
        if q.shape[2] != self.window or q.shape[3] != self.window:
            q = F.interpolate(q, size=(self.window, self.window), mode="bicubic", align_corners=False)
        q = q.permute(0, 2, 3, 1).reshape(-1, self.window**2, self.num_heads, q.shape[1] // self.num_heads)
        return q.transpose(1, 2)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a relative position bias.

    Args:
        channels: C.
        num_heads: h.
        window: side of the window in tokens.
        use_global_query: whether queries are given, shared by all windows of an image; the layer then
            projects keys and values only.
    """

    def __init__(self, channels: int, num_heads: int, window: int, use_global_query: bool) -> None:
        super().__init__()
        self.num_heads, self.window, self.use_global_query = num_heads, window, use_global_query
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(channels, channels * (2 if use_global_query else 3))
        self.proj = nn.Linear(channels, channels)
        self.register_load_state_dict_pre_hook(_drop_index)

    def forward(self, x_blnc: Tensor, q_global_bhnd: Tensor | None = None) -> Tensor:
        """(B, L, N, C), and (B, h, N, d) where queries are global, to (B, L, N, C)."""
        num_windows, num_tokens, channels = x_blnc.shape[1:]
        # Windows of all images in one axis, heads before tokens: (2 or 3, B * L, h, N, d).
        split = self.qkv(x_blnc).reshape(
            -1, num_tokens, 2 if self.use_global_query else 3, self.num_heads, channels // self.num_heads
        )
        parts = split.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        if self.use_global_query:
            q = q_global_bhnd.unsqueeze(1).expand(-1, num_windows, -1, -1, -1).flatten(0, 1)
            parts = (q, *parts)
        out = attend(*parts, self.position_bias())
        return self.proj(out.transpose(1, 2).reshape(-1, num_windows, num_tokens, channels))

    def position_bias(self) -> Tensor:
        """Return the bias of the attention logits, (h, N, N)."""
        num_tokens = self.window**2
        # index_select along rows of a transposed copy: several times faster than indexing.
        table = self.relative_position_bias_table.t().contiguous()
        bias = table.index_select(1, self.relative_position_index.flatten())
        return bias.reshape(self.num_heads, num_tokens, num_tokens)


def attend(q: Tensor, k: Tensor, v: Tensor, bias_hnn: Tensor) -> Tensor:
    """Softmax attention with a bias; everything else (windows, h, N, d)."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_hnn.unsqueeze(0))
    # On a CPU two matrix products are faster than the fused kernel at 49 or 196 tokens, and it is not used
    # with a trained bias. An ONNX graph needs the plain form too.
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    logits += bias_hnn
    return logits.softmax(-1) @ v


def _drop_index(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Drop the index from a checkpoint: it is not a weight."""
    state_dict.pop(prefix + "relative_position_index", None)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on the last axis."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm window attention and MLP, each on a residual with layer scale and drop path.

    Args:
        channels: C.
        num_heads: h.
        window: side of the window in tokens.
        mlp_ratio: hidden channels of the MLP over C.
        use_global_query: see :class:`WindowAttention`.
        drop_path_rate: probability that an image skips a residual branch in training, 0..1.
        layer_scale: initial value of the factors on the branches; None for no factors.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: int,
        mlp_ratio: float,
        use_global_query: bool,
        drop_path_rate: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads, window, use_global_query)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        scaled = layer_scale is not None
        self.gamma1 = nn.Parameter(torch.full((channels,), layer_scale)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((channels,), layer_scale)) if scaled else None

    def forward(self, x_blnc: Tensor, padding_ln1: Tensor | None, q_global_bhnd: Tensor | None) -> Tensor:
        """(B, L, N, C) to the same shape.

        Args:
            x_blnc: windows of tokens.
            padding_ln1: (L, N, 1) bool, true on padding, which enters attention as zeros.
            q_global_bhnd: (B, h, N, d) where queries are global.
        """
        tokens = self.norm1(x_blnc)
        if padding_ln1 is not None:
            tokens = tokens.masked_fill(padding_ln1, 0.0)
        x_blnc = self._add(x_blnc, self.attn(tokens, q_global_bhnd), self.gamma1)
        return self._add(x_blnc, self.mlp(self.norm2(x_blnc)), self.gamma2)

    def _add(self, x_blnc: Tensor, branch_blnc: Tensor, gamma_c: Tensor | None) -> Tensor:
        """Return x + drop_path(gamma * branch), with the factors multiplied first."""
        factor = gamma_c
        if self.training and self.drop_path_rate > 0:
            keep = 1 - self.drop_path_rate
            kept_b = x_blnc.new_empty((x_blnc.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)
            factor = kept_b if gamma_c is None else kept_b * gamma_c
        return x_blnc + branch_blnc if factor is None else torch.addcmul(x_blnc, branch_blnc, factor)


class Stage(nn.Module):
    """Blocks of one resolution, local and global attention in turn, then the reduction.

    The map is partitioned into windows once and merged once; padding is zero where attention reads it.

    Args:
        channels: C.
        num_heads: h.
        window: side of the window in tokens.
        mlp_ratio: hidden channels of the MLPs over C.
        drop_path_rates: one for each block.
        layer_scale: see :class:`Block`.
        pyramid: blocks and pooling of the global query, see :func:`query_pyramid`.
        reduce: whether a reduction to twice the channels follows.
        with_cp: recompute each block in the backward pass to save memory.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: int,
        mlp_ratio: float,
        drop_path_rates: list[float],
        layer_scale: float | None,
        pyramid: tuple[int, bool],
        reduce: bool,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.with_cp = window, with_cp
        self.blocks = nn.ModuleList(
            Block(channels, num_heads, window, mlp_ratio, index % 2 == 1, rate, layer_scale)
            for index, rate in enumerate(drop_path_rates)
        )
        self.downsample = Reduction(channels, 2 * channels) if reduce else None
        self.q_global_gen = GlobalQuery(channels, num_heads, window, *pyramid)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) to the stage's feature, (B, H, W, C); the reduction is not applied."""
        height, width = x_bhwc.shape[1:3]
        q_global = self.q_global_gen(x_bhwc)
        windows, padding = partition_windows(x_bhwc, self.window)
        for block in self.blocks:
            query = q_global if block.attn.use_global_query else None
            if self.with_cp and self.training:
                windows = checkpoint(block, windows, padding, query, use_reentrant=False)
            else:
                windows = block(windows, padding, query)
        return merge_windows(windows, self.window, height, width)


# --- The backbone ---


@MODELS.register_module()
class GCViT(BaseModule):
    """GCViT backbone: images in, one feature map for each chosen stage out.

    Parameter names follow the paper's module tree (``patch_embed``, ``levels.N.blocks.M``,
    ``norm{i}``), so that a TAO checkpoint's backbone fits without its prefix. An ONNX graph traced from
    it has standard operators only and any batch; its height and width are the traced ones.

    Args:
        variant: a key of :data:`~ddetr_mm.weights.gcvit.VARIANTS`: xxtiny, xtiny, tiny, small, base, large,
            large_384.
        out_indices: stages to return, increasing, each 0..3 (strides 4, 8, 16, 32). Stages after the last
            one, and its reduction, do not exist; a file's weights for them are left out.
        frozen_stages: -1 trains all; 0 freezes the stem; k freezes the stem and the first k
            stages with their reductions and output norms; 4 freezes the whole backbone, which is
            ``train_backbone: False`` of a spec. Frozen parts also stay in evaluation mode (no
            drop path). There is no ``norm_eval``: LayerNorm keeps no statistics.
        drop_path_rate: probability of skipping a branch in the last block, 0..1; it grows
            linearly from 0 in the first.
        with_cp: recompute blocks in the backward pass. Less memory, the same gradients.
        windows: side of each stage's window in tokens; None for the variant's.
        resolution: image side in pixels for which the global-query pyramids are designed, which determines
            their number of blocks; images may have any size. TAO uses 224 for every variant, large_384
            included.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` loads FILE (a path or URL) with
            :func:`~ddetr_mm.weights.load_backbone`; ``prefix`` names the backbone in it where it holds
            several. None for random weights.

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
        last = self.out_indices[-1]
        for stage, window in enumerate((windows or arch.windows)[: last + 1]):
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
                    reduce=stage < last,
                    with_cp=with_cp,
                )
            )
        for stage in self.out_indices:
            self.add_module(f"norm{stage}", nn.LayerNorm(arch.channels[stage]))
        self.apply(_init_parameters)
        self._freeze()

    def forward(self, images_bchw: Tensor) -> tuple[Tensor, ...]:
        """Return the features of the chosen stages.

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
            if level.downsample is not None:
                x_bhwc = level.downsample(x_bhwc)
        return tuple(features)

    def train(self, mode: bool = True) -> GCViT:
        """Switch to training or evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def init_weights(self) -> None:
        """Load the file of ``init_cfg``; without one the initial random weights are kept.

        Raises:
            WeightsError: the file cannot be read or holds no GCViT.
        """
        if not self.init_cfg or self.init_cfg.get("type") != "Pretrained":
            super().init_weights()
            return
        path = local_file(self.init_cfg["checkpoint"])
        report = load_backbone(self, path, self.init_cfg.get("prefix"))
        print_log(report.summary(), logger="current")
        self._is_init = True

    def _frozen_modules(self) -> list[nn.Module]:
        modules: list[nn.Module] = [self.patch_embed] if self.frozen_stages >= 0 else []
        for stage in range(min(max(0, self.frozen_stages), len(self.levels))):
            modules.append(self.levels[stage])
            if stage in self.out_indices:
                modules.append(getattr(self, f"norm{stage}"))
        return modules

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)


def _init_parameters(module: nn.Module) -> None:
    """Initialise as Swin does: normal with standard deviation 0.02, biases zero."""
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
    """Raise one SpecError for all arguments out of range."""
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
