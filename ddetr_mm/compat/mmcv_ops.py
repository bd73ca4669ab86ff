"""An answer for ``mmcv._ext`` where mmcv has no compiled ops.

``mmcv-lite`` has all of mmcv's Python, ``mmcv.ops`` included, which fails on import for want of the
extension module ``mmcv._ext``. The hook here, last in line, supplies that module only when no real
one is found: compiled ops, where they are, are used and nothing is touched. What the module answers
with is in :mod:`ddetr_mm.compat.torch_ops`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ddetr_mm.compat.versions import StackImportError

EXTENSION = "mmcv._ext"
INSTALL_COMMAND = "ddetr-mm install-ops"


class StandInFinder:
    """Meta-path finder and loader of the stand-in for ``mmcv._ext``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The stand-in's spec for ``mmcv._ext``; None for every other module."""
        if fullname != EXTENSION:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin="ddetr_mm stand-in")  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """None: the import system makes the empty module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module; torch is imported here, not before (``mmcv.ops`` has imported it already)."""
        from ddetr_mm.compat import torch_ops

        torch_ops.fill(module)


def install_stand_in() -> None:
    """Put the hook last in the import system's line; a second call does nothing.

    Raises:
        StackImportError: mmcv's ops or mmdet were imported before, and broke off half-way.
    """
    if any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        return
    broken = _half_imported(sys.modules)
    if broken and not has_compiled_ops():
        raise StackImportError(
            f"{broken} was imported before ddetr_mm, and broke off because mmcv has no compiled ops; "
            f"start Python anew and import ddetr_mm first, or run `{INSTALL_COMMAND}`"
        )
    sys.meta_path.append(StandInFinder())


def has_compiled_ops() -> bool:
    """Whether the installed mmcv has its compiled ops (the file is there; it is not loaded)."""
    try:
        mmcv = importlib.util.find_spec("mmcv")
    except (ImportError, ValueError):
        return False
    folders = (mmcv.submodule_search_locations if mmcv else None) or ()
    return any(
        Path(folder, f"_ext{suffix}").is_file()
        for folder in folders
        for suffix in importlib.machinery.EXTENSION_SUFFIXES
    )


def _half_imported(modules: dict[str, ModuleType]) -> str | None:
    """The first mmcv or mmdet package whose parts are loaded while it is not: its import failed."""
    for name in sorted(modules):
        if name.startswith(("mmcv.", "mmdet.")):
            parent = name.rpartition(".")[0]
            if parent not in modules:
                return parent
    return None
