"""Deformable sampling on a GPU: mmcv's compiled op, the Triton kernels and the PyTorch form, side by side.

One process, the same inputs: the encoder's (every cell of four levels asks) and the decoder's (300 queries)
of four 800x1333 images, 8 heads of 32 channels, 4 points, values in float32, float16 and bfloat16. Before
the clock starts, forward and gradients of all are compared with the PyTorch form in float32; contestants
that differ are reported and left out. Then they alternate, forward alone and backward alone. The PyTorch
form is mmcv's, which Hugging Face's model has under another name.

Run: ``python benchmarks/attention_gpu.py`` (``--record`` writes
``benchmarks/records/attention_gpu.{json,md}``; ``--device cpu --quick`` tries it out on tiny inputs, with the
Triton kernels where ``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
RECORD = Path(__file__).parent / "records" / "attention_gpu"

import torch  # noqa: E402
from environment import heading, load_average, report  # noqa: E402
from gpu_alternating import alternate_on, describe_device, device_of, megabytes, peak_mb, times_text  # noqa: E402
from torch import Tensor  # noqa: E402

import ddetr_mm  # noqa: E402, F401  (before mmcv's ops: answers for the compiled ones)

from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # isort: skip  # noqa: E402

from ddetr_mm.models.deformable_attention import level_layout  # noqa: E402
from ddetr_mm.models.sampling_choice import agree  # noqa: E402
from ddetr_mm.models.triton_attention import backward_candidates, forward_candidates  # noqa: E402

STRIDES, CHANNELS, POINTS = (8, 16, 32, 64), 32, 4
PYTORCH, MMCV = "PyTorch form", "mmcv"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Run = Callable[..., tuple[Tensor, ...]]


def inputs(args: argparse.Namespace, queries: int | None, device: torch.device) -> dict[str, Any]:
    """Values, locations around each query's own place, and weights; ``queries`` None: one a cell."""
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device)
    height, width = args.size
    sizes_hw = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    centers = torch.cat([_cell_centers(*size, device) for size in sizes_hw])
    num_values = len(centers)
    if queries is not None:
        centers = torch.rand(queries, 2, generator=generator, device=device)
    shape = (args.batch, len(centers), args.heads, len(sizes_hw), POINTS)
    return {
        "sizes_hw": sizes_hw,
        "value": random(args.batch, num_values, args.heads, CHANNELS),
        "locations": centers[None, :, None, None, None] + 0.03 * random(*shape, 2),
        "weights": random(shape).flatten(3).softmax(-1).view(shape),
        "upstream": random(args.batch, len(centers), args.heads * CHANNELS),
    }


def _cell_centers(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) as (x, y), 0..1."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(((xs + 0.5) / width, (ys + 0.5) / height), dim=-1).reshape(-1, 2).to(device)


def pytorch_forward(sizes_hw: list, value: Tensor, locations: Tensor, weights: Tensor, *_: Tensor) -> tuple:
    """mmcv's PyTorch form in float32, as it must be in half precision, too: locations need it."""
    output = multi_scale_deformable_attn_pytorch(value.float(), sizes_hw, locations, weights)
    return (output.to(value.dtype),)


def pytorch_backward(
    sizes_hw: list, upstream: Tensor, value: Tensor, locations: Tensor, weights: Tensor, *_: Tensor
) -> tuple:
    """Forward and all gradients: autograd cannot run the one without the other."""
    needed = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    return torch.autograd.grad(pytorch_forward(sizes_hw, *needed)[0], needed, upstream)


def contestants(direction: str, given: dict[str, Any], device: torch.device) -> dict[str, Run]:
    """The contestants; the yardstick first."""
    find, pytorch = {
        "forward": (forward_candidates, pytorch_forward),
        "backward": (backward_candidates, pytorch_backward),
    }[direction]
    found: dict[str, Run] = {candidate.name: candidate.run for candidate in find(device)}
    found[PYTORCH] = functools.partial(pytorch, given["sizes_hw"])
    return found


