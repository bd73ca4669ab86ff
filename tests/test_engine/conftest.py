"""Fixtures over :mod:`tiny_runs`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_runner(tmp_path: Path) -> Callable[..., Any]:
    """``make_runner(hooks, work_dir=…, …)``: see :func:`tiny_runs.build_runner`."""
    from tiny_runs import build_runner

    def make(hooks: list[Any], work_dir: Path | None = None, **options: Any) -> Any:
        return build_runner(work_dir or tmp_path / "train", hooks, **options)

    return make
