"""What a folder holds, without the two files by which runs know their own results."""

from __future__ import annotations

from pathlib import Path

from ddetr_mm.outputs import LOCK_NAME, OWNED_NAME


def visible(folder: Path) -> list[str]:
    """The names in a folder, sorted, without our list of written files and our lock."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (OWNED_NAME, LOCK_NAME))
