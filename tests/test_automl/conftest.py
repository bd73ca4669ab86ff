"""A project for searches, and searches in this process whose trials are quick stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from automl_project import make_project, with_stand_in

from ddetr_mm.automl import study, trials
from ddetr_mm.cli import main
from ddetr_mm.tasks import automl


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data and ``spec.yaml``."""
    make_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def search(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs ``ddetr-mm automl`` with stand-ins, without a check of data; returns ``results/automl``."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(trials, "python_module", trials.python_module)
    monkeypatch.setattr(automl, "check_data", lambda loaded: None)
    monkeypatch.setattr(study, "POLL_S", 0.03)
    with_stand_in()

    def run(*overrides: str, status: int = 0) -> Path:
        own = [
            one if one.startswith(("train.", "dataset.", "results")) else f"ddetr_mm.automl.{one}"
            for one in overrides
        ]
        assert main(["automl", "-e", "spec.yaml", *own]) == status
        return project / "results" / "automl"

    return run
