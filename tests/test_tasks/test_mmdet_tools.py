"""What our tools hand to mmdet's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddetr_mm.errors import WeightsError
from ddetr_mm.tasks.mmdet_tools import mmdet_checkpoint


def test_mmengines_own_checkpoint_of_any_detector_is_handed_on(tmp_path: Path):
    path = tmp_path / "faster_rcnn.pth"
    weights = {"roi_head.bbox_head.fc_cls.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": weights, "meta": {"mmengine_version": "0.10.7"}}, path)
    assert mmdet_checkpoint(str(path), tmp_path) == path


def test_foreign_weights_of_no_known_detector_are_refused(tmp_path: Path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(WeightsError, match="other.pth"):
        mmdet_checkpoint(str(path), tmp_path)
