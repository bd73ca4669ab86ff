"""Alternating contestants on a GPU: times by events, ratios, peak memory; on a CPU by the clock.

A contestant that fails is left out and reported; the others continue.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from alternating import summary
from environment import describe
from gpu_process import BROKEN_CONTEXT, Deadline, Figures

Step = Callable[[], Any]
Result = TypeVar("Result")


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
    # What a peer gets who sets nothing: TF32 in convolutions, not in matrix products.
    found["TF32 by default"] = (
        f"matrix products {torch.backends.cuda.matmul.allow_tf32}, "
        f"convolutions {torch.backends.cudnn.allow_tf32}"
    )
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


# --- Contestants that fail ---


def attempt(
    figures: Figures, contestant: str, work: Callable[[], Result], deadline: Deadline, device: torch.device
) -> Result | None:
    """Run one contestant's work, with figures of its begin and end; what fails is left out.

    Args:
        figures: the file, where those that failed before are named.
        contestant: its name.
        work: what it does.
        deadline: nothing begins after it.
        device: where it runs.

    Returns:
        What the work gives; None where it failed, failed before, or had no time.

    Raises:
        SystemExit: the GPU's context no longer works; status :data:`~gpu_process.BROKEN_CONTEXT`.
    """
    if contestant in figures.left_out():
        return None
    if deadline.has_passed():
        figures.append("skipped", contestant, reason="no time was left")
        return None
    figures.append("begin", contestant)
    began = time.monotonic()
    try:
        found = work()
        synchronize(device)
    except Exception as error:
        leave_out(figures, contestant, error, device)
        return None
    figures.append("end", contestant, seconds=round(time.monotonic() - began, 1))
    return found


def leave_out(figures: Figures, contestant: str, error: Exception, device: torch.device) -> None:
    """Report a contestant that failed, and free its memory.

    Raises:
        SystemExit: the GPU's context no longer works.
    """
    reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:300]
    traceback.print_exception(error, file=sys.stdout)
    print(f"left out: {contestant}: {reason}", flush=True)
    figures.append("left_out", contestant, reason=reason)
    error.__traceback__ = None  # it holds the tensors of all frames
    free(device)
    try:
        synchronize(device)
    except RuntimeError as broken:
        raise SystemExit(BROKEN_CONTEXT) from broken


def free(device: torch.device) -> None:
    """Give memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a broken context is found by the caller
            torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device.

    Raises:
        RuntimeError: what was queued before has failed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- Times ---


def time_ms(step: Step, repeats: int, device: torch.device) -> float:
    """Mean milliseconds of a step over a few in a row, so that launching is part of it only if it must."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        return 1e3 * (time.perf_counter() - began) / repeats
    with torch.cuda.device(device):
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
    figures: Figures | None = None,
    deadline: Deadline | None = None,
) -> dict[str, dict[str, float]]:
    """Run all in turn, in another order every other round.

    Args:
        device: where they run.
        contestants: name to what one round runs.
        rounds: rounds that count.
        yardstick: whom the others are compared with; the first one where it is not among them.
        warm_up: steps of each before any counts: they compile, choose and allocate.
        repeats: steps in a row that are timed together; on a CPU one.
        figures: gets every round, and who fails; without it a failure is raised.
        deadline: after it no step begins; a round that it cuts does not count.

    Returns:
        For each that did not fail ``median_ms``, ``min_ms``, ``max_ms``, ``rounds``, ``yardstick`` and
        ``speedup``, the median of the rounds' own ratios. Empty where there was no time for a round.
    """
    steps, deadline = dict(contestants), deadline or Deadline(None)
    repeats = repeats if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in steps}

    def run(name: str, work: Callable[[], Any]) -> Any:
        try:
            found = work()
            synchronize(device)
            return found
        except Exception as error:
            if figures is None:
                raise
            leave_out(figures, name, error, device)
            del steps[name], times[name]
            return None

    for name, step in contestants.items():
        for _ in range(warm_up):
            if name in steps and not deadline.has_passed():
                run(name, step)
    for number in range(rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            if deadline.has_passed():
                break
            took = run(name, lambda name=name: time_ms(steps[name], repeats, device))
            if took is not None:
                times[name].append(took)
                if figures is not None:
                    figures.append("round", name, number=number, ms=took)
    whole = min(map(len, times.values()), default=0)
    times = {name: own[:whole] for name, own in times.items()}
    if not whole:
        return {}
    compared = yardstick if yardstick in times else next(iter(times))
    found = summary(times, compared)
    return {
        name: {**found[name], "rounds": len(times[name]), "yardstick": compared}  # type: ignore[dict-item]
        for name in found
    }


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
