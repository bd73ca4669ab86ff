"""Training on a GPU: ours, stock mmdet's and Hugging Face's Deformable DETR at 800x1333, batch 8.

All start from the same weights (random, carried over by our checkpoint conversion) and see the same batches,
padded to one size, on the GPU already: ResNet-50, four levels, box refinement, 80 classes, 300 queries, no
dropout. A step is forward, loss, backward, clipping and AdamW. First every contestant trains alone for some
steps: its losses step by step are the curves that must agree, its memory is read, the host's waits for the
GPU are counted. Then they alternate for the times; for some of ours the time of each region follows.

Every figure is written when it is known, and a contestant that fails is left out and reported. Eager
contestants share a process; each compiled one has its own.

Run: ``python benchmarks/train_gpu.py`` (``--record`` writes ``benchmarks/records/train_gpu.{jsonl,json,md}``;
``--device cpu --quick`` tries it out on tiny images, without ``torch.compile``).
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from environment import load_average  # noqa: E402
from gpu_alternating import Step, alternate_on, attempt, free, peak_mb, time_ms  # noqa: E402
from gpu_detectors import (  # noqa: E402
    HUGGING_FACE,
    OURS,
    STOCK,
    YARDSTICK,
    Contestant,
    Weights,
    arguments,
    chosen_contestants,
    compiled,
    groups_of,
    padded_batch,
    set_up,
    training_step,
)
from gpu_process import Deadline, Figures, run_and_record  # noqa: E402
from step_timing import region_times  # noqa: E402

sys.path.append(str(ROOT / "tests"))

from host_reads import counted_host_reads  # noqa: E402

NAME = Path(__file__).stem
WITH_REGIONS = ("ours, bf16", "ours, fp32")


def contestants() -> list[Contestant]:
    """The contestants, most wanted first; the yardstick is the first."""
    return [
        Contestant(YARDSTICK, STOCK, "fp32"),
        Contestant("ours, fp32", OURS, "fp32"),
        Contestant("ours, bf16", OURS, "bf16"),
        Contestant("mmdet, bf16", STOCK, "bf16"),
        Contestant("ours, tf32", OURS, "tf32"),
        Contestant("mmdet, tf32", STOCK, "tf32"),
        Contestant("mmdet, defaults", STOCK, "defaults"),
        Contestant("Hugging Face, fp32", HUGGING_FACE, "fp32"),
        Contestant("Hugging Face, bf16", HUGGING_FACE, "bf16"),
        Contestant("Hugging Face, tf32", HUGGING_FACE, "tf32"),
        Contestant("ours, bf16, recomputing", OURS, "bf16", {"activation_checkpoint": True}),
        Contestant("ours, bf16, compile", OURS, "bf16", compiled()),
        Contestant("ours, tf32, compile", OURS, "tf32", compiled()),
        Contestant("Hugging Face, bf16, compile", HUGGING_FACE, "bf16", compiled()),
        Contestant("Hugging Face, tf32, compile", HUGGING_FACE, "tf32", compiled()),
    ]


def alone(
    contestant: Contestant,
    weights: Weights,
    batches: list[dict[str, Any]],
    args: argparse.Namespace,
    figures: Figures,
) -> Step:
    """Train one contestant alone: loss curve, time, peak memory, the host's waits; returns its step."""
    device = weights.device
    step = training_step(contestant, weights.model(contestant).train(), batches, args.lr)
    # The curve is read once, at its end: reading each loss would make the host wait.
    curve = torch.stack([step() for _ in range(args.steps)]).tolist()
    figures.append("alone", contestant.name, losses=curve)
    figures.append("alone", contestant.name, alone_ms=time_ms(step, 1 if args.quick else 3, device))
    figures.append("alone", contestant.name, memory_mb=peak_mb(device, step))
    with counted_host_reads(device) as reads:
        step()
    shown = sorted(set(_without_folder(reads)))
    figures.append("alone", contestant.name, host_reads_per_step=len(reads), host_reads=shown)
    print(f"{contestant.name}: losses {curve[0]:.4f} to {curve[-1]:.4f}, {len(reads)} waits", flush=True)
    return step


def _without_folder(reads: list[str]) -> list[str]:
    """Calls with their file's path from the package on."""
    return [read.replace(f"{ROOT}/", "").rpartition("site-packages/")[2] for read in reads]


def measure(args: argparse.Namespace) -> None:
    """All contestants of one process, each alone, then alternating; figures go to ``--figures``."""
    # The first part of the time is for what each gives alone, the second for alternating.
    time_limit, before_alternating = Deadline(args.seconds), Deadline(args.seconds and 0.65 * args.seconds)
    device, environment = set_up(args)
    figures = Figures(args.figures, NAME)
    figures.append("environment", **environment, batch=args.batch)
    weights = Weights(device, args.quick)
    batches = [
        padded_batch(tuple(args.size), args.batch, args.boxes, device, seed) for seed in range(args.data)
    ]
    steps: dict[str, Step] = {}
    for contestant in chosen_contestants(args, contestants()):
        step = attempt(
            figures,
            contestant.name,
            functools.partial(alone, contestant, weights, batches, args, figures),
            before_alternating if steps else time_limit,
            device,
        )
        if step is not None:
            steps[contestant.name] = step
        free(device)
    times = alternate_on(
        device, steps, args.rounds, YARDSTICK, 1, 1 if args.quick else 3, figures, time_limit
    )
    for name, found in times.items():
        figures.append("times", name, **found)
    for name in WITH_REGIONS:
        if name in times and not time_limit.has_passed(0.7):
            figures.append("alone", name, regions=region_times(steps[name], 3, device))
    figures.append("environment", load_after=load_average())


def main() -> int:
    """Read the command line."""
    parser = arguments((__doc__ or "").split("\n")[0], ("fp32", "tf32", "bf16", "defaults"), rounds=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data", type=int, default=4, help="different batches")
    parser.add_argument("--steps", type=int, default=40, help="of the loss curves")
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    if args.quick:
        args.size, args.batch, args.data, args.steps, args.rounds = [64, 96], 2, 1, 2, 1
        args.no_compile = True
        if args.only is None:
            args.precisions = ["fp32"]
    if args.figures:
        measure(args)
        return 0
    groups = [["--only", *names] for names in groups_of(chosen_contestants(args, contestants()))]
    return run_and_record(Path(__file__), groups, args)


if __name__ == "__main__":
    sys.exit(main())
