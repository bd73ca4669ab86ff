"""The heads of records."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from environment import MOST_LOAD, heading


@pytest.mark.parametrize(("load", "marked"), [(0.4, False), (MOST_LOAD, False), (6.2, True)])
def test_a_record_of_a_busy_machine_is_marked(load: float, marked: bool) -> None:
    lines = heading("Title", {"date": "2026-11-29", "load_before": load})
    assert lines[:4] == ["# Title", "", "- date: 2026-11-29", f"- load_before: {load}"]
    assert any("not idle" in line for line in lines[4:]) is marked
