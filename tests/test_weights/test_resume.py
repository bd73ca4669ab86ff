"""Checkpoints that a training can go on from."""

from __future__ import annotations

import pytest
import torch

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights.resume import require_resumable

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
