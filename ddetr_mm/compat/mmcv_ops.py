"""Provides the module ``mmcv._ext`` where mmcv has no compiled ops.

``mmcv-lite`` has all of mmcv's Python code, but ``mmcv.ops`` cannot be imported without the extension module
``mmcv._ext``. The last import hook provides one with the ops of :mod:`ddetr_mm.compat.torch_ops`. Where mmcv
has its compiled ops, those are found first.
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
    """Meta-path finder and loader of the replacement for ``mmcv._ext``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec for ``mmcv._ext``; None for every other module."""
        if fullname != EXTENSION:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin="ddetr_mm stand-in")  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """None: the import system makes the empty module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Add the ops; imports torch, which ``mmcv.ops`` has imported already."""
        from ddetr_mm.compat import torch_ops

        torch_ops.fill(module)


def install_stand_in() -> None:
    """Append the hook to ``sys.meta_path``, once.

    Raises:
        StackImportError: an import of mmcv's ops or mmdet has failed before.
    """
    if any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        return
    broken = _half_imported(sys.modules)
    if broken and not has_compiled_ops():
        raise StackImportError(
            f"{broken} was imported before ddetr_mm and failed because mmcv has no compiled ops; "
            f"restart Python and import ddetr_mm first, or run `{INSTALL_COMMAND}`"
        )
    sys.meta_path.append(StandInFinder())


def has_compiled_ops() -> bool:
    """Whether the installed mmcv has the file of its compiled ops; does not load it."""
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
    """The first mmcv or mmdet package that is not loaded while a module of it is: its import failed."""
    for name in sorted(modules):
        if name.startswith(("mmcv.", "mmdet.")):
            parent = name.rpartition(".")[0]
            if parent not in modules:
                return parent
    return None
