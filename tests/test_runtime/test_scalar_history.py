"""A run keeps an epoch of every logged scalar, and ten of the loss; its checkpoints stop growing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub

from ddetr_mm.runtime import scalar_history
from ddetr_mm.runtime.checkpoint_hook import TAOCheckpointHook
from ddetr_mm.runtime.scalar_history import LEAST_KEPT, bound_history


def test_older_values_go_and_the_mean_of_an_epoch_stays():
    hub = MessageHub.get_instance("history", log_scalars={}, runtime_info={}, resumed_keys={})
    for name, steps in (("train/loss", 12_000), ("train/lr", 3_000)):
        for step in range(steps):
            hub.update_scalar(name, float(step))
    bound_history(hub, steps_an_epoch=500)
    hub.update_scalar("train/loss", 12_000.0)
    hub.update_scalar("train/lr", 3_000.0)
    lengths = {name: len(buffer.data[0]) for name, buffer in hub.log_scalars.items()}
    assert lengths == {"train/loss": 5_000, "train/lr": LEAST_KEPT}
    assert hub.get_scalar("train/lr").mean(500) == pytest.approx(2_750.5)
    assert hub.get_scalar("train/loss").data[0][0] == 12_000 - 4_999


def test_checkpoints_of_a_long_run_hold_no_more(make_runner, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scalar_history, "LEAST_KEPT", 2)
    monkeypatch.setattr(scalar_history, "EPOCHS_OF_LOSS", 2)
    runner = make_runner([TAOCheckpointHook(interval=1)], tmp_path, elastic=True, epochs=6)
    runner.train()
    steps = len(runner.train_dataloader)
    files = sorted(tmp_path.glob("model_epoch_*.pth"))
    assert len(files) == 6
    kept = [
        {
            name: len(buffer["values"])
            for name, buffer in torch.load(file, weights_only=True)["message_hub"]["log_scalars"].items()
        }
        for file in files
    ]
    assert kept[-1] == kept[-2] == kept[-3]
    assert kept[-1]["train/loss"] == 2 * steps and kept[-1]["train/lr"] == max(2, steps)
