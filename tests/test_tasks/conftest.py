"""A tiny project on disk that the command-line tests share: pictures, labels, a spec and short cuts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY_DETECTOR = ROOT / "projects" / "shapes" / "tiny.txt"

TINY = (
    *TINY_DETECTOR.read_text(encoding="utf-8").split(),
    "dataset.batch_size=4",
    "dataset.workers=0",
    "train.num_epochs=2",
    "train.checkpoint_interval=1",
    "train.validation_interval=2",
    "export.input_width=96",
    "export.input_height=64",
    "ddetr_mm.log_interval=1",
    "ddetr_mm.backbone.base_channels=16",
)


@dataclass(frozen=True)
class Project:
    """A folder with data and a spec, and a way to run commands in it."""

    folder: Path

    @property
    def spec(self) -> str:
        """Path of the experiment spec."""
        return str(ROOT / "configs" / "specs" / "shapes_resnet18.yaml")

    @property
    def results(self) -> Path:
        """Where the spec's results go."""
        return self.folder / "results" / "shapes"

    def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run ``ddetr-mm`` with the project's folder as current folder and expect an exit status."""
        return self.python("-m", "ddetr_mm", *arguments, status=status)

    def python(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run Python in the project's folder and expect an exit status."""
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return done

    def tiny(self, command: str, *overrides: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a subtask of the tiny model."""
        return self.run(command, "-e", self.spec, *TINY, *overrides, status=status)


def make_project(folder: Path) -> Project:
    """Draw the pictures and convert their labels."""
    project = Project(folder)
    generate = str(ROOT / "projects" / "shapes" / "generate.py")
    project.python(generate, "results/shapes/data", "--train", "12", "--val", "5", "--test", "6")
    project.run("convert", "-e", str(ROOT / "configs" / "specs" / "shapes_convert.yaml"))
    return project


@pytest.fixture(scope="session")
def data_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with converted data and nothing trained."""
    return make_project(tmp_path_factory.mktemp("data_project"))


@pytest.fixture(scope="session")
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose tiny model was trained for two epochs."""
    project = make_project(tmp_path_factory.mktemp("trained_project"))
    project.tiny("train")
    return project
