"""Fields the documentation knows under two names."""

from __future__ import annotations

ALIASES: dict[str, str] = {
    "model.pretrained_model_path": "pretrained_backbone_path",
    "train.optim.lr_monitor": "monitor_name",
}
"""Dotted path of the second name → the field's name in the same section."""


def canonical(section: str, key: str) -> str:
    """The field's own name for a key in a section (dotted path, empty for the root)."""
    return ALIASES.get(f"{section}.{key}", key)
