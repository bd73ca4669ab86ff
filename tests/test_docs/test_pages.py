"""Pages of the documentation: links lead somewhere, commands and code are ones that exist."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ddetr_mm.cli import build_parser
from ddetr_mm.spec import iter_fields, load_spec
from ddetr_mm.spec.describe import aliases

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "projects/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
names = [str(path.relative_to(ROOT)) for path in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=names)

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_ANY_BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FILE_ENDINGS = ("py", "onnx", "pth", "engine", "json", "yaml", "cu", "svg", "md")
_OPEN_FIELDS = ("ddetr_mm.backbone",)  # any mmdet config
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
        if Path(ROOT, getattr(arguments, "experiment_spec", None) or "spec.yaml").is_file():
            # A spec of this repository: every value must be one that the command takes.
            subtask = getattr(arguments, "subtask", arguments.command)
            load_spec(ROOT / arguments.experiment_spec, arguments.overrides, subtask)
        kind = "convert" if arguments.command == "convert" else "train"
        fields = {field.path for field in iter_fields(kind)}
        for override in getattr(arguments, "overrides", []):
            key = re.sub(r"(\.\d+|\[\d+\])", "", override.partition("=")[0])
            assert any(
                path == key or path.startswith(key + ".") or key.startswith(path) for path in fields
            ), line


@every_page
def test_commands_are_in_blocks_of_bash(page):
    """So that the test above sees them."""
    for language, text in _ANY_BLOCK.findall(page.read_text(encoding="utf-8")):
        if language != "bash":
            assert not re.search(r"^(ddetr-mm|make|python|pip) ", text, re.MULTILINE), text


@every_page
def test_other_commands_name_targets_and_files_of_the_repository(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line
        if words[:2] == ["python", "-m"] and words[2].startswith("ddetr_mm"):
            assert importlib.util.find_spec(words[2]), line


@every_page
def test_python_and_yaml_blocks_can_be_read(page):
    for text in blocks(page, "python"):
        assert ast.parse(text, str(page)).body, text
    for text in blocks(page, "yaml"):
        documents = list(yaml.safe_load_all(text))
        assert documents and all(isinstance(document, (dict, list)) for document in documents), text


@every_page
def test_fields_in_the_text_are_fields(page):
    """`train.optim.lr` and the like; `ddetr_mm.datasets` may also be a module, `model.onnx` a file."""
    if page.name == "fields.md":
        pytest.skip(
            "has names of the mmengine config too; tests/test_fields_table.py compares it with the schema"
        )
    fields = {re.sub(r"\[.*?\]", "", field.path).removeprefix("convert:") for field in iter_fields()}
    fields |= set(aliases())
    sections = {path.partition(".")[0] for path in fields if "." in path}
    text = _ANY_BLOCK.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`(\w+\.[a-z0-9_.]+)", text):
        section, _, rest = name.partition(".")
        if section not in sections or rest.rpartition(".")[2] in _FILE_ENDINGS or name.endswith("."):
            continue
        bare = re.sub(r"\.\d+", "", name)
        known = any(path == bare or path.startswith(bare + ".") for path in fields)
        open_ended = any(bare.startswith(path + ".") for path in _OPEN_FIELDS)
        assert known or open_ended or (section == "ddetr_mm" and is_module(name)), name


def is_module(name):
    """Whether a dotted name is a module of the package, or something in one."""
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file() or path.parent.with_suffix(".py").is_file()


@pytest.mark.parametrize("page", ["commands", "field-differences", "performance"])
def test_generated_pages_are_up_to_date(page):
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = getattr(module, f"{page.replace('-', '_')}_page")()
    committed = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert committed == expected, "run: python docs/generate.py"


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {
        name for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for name in block.split()
    }
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= listed
