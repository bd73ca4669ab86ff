"""``ddetr-mm weights`` as a user types it: the file, a summary, and the account of every key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from weights_builders import small_canonical

from ddetr_mm.cli import main
from ddetr_mm.weights.formats import TAO, from_canonical


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A whole small network in TAO's names, and a key that is not the network's."""
    named, _trace = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    state_dict = {**named, "model.criterion.empty_weight": torch.ones(3)}
    path = tmp_path / "tao.pth"
    torch.save({"state_dict": state_dict, "pytorch-lightning_version": "2.0.0"}, path)
    return path


def test_every_key_is_accounted_for_beside_the_file(source, tmp_path, capsys):
    target = tmp_path / "mmdet.pth"
    assert main(["weights", str(source), str(target), "--to", "mmdet"]) == 0
    report = json.loads((tmp_path / "mmdet.report.json").read_text())
    assert report["mapped"]["model.model.query_embed.weight"] == ["query_embedding.weight"]
    assert report["unexpected"] == ["model.criterion.empty_weight"]
    assert report["missing"] == []
    keys = torch.load(source, weights_only=True)["state_dict"].keys()
    assert {*report["mapped"], *report["unexpected"], *report["aliases"], *report["dropped"]} == set(keys)
    printed = capsys.readouterr().out
    assert f"{len(report['mapped'])} keys loaded" in printed and "model.criterion.empty_weight" in printed
    assert "mmdet.report.json" in printed
    written = torch.load(target, weights_only=True)["state_dict"]
    assert {key for targets in report["mapped"].values() for key in targets} == set(written)


def test_a_refused_conversion_leaves_nothing(source, tmp_path, capsys):
    source.write_text("no weights")
    assert main(["weights", str(source), str(tmp_path / "x.pth"), "--to", "hf"]) == 2
    assert "is a text file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tao.pth"]
