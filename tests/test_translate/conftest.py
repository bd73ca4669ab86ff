"""Translated configs of a tiny detector on a few drawn pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_scene import Scene, draw_scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The pictures; nobody may change them."""
    return draw_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def tiny_config(scene: Scene, tmp_path: Path) -> Callable[..., Any]:
    """Translate the scene's spec with overrides; returns an mmengine config."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    import ddetr_mm.register  # noqa: F401 - registers what the configs name
    from ddetr_mm.models.backbones import feature_channels
    from ddetr_mm.translate import to_config

    init_default_scope("mmdet")

    def run(*overrides: str, subtask: str = "train", **keywords: Any) -> Config:
        loaded = scene.load(tmp_path / "spec.yaml", *overrides, subtask=subtask)
        draft = to_config(loaded, subtask, look_up_channels=feature_channels, **keywords)
        return Config(draft.to_dict())

    return run


@pytest.fixture
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Build the network of the scene's spec with overrides, from the same random numbers each time."""
    import torch
    from mmdet.registry import MODELS

    def build(*overrides: str) -> torch.nn.Module:
        config = tiny_config(*overrides)
        torch.manual_seed(5)
        model = MODELS.build(config.model)
        model.init_weights()
        return model

    return build


@pytest.fixture
def training_batch() -> Callable[[], dict[str, Any]]:
    """Makes a batch as a training dataloader gives it: two images of 64 x 96 with one box each."""
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8) for _ in "ab"]
        samples = []
        for label in (1, 2):
            sample = DetDataSample(metainfo=dict(img_shape=(64, 96), scale_factor=(1.0, 1.0)))
            sample.gt_instances = InstanceData(
                labels=torch.tensor([label]), bboxes=torch.tensor([[16.0, 8.0, 48.0, 32.0]])
            )
            samples.append(sample)
        return dict(inputs=inputs, data_samples=samples)

    return make
