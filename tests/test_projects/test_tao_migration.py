"""projects/tao_migration: from TAO's spec and checkpoint to DeepStream's files, by the README's commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from readme_runs import ROOT, ddetr_mm, follow, prepared
from test_tasks.conftest import TINY, make_project

from ddetr_mm.spec import load_spec
from ddetr_mm.weights import formats
from ddetr_mm.weights.read import find_weights
from ddetr_mm.weights.safe_read import read_raw

SPEC = ROOT / "projects" / "tao_migration" / "spec.yaml"


def test_the_spec_has_one_section_that_tao_does_not_know():
    spec = yaml.safe_load(SPEC.read_text())
    assert set(spec) - {"ddetr_mm"} <= {"results_dir", "encryption_key", "dataset", "model", "train",
                                        "evaluate", "inference", "export"}  # fmt: skip
    load_spec(SPEC, [], "train")


@pytest.mark.slow
def test_the_readme_leads_to_deepstreams_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = prepared(make_project(tmp_path).folder)
    ddetr_mm(folder, "train", "-e", "configs/specs/shapes_resnet18.yaml", small=TINY)  # in place of make demo
    (folder / "results" / "tao_migration").mkdir()
    capsys.readouterr()
    assert follow("tao_migration", folder, TINY) == [
        "weights", "check", "evaluate", "train", "evaluate", "export", "ddetr_mm.deploy.deepstream",
    ]  # fmt: skip
    results = folder / "results" / "tao_migration"
    raw = read_raw(results / "tao_model.pth")
    assert find_weights(raw).table is formats.TAO
    assert "model.model.query_embed.weight" in raw.payload["state_dict"]
    log = next((results / "train").glob("*/*.log")).read_text()
    assert "tao_model.pth (tao)" in log
    assert (results / "export" / "labels.txt").read_text().split() == [
        "background", "triangle", "star", "rectangle", "circle",
    ]  # fmt: skip
    assert json.loads((results / "export" / "model.parity.json").read_text())["max_abs_diff_boxes"] < 1e-4
    config = yaml.safe_load((results / "export" / "nvdsinfer_config.yaml").read_text())
    assert config["property"]["onnx-file"] == "model.onnx"
