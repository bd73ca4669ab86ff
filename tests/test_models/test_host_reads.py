"""Reads from a device are found where they are made; a whole training step makes at most three."""

from __future__ import annotations

import pytest
import torch
from detr_builders import detector_config, padded_batch
from host_reads import counted_host_reads
from mmdet.registry import MODELS
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from torch.profiler import ProfilerActivity, profile

import ddetr_mm.register  # noqa: F401
from ddetr_mm.models.detector import HostScalars

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: x * 2 + x.sum(), 0),
        (lambda x: x[[0, 2]], 0),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: x.masked_fill(x > 1, 0.0), 0),
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x.sum()) + int(x.sum()), 2),
        (lambda x: bool(x.sum() > 0), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu().numpy().sum(), 1),
        (lambda x: x.to("cpu").tolist(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.where(x > 1), 1),
        (lambda x: x.unique(), 1),
        (lambda x: [value.item() for value in HostScalars({"a": x.sum(), "b": x.mean()}).values()], 1),
    ],
)
def test_reads_are_counted(call, expected) -> None:
    x = torch.tensor([0.5, 1.5, 2.5])
    with counted_host_reads(CPU) as reads:
        call(x)
    assert len(reads) == expected
    assert all("test_host_reads.py" in read or "detector.py" in read for read in reads)


def test_host_scalars_are_the_losses() -> None:
    scalars = {"loss": torch.tensor(3.5, requires_grad=True) * 2, "loss_cls": torch.tensor([0.25])}
    host = HostScalars(scalars)
    assert {name: value.item() for name, value in host.items()} == {"loss": 7.0, "loss_cls": 0.25}
    assert list(host) == list(scalars) and len(host) == 2
    assert host["loss"].ndim == 0 and not host["loss"].requires_grad


@pytest.mark.parametrize("num_decoder_layers", [1, 3])
def test_a_training_step_reads_three_times(num_decoder_layers: int) -> None:
    """The matching's costs, the norm of the gradient, the losses for the log: each once for all layers."""
    torch.manual_seed(0)
    model = MODELS.build(detector_config(num_decoder_layers=num_decoder_layers)).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    wrapper = OptimWrapper(optimizer=optimizer, clip_grad={"max_norm": 0.1})
    images, samples = padded_batch()
    data = {"inputs": list((images * 50).to(torch.uint8)), "data_samples": samples}
    hub = MessageHub.get_instance("reads", log_scalars={})
    runner = type("Runner", (), {"message_hub": hub})()

    def step() -> dict:
        outputs = model.train_step(data, wrapper)
        RuntimeInfoHook().after_train_iter(runner, 0, outputs=outputs)
        return outputs

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    regions = {event.key for event in profiler.key_averages()}
    assert {"backbone", "encoder", "decoder", "matching", "loss"} <= regions
    with counted_host_reads(DEVICE) as reads:
        outputs = step()
    assert len(reads) <= 3, reads
    assert len(outputs) == 1 + 3 * num_decoder_layers
    assert hub.get_scalar("train/loss").current() == outputs["loss"].item()
