"""Inference on a GPU: ours, stock mmdet's and Hugging Face's Deformable DETR, at batch 1 and 8.

All have the same weights (random, carried over by our checkpoint conversion) and get the same images, padded
to 800x1333: ResNet-50, four levels, box refinement, 80 classes, 300 queries. Before the clock starts, the
predictions of all are compared with stock mmdet's in float32: ours in float32 must agree to 1e-3, the other
differences are reported. Then they alternate: the network and its post-processing.

Run: ``python benchmarks/inference_gpu.py`` (``--record`` writes
``benchmarks/records/inference_gpu.{json,md}``; ``--device cpu --quick`` tries it out on tiny images, without
``torch.compile``).
"""

from __future__ import annotations

import argparse
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
    apart,
    arguments,
    compiled,
    inference_step,
    outputs,
    padded_batch,
    set_up,
)

RECORD = Path(__file__).parent / "records" / "inference_gpu"
TOLERANCE = 1e-3


def contestants(with_compile: bool) -> list[Contestant]:
    """The contestants; the yardstick first."""
    found = [Contestant(YARDSTICK, STOCK, "fp32")]
    for precision in ("fp32", "tf32", "fp16", "bf16"):
        found += [
            Contestant(f"mmdet, {precision}", STOCK, precision),
            Contestant(f"Hugging Face, {precision}", HUGGING_FACE, precision),
            Contestant(f"ours, {precision}", OURS, precision),
        ]
        if with_compile:
            graphs = compiled("reduce-overhead")
            found += [
                Contestant(f"ours, {precision}, compile", OURS, precision, compiled()),
                Contestant(f"ours, {precision}, CUDA graphs", OURS, precision, graphs),
            ]
    return [found[0], *(one for one in found[1:] if one.name != YARDSTICK)]


def compare(args: argparse.Namespace, device: torch.device, batch: int) -> dict[str, Any]:
    """All contestants on one batch size: times, memory, agreement."""
    weights = Weights(device)
    given = padded_batch(tuple(args.size), batch, args.boxes, device)
    chosen = [one for one in contestants(not args.no_compile) if one.precision in args.precisions]
    steps, memory, agreement, expected = {}, {}, {}, None
    for contestant in chosen:
        model = weights.model(contestant).eval()
        found = outputs(contestant, model, given)
        expected = found if expected is None else expected
        agreement[contestant.name] = apart(found, expected)
        largest = max(agreement[contestant.name][f"largest {what} difference"] for what in ("score", "box"))
        # Hugging Face places the padding's positions differently: reported, not required.
        if contestant.precision == "fp32" and contestant.kind == OURS and largest > TOLERANCE:
            raise SystemExit(f"{contestant.name} differs from {YARDSTICK}: {agreement[contestant.name]}")
        steps[contestant.name] = inference_step(contestant, model, given)
        memory[contestant.name] = peak_mb(device, steps[contestant.name])
        print(f"{contestant.name}: differs by {largest:.1e}", flush=True)
    times = alternate_on(device, steps, args.rounds, YARDSTICK, warm_up=5)
    return {"batch": batch, "times": times, "memory_mb": memory, "agreement": agreement}


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("Inference on a GPU", result["environment"])
    lines += [
        "",
        "ResNet-50, 4 levels, refinement, 300 queries. Milliseconds a batch: median (smallest to largest);",
        f"images a second; how many times the speed of {YARDSTICK}; peak memory beyond weights and images,",
        "MB; largest and mean differences of scores and boxes (0..1) from it.",
        "",
        "| batch | | ms | images/s | speed | memory | largest score, box | mean score, box |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        for name, times in row["times"].items():
            differ = row["agreement"][name]
            lines.append(
                f"| {row['batch']} | {name} | {times_text(times)} "
                f"| {1e3 * row['batch'] / times['median_ms']:.1f} "
                f"| {times['speedup']:.2f} | {megabytes(row['memory_mb'][name])} "
                f"| {differ['largest score difference']:.1e}, {differ['largest box difference']:.1e} "
                f"| {differ['mean score difference']:.1e}, {differ['mean box difference']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = arguments((__doc__ or "").split("\n")[0], ("fp32", "tf32", "fp16", "bf16"), rounds=11)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    if args.quick:
        args.size, args.batches, args.rounds = [64, 96], [2], 1
        args.precisions, args.no_compile = ["fp32", "bf16"], True
    device, environment = set_up(args)
    rows = [compare(args, device, batch) for batch in args.batches]
    result = {"environment": environment, "rows": rows}
    environment["load_after"] = load_average()
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
