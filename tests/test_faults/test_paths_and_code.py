"""Names in data and specs neither lead out of the results folder nor become code or a shell's text."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from bad_input_project import ROOT, edit_json, run_here

from ddetr_mm.deploy.onnx_file import META_KEY

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
