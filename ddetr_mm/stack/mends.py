"""Small mends of mmengine at run time. Each is applied by a call, once, and a second call does nothing."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_SKIPPED = re.compile(r"^\.?(?P<parameter>\S+) is skipped since its requires_grad=False$")


def allow_mmengine_checkpoint_classes() -> None:
    """Let ``torch.load`` read what mmengine saves beside the weights, its protection left on.

    mmengine calls ``torch.load`` without arguments, which since torch 2.6 refuses every class that it
    does not know; mmengine's own checkpoints are full of them. See :mod:`ddetr_mm.stack.safe_globals`.
    The fork onedl-mmengine reads a refused file once more without protection, and would run what code it
    holds: it is kept from that.
    """
    import torch
    from mmengine.runner import checkpoint

    from ddetr_mm.stack.safe_globals import safe_globals

    torch.serialization.add_safe_globals(safe_globals())  # a set: adding twice changes nothing
    if hasattr(checkpoint, "_safe_torch_load"):
        checkpoint._safe_torch_load = _protected_torch_load


def _protected_torch_load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """``torch.load`` with its protection, in the place of onedl-mmengine's function of these arguments.

    Args:
        file: as for ``torch.load``.
        map_location: likewise.
        weights_only: not looked at: the protection stays on whatever is asked for.

    Raises:
        pickle.UnpicklingError: the file holds a class that is not allowed.
    """
    import torch

    return torch.load(file, map_location=map_location, weights_only=True)


def find_our_configs() -> None:
    """Let mmengine resolve ``ddetr_mm::deformable_detr/…`` as it resolves ``mmdet::…``.

    mmengine knows the packages of OpenMMLab by a table. And up to 0.10.7 it looks for a package beside its
    metadata, where an editable install has nothing; its own answer counts wherever that folder exists.
    """
    from mmengine.config.utils import MODULE2PACKAGE
    from mmengine.utils import package_utils

    MODULE2PACKAGE.setdefault("ddetr_mm", "ddetr_mm")
    original = package_utils.get_installed_path
    if getattr(original, "finds_editable", False):
        return

    @functools.wraps(original)
    def get_installed_path(package: str) -> str:
        path = original(package)
        if os.path.isdir(path):
            return path
        spec = importlib.util.find_spec(package)
        return path if spec is None or spec.origin is None else os.path.dirname(spec.origin)

    get_installed_path.finds_editable = True  # type: ignore[attr-defined]
    # Modules that are imported later take it from mmengine.utils.
    for name in (
        "mmengine.utils.package_utils",
        "mmengine.utils",
        "mmengine.config.config",
        "mmengine.hub.hub",
    ):
        module = sys.modules.get(name)
        if getattr(module, "get_installed_path", None) is original:
            module.get_installed_path = get_installed_path  # type: ignore[union-attr]


def quiet_frozen_parameter_warnings() -> None:
    """Make mmengine tell the frozen parameters in one line instead of one WARNING for each.

    It logs ``backbone.conv1.weight is skipped since its requires_grad=False`` for every one of them,
    hundreds of lines, while it builds an optimizer with ``paramwise_cfg``.
    """
    from mmengine.optim import DefaultOptimWrapperConstructor

    original = DefaultOptimWrapperConstructor.__call__
    if getattr(original, "tells_frozen_in_one_line", False):
        return

    @functools.wraps(original)
    def call(self: Any, model: Any) -> Any:
        with frozen_parameters_in_one_line():
            return original(self, model)

    call.tells_frozen_in_one_line = True  # type: ignore[attr-defined]
    DefaultOptimWrapperConstructor.__call__ = call


@contextmanager
def frozen_parameters_in_one_line() -> Iterator[None]:
    """Hold back mmengine's lines on frozen parameters inside the block; log their sum at its end."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    held_back: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        match = _SKIPPED.match(record.getMessage())
        if match:
            held_back.append(match["parameter"])
        return match is None

    with _filtered(logger, keep):
        yield
    if held_back:
        logger.info(
            f"{len(held_back)} frozen parameters stay out of the optimizer: {summarise_names(held_back)}"
        )


def summarise_names(parameters: Iterable[str], depth: int = 2, limit: int = 8) -> str:
    """Parameter names as counts of their first ``depth`` parts: ``backbone.layer1 (30), …``.

    Args:
        parameters: dotted names.
        depth: how many parts of a name count.
        limit: how many groups are told; the rest is counted.
    """
    groups: dict[str, int] = {}
    for name in parameters:
        group = ".".join(name.split(".")[:depth])
        groups[group] = groups.get(group, 0) + 1
    told = [f"{group} ({count})" for group, count in groups.items()]
    rest = len(told) - limit
    return ", ".join(told[:limit]) + (f" and {rest} more groups" if rest > 0 else "")


@contextmanager
def _filtered(logger: logging.Logger, keep: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
