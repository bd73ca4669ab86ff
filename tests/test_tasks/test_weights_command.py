"""``ddetr-mm weights`` as a user types it: the file, a summary, and the account of every key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddetr_mm.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The weights of a few modules in the reference's names, one of them unknown."""
    state_dict = {
        "model.model.backbone.0.body.conv1.weight": torch.ones(2, 3, 3, 3),
        "model.model.transformer.level_embed": torch.ones(1, 8),
        "model.model.transformer.encoder.layers.0.norm1.weight": torch.ones(8),
        "model.model.query_embed.weight": torch.ones(5, 16),
        "model.criterion.empty_weight": torch.ones(3),
    }
    path = tmp_path / "tao.pth"
    torch.save({"state_dict": state_dict, "pytorch-lightning_version": "2.0.0"}, path)
    return path


def test_every_key_is_accounted_for_beside_the_file(source, tmp_path, capsys):
    target = tmp_path / "mmdet.pth"
    assert main(["weights", str(source), str(target), "--to", "mmdet"]) == 0
    report = json.loads((tmp_path / "mmdet.report.json").read_text())
    assert report["mapped"]["model.model.query_embed.weight"] == ["query_embedding.weight"]
    assert report["unexpected"] == ["model.criterion.empty_weight"]
    assert "encoder.layers.0.norms.0.bias" in report["missing"] and not report["complete"]
    assert len(report["mapped"]) + len(report["unexpected"]) == 5
    told = capsys.readouterr().out
    assert "4 keys loaded" in told and "model.criterion.empty_weight" in told
    assert "mmdet.report.json" in told
    written = torch.load(target, weights_only=True)["state_dict"]
    assert {key for targets in report["mapped"].values() for key in targets} == set(written)


def test_a_refused_conversion_leaves_nothing(source, tmp_path, capsys):
    source.write_text("no weights")
    assert main(["weights", str(source), str(tmp_path / "x.pth"), "--to", "hf"]) == 2
    assert "is a text file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tao.pth"]
