"""Names in data and specs neither lead out of the results folder nor become code or a shell's text."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import onnx
import pytest
from bad_input_project import ROOT, edit_json, run_here

from ddetr_mm.cli import safe_children
from ddetr_mm.deploy.onnx_file import META_KEY
from ddetr_mm.engine.distributed import rank_command
from ddetr_mm.files import python_module

VAL = "coco/val/val-shard-00000-of-00001.json"
SPEC = ("-e", "spec.yaml")
ODD_NAMES = ("../../../evil", "/tmp/evil", "<script>alert(1)</script>", "a b\tc")
SOURCES = sorted(
    path for folder in ("ddetr_mm", "tools", "projects") for path in (ROOT / folder).rglob("*.py")
)


def test_odd_class_names_stay_inside_the_results(own_project: Path):
    def rename(content: dict) -> None:
        for category, name in zip(content["categories"], ODD_NAMES, strict=True):
            category["name"] = name
        image = content["images"][0]
        odd = Path(image["file_name"]).with_name("<script>alert(1).png")
        (own_project / "data" / image["file_name"]).rename(own_project / "data" / odd)
        image["file_name"] = str(odd)

    edit_json(own_project / VAL, rename)
    graph = onnx.load(str(own_project / "random.onnx"))
    meta = next(entry for entry in graph.metadata_props if entry.key == META_KEY)
    meta.value = json.dumps(json.loads(meta.value) | {"class_names": ["background", *ODD_NAMES]})
    (own_project / "random.onnx").unlink()  # a link to a file of all tests
    onnx.save(graph, str(own_project / "random.onnx"))
    (own_project / "names.txt").write_text("\n".join(ODD_NAMES))
    evaluated = run_here(own_project, "evaluate", *SPEC, "evaluate.checkpoint=random.onnx")
    inferred = run_here(
        own_project,
        *("inference", *SPEC, "inference.checkpoint=random.onnx", "inference.conf_threshold=0.0"),
        "dataset.infer_data_sources.classmap=names.txt",
    )
    for ended in (evaluated, inferred):
        assert ended.status == 0, ended.message[-2000:]
        assert ended.new and all(name.startswith("results/") for name in ended.new)
        assert not ended.lost
    assert not list(own_project.parent.rglob("*evil*"))
    lines = [
        line
        for path in (own_project / "results/inference/labels").glob("*.txt")
        for line in path.read_text().splitlines()
    ]
    assert lines and {len(line.split(" ")) for line in lines} == {16}
    page = (own_project / "results/evaluate/report.html").read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


def test_an_image_behind_a_link_is_read_and_written_inside_the_results(own_project: Path):
    folder = own_project / "linked"
    folder.mkdir()
    (folder / "one.png").symlink_to(own_project / "data/val/images/00000.png")
    ended = run_here(
        own_project,
        *("inference", *SPEC, "inference.checkpoint=random.onnx"),
        "dataset.infer_data_sources.image_dir=linked",
    )
    assert ended.status == 0, ended.message[-2000:]
    assert {name for name in ended.new if name.endswith((".png", ".txt"))} == {
        "results/inference/images_annotated/one.png",
        "results/inference/labels/one.txt",
    }
    assert not ended.lost


def test_data_workers_leave_nothing_among_the_temporary_files(
    own_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    # A process of its own: workers and ONNX Runtime's threads do not survive a fork of this one.
    words = ["inference", *SPEC, "inference.checkpoint=random.onnx", "dataset.workers=2"]
    ended = subprocess.run(
        [sys.executable, "-m", "ddetr_mm", *words],
        cwd=own_project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert not [path.name for path in temporary.iterdir() if path.name.startswith("pymp-")]


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file with the dotted name of what is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput")
CODE = ("eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "yaml.load", "yaml.unsafe_load")


def test_the_scan_sees_the_sources():
    assert len(SOURCES) > 100
    assert any(name == "subprocess.run" for path in SOURCES for name, _ in calls(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_shell_and_no_code_from_input(path: Path):
    for name, call in calls(path):
        line = f"{path.relative_to(ROOT)}:{call.lineno}: {name}"
        assert name not in SHELLS, line
        values = {keyword.arg: keyword.value for keyword in call.keywords}
        shell = values.get("shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), line
        if name == "yaml.load":
            assert "Loader" in values and ast.unparse(values["Loader"]).startswith("_"), line
        else:
            assert name not in CODE, line
        weights_only = values.get("weights_only")
        assert weights_only is None or ast.unparse(weights_only) == "True", line


# --- The current folder ---

PLANTED = ("yaml", "torch", "numpy", "mmdet", "json", "signal", "pip")
"""Modules that a rank, a helper process or pip imports."""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder whose modules leave a trace when they are imported."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    return tmp_path


def test_ranks_import_nothing_from_the_current_folder(project: Path, planted: Path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    spec = project / "spec.yaml"
    arguments = Namespace(command="spec", experiment_spec=str(spec), overrides=[], debug=False, force=False)
    command = [sys.executable, *rank_command(arguments)]
    done = subprocess.run(command, cwd=planted, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "invalid choice" in done.stderr, done.stderr  # it has reached our parser
    command = [sys.executable, *rank_command(arguments)[:2], "check", "--quick", "-e", str(spec)]
    done = subprocess.run(command, cwd=planted, capture_output=True, text=True, timeout=120)
    assert "valid for train" in done.stdout, done.stderr
    assert not (planted / "ran").exists()


def test_pip_is_not_taken_from_the_current_folder(planted: Path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    subprocess.run(python_module("pip", "--version"), cwd=planted, capture_output=True, timeout=120)
    assert not (planted / "ran").exists()


def test_children_of_libraries_are_safe_too(planted: Path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with safe_children():
        code = "import yaml, signal"
        subprocess.run([sys.executable, "-c", code], cwd=planted, check=True, timeout=60)
    assert not (planted / "ran").exists() or sys.version_info < (3, 11)
    assert "PYTHONSAFEPATH" not in os.environ
