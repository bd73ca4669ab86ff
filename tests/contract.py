"""Compares text with the stored interface in ``golden/contract``, or writes it there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

import pytest
from golden_files import GOLDEN

CONTRACT = GOLDEN / "contract"
WRITE_VARIABLE = "DDETR_MM_WRITE_CONTRACT"


def check_contract(name: str, text: str) -> None:
    """Compare ``text`` with the stored file ``name``; fail with a diff where they differ.

    With ``DDETR_MM_WRITE_CONTRACT=1`` the file is written instead, and the test fails to say so.
    """
    path = CONTRACT / name
    if os.environ.get(WRITE_VARIABLE) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"written: {name}; unset {WRITE_VARIABLE} and run again")
    stored = path.read_text(encoding="utf-8") if path.is_file() else ""
    difference = "\n".join(
        difflib.unified_diff(stored.splitlines(), text.splitlines(), "stored", "now", lineterm="")
    )
    assert stored == text, (
        f"the interface changed ({name}; see tests/golden/contract/README.md):\n{difference}"
    )


def lines(values: Iterable[str]) -> str:
    """One value per line."""
    return "".join(f"{value}\n" for value in values)
