"""Changes to mmengine, mmdet and OpenCV at run time, each applied by name: :data:`PATCHES`."""

from __future__ import annotations

import argparse
import functools
import importlib.machinery
import importlib.util
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# --- classes that ``torch.load`` may build with ``weights_only=True`` ---
# mmengine saves its log history (``HistoryBuffer``, numpy arrays and scalars) with the weights, and the
# first Deformable DETR releases hold an ``argparse.Namespace``: plain data. Everything else stays refused.

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]

_NUMBER_TYPES = "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8"


def safe_globals() -> list[SafeGlobal]:
    """The argument of ``torch.serialization.safe_globals`` and ``add_safe_globals``.

    Returns:
        Callables, and pairs of a callable and its name in the file.
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
    """``getattr`` for a checkpoint: looks up the four methods that a pickled ``HistoryBuffer`` refers to.

    Raises:
        pickle.UnpicklingError: any other attribute of anything is asked for.
    """
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"the file asks for attribute {name!r} of {owner!r}, which is no plain data")


# --- limit on the pixels of an image: a small file must not take gigabytes when it is decoded ---

MAX_IMAGE_PIXELS = 178_956_970
"""Most pixels of an image: Pillow's limit (``DecompressionBombError``), 0.5 GB decoded. OpenCV's own limit of
2**30 lets a file of a few kilobytes take 3 GB in every worker."""

OPENCV_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"


def limit_decoded_images() -> None:
    """Set OpenCV's limit, which it reads when imported, unless the environment sets one."""
    os.environ.setdefault(OPENCV_VARIABLE, str(MAX_IMAGE_PIXELS))


def size_refused(width: int, height: int) -> str | None:
    """The message for an image that is too large to decode (sizes in pixels); None for any other."""
    if width * height <= MAX_IMAGE_PIXELS:
        return None
    return f"has {width} x {height} pixels, more than the {MAX_IMAGE_PIXELS:,} that are decoded"


# --- imports that a spec never uses ---

_PLOTS = "mmdet.utils.mot_error_visualize"


class _UnusedImports:
    """A finder of modules that keeps mmengine and mmdet from importing what a spec never uses.

    mmengine imports transformers for one optimizer and mmdet for GLIP and Grounding DINO, with all that it
    imports itself: a quarter of the time to the first step. They cope with its absence. mmdet's plots of
    tracking errors import matplotlib: their function does so when it is called.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Refuse or replace what this class says; None leaves a module to the other finders."""
        if name == "transformers" and _importing_package() in ("mmengine", "mmdet"):
            raise ModuleNotFoundError("not imported: a spec uses no part of it", name=name)
        return importlib.machinery.ModuleSpec(name, self) if name == _PLOTS else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the making of the module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its only function."""

        def imshow_mot_errors(*args: Any, **kwargs: Any) -> Any:
            """Show the wrong tracks on the input image: mmdet's function, imported by the call."""
            import mmdet.utils

            spec = importlib.machinery.PathFinder.find_spec(_PLOTS, mmdet.utils.__path__)
            real = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(real)  # type: ignore[union-attr]
            return real.imshow_mot_errors(*args, **kwargs)

        vars(module)["imshow_mot_errors"] = imshow_mot_errors


def _importing_package() -> str:
    """The top package of the code whose import statement is being carried out."""
    frame = sys._getframe(2)  # past this function and the finder
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib."):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


@contextmanager
def without_unused_imports() -> Iterator[None]:
    """Import OpenMMLab's packages without what a spec never uses, within the block."""
    finder: Any = _UnusedImports()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


# --- patches ---

_SKIPPED = re.compile(r"^\.?(?P<parameter>\S+) is skipped since its requires_grad=False$")


def allow_mmengine_checkpoint_classes() -> None:
    """Let ``torch.load`` read mmengine's own classes in a checkpoint (:func:`safe_globals`), and no others.

    mmengine calls ``torch.load`` without arguments, and since torch 2.6 that refuses them. The fork
    onedl-mmengine loads a refused file again with ``weights_only=False``, which would run code from the file:
    its function is replaced.
    """
    import torch
    from mmengine.runner import checkpoint

    torch.serialization.add_safe_globals(safe_globals())  # a set: adding twice changes nothing
    if hasattr(checkpoint, "_safe_torch_load"):
        checkpoint._safe_torch_load = _protected_torch_load


def _protected_torch_load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """``torch.load`` with ``weights_only=True`` whatever is asked for; replaces onedl-mmengine's function.

    Raises:
        pickle.UnpicklingError: the file holds a class that is not allowed.
    """
    import torch

    return torch.load(file, map_location=map_location, weights_only=True)


