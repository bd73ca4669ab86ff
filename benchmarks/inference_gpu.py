"""Inference on a GPU: ours, stock mmdet's and Hugging Face's Deformable DETR, at batch 1 and 8.

All have the same weights (random, carried over by our checkpoint conversion) and get the same images, padded
to 800x1333: ResNet-50, four levels, box refinement, 80 classes, 300 queries; ours with its batch norms folded
away, as ``evaluate`` and ``inference`` do. Before the clock starts, the predictions of all are compared with
stock mmdet's in float32; those of ours in float32 that are off by more than 1e-3 leave it out. Then they
alternate: the network and its post-processing.

Every figure is written when it is known, and a contestant that fails is left out and reported. Eager
contestants share a process; each compiled one has its own.

Run: ``python benchmarks/inference_gpu.py`` (``--record`` writes
``benchmarks/records/inference_gpu.{jsonl,json,md}``; ``--device cpu --quick`` tries it out on tiny images,
without ``torch.compile``).
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from environment import load_average  # noqa: E402
from gpu_alternating import Step, alternate_on, attempt, free, peak_mb, time_ms  # noqa: E402
from gpu_detectors import (  # noqa: E402
    HUGGING_FACE,
    OURS,
    STOCK,
    YARDSTICK,
    Contestant,
    Weights,
    apart,
    arguments,
    chosen_contestants,
    compiled,
    groups_of,
    inference_step,
    outputs,
    padded_batch,
    set_up,
)
from gpu_process import Deadline, Figures, run_and_record  # noqa: E402
from torch import Tensor  # noqa: E402

NAME = Path(__file__).stem
TOLERANCE = 1e-3
Outputs = tuple[Tensor, Tensor]


def contestants() -> list[Contestant]:
    """The contestants, most wanted first; the yardstick is the first."""
    found = [Contestant(YARDSTICK, STOCK, "fp32"), Contestant("ours, fp32", OURS, "fp32")]
    for precision in ("bf16", "tf32", "fp16"):
        found += [
            Contestant(f"ours, {precision}", OURS, precision),
            Contestant(f"mmdet, {precision}", STOCK, precision),
        ]
    found.append(Contestant("mmdet, defaults", STOCK, "defaults"))
    for precision in ("fp32", "bf16", "tf32", "fp16"):
        found.append(Contestant(f"Hugging Face, {precision}", HUGGING_FACE, precision))
    for precision in ("bf16", "tf32", "fp16", "fp32"):
        graphs = compiled("reduce-overhead")
        found += [
            Contestant(f"ours, {precision}, compile", OURS, precision, compiled()),
            Contestant(f"ours, {precision}, CUDA graphs", OURS, precision, graphs),
        ]
        if precision in ("bf16", "tf32"):
            name = f"Hugging Face, {precision}, compile"
            found.append(Contestant(name, HUGGING_FACE, precision, compiled()))
    return found


def prepared(
    contestant: Contestant, weights: Weights, given: dict[str, Any], expected: list[Outputs], figures: Figures
) -> Step:
    """One contestant's step, with its agreement, time alone and memory in the figures.

    Args:
        contestant: to prepare.
        weights: those of all.
        given: the batch.
        expected: outputs of the yardstick, which are put there if it is this one.
        figures: for what is found.

    Raises:
        ValueError: ours in float32 is off by more than :data:`TOLERANCE`.
    """
    model = weights.predicting_model(contestant)
    found = outputs(contestant, model, given)
    if not expected:  # the yardstick; where it is not in this process, its outputs are computed all the same
        stock = Contestant(YARDSTICK, STOCK, "fp32")
        same = contestant.name == YARDSTICK
        expected.append(found if same else outputs(stock, weights.predicting_model(stock), given))
    agreement = apart(found, expected[0])
    figures.append("alone", contestant.name, agreement=agreement)
    largest = max(agreement[f"largest {what} difference"] for what in ("score", "box"))
    print(f"{contestant.name}: differs by {largest:.1e}", flush=True)
    # Hugging Face places the padding's positions differently: reported, not required.
    if contestant.precision == "fp32" and contestant.kind == OURS and not largest <= TOLERANCE:
        raise ValueError(f"predictions differ by {largest:.1e}")
    step = inference_step(contestant, model, given)
    step()
    figures.append("alone", contestant.name, alone_ms=time_ms(step, 3, weights.device))
    figures.append("alone", contestant.name, memory_mb=peak_mb(weights.device, step))
    return step


def measure(args: argparse.Namespace) -> None:
    """All contestants of one process on every batch size; figures go to ``--figures``."""
    time_limit = Deadline(args.seconds)
    device, environment = set_up(args)
    Figures(args.figures, NAME).append("environment", **environment)
    weights = Weights(device, args.quick)
    for number, batch in enumerate(args.batches, start=1):
        figures = Figures(args.figures, NAME, f"batch {batch}")
        given = padded_batch(tuple(args.size), batch, args.boxes, device)
        share = number / len(args.batches)
        here = Deadline(args.seconds and time_limit.left_s(share))
        ready = Deadline(args.seconds and 0.7 * here.left_s())
        steps: dict[str, Step] = {}
        expected: list[Outputs] = []
        for contestant in chosen_contestants(args, contestants()):
            step = attempt(
                figures,
                contestant.name,
                functools.partial(prepared, contestant, weights, given, expected, figures),
                ready if steps else time_limit,
                device,
            )
            if step is not None:
                steps[contestant.name] = step
        times = alternate_on(device, steps, args.rounds, YARDSTICK, 3, 3, figures, here)
        for name, found in times.items():
            figures.append("times", name, batch=batch, **found)
        steps.clear()
        free(device)
    Figures(args.figures, NAME).append("environment", load_after=load_average())


def main() -> int:
    """Read the command line."""
    precisions = ("fp32", "tf32", "fp16", "bf16", "defaults")
    parser = arguments((__doc__ or "").split("\n")[0], precisions, rounds=11)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    if args.quick:
        args.size, args.batches, args.rounds, args.no_compile = [64, 96], [2], 1, True
        if args.only is None:
            args.precisions = ["fp32", "bf16"]
    if args.figures:
        measure(args)
        return 0
    # A compiled contestant on a second batch size would be compiled anew, for sizes of any value.
    groups = [
        ["--batches", *batches, "--only", *names]
        for names in groups_of(chosen_contestants(args, contestants()))
        for batches in _together(names, args.batches)
    ]
    return run_and_record(Path(__file__), groups, args)


def _together(names: list[str], batches: list[int]) -> list[list[str]]:
    """Batch sizes that share a process."""
    texts = [str(batch) for batch in batches]
    compiles = any(one.is_compiled for one in contestants() if one.name in names)
    return [[text] for text in texts] if compiles else [texts]


if __name__ == "__main__":
    sys.exit(main())