def agreeing(
    runs: dict[str, Run], tensors: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> tuple[dict[str, Run], dict[str, float], list[str]]:
    """Who computes the same as the PyTorch form in float32: runs, how far all are apart, who differs."""
    expected = runs[PYTORCH](*exact)
    kept, apart, wrong = {}, {}, []
    for name, run in runs.items():
        found = run(*tensors)
        # Judged by the dtype of the values, in which all results but locations' gradients come.
        dtype = found[0].dtype
        judged = [(one.to(dtype), other.to(dtype)) for one, other in zip(found, expected, strict=True)]
        apart[name] = max(_quantile_apart(one, other) for one, other in judged)
        if agree(*zip(*judged, strict=True)):
            kept[name] = run
        else:
            wrong.append(name)
    return kept, apart, wrong


def _quantile_apart(found: Tensor, expected: Tensor) -> float:
    """The 999th of 1,000 differences, relative to the largest value: locations on a cell's edge jump."""
    apart = (found.float() - expected.float()).abs().flatten() / expected.float().abs().max()
    return float(apart.kthvalue(max(1, int(0.999 * apart.numel()))).values)


def compare(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Encoder and decoder, all dtypes, forward and backward."""
    rows = []
    for part, queries in (("encoder", None), ("decoder", args.queries)):
        given = inputs(args, queries, device)
        geometry = level_layout(given["sizes_hw"], device)
        for dtype_name in args.dtypes:
            exact = (given["value"], given["locations"], given["weights"], *geometry)
            tensors = (given["value"].to(DTYPES[dtype_name]), *exact[1:])
            for direction in ("forward", "backward"):
                if direction == "backward":
                    exact = (given["upstream"], *exact)
                    tensors = (given["upstream"].to(DTYPES[dtype_name]), *tensors)
                runs, apart, wrong = agreeing(contestants(direction, given, device), tensors, exact)
                steps = {name: functools.partial(run, *tensors) for name, run in runs.items()}
                yardstick = MMCV if MMCV in steps else PYTORCH
                row = {
                    "part": part,
                    "queries": given["upstream"].shape[1],
                    "dtype": dtype_name,
                    "direction": direction,
                    "yardstick": yardstick,
                    "differ": apart,
                    "left_out": wrong,
                    "memory_mb": {name: peak_mb(device, step) for name, step in steps.items()},
                    "times": alternate_on(device, steps, args.rounds, yardstick, repeats=5),
                }
                rows.append(row)
                print(*markdown_rows(row), sep="\n", flush=True)
    return rows


def markdown_rows(row: dict[str, Any]) -> list[str]:
    """A line a contestant."""
    head = f"| {row['part']}, {row['queries']:,} | {row['dtype']} | {row['direction']}"
    lines = [
        f"{head} | {name} | {times_text(times)} | {times['speedup']:.2f} | {row['differ'][name]:.1e} "
        f"| {megabytes(row['memory_mb'][name])} |"
        for name, times in row["times"].items()
    ]
    return lines + [
        f"{head} | {name} | differs | | {row['differ'][name]:.1e} | |" for name in row["left_out"]
    ]


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("Deformable sampling on a GPU", result["environment"])
    lines += [
        f"- levels: {result['sizes_hw']}, batch {result['batch']}",
        "",
        "Milliseconds: median (smallest to largest); how many times mmcv's op, or the PyTorch form where",
        "that is not installed; largest difference from the PyTorch form in float32, relative to the largest",
        "value and but for one element of a thousand; peak memory beyond the inputs, MB. `triton 32x4`: 32",
        "queries a program, 4 warps; `gather`: the deterministic gradient of the values. The PyTorch form's",
        "backward includes its forward.",
        "",
        "| queries | values | | | ms | speed | differs | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        lines += markdown_rows(row)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--queries", type=int, default=300, help="the decoder's")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny inputs, one round")
    parser.add_argument("--record", action="store_true", help="write the record")
    args = parser.parse_args()
    if args.quick:
        args.size, args.batch, args.queries, args.heads, args.rounds = [16, 24], 1, 3, 1, 1
    device = device_of(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    environment = describe_device(device)
    rows = compare(args, device)
    height, width = args.size
    levels = [[-(-height // stride), -(-width // stride)] for stride in STRIDES]
    environment["heads"] = args.heads
    result = {"environment": environment, "sizes_hw": levels, "batch": args.batch, "rows": rows}
    environment["load_after"] = load_average()
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
