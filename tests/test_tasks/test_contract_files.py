"""The keys of the files that a run leaves, as stored text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from contract import check_contract, lines

from tests.test_tasks.conftest import Project

LATEST = Path("results/shapes/train/dd_model_latest.pth")


def keys(content: object, prefix: str, depth: int = 1) -> list[str]:
    """Dotted keys of nested mappings down to a depth."""
    if not isinstance(content, dict):
        return []
    found = []
    for key, value in content.items():
        found.append(f"{prefix}{key}")
        if depth > 1:
            found += keys(value, f"{prefix}{key}.", depth - 1)
    return found


def test_checkpoint_keys(trained_project: Project):
    checkpoint = torch.load(trained_project.folder / LATEST, map_location="cpu", weights_only=False)
    found = keys(checkpoint, "")
    for section in ("meta", "message_hub", "optimizer", "state_dict"):
        found += keys(checkpoint[section], f"{section} ")
    check_contract("checkpoint_keys.txt", lines(sorted(found)))


def test_result_keys(trained_project: Project, tmp_path: Path):
    trained_project.tiny("evaluate", f"evaluate.checkpoint={LATEST}", f"evaluate.results_dir={tmp_path}")
    found = {}
    for name in ("results.json", "results_detail.json"):
        found[name] = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    check_contract("results_keys.txt", lines(keys(found, "", depth=3)))
