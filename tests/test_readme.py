"""README.md is followed literally: its commands run in order, its config loads, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_tasks.conftest import ROOT, TINY, make_project

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(heading: str, language: str) -> list[str]:
    """Code blocks of one language under a second-level heading."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README, re.S | re.M)
    assert section, f"README.md has no section {heading!r}"
    return re.findall(rf"```{language}\n(.*?)```", section[1], re.S)


def ddetr_mm_commands(heading: str) -> list[str]:
    """The ``ddetr-mm`` lines of a section's shell blocks, in order."""
    lines = "\n".join(code_blocks(heading, "bash")).splitlines()
    commands = [line for line in lines if line.startswith("ddetr-mm ")]
    assert commands
    return commands


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's commands name: specs of a tiny project and its pictures."""
    project = make_project(tmp_path_factory.mktemp("readme"))
    from ddetr_mm.spec import load_spec, spec_to_yaml

    overrides = [*TINY, "train.num_epochs=1", "train.validation_interval=1", "results_dir=results"]
    spec = spec_to_yaml(load_spec(project.spec, overrides).spec)
    (project.folder / "spec.yaml").write_text(spec)
    (project.folder / "my_tao_spec.yaml").write_text(spec)
    shutil.copy(ROOT / "configs" / "specs" / "shapes_convert.yaml", project.folder / "convert.yaml")
    return project.folder


def follow(command: str, folder: Path) -> None:
    """Run one README line in a folder, with the console script replaced by ``python -m ddetr_mm``."""
    target = None
    words = shlex.split(command, comments=True)[1:]
    if ">" in words:
        target = words[words.index(">") + 1]
        words = words[: words.index(">")]
    done = subprocess.run(
        [sys.executable, "-m", "ddetr_mm", *words], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    if target:
        (folder / target).write_text(done.stdout)


def test_from_a_spec_to_a_trained_detector(workspace: Path):
    for command in ddetr_mm_commands("From a spec to a trained detector"):
        follow(command, workspace)
    assert yaml.safe_load((workspace / "all_fields.yaml").read_text())["model"]["num_queries"] == 300
    assert (workspace / "results" / "evaluate" / "results.json").is_file()
    assert any((workspace / "results" / "inference" / "images_annotated").iterdir())
    assert (workspace / "model.onnx").is_file()


def test_migrating_from_tao_in_five_lines(workspace: Path):
    if not (workspace / "results" / "train" / "dd_model_latest.pth").exists():
        follow("ddetr-mm train -e spec.yaml", workspace)
    follow("ddetr-mm weights results/train/dd_model_latest.pth tao_model.pth --to tao", workspace)
    shutil.rmtree(workspace / "results" / "train")
    (workspace / "model.onnx").unlink(missing_ok=True)
    for command in ddetr_mm_commands("Migrating from TAO in five lines"):
        follow(command, workspace)
    log = next((workspace / "results" / "train").glob("*/*.log")).read_text()
    assert "Model from tao_model.pth" in log
    assert (workspace / "model.onnx").is_file()


def test_the_mmdet_config_loads(tmp_path: Path):
    from mmengine.config import Config

    import ddetr_mm  # noqa: F401 - before mmdet, for environments without compiled ops

    path = tmp_path / "config.py"
    path.write_text(code_blocks("One component in an mmdet config", "python")[0])
    config = Config.fromfile(str(path))
    assert config.train_dataloader.dataset.type == "SerializedCocoDataset"
    assert config.val_evaluator.type == "FastCocoMetric"


def test_registered_names_are_registered():
    from mmdet.registry import DATASETS, METRICS, MODELS, TRANSFORMS

    import ddetr_mm.register  # noqa: F401

    sentence = re.search(r"^Registered: (.*?)\n\n", README, re.S | re.M)[1]
    names = re.findall(r"`(\w+)`", sentence)
    assert len(names) == 10
    known = [
        name for registry in (MODELS, DATASETS, TRANSFORMS, METRICS) for name in names if registry.get(name)
    ]
    assert sorted(set(known)) == sorted(names)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
