"""What a training can go on from, and what is told where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from weights_builders import detector, write_golden

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights.resume import require_resumable, require_same_network

WHERE = "train.resume_training_checkpoint_path"
WHOLE = dict(state_dict={"a": torch.zeros(1)}, optimizer={"state": {}}, meta={"epoch": 1, "iter": 5})


def test_a_whole_checkpoint_passes(tmp_path):
    torch.save(WHOLE, tmp_path / "whole.pth")
    require_resumable(tmp_path / "whole.pth", where="here")


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ({key: value for key, value in WHOLE.items() if key != "optimizer"}, "optimizer is missing"),
        ({**WHOLE, "meta": {"epoch": 1}}, "meta.iter is missing"),
        ({"a": torch.zeros(1)}, "state_dict, optimizer, meta is missing"),
        ([1], "state_dict"),
    ],
)
def test_weights_alone_are_refused(tmp_path, content, missing):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=missing) as caught:
        require_resumable(tmp_path / "weights.pth", where="here")
    assert "train.pretrained_model_path" in str(caught.value)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The network of the run that is resumed."""
    return detector(kind="TAODeformableDETR", seed=None)


def training_file(path: Path, network: nn.Module) -> Path:
    """A checkpoint of a training, as far as resuming looks at it."""
    torch.save({**WHOLE, "state_dict": network.state_dict()}, path)
    return path


def refusal(path: Path, model: nn.Module) -> str:
    with pytest.raises(WeightsError) as caught:
        require_same_network(path, model, where=WHERE)
    text = str(caught.value)
    assert path.name in text and WHERE in text
    return text


def test_a_checkpoint_of_the_same_network_passes(model: nn.Module, tmp_path: Path):
    path = training_file(tmp_path / "a.pth", model)
    require_same_network(path, model, where=WHERE)
    wrapped = nn.Module()
    wrapped.module = model
    require_same_network(path, wrapped, where=WHERE)


def test_another_number_of_classes(model: nn.Module, tmp_path: Path):
    other = detector(kind="TAODeformableDETR", seed=None, num_classes=7)
    text = refusal(training_file(tmp_path / "a.pth", other), model)
    assert "7 columns" in text and "5" in text and "dataset.num_classes" in text
    assert "train.pretrained_model_path" in text


def test_another_backbone(model: nn.Module, tmp_path: Path):
    other = detector(kind="TAODeformableDETR", seed=None, backbone="resnet_18")
    text = refusal(training_file(tmp_path / "a.pth", other), model)
    assert "another backbone" in text and "resnet_18" in text and "model.backbone" in text


def test_another_structure(model: nn.Module, tmp_path: Path):
    other = detector(kind="TAODeformableDETR", seed=None, layers=3, num_queries=9)
    text = refusal(training_file(tmp_path / "a.pth", other), model)
    assert "keys not in the model" in text and "the section model" in text
    assert "query_embedding.weight [9, 128] in the file, [12, 128] in the model" in text


def test_a_checkpoint_of_the_reference(tmp_path: Path):
    with pytest.raises(WeightsError, match="PyTorch Lightning") as caught:
        require_resumable(write_golden("resnet50_4lvl", tmp_path), where=WHERE)
    assert "train.pretrained_model_path" in str(caught.value) and WHERE in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"a text file", b"\x89PNG\r\n\x1a\n" + 100 * b"x"])
def test_files_of_other_kinds(tmp_path: Path, content: bytes):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pth"):
        require_resumable(path, where=WHERE)
