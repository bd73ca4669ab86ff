"""The documentation as a site: it builds without a warning, and every link in it leads somewhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Page(HTMLParser):
    """The links, pictures and anchors of a page."""

    targets: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value}
        self.anchors |= {found["id"]} if "id" in found else set()
        self.targets += [found[name] for name in ("href", "src") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of the site as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-b", "html", "-q", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "trees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ".", str(folder / "html")],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {}
    for path in (folder / "html").rglob("*.html"):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def test_every_link_leads_to_a_file_and_an_anchor(site: dict[Path, Page]):
    followed = 0
    for path, page in site.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert file.is_file(), f"{path.name}: {target}"
            if parts.fragment and file in site:
                assert unquote(parts.fragment) in site[file].anchors, f"{path.name}: {target}"
            followed += 1
    assert followed > 1000


def test_pages_of_docs_projects_and_records_are_in_it(site: dict[Path, Page]):
    built = {path.as_posix().rpartition("/html/")[2] for path in site}
    for pattern in ("docs/*.md", "projects/*/README.md", "benchmarks/records/*.md"):
        for source in ROOT.glob(pattern):
            assert source.relative_to(ROOT).with_suffix(".html").as_posix() in built


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]):
    for path in site:
        text = path.read_text(encoding="utf-8")
        for marker in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http'):
            assert marker not in text, path.name


def test_the_fields_can_be_filtered(site: dict[Path, Page], browser):
    path = next(path for path in site if path.parts[-2:] == ("docs", "fields.html"))
    browser.open(path)
    page = browser.driver
    shown = "return [...document.querySelectorAll('article tbody tr')].filter(row => row.offsetParent).length"
    every = page.execute_script(shown)
    field = page.find_element("css selector", "input[aria-label='Filter rows']")
    field.send_keys("train.optim lr_steps")
    found = page.execute_script(shown)
    assert every > 250 and 0 < found < 10
    field.clear()
    field.send_keys("x")
    field.send_keys("\b")
    assert page.execute_script(shown) == every
