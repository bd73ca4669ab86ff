"""Alternating contestants: times, their ratios, and the peak memory of a function."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Step = Callable[[], Any]
Contestant = TypeVar("Contestant")


def measured(step: Step) -> tuple[float, float]:
    """Wall time of a step, and processor time of all threads of this process meanwhile, milliseconds."""
    began, cpu_began = time.perf_counter(), time.process_time()
    step()
    return 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - cpu_began)


def alternate(
    contestants: dict[str, Contestant],
    rounds: int,
    yardstick: str,
    measure: Callable[[Contestant], tuple[float, float]] = measured,
) -> dict[str, dict[str, float]]:
    """Run all in turn, in another order every other round, after one round that warms up.

    Args:
        contestants: name to what one round runs.
        rounds: rounds that count.
        yardstick: whom the others are compared with.
        measure: runs one round of a contestant and returns its wall and processor time in milliseconds.

    Returns:
        For each: ``median_ms``, ``min_ms``, ``max_ms`` and ``cpu_median_ms`` (processor time of all
        threads), and how many times the yardstick's speed it has, ``speedup`` and ``cpu_speedup``: medians
        of the ratios within each round, so that what else runs on the machine weighs on both.
    """
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            wall_ms, cpu_ms = measure(contestants[name])
            if number:
                wall[name].append(wall_ms)
                cpu[name].append(cpu_ms)
    found = summary(wall, yardstick)
    for name, times in cpu.items():
        found[name]["cpu_median_ms"] = statistics.median(times)
        found[name]["cpu_speedup"] = _ratio(cpu[yardstick], times)
    return found


def summary(times_ms: dict[str, list[float]], yardstick: str) -> dict[str, dict[str, float]]:
    """Median, smallest and largest of each contestant's rounds, and ``speedup``.

    Args:
        times_ms: name to the time of every round, in the order of the rounds.
        yardstick: whom the others are compared with.

    Returns:
        For each ``median_ms``, ``min_ms``, ``max_ms`` and ``speedup``, the median of the rounds' own ratios
        of the yardstick's time to its own.
    """
    return {
        name: {
            "median_ms": statistics.median(own),
            "min_ms": min(own),
            "max_ms": max(own),
            "speedup": _ratio(times_ms[yardstick], own),
        }
        for name, own in times_ms.items()
    }


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def peak_growth_mb(step: Step) -> float | None:
    """How much a forked process grows at its peak in ``step``; None where the system does not report it.

    Call it before the first operation that starts threads: a forked process has none of them.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(step, send))
    process.start()
    send.close()
    try:
        growth = float(receive.recv())
    finally:
        process.join()
    return growth


def _measure(step: Step, send: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status_mb("VmRSS")
    step()
    send.send(_status_mb("VmHWM") - before)


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)
