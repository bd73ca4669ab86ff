"""Starting weights: loaded by name before the first step, left alone when a run goes on."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.errors import WeightsError
from ddetr_mm.runtime.pretrained_hook import PretrainedWeightsHook


class Messages(list):
    """Stands for a logger: keeps what it is told."""

    def info(self, text: str) -> None:
        self.append(text)


def detector(num_classes: int = 4) -> torch.nn.Module:
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    from ddetr_mm.spec import ExperimentSpec
    from ddetr_mm.translate.model_section import detector as detector_config

    spec = ExperimentSpec()
    spec.model.enc_layers = spec.model.dec_layers = 1
    spec.model.hidden_dim = spec.model.dim_feedforward = 32
    spec.model.num_queries = spec.model.num_select = 6
    spec.dataset.num_classes = num_classes
    spec.ddetr_mm.backbone = dict(type="ResNet", depth=18, base_channels=8, out_indices=(1, 2, 3))
    init_default_scope("mmdet")
    return MODELS.build(detector_config(spec, zero_padded_values=False, channels=[16, 32, 64]))


def runner_for(model: torch.nn.Module, iteration: int = 0) -> types.SimpleNamespace:
    dataset = types.SimpleNamespace(metainfo=dict(classes=("background", "a", "b", "c")))
    loader = types.SimpleNamespace(dataset=dataset)
    return types.SimpleNamespace(model=model, iter=iteration, logger=Messages(), train_dataloader=loader)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = detector()
    path = tmp_path / "model.pth"
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


def test_the_whole_model_is_loaded(checkpoint: Path):
    torch.manual_seed(4)
    model = detector()
    runner = runner_for(model)
    PretrainedWeightsHook(model_path=str(checkpoint)).before_train(runner)
    saved = torch.load(checkpoint)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert any("keys taken over" in line for line in runner.logger)


def test_only_the_backbone_is_loaded(checkpoint: Path):
    torch.manual_seed(4)
    model = detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PretrainedWeightsHook(backbone_path=str(checkpoint)).before_train(runner_for(model))
    saved = torch.load(checkpoint)["state_dict"]
    weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert all(torch.equal(weights[name], saved[name]) for name in weights if name.startswith("backbone."))
    assert all(torch.equal(weights[name], before[name]) for name in weights if name.startswith("encoder."))


def test_a_resumed_run_keeps_its_weights(checkpoint: Path):
    torch.manual_seed(4)
    model = detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = runner_for(model, iteration=10)
    PretrainedWeightsHook(model_path=str(checkpoint)).before_train(runner)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "not loaded" in runner.logger[0]


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(WeightsError, match="nowhere.pth"):
        PretrainedWeightsHook(model_path=str(tmp_path / "nowhere.pth")).before_train(runner_for(detector()))
