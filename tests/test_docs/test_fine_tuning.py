"""docs/fine-tuning.md: its lines write files that fit, and the tests of its table exist."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from mmdet.registry import MODELS

import ddetr_mm.register  # noqa: F401 - registers what the page names
from ddetr_mm.weights import load_backbone

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
LINES = re.findall(r"^```python\n(.*?)\n```", TEXT, re.MULTILINE | re.DOTALL)
RESNET = {"type": "ResNet", "depth": 50, "out_indices": (1, 2, 3)}
BACKBONES = {
    "resnet50.pth": RESNET,
    "resnet18.pth": {**RESNET, "depth": 18},
    "gcvit_tiny.pth": {"type": "GCViT", "variant": "tiny", "out_indices": (3,)},
}


def without_download(make):
    """The same network with random weights, whatever weights are asked for."""

    def made(*args, weights=None, pretrained=None):
        assert weights == "DEFAULT" or pretrained is True
        torch.manual_seed(3)
        return make(*args)

    return made


@pytest.mark.parametrize("name", BACKBONES)
def test_what_a_line_writes_fits(name, tmp_path, monkeypatch):
    (line,) = [line for line in LINES if f'"{name}"' in line]
    for module, function in ((torchvision.models, "resnet50"), (torchvision.models, "resnet18")):
        monkeypatch.setattr(module, function, without_download(getattr(module, function)))
    monkeypatch.setattr(timm, "create_model", without_download(timm.create_model))
    monkeypatch.chdir(tmp_path)
    exec(line, {})
    written = torch.load(tmp_path / name, weights_only=True)
    backbone = MODELS.build(BACKBONES[name])
    report = load_backbone(backbone, tmp_path / name)
    assert report.missing == [] and report.reshaped == {}
    assert {key.split(".")[0] for key in report.dropped} <= {"fc", "head"}
    loaded = backbone.state_dict()
    for source, targets in report.mapped.items():
        for target in targets:
            assert torch.equal(loaded[target].flatten(), written[source].flatten()), source
    assert len(report.mapped) >= len(loaded)


def test_every_line_is_tried():
    assert len(LINES) == len(BACKBONES)


def test_the_tests_of_the_table_exist():
    rows = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(rows) == 9
    for path, name in rows:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)
