"""What pyproject.toml cannot say: the wheel carries configs and tools below ``ddetr_mm/.mim``, as mmdet's.

mmengine (``ddetr_mm::deformable_detr/…``) and mim look for them there. A wheel gets copies; an editable
install gets links beside the sources, so that an edited config counts at once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

PACKAGE_FOLDER = Path("ddetr_mm") / ".mim"
CARRIED = ("configs", "tools", "model-index.yml")
# Tools that need the repository around them.
LEFT_OUT = ("tools/env", "tools/audit.py", "tools/fields_table.py")


def carried_files() -> list[Path]:
    """Every file that goes below ``.mim``, relative to this folder, in a fixed order."""
    files: list[Path] = []
    for name in CARRIED:
        files += [Path(name)] if Path(name).is_file() else sorted(Path(name).rglob("*"))
    return [file for file in files if file.is_file() and not _left_out(file)]


def _left_out(file: Path) -> bool:
    below = any(file.is_relative_to(name) for name in LEFT_OUT)
    return below or file.suffix == ".pyc" or any(part.startswith(".") for part in file.parts)


class BuildMim(Command):
    """Put configs, tools and ``model-index.yml`` below the package (a setuptools ``SubCommand``)."""

    user_options: ClassVar[list] = []
    editable_mode = False

    def initialize_options(self) -> None:
        """Nothing is set by the user."""
        self.build_lib = None

    def finalize_options(self) -> None:
        """Build where the modules are built."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Copy into the build, or link beside the sources of an editable install."""
        if self.editable_mode:
            link_into_sources()
            return
        for target, source in self.get_output_mapping().items():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def get_source_files(self) -> list[str]:
        """What the sdist needs."""
        return [str(file) for file in carried_files()]

    def get_outputs(self) -> list[str]:
        """What the wheel holds."""
        return list(self.get_output_mapping())

    def get_output_mapping(self) -> dict[str, str]:
        """File in the build → file in the sources; empty where nothing is copied."""
        if self.editable_mode:
            return {}
        folder = Path(self.build_lib) / PACKAGE_FOLDER
        return {str(folder / file): str(file) for file in carried_files()}


def link_into_sources() -> None:
    """Make ``ddetr_mm/.mim/configs`` and its like relative links to what they stand for."""
    PACKAGE_FOLDER.mkdir(exist_ok=True)
    for name in CARRIED:
        link = PACKAGE_FOLDER / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(name, PACKAGE_FOLDER))


build.sub_commands.append(("build_mim", None))
setup(cmdclass={"build_mim": BuildMim})
