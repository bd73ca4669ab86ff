"""Headless Chromium for tests of our HTML pages: opens a file at a width, and looks at what is laid out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)
WIDTHS = (1280, 390)

# What a reader cannot see: text that its own box cuts off, or that lies outside the window. Frames that
# scroll show all of theirs.
_LAYOUT = """
const problems = [], small = [];
const scrolls = e => e &&
  (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
for (const e of document.body.querySelectorAll("*")) {
  const style = getComputedStyle(e);
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(e.tagName) || !e.checkVisibility()) continue;
  if (parseFloat(style.fontSize) < 12) small.push(e.textContent.slice(0, 40));
  for (let box = e; box && box !== document.body; box = box.parentElement) {
    const s = getComputedStyle(box), clips = v => v === "hidden" || v === "clip";
    if ((clips(s.overflowX) && box.scrollWidth > box.clientWidth + 1) ||
        (clips(s.overflowY) && box.scrollHeight > box.clientHeight + 1)) {
      problems.push("cut off: " + e.textContent.slice(0, 40)); break;
    }
    if (s.overflowX === "auto" || s.overflowX === "scroll") break;
  }
  const range = document.createRange();
  range.selectNodeContents(e);
  const r = range.getBoundingClientRect();
  if (!scrolls(e) && (r.left < -1 || r.right > innerWidth + 1))
    problems.push(`outside: ${e.textContent.slice(0, 40)} ${r.left}..${r.right}`);
}
const overlaps = [];
for (const group of document.querySelectorAll(".x-ticks, .y-ticks, .legend, dialog[open] .frame")) {
  const boxes = [...group.querySelectorAll("span:not(.key):not(:empty), li, .tag")]
    .filter(e => !e.classList.contains("frame")).map(e => [e.textContent, e.getBoundingClientRect()]);
  for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(0, i))
    if (p.left < q.right - .5 && q.left < p.right - .5 && p.top < q.bottom - .5 && q.top < p.bottom - .5)
      overlaps.push(`${a} / ${b}`);
}
return {problems, small, overlaps, width: document.scrollingElement.scrollWidth, window: innerWidth,
  back: getComputedStyle(document.body).backgroundColor, front: getComputedStyle(document.body).color,
  requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))};
"""


class Browser:
    """A page in Chromium.

    Attributes:
        driver: selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of a size, in light or dark mode."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get_log("browser")
        self.driver.get(page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def layout(self) -> dict[str, Any]:
        """What is cut off, too small or covered, the widths, colours, and requests that were made."""
        return self.run(_LAYOUT)

    def assert_readable(self) -> dict[str, Any]:
        """Assert that nothing is cut off, small, covered, wider than the window, loaded, or reported."""
        found = self.layout()
        assert found["problems"] == [] and found["small"] == [] and found["overlaps"] == []
        assert found["width"] <= found["window"]
        assert found["requests"] == []
        assert self.driver.get_log("browser") == []
        return found


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Chromium with an empty profile; skips the test where it or its driver is missing."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
