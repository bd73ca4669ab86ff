"""Patches of mmengine and mmdet for today's torch, each applied by name."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# --- The classes beyond tensors that a checkpoint may hold and still be read with ``weights_only=True`` ---
# mmengine saves its log history (``HistoryBuffer``, numpy arrays and scalars) with the weights, and the
# first Deformable DETR releases hold an ``argparse.Namespace``. All of it is plain data; the protection
# of ``torch.load`` stays on for everything else.

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]

_NUMBER_TYPES = "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8"


def safe_globals() -> list[SafeGlobal]:
    """What to hand to ``torch.serialization.safe_globals`` or ``add_safe_globals``.

    Returns:
        Callables, and pairs of a callable and the name that the file knows it by.
    """
    import numpy as np
    from mmengine.logging import HistoryBuffer

    # Taken from values, since numpy 1 and 2 keep them in different modules; files of both exist.
    rebuild_array: Any = np.empty(0).__reduce__()[0]
    rebuild_scalar: Any = np.float64(0).__reduce__()[0]
    numpy_globals: list[SafeGlobal] = [np.ndarray, np.dtype]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        numpy_globals += [(rebuild_array, f"{module}._reconstruct"), (rebuild_scalar, f"{module}.scalar")]
    # One class per number type: an array of objects is not among them.
    numpy_globals += list(dict.fromkeys(type(np.dtype(name)) for name in _NUMBER_TYPES.split()))
    return [
        HistoryBuffer,
        (_history_buffer_method, "builtins.getattr"),
        argparse.Namespace,
        *numpy_globals,
    ]


def _history_buffer_method(owner: Any, name: str) -> Any:
    """What ``getattr`` may do in a checkpoint: name one of ``HistoryBuffer``'s own statistics.

    ``HistoryBuffer`` pickles references to its methods ``min``, ``max``, ``current`` and ``mean``.

    Raises:
        pickle.UnpicklingError: any other attribute of anything is asked for.
    """
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"the file asks for attribute {name!r} of {owner!r}, which is no plain data")


# --- A limit on the pixels of an image, so that a small file cannot claim gigabytes when it is decoded ---

MAX_IMAGE_PIXELS = 178_956_970
"""Pixels that an image may have: where Pillow suspects an attack (its ``DecompressionBombError``). They take
0.5 GB of memory. OpenCV's own limit of 2**30 lets a file of a few kilobytes take 3 GB in every worker."""

OPENCV_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"


def limit_decoded_images() -> None:
    """Give OpenCV the same limit, unless the environment sets one; it is read when OpenCV is imported."""
    os.environ.setdefault(OPENCV_VARIABLE, str(MAX_IMAGE_PIXELS))


def size_refused(width: int, height: int) -> str | None:
    """What is wrong with an image of this size in pixels; None where it may be decoded."""
    if width * height <= MAX_IMAGE_PIXELS:
        return None
    return f"has {width} x {height} pixels, more than the {MAX_IMAGE_PIXELS:,} that are decoded"


# --- Importing mmdet without what only its language models need ---


@contextmanager
def without_language_models() -> Iterator[None]:
    """A block in which mmdet, imported for the first time, finds no ``transformers``.

    mmdet imports it for GLIP and Grounding DINO wherever it is installed, which takes a third of the time
    that all of mmdet takes; without it those two alone cannot be built. For processes that run a spec: its
    detector is never one of them. Where ``transformers`` is loaded already, nothing changes.
    """
    name = "transformers"
    if name in sys.modules:
        yield
        return
    # None makes an import fail as one of a package that is not installed.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules[name] is None:
            del sys.modules[name]


# --- Small mends of mmengine at run time. Each is applied by a call, once, and a second call does nothing ---

_SKIPPED = re.compile(r"^\.?(?P<parameter>\S+) is skipped since its requires_grad=False$")


def allow_mmengine_checkpoint_classes() -> None:
    """Let ``torch.load`` read what mmengine saves beside the weights, its protection left on.

    mmengine calls ``torch.load`` without arguments, which since torch 2.6 refuses every class that it
    does not know; mmengine's own checkpoints are full of them. See :mod:`ddetr_mm.compat.patches`.
    The fork onedl-mmengine reads a refused file once more without protection, and would run what code it
    holds: it is kept from that.
    """
    import torch
    from mmengine.runner import checkpoint

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


def quiet_warnings_without_remedy() -> None:
    """Silence warnings about calls inside mmdet and mmengine that a user cannot change."""
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # No loss is changed in place here, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")


PATCHES: dict[str, Callable[[], None]] = {
    "decoded image limit": limit_decoded_images,
    "mmengine checkpoint classes": allow_mmengine_checkpoint_classes,
    "configs of this package": find_our_configs,
    "frozen parameters in one line": quiet_frozen_parameter_warnings,
    "warnings without remedy": quiet_warnings_without_remedy,
}
"""Every patch by name. Each may be applied several times; from the second time on it changes nothing."""

AT_IMPORT = ("decoded image limit",)
"""Applied by ``import ddetr_mm``: they import nothing heavy."""

AT_REGISTRATION = tuple(name for name in PATCHES if name not in AT_IMPORT)
"""Applied by ``import ddetr_mm.register``."""


def apply_patches(names: Iterable[str]) -> None:
    """Apply patches by name.

    Raises:
        KeyError: there is no patch of that name.
    """
    for name in names:
        PATCHES[name]()
