"""NVIDIA TAO's ``deformable_detr`` on MMDetection 3.x: the same specs, subtasks and artifacts.

Importing the package is light: it checks by their metadata that the installed versions fit, and puts
an import hook in place that answers for mmcv's compiled ops where mmcv has none (so import it before
mmdet there). Torch and mmdet are imported only by the parts that use them.

To register every class with mmdet, import :mod:`ddetr_mm.register`.

Raises:
    ddetr_mm.compat.versions.StackImportError: a required package is missing or does not fit.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ddetr_mm.compat.mmcv_ops import install_stand_in
from ddetr_mm.compat.patches import AT_IMPORT, apply_patches, without_unused_imports
from ddetr_mm.compat.versions import check_on_import

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddetr_mm.tasks.detector import Detector as Detector
    from ddetr_mm.tasks.detector import Result as Result

check_on_import()
apply_patches(AT_IMPORT)
install_stand_in()


def __getattr__(name: str) -> Any:
    """``Detector`` and ``Result``, imported when they are first used."""
    if name in ("Detector", "Result"):
        with without_unused_imports():
            return getattr(importlib.import_module("ddetr_mm.tasks.detector"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
