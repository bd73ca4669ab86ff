"""The pictures that the configs under projects/ name, drawn and converted once."""

from __future__ import annotations

from pathlib import Path

import pytest
from project_runs import draw_shapes

import ddetr_mm  # noqa: F401 - before mmdet, for environments without compiled ops


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the configs' relative paths lead to a few pictures."""
    return draw_shapes(tmp_path_factory.mktemp("few_shapes"), {"train": 8, "val": 4, "test": 4})


@pytest.fixture(scope="session")
def all_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which they lead to the pictures that projects/shapes/generate.py draws by default."""
    return draw_shapes(tmp_path_factory.mktemp("all_shapes"), {"train": 400, "val": 60, "test": 100})
