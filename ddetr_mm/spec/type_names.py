"""Which names a ``type`` in a free configuration may have.

mmengine looks a ``type`` up in its registries, and takes what it does not find there for a path to any
Python object, imports and calls it: ``{type: os.system, command: ...}`` would run a command. So a spec may
name registered classes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SCOPES = ("mmdet", "mmpretrain", "mmcls", "mmseg", "mmyolo", "mmrotate")
"""Packages whose registries a name may be taken from."""

TYPE_NAMES = "a registered name such as ResNet, or one with its package: mmpretrain.ConvNeXt"

_FITS = re.compile(rf"((?:{'|'.join(SCOPES)})\.)?[A-Za-z][A-Za-z0-9_]*")


def unfit_type_names(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every ``type`` and ``_scope_`` below a configuration that names no class of a registry.

    Args:
        config: nested mappings and lists.
        path: what goes before the places, e.g. ``".norm_cfg"``.

    Yields:
        The place (``".norm_cfg.type"``) and the name.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            here = f"{path}.{key}"
            if (key == "type" and not _is_name(value)) or (key == "_scope_" and value not in SCOPES):
                yield here, value
            else:
                yield from unfit_type_names(value, here)
    elif isinstance(config, (list, tuple)):
        for index, item in enumerate(config):
            yield from unfit_type_names(item, f"{path}[{index}]")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _FITS.fullmatch(value) is not None
