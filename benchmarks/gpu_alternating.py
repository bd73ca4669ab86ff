"""Alternating contestants on a GPU: times by events, ratios, peak memory; on a CPU by the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from alternating import alternate, summary
from environment import describe

Step = Callable[[], Any]


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        SystemExit: CUDA is asked for and not there.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here; `--device cpu --quick` tries the script out")
    return torch.device(name)


def describe_device(device: torch.device, *packages: str) -> dict[str, Any]:
    """The head of a record: :func:`environment.describe`, and the GPU with what decides its speed."""
    found = describe("torch", "triton", "mmcv", "mmcv-lite", "mmdet", "transformers", "ddetr_mm", *packages)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["device_memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    else:
        found["device"] = "CPU: a trial of the script, whose times say nothing about a GPU"
    return found


def _time_ms(step: Step, repeats: int) -> float:
    """Mean milliseconds of a step over a few in a row, so that launching is part of it only if it must."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def alternate_on(
    device: torch.device,
    contestants: dict[str, Step],
    rounds: int,
    yardstick: str,
    warm_up: int = 3,
    repeats: int = 3,
) -> dict[str, dict[str, float]]:
    """Run all in turn, in another order every other round.

    Args:
        device: where they run.
        contestants: name to what one round runs.
        rounds: rounds that count.
        yardstick: whom the others are compared with.
        warm_up: steps of each before any counts: they compile, choose and allocate.
        repeats: steps in a row that are timed together.

    Returns:
        For each ``median_ms``, ``min_ms``, ``max_ms`` and ``speedup``, the median of the rounds' own ratios.
    """
    if device.type != "cuda":
        return alternate(contestants, rounds, yardstick)
    for step in contestants.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            times[name].append(_time_ms(contestants[name], repeats))
    return summary(times, yardstick)


def peak_mb(device: torch.device, step: Step) -> float | None:
    """Memory of a GPU that one step takes at its peak beyond what is in use before; None on a CPU."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def times_text(times: dict[str, float]) -> str:
    """Median and spread for a table."""
    return f"{times['median_ms']:.3f} ({times['min_ms']:.3f} to {times['max_ms']:.3f})"


def megabytes(value: float | None) -> str:
    """Megabytes for a table; nothing where they are not known."""
    return "" if value is None else f"{value:,.0f}"
