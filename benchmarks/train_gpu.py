"""Training on a GPU: ours, stock mmdet's and Hugging Face's Deformable DETR at 800x1333, batch 8.

All start from the same weights (random, carried over by our checkpoint conversion) and see the same batches,
padded to one size, on the GPU already: ResNet-50, four levels, box refinement, 80 classes, 300 queries, no
dropout. A step is forward, loss, backward, clipping and AdamW. First every contestant trains alone for some
steps: its losses step by step are the curves that must agree, its memory is read, the host's waits for the
GPU are counted, and for ours the time of each region is kept. Then they alternate for the times.

Run: ``python benchmarks/train_gpu.py`` (``--record`` writes ``benchmarks/records/train_gpu.{json,md}``;
``--device cpu --quick`` tries it out on tiny images, without ``torch.compile``).
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from environment import heading, load_average, report
from gpu_alternating import alternate_on, megabytes, peak_mb, times_text
from gpu_detectors import (
    HUGGING_FACE,
    OURS,
    STOCK,
    YARDSTICK,
    Contestant,
    Weights,
    arguments,
    compiled,
    padded_batch,
    set_up,
    training_step,
)
from step_timing import region_table, region_times

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from host_reads import counted_host_reads  # noqa: E402

RECORD = Path(__file__).parent / "records" / "train_gpu"
FIRST_LOSS_TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}


def contestants(with_compile: bool) -> list[Contestant]:
    """The contestants; the yardstick first."""
    found = [
        Contestant(YARDSTICK, STOCK, "fp32"),
        Contestant("mmdet, tf32", STOCK, "tf32"),
        Contestant("mmdet, bf16", STOCK, "bf16"),
        Contestant("Hugging Face, fp32", HUGGING_FACE, "fp32"),
        Contestant("Hugging Face, tf32", HUGGING_FACE, "tf32"),
        Contestant("ours, fp32", OURS, "fp32"),
        Contestant("ours, tf32", OURS, "tf32"),
        Contestant("ours, bf16", OURS, "bf16"),
        Contestant("ours, bf16, recomputing", OURS, "bf16", {"activation_checkpoint": True}),
    ]
    if with_compile:
        found += [
            Contestant("ours, tf32, compile", OURS, "tf32", compiled()),
            Contestant("ours, bf16, compile", OURS, "bf16", compiled()),
        ]
    return found


def alone(
    contestant: Contestant,
    weights: Weights,
    batches: list[dict[str, Any]],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Train one contestant alone: loss curve, peak memory, the host's waits; for ours the time by region."""
    step = training_step(contestant, weights.model(contestant).train(), batches, args.lr)
    # The curve is read once, at its end: reading each loss would make the host wait.
    curve = torch.stack([step() for _ in range(args.steps)]).tolist()
    found: dict[str, Any] = {"losses": curve, "memory_mb": peak_mb(device, step)}
    with counted_host_reads(device) as reads:
        step()
    found["host_reads_per_step"], found["host_reads"] = len(reads), sorted(set(_without_folder(reads)))
    if contestant.kind == OURS:
        found["regions"] = region_times(step, max(3, args.rounds), device)
        print(region_table(found["regions"]), flush=True)
    return found


def _without_folder(reads: list[str]) -> list[str]:
    """Calls with their file's path from the package on."""
    return [read.replace(f"{ROOT}/", "").rpartition("site-packages/")[2] for read in reads]


def check_first_losses(results: dict[str, dict[str, Any]], chosen: list[Contestant]) -> None:
    """Stop where the first loss of ours is not the yardstick's: times would say nothing.

    Raises:
        SystemExit: so it is.
    """
    expected = results[YARDSTICK]["losses"][0]
    for contestant in chosen:
        found = abs(results[contestant.name]["losses"][0] - expected) / expected
        if contestant.kind == OURS and not found <= FIRST_LOSS_TOLERANCE[contestant.precision]:
            raise SystemExit(f"{contestant.name}: the first loss is {found:.1e} off {YARDSTICK}'s")


def compare(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Curves and memory of all, each alone, then alternating times."""
    weights = Weights(device)
    batches = [
        padded_batch(tuple(args.size), args.batch, args.boxes, device, seed) for seed in range(args.data)
    ]
    chosen = [one for one in contestants(not args.no_compile) if one.precision in args.precisions]
    results: dict[str, dict[str, Any]] = {}
    for contestant in chosen:
        results[contestant.name] = alone(contestant, weights, batches, args, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        found = results[contestant.name]
        print(
            f"{contestant.name}: losses {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}, "
            f"{found['host_reads_per_step']} waits a step",
            flush=True,
        )
    check_first_losses(results, chosen)
    steps = {
        contestant.name: training_step(contestant, weights.model(contestant).train(), batches, args.lr)
        for contestant in chosen
    }
    times = alternate_on(device, steps, args.rounds, YARDSTICK)
    return {"alone": results, "times": times}


def curve_apart(found: list[float], expected: list[float]) -> tuple[float, float]:
    """Difference of the first loss, and the mean difference over the curve, relative."""
    apart = [abs(one - other) / other for one, other in zip(found, expected, strict=True)]
    return apart[0], sum(apart) / len(apart)


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("Training on a GPU", result["environment"])
    lines += [
        "",
        "ResNet-50, 4 levels, refinement, 300 queries. Milliseconds a step: median (smallest to largest);",
        f"images a second; how many times the speed of {YARDSTICK}; peak memory of a step beyond weights,",
        "optimizer and images, MB; waits of the host for the GPU in a step; how far the first loss, and the",
        "losses of all steps on average, are from the yardstick's (relative).",
        "",
        "| | ms | images/s | speed | memory | waits | first loss | losses |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    expected = result["alone"][YARDSTICK]["losses"]
    for name, times in result["times"].items():
        own = result["alone"][name]
        first, mean = curve_apart(own["losses"], expected)
        lines.append(
            f"| {name} | {times_text(times)} | {1e3 * result['batch'] / times['median_ms']:.1f} "
            f"| {times['speedup']:.2f} | {megabytes(own['memory_mb'])} | {own['host_reads_per_step']} "
            f"| {first:.1e} | {mean:.1e} |"
        )
    for name, own in result["alone"].items():
        if "regions" in own:
            lines += ["", f"Regions of {name}, profiled:", "", "```", region_table(own["regions"]), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = arguments((__doc__ or "").split("\n")[0], ("fp32", "tf32", "bf16"), rounds=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data", type=int, default=4, help="different batches")
    parser.add_argument("--steps", type=int, default=40, help="of the loss curves")
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    if args.quick:
        args.size, args.batch, args.data, args.steps, args.rounds = [64, 96], 2, 1, 2, 1
        args.precisions, args.no_compile = ["fp32"], True
    device, environment = set_up(args)
    environment["batch"] = args.batch
    result = {"environment": environment, "batch": args.batch, **compare(args, device)}
    environment["load_after"] = load_average()
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
