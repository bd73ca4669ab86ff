"""``automl.html`` in headless Chromium: what it shows, at two widths, and its sortable table."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import WIDTHS, open_browser


@pytest.fixture
def page(search, monkeypatch) -> Path:
    """The page of eight trials, one of which failed."""
    monkeypatch.setenv("STAND_IN_FAILS", "s['results_dir'].endswith('003')")
    return search("algorithm=asha", "reduction_factor=2", "max_trials=8") / "automl.html"


def test_the_page_shows_the_study(page, tmp_path: Path):
    text = page.read_text(encoding="utf-8")
    for heading in (
        "History",
        "Curves",
        "Importance of each field",
        "Parallel coordinates",
        "Slices",
        "Trials",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert "CUDA out of memory" in text and "Too few" not in text and "src=" not in text
    with open_browser(tmp_path / "profile") as browser:
        for width in WIDTHS:
            browser.open(page, width=width, dark=width < 500)
            browser.assert_readable()
        table = "document.querySelectorAll('table.sortable tbody tr')"
        rows = f"return [...{table}].map(r => r.cells[%d].textContent)"
        assert browser.run(rows % 0) == [f"{number:03d}" for number in range(8)]
        button = "document.querySelectorAll('table.sortable th button')[1].click()"
        browser.run(button)
        first = [float(one) for one in browser.run(rows % 1) if one != "–"]
        browser.run(button)
        second = [float(one) for one in browser.run(rows % 1) if one != "–"]
        assert first == second[::-1] and first in (sorted(first), sorted(first)[::-1])
        assert browser.run("return document.querySelectorAll('.slices circle').length") == 2 * 7
        assert browser.run("return document.querySelectorAll('polyline').length") == 7
