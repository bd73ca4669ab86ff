"""Pages of the documentation: links lead somewhere, commands and code are ones that exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from ddetr_mm.cli import build_parser
from ddetr_mm.spec import iter_fields

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "projects/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
names = [str(path.relative_to(ROOT)) for path in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=names)

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [text for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def headings(page):
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@every_page
def test_links_lead_to_files_and_headings(page):
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        if anchor:
            assert anchor in headings(path), link


@every_page
def test_commands_are_ones_the_parser_takes(page, capsys):
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        if not line.startswith(("ddetr-mm ", "python -m ddetr_mm ")):
            continue
        words = shlex.split(line, comments=True)
        words = words[1:] if words[0] == "ddetr-mm" else words[3:]
        for stop in (">", "|", "&&", "2>&1"):
            words = words[: words.index(stop)] if stop in words else words
        if "-h" in words or "--version" in words:
            continue
        try:
            arguments = build_parser().parse_args([word for word in words if "…" not in word])
        except SystemExit:
            pytest.fail(f"{line}: {capsys.readouterr().err}")
        kind = "convert" if arguments.command == "convert" else "train"
        fields = {field.path for field in iter_fields(kind)}
        for override in getattr(arguments, "overrides", []):
            key = re.sub(r"(\.\d+|\[\d+\])", "", override.partition("=")[0])
            assert any(
                path == key or path.startswith(key + ".") or key.startswith(path) for path in fields
            ), line


@every_page
def test_python_blocks_compile(page):
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")


@pytest.mark.parametrize("page", ["commands", "performance"])
def test_generated_pages_are_up_to_date(page):
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = {"commands": module.commands_page, "performance": module.performance_page}[page]()
    committed = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert committed == expected, "run: python docs/generate.py"


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {
        name for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for name in block.split()
    }
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= listed
