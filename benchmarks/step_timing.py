"""Time of the named regions of a training step, read from ``torch.profiler``.

The detector marks its parts with ``torch.profiler.record_function`` (see ``ddetr_mm.models.detector``); a
benchmark may mark more, such as the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

REGIONS = ("backbone", "encoder", "decoder", "matching", "loss", "backward", "optimizer")
"""Regions of a training step in their order; ``loss`` contains ``matching``."""

STEP = "whole step"


def region_times(
    step: Callable[[], Any], steps: int, device: torch.device, regions: Sequence[str] = REGIONS
) -> dict[str, dict[str, float]]:
    """Profile some steps after one that is not counted.

    Args:
        step: runs one training step.
        steps: how many are profiled.
        device: a CUDA device or the CPU.
        regions: names given to ``record_function``.

    Returns:
        ``"host_ms"`` and on CUDA ``"device_ms"``: region to mean milliseconds a step, the whole as
        :data:`STEP`. The profiler itself makes a step slower, so only the shares can be compared.
    """
    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
    found: dict[str, dict[str, float]] = {"host_ms": {}}
    averages = {event.key: event for event in profiler.key_averages()}
    for name in (*regions, STEP):
        if name in averages:
            found["host_ms"][name] = averages[name].cpu_time_total / steps / 1e3
            if on_gpu:
                device_ms = averages[name].device_time_total / steps / 1e3
                found.setdefault("device_ms", {})[name] = device_ms
    return found


def region_table(times: dict[str, dict[str, float]]) -> str:
    """The times as lines of text: region, milliseconds, share of the step.

    Args:
        times: of :func:`region_times`.
    """
    device = times.get("device_ms", {})
    main = device or times["host_ms"]
    lines = ["ms a step".ljust(30) + f"{'host':>10}" + (f"{'GPU':>10}" if device else "")]
    for name, host_ms in times["host_ms"].items():
        share = main.get(name, 0.0) / main[STEP] if main.get(STEP) else 0.0
        gpu = f"{device.get(name, 0.0):10.1f}" if device else ""
        lines.append(f"  {name:<28}{host_ms:10.1f}{gpu}  {share:4.0%}")
    return "\n".join(lines)
