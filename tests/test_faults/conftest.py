"""One small project for all kinds of bad input; nobody writes into it but below a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input_project import copy_project, make_project, run_here


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, annotations, specs, a checkpoint and its ONNX file."""
    folder = make_project(tmp_path_factory.mktemp("bad_input"))
    ended = run_here(
        folder,
        *("export", "-e", "spec.yaml", "export.checkpoint=random.pth", "export.onnx_file=random.onnx"),
        f"results_dir={folder.parent / 'first_results'}",
    )
    assert ended.status == 0, ended.message
    return folder


@pytest.fixture
def own_project(project: Path, tmp_path: Path) -> Path:
    """A copy of the project to spoil."""
    return copy_project(project, tmp_path / "project")
