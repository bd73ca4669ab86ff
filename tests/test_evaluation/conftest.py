"""Fixtures over :mod:`evaluation_scenes`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_scenes import Scene, random_scene, write_coco


@pytest.fixture
def make_scene() -> Callable[..., Scene]:
    """``make_scene(seed, …)``: see :func:`evaluation_scenes.random_scene`."""
    return random_scene


@pytest.fixture
def scene_file(tmp_path: Path) -> Callable[..., tuple[Scene, Path]]:
    """``scene_file(seed, …)``: a scene and its COCO file."""

    def make(seed: int, **options: Any) -> tuple[Scene, Path]:
        scene = random_scene(seed, **options)
        return scene, write_coco(tmp_path / f"scene-{seed}.json", scene[0])

    return make
