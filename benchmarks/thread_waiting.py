"""How threads that wait for work cost a training step, on a machine of one's own and on a shared one.

PyTorch's OpenMP threads spin for milliseconds before they sleep. Alone on a machine that saves the waking;
where other programs want the cores, or a container has fewer than it sees, the spinning takes the time that
the working thread needs. A process for each setting trains our ResNet-50 detector, with a thread for each
core; they alternate, first alone, then beside as many busy processes as there are cores.

Run: ``python benchmarks/thread_waiting.py`` (``--rounds 2`` for a quick look; ``--record`` writes
``benchmarks/records/thread_waiting.{json,md}``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from alternating import alternate, measured
from environment import describe, heading, load_average, report

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).parent / "records" / "thread_waiting"
OWN = "OpenMP's own"
SETTINGS: dict[str, dict[str, str]] = {
    OWN: {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
SIZE_HW, NUM_OBJECTS = (192, 256), 10


def work() -> None:
    """Of a contestant: for every line on standard input one step, and its time on standard output."""
    import copy

    from detectors_cpu import batch
    from scaling import build, register_all_modules, torch

    register_all_modules()
    torch.manual_seed(0)
    model = build(queries=300, levels=4).train()
    given = batch(SIZE_HW, NUM_OBJECTS)

    def train(samples: list) -> None:
        loss, _ = model.parse_losses(model.loss(given["image"], samples))
        loss.backward()
        model.zero_grad()

    print("ready", flush=True)
    for _ in sys.stdin:
        copied = copy.deepcopy(given["samples"])
        print(json.dumps(measured(partial(train, copied))), flush=True)


@contextmanager
def contestants() -> Iterator[dict[str, subprocess.Popen]]:
    """A process for each setting, ready for its first step."""
    bare = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    started: dict[str, subprocess.Popen] = {}
    try:
        for name, variables in SETTINGS.items():
            started[name] = subprocess.Popen(
                [sys.executable, __file__, "--work"],
                env={**bare, **variables, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            while (line := started[name].stdout.readline()) != "ready\n":
                if not line:
                    raise RuntimeError(f"the contestant {name} has ended")
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other programs that never stop calculating."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def step(process: subprocess.Popen) -> tuple[float, float]:
    """One step's wall and processor time in milliseconds."""
    process.stdin.write("\n")
    process.stdin.flush()
    wall_ms, cpu_ms = json.loads(process.stdout.readline())
    return wall_ms, cpu_ms


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("Waiting threads and a training step on a CPU", result["environment"])
    lines += [
        "",
        f"Our detector, ResNet-50, {SIZE_HW[1]} x {SIZE_HW[0]}, batch 1; milliseconds a step, medians.",
    ]
    for condition, found in result["conditions"].items():
        lines += ["", f"## {condition}", "", "| setting | step | smallest | processor time | speed |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        lines += [
            f"| {name} | {row['median_ms']:.0f} | {row['min_ms']:.0f} | {row['cpu_median_ms']:.0f} | "
            f"{row['speedup']:.2f} |"
            for name, row in found.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--record", action="store_true", help="keep the figures under records/")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work()
    environment = describe("torch")
    cores = environment["cores"]
    conditions = {}
    with contestants() as started:
        conditions["Alone"] = alternate(started, arguments.rounds, OWN, step)
        environment["load_between"] = load_average()
        with busy(cores):
            conditions[f"Beside {cores} busy processes"] = alternate(started, arguments.rounds, OWN, step)
    result = {"environment": environment, "conditions": conditions}
    report(result, markdown(result), RECORD if arguments.record else None)
    return None


if __name__ == "__main__":
    main()
