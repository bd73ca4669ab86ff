"""docs/tour.ipynb: its stored outputs, and executed as Jupyter executes it."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
PICTURES = {"train": 12, "val": 4, "test": 4}
SCHEDULE = QUICK
"""


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    """The notebook as it is kept."""
    return nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# The site shows the notebook with its outputs, so that they are stored; before, they were not.
def test_ten_cells_of_code_are_kept_with_small_outputs(notebook: nbformat.NotebookNode):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert len(cells) == 10
    pictures, texts = [], []
    for number, cell in enumerate(cells, start=1):
        assert cell.source.startswith(f"# {number}. ") and cell.execution_count == number
        compile(cell.source, f"cell {number}", "exec")
        assert not [output for output in cell.outputs if output.output_type == "error"]
        pictures.append(sum("image/png" in output.get("data", {}) for output in cell.outputs))
        texts.append("".join(output.text for output in cell.outputs if output.output_type == "stream"))
    assert pictures == [0, 1, 0, 0, 1, 2, 0, 4, 0, 0]
    assert (ROOT / "docs" / "tour.ipynb").stat().st_size < 600_000
    scores = ast.literal_eval(texts[6].splitlines()[-1])
    assert scores["AP50"] > 0.5, "run with the spec's own schedule: python docs/generate.py --tour"
    for text in texts:
        assert "/tmp/" not in text and "/home/" not in text and "Warning" not in text


@pytest.mark.slow
def test_from_images_to_detections(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "docs").mkdir()
    for name in ("configs", "projects"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    [amount] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    amount.source += SMALL
    NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "docs")}}
    ).execute()
    pictures = [
        sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code_cells(notebook)
    ]
    assert pictures.pop(5) >= 1, "curves: how many depends on the number of steps"
    assert pictures == [0, 1, 0, 0, 1, 0, 4, 0, 0]
    results = tmp_path / "results" / "tour"
    assert set(json.loads((results / "evaluate" / "results.json").read_text())) >= {"AP", "AP50", "AP75"}
    assert len(list((results / "inference" / "labels").glob("*.txt"))) == 4
    parity = json.loads((results / "export" / "shapes.parity.json").read_text())
    assert parity["max_abs_diff_boxes"] < 1e-4
    # Which of the two streams comes last is not determined.
    printed = [output.text for output in code_cells(notebook)[-1].outputs if output.name == "stdout"]
    assert "pred_boxes" in "".join(printed)
