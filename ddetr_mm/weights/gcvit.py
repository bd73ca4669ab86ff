"""GCViT weights of other layouts, converted by name to the backbone's own.

Two trees occur. The paper's (``patch_embed``, ``levels.N``), which published classifiers, TAO
checkpoints and this package share, and timm's (``stem``, ``stages.N``). Either may lie below any
prefix (``module.``, ``backbone.``, ``model.model.backbone.0.body.``) and inside a checkpoint's
``state_dict`` or ``model``. Pure functions; nothing here knows mmdet.

Licence: Apache-2.0, written for this package; timm's and others' layouts are known from the names
and shapes in their files. The weights themselves keep their own licence, see ``gcvit.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError

_CONTAINERS = ("state_dict", "model", "model_state", "module")
_ANCHORS = {"paper": "patch_embed.proj.weight", "timm": "stem.conv1.weight"}
_TABLE = "relative_position_bias_table"

# timm's names to the paper's, applied in this order to the whole key.
_TIMM_RULES: tuple[tuple[str, str], ...] = (
    (r"^stem\.conv1\.", "patch_embed.proj."),
    (r"^stem\.down\.", "patch_embed.conv_down."),
    (r"^stages\.3\.norm\.", "norm."),
    (r"^stages\.(\d+)\.", r"levels.\1."),
    (r"\.global_block\.blocks\.conv(\d+)\.", r".q_global_gen.to_q_global.#\1.conv_block."),
    (r"\.conv_block\.conv_dw\.", ".conv.0."),
    (r"\.conv_block\.se\.fc1\.", ".conv.2.fc.0."),
    (r"\.conv_block\.se\.fc2\.", ".conv.2.fc.2."),
    (r"\.conv_block\.conv_pw\.", ".conv.3."),
    (r"\.attn\.rel_pos\.", ".attn."),
    (r"\.ls([12])\.gamma$", r".gamma\1"),
)


@dataclass
class BackboneLoadReport:
    """What became of every key; names without a side are the backbone's own.

    Attributes:
        layout: ``paper`` or ``timm``.
        prefix: what stood before the keys in the file.
        mapped: the file's key to the backbone's, for every weight that is loaded.
        missing: keys of the backbone that the file has no weight for; they keep their values.
        unexpected: keys of the file, without its prefix, that the backbone has no place for
            (a classifier's head, blocks of a longer query pyramid).
        reshaped: key to (shape in the file, shape loaded), position tables of another window.
        skipped: key to (shape in the file, shape wanted), not loaded because they do not fit.
        outside: how many keys of the file are not below the prefix (the rest of a detector).
    """

    layout: str
    prefix: str
    mapped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    skipped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    outside: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.layout} layout, prefix '{self.prefix}': {len(self.mapped)} weights loaded, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.reshaped)} reshaped, {len(self.skipped)} of another shape skipped"
        ]
        lines += [f"  missing     {key}" for key in self.missing]
        lines += [f"  unexpected  {key}" for key in self.unexpected]
        for word, shapes in (("reshaped", self.reshaped), ("skipped", self.skipped)):
            lines += [
                f"  {word:<11} {key}: {old} in the file, {new} here" for key, (old, new) in shapes.items()
            ]
        return "\n".join(lines)


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, whether or not it wraps them in ``state_dict`` or alike.

    Raises:
        WeightsError: the checkpoint is no mapping.
    """
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(
            Problem("is no checkpoint", value=type(checkpoint).__name__, allowed="names with their tensors")
        )
    for _ in _CONTAINERS:
        inner = next(
            (checkpoint[name] for name in _CONTAINERS if isinstance(checkpoint.get(name), Mapping)), None
        )
        if inner is None:
            break
        checkpoint = inner
    return {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def find_layout(keys: Mapping[str, Any], prefix: str | None = None) -> tuple[str, str]:
    """The layout and prefix of the GCViT inside a state dict.

    Raises:
        WeightsError: none is there, or several are and ``prefix`` names none of them.
    """
    found = [
        (layout, key[: -len(anchor)])
        for layout, anchor in _ANCHORS.items()
        for key in keys
        if key.endswith(anchor) and (key == anchor or key[: -len(anchor)].endswith("."))
    ]
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else prefix + "."
        found = [(layout, have) for layout, have in found if have == wanted]
    if not found:
        where = "" if prefix is None else f" below '{prefix}'"
        raise WeightsError(
            Problem(
                f"no GCViT weights found{where}",
                value=list(keys)[:3],
                allowed=[f"a checkpoint with a key that ends in '{anchor}'" for anchor in _ANCHORS.values()],
            )
        )
    if len(found) > 1:
        raise WeightsError(
            Problem(
                "holds more than one GCViT",
                value=[have for _, have in found],
                hint="name the one to load with prefix",
            )
        )
    return found[0]


def convert_backbone_state_dict(
    checkpoint: Mapping[str, Any], target: Mapping[str, Tensor], prefix: str | None = None
) -> tuple[dict[str, Tensor], BackboneLoadReport]:
    """Weights of any layout under the backbone's own names and in its shapes.

    Position tables of another window are resized over their (2w - 1) x (2w - 1) grid. Global-query
    pyramids of another resolution share their first blocks; what is over is unexpected, what is
    lacking missing. A classifier's final ``norm`` is the norm of the last stage's output and serves
    as ``norm3`` where the file has none.

    Args:
        checkpoint: a state dict or a checkpoint that wraps one; not changed.
        target: the backbone's ``state_dict()``.
        prefix: what stands before the backbone's keys in the file; None finds it.

    Returns:
        The weights to load (those that fit, so possibly not all) and the report.

    Raises:
        WeightsError: see :func:`find_layout`; also when fewer than half of the weights fit.
    """
    state_dict = unwrap_state_dict(checkpoint)
    layout, prefix = find_layout(state_dict, prefix)
    report = BackboneLoadReport(layout, prefix)
    named = _own_names(state_dict, target, report)
    converted: dict[str, Tensor] = {}
    for key, (source, tensor) in named.items():
        if key not in target:
            report.unexpected.append(source[len(prefix) :])
            continue
        fitted = _fit(key, tensor, target[key])
        if fitted is None:
            report.skipped[key] = (tuple(tensor.shape), tuple(target[key].shape))
            continue
        if key.endswith(_TABLE) and fitted.shape != tensor.shape:
            report.reshaped[key] = (tuple(tensor.shape), tuple(fitted.shape))
        converted[key] = fitted
        report.mapped[source] = key
    report.missing = [key for key in target if key not in named]
    if 2 * len(converted) < len(target):
        raise WeightsError(
            Problem(
                f"holds another GCViT than the model: {len(converted)} of {len(target)} weights fit",
                value=report.skipped or report.unexpected,
                hint="choose the file's variant",
            )
        )
    return converted, report


def _own_names(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor], report: BackboneLoadReport
) -> dict[str, tuple[str, Tensor]]:
    """The backbone's name of every weight below the prefix, with the file's key."""
    named: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if not key.startswith(report.prefix):
            report.outside += 1
        elif not key.endswith("relative_position_index"):
            own = key[len(report.prefix) :]
            named[timm_to_paper(own) if report.layout == "timm" else own] = (key, tensor)
    for leaf in ("weight", "bias"):
        if f"norm3.{leaf}" in target and f"norm3.{leaf}" not in named and f"norm.{leaf}" in named:
            named[f"norm3.{leaf}"] = named.pop(f"norm.{leaf}")
    return named


def timm_to_paper(key: str) -> str:
    """One key of timm's tree in the paper's; keys without a counterpart come back as they are."""
    reduction = re.match(r"^stages\.(\d+)\.downsample\.(.*)$", key)
    if reduction:
        # timm counts a reduction to the stage it leads to, the paper to the one it leaves.
        key = f"stages.{int(reduction[1]) - 1}.downsample.{reduction[2]}"
    for pattern, replacement in _TIMM_RULES:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"#(\d+)", lambda match: str(int(match[1]) - 1), key)


def resize_position_table(table: Tensor, rows: int) -> Tensor:
    """A relative position bias table for another window.

    Args:
        table: ((2w - 1)**2, h).
        rows: (2v - 1)**2 of the new window v.

    Returns:
        (rows, h), bicubic over the grid of offsets, each head by itself.
    """
    old_side, new_side = _side(table.shape[0]), _side(rows)
    grid = table.float().t().reshape(1, -1, old_side, old_side)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return grid.reshape(-1, rows).t().contiguous().to(table.dtype)


def _side(rows: int) -> int:
    return round(rows**0.5)


def _fit(key: str, tensor: Tensor, target: Tensor) -> Tensor | None:
    """The tensor in the target's shape, or None where the two do not go together."""
    if tensor.shape == target.shape:
        return tensor
    if tensor.numel() == target.numel() and tensor.shape[:2] == target.shape[:2]:
        return tensor.reshape(target.shape)  # a 1x1 convolution where we have a linear layer
    is_table = key.endswith(_TABLE) and tensor.ndim == 2 and tensor.shape[1] == target.shape[1]
    if is_table and _side(tensor.shape[0]) ** 2 == tensor.shape[0]:
        return resize_position_table(tensor, target.shape[0])
    return None
