"""The reference's numbers through the public path: file → weights → translate → build → forward."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, golden_state_dict

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.cli import main

SPEC = """
results_dir: {folder}
dataset: {{num_classes: 8}}
model:
  {{backbone: {backbone}, enc_layers: 2, dec_layers: 2, dim_feedforward: 128, num_queries: 20}}
train: {{activation_checkpoint: False}}
"""


def reference_checkpoint(name: str, path: Path) -> dict:
    """Write the reference's checkpoint with its seeded weights; returns its description."""
    description = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    weights = golden_state_dict(name)
    bookkeeping = {
        "epoch": 9,
        "global_step": 100,
        "pytorch-lightning_version": "2.3.0",
        "loops": {},
        "callbacks": {},
    }
    torch.save({"state_dict": weights, **bookkeeping}, path)
    return description


@pytest.mark.parametrize(
    "name, backbone", [("resnet50_4lvl", "resnet_50"), ("gc_vit_xxtiny_4lvl", "gc_vit_xxtiny")]
)
def test_reference_outputs_are_met(name: str, backbone: str, tmp_path: Path):
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.runner import load_checkpoint

    description = reference_checkpoint(name, tmp_path / "tao.pth")
    assert description["model"]["backbone"] == backbone
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.format(folder=tmp_path, backbone=backbone))
    assert main(["weights", str(tmp_path / "tao.pth"), str(tmp_path / "mmdet.pth"), "--to", "mmdet"]) == 0
    assert main(["translate", "-e", str(spec), "-o", str(tmp_path / "config.py"), "--for", "evaluate"]) == 0

    model = MODELS.build(Config.fromfile(str(tmp_path / "config.py")).model).eval()
    load_checkpoint(model, str(tmp_path / "mmdet.pth"), strict=True)
    arrays = np.load(GOLDEN / f"{name}.npz")
    images = torch.from_numpy(arrays["images"])
    samples = [
        DetDataSample(
            metainfo=dict(img_shape=tuple(map(int, hw)), batch_input_shape=tuple(images.shape[-2:]))
        )
        for hw in arrays["valid_hw"]
    ]
    with torch.no_grad():
        logits, boxes_cxcywh = model(images, samples, mode="tensor")
    assert np.abs(logits.numpy() - arrays["pred_logits"]).max() < 1e-4
    assert np.abs(boxes_cxcywh.numpy() - arrays["pred_boxes"]).max() < 1e-4
