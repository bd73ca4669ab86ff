"""Deformable sampling on the CPU: ours, mmcv's PyTorch form and the compiled package, side by side.

One process, the same inputs: the encoder's of a 480x640 and an 800x1333 image (each cell of four levels asks)
and the decoder's (300 queries), 8 heads of 32 channels, 4 points. Ours takes bags for the encoder's many
queries, and mmcv's form for the decoder's. Before the clock starts all results and
gradients are compared; the benchmark stops where they differ. Then the contestants alternate. Peak memory is
that of a forked process a contestant, forward and backward once.

``torch-ms-deform-attn`` (https://github.com/S-aiueo32/torch-ms-deform-attn) is included where it is
installed; it is built from source.

Run: ``python benchmarks/attention.py`` (``--sizes 480x640 --rounds 3`` for a quick look; ``--record`` writes
``benchmarks/records/attention_cpu.{json,md}``).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "attention_cpu"

import torch  # noqa: E402
from alternating import alternate, peak_growth_mb  # noqa: E402
from environment import describe, heading, load_average, report  # noqa: E402
from torch import Tensor  # noqa: E402

import ddetr_mm  # noqa: E402, F401  (before mmcv's ops: answers for the compiled ones)

from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # isort: skip  # noqa: E402

from ddetr_mm.models.deformable_attention import sample_values  # noqa: E402

HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)
MMCV, PACKAGE, OURS = "mmcv, PyTorch", "torch-ms-deform-attn", "ours"
TOLERANCE = 1e-4
Sampler = Callable[[], Tensor]


def inputs(image_hw: tuple[int, int], queries: int | None, batch: int) -> dict[str, Any]:
    """Values, locations around each query's own place, weights; ``queries`` None: one a cell."""
    generator = torch.Generator().manual_seed(0)
    sizes_hw = [(-(-image_hw[0] // stride), -(-image_hw[1] // stride)) for stride in STRIDES]
    centers = torch.cat([cell_centers(height, width) for height, width in sizes_hw])
    num_values = len(centers)
    if queries is not None:
        centers = torch.rand(queries, 2, generator=generator)
    shape = (batch, len(centers), HEADS, len(sizes_hw), POINTS)
    spread = 0.03 * torch.randn(*shape, 2, generator=generator)
    return {
        "value": torch.randn(batch, num_values, HEADS, CHANNELS, generator=generator).requires_grad_(),
        "locations": (centers[None, :, None, None, None] + spread).requires_grad_(),
        "weights": torch.randn(shape, generator=generator)
        .flatten(3)
        .softmax(-1)
        .view(shape)
        .requires_grad_(),
        "sizes_hw": sizes_hw,
        "upstream": torch.randn(batch, len(centers), HEADS * CHANNELS, generator=generator),
    }


def cell_centers(height: int, width: int) -> Tensor:
    """(height * width, 2) as (x, y), 0..1."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(((xs + 0.5) / width, (ys + 0.5) / height), dim=-1).reshape(-1, 2)


def samplers(given: dict[str, Any]) -> dict[str, Sampler]:
    """The contestants on these inputs."""
    value, locations, weights, sizes_hw = (
        given[key] for key in ("value", "locations", "weights", "sizes_hw")
    )
    shapes = torch.tensor(sizes_hw)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    found: dict[str, Sampler] = {
        MMCV: lambda: multi_scale_deformable_attn_pytorch(value, sizes_hw, locations, weights),
        # "mmcv" is another name for all that is not the package: see sample_values.
        OURS: lambda: sample_values(
            value, locations, weights, sizes_hw, shapes, starts, implementation="mmcv"
        ),
    }
    if importlib.util.find_spec("torch_ms_deform_attn"):
        from torch_ms_deform_attn import ms_deform_attn

        found[PACKAGE] = lambda: ms_deform_attn(value, shapes, starts, locations, weights)
    return found


def backward(sampler: Sampler, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Forward and all gradients."""
    needed = (given["value"], given["locations"], given["weights"])
    return torch.autograd.grad(sampler(), needed, given["upstream"])


def difference(contestants: dict[str, Sampler], given: dict[str, Any]) -> float:
    """Largest difference from mmcv's form, relative to the largest value.

    Raises:
        SystemExit: the results differ, so times say nothing.
    """
    outcomes = {name: (run().detach(), *backward(run, given)) for name, run in contestants.items()}
    worst = 0.0
    for name, outcome in outcomes.items():
        for found, expected in zip(outcome, outcomes[MMCV], strict=True):
            # A few locations fall on a cell's edge, where the gradient jumps and rounding decides.
            apart = (found - expected).abs().flatten() / expected.abs().max()
            apart = apart.kthvalue(max(1, int(0.9999 * apart.numel()))).values.item()
            if apart > TOLERANCE:
                raise SystemExit(f"{name} differs from mmcv's form: {apart:.1e}")
            worst = max(worst, apart)
    return worst


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sizes, forward alone and forward + backward."""
    cases = []
    for size in args.sizes:
        cases += [(size, "encoder", None), (size, "decoder", 300)]
    memory = {case: peak_memory(case, args.batch) for case in cases}
    torch.set_num_threads(args.threads)
    rows = []
    for case in cases:
        size, part, queries = case
        given = inputs(tuple(map(int, size.split("x"))), queries, args.batch)
        contestants = samplers(given)
        worst = difference(contestants, given)

        def forward(run: Sampler) -> None:
            with torch.no_grad():
                run()

        modes = {
            "forward": {name: functools.partial(forward, run) for name, run in contestants.items()},
            "forward + backward": {
                name: functools.partial(backward, run, given) for name, run in contestants.items()
            },
        }
        for mode, steps in modes.items():
            times = alternate(steps, args.rounds, MMCV)
            row = {"size": size, "part": part, "queries": given["upstream"].shape[1], "mode": mode}
            rows.append({**row, "times": times, "memory_mb": memory[case], "differ": worst})
            print(*markdown_rows(rows[-1]), sep="\n", flush=True)
    return rows


def peak_memory(case: tuple[str, str, int | None], batch: int) -> dict[str, float | None]:
    """Peak of one forward and backward, each contestant in a process forked before any thread starts."""
    size, _, queries = case

    def run(name: str) -> None:
        torch.set_num_threads(1)
        given = inputs(tuple(map(int, size.split("x"))), queries, batch)
        backward(samplers(given)[name], given)

    def inputs_only() -> None:
        torch.set_num_threads(1)
        inputs(tuple(map(int, size.split("x"))), queries, batch)

    names = [MMCV, OURS, *([PACKAGE] if importlib.util.find_spec("torch_ms_deform_attn") else [])]
    base = peak_growth_mb(inputs_only)
    peaks = {name: peak_growth_mb(functools.partial(run, name)) for name in names}
    return {name: None if peak is None or base is None else peak - base for name, peak in peaks.items()}


def markdown_rows(row: dict[str, Any]) -> list[str]:
    """A line a contestant."""
    lines = []
    for name, times in row["times"].items():
        memory = row["memory_mb"][name]
        told = f"{memory:.0f}" if memory is not None and row["mode"] != "forward" else ""
        lines.append(
            f"| {row['size']} | {row['part']}, {row['queries']:,} | {row['mode']} | {name} "
            f"| {times['median_ms']:.1f} ({times['min_ms']:.1f} to {times['max_ms']:.1f}) "
            f"| {times['speedup']:.2f} | {times['cpu_speedup']:.2f} | {told} |"
        )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("Deformable sampling on the CPU", result["environment"])
    lines += [
        "",
        "Milliseconds: median (smallest to largest); how many times mmcv's PyTorch form, by wall and by",
        "processor time; peak memory of one forward and backward beyond the inputs, MB.",
        "",
        "| image | queries | | | ms | times mmcv's | by processor | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        lines += markdown_rows(row)
    worst = max(row["differ"] for row in result["rows"])
    lines += ["", f"Largest difference of results and gradients, relative to the largest value: {worst:.1e}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["480x640", "800x1333"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help="write the record")
    args = parser.parse_args()
    environment = describe("torch", "mmcv-lite", "torch-ms-deform-attn", "ddetr_mm")
    environment["threads"] = args.threads
    result = {"environment": environment, "rows": compare(args)}
    environment["load_after"] = load_average()
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