def find_our_configs() -> None:
    """Let mmengine resolve ``ddetr_mm::deformable_detr/…`` as it resolves ``mmdet::…``.

    mmengine has a table of OpenMMLab's packages. Up to 0.10.7 it looks for a package beside its metadata,
    which fails for an editable install; where mmengine finds an existing folder, that one is used.
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
    """Make mmengine log the frozen parameters in one line instead of one WARNING each.

    Building an optimizer with ``paramwise_cfg``, it logs ``backbone.conv1.weight is skipped since its
    requires_grad=False`` for every one of them, hundreds of lines.
    """
    from mmengine.optim import DefaultOptimWrapperConstructor

    original = DefaultOptimWrapperConstructor.__call__
    if getattr(original, "logs_frozen_in_one_line", False):
        return

    @functools.wraps(original)
    def call(self: Any, model: Any) -> Any:
        with frozen_parameters_in_one_line():
            return original(self, model)

    call.logs_frozen_in_one_line = True  # type: ignore[attr-defined]
    DefaultOptimWrapperConstructor.__call__ = call


@contextmanager
def frozen_parameters_in_one_line() -> Iterator[None]:
    """Replace mmengine's lines on frozen parameters inside the block by one line at its end."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    frozen: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        match = _SKIPPED.match(record.getMessage())
        if match:
            frozen.append(match["parameter"])
        return match is None

    with _filtered(logger, keep):
        yield
    if frozen:
        logger.info(f"{len(frozen)} frozen parameters stay out of the optimizer: {summarise_names(frozen)}")


def summarise_names(parameters: Iterable[str], depth: int = 2, limit: int = 8) -> str:
    """Parameter names counted by their first parts: ``backbone.layer1 (30), …``.

    Args:
        parameters: dotted names.
        depth: parts of a name that form a group.
        limit: groups to name; the others are counted.
    """
    groups: dict[str, int] = {}
    for name in parameters:
        group = ".".join(name.split(".")[:depth])
        groups[group] = groups.get(group, 0) + 1
    names = [f"{group} ({count})" for group, count in groups.items()]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more groups" if rest > 0 else "")


@contextmanager
def _filtered(logger: logging.Logger, keep: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def find_our_image_loader() -> None:
    """Let mmdet's ``get_loading_pipeline`` find the loading step: it compares with mmcv's class.

    ``LoadImageFromFile`` in mmdet's registry is ``TAOLoadImageFromFile``.
    """
    from mmdet.datasets import utils
    from mmdet.registry import TRANSFORMS

    utils.LoadImageFromFile = TRANSFORMS.get("LoadImageFromFile")


def quiet_warnings_without_remedy() -> None:
    """Silence warnings about calls inside mmdet and mmengine that a user cannot change."""
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # No loss is changed in place here, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")


def let_interruptions_through() -> None:
    """Let Ctrl-C end ``Config.pretty_text``, whose bare ``except`` makes a SyntaxError of it."""
    from mmengine.config import Config

    original = Config.pretty_text.fget
    if getattr(original, "lets_interruptions_through", False):
        return

    @functools.wraps(original)
    def pretty_text(self: Any) -> str:
        try:
            text: str = original(self)
        except SyntaxError as error:
            interruption = error.__context__
            if interruption is None or isinstance(interruption, Exception):
                raise
            raise interruption from None
        return text

    pretty_text.lets_interruptions_through = True  # type: ignore[attr-defined]
    Config.pretty_text = property(pretty_text)


PATCHES: dict[str, Callable[[], None]] = {
    "decoded image limit": limit_decoded_images,
    "mmengine checkpoint classes": allow_mmengine_checkpoint_classes,
    "configs of this package": find_our_configs,
    "loading step of pipelines": find_our_image_loader,
    "interruptions while a config is written": let_interruptions_through,
    "frozen parameters in one line": quiet_frozen_parameter_warnings,
    "warnings without remedy": quiet_warnings_without_remedy,
}
"""Every patch by name; applying one again changes nothing."""

AT_IMPORT = ("decoded image limit",)
"""Applied by ``import ddetr_mm``; they import nothing heavy."""

AT_REGISTRATION = tuple(name for name in PATCHES if name not in AT_IMPORT)
"""Applied by ``import ddetr_mm.register``."""


def apply_patches(names: Iterable[str]) -> None:
    """Apply patches by name.

    Raises:
        KeyError: there is no patch of that name.
    """
    for name in names:
        PATCHES[name]()
