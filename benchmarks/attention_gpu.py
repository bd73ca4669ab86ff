"""Deformable sampling on a GPU: mmcv's compiled op, the Triton kernels and the PyTorch form, side by side.

The same inputs: the encoder's (every cell of four levels asks) and the decoder's (300 queries) of four
800x1333 images, 8 heads of 32 channels, 4 points, values in float32, bfloat16 and float16. Before the clock
starts, forward and gradients of all are compared with the PyTorch form in float32; contestants that differ
are reported and left out. Then they alternate, forward alone and backward alone: once from the offsets and
logits that the network gives (``fused``), once from locations and weights. The PyTorch form is mmcv's,
which Hugging Face's model has under another name. The package deformops (MIT, Triton kernels) takes part
where it is installed.

Every figure is written when it is known; after a crash another process continues without its cause.

Run: ``python benchmarks/attention_gpu.py`` (``--record`` writes
``benchmarks/records/attention_gpu.{jsonl,json,md}``; ``--device cpu --quick`` tries it out on tiny inputs,
with the Triton kernels where ``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
NAME = Path(__file__).stem

import torch  # noqa: E402
from environment import load_average  # noqa: E402
from gpu_alternating import (  # noqa: E402
    Step,
    alternate_on,
    attempt,
    describe_device,
    device_of,
    peak_mb,
    time_ms,
)
from gpu_process import Deadline, Figures, add_process_arguments, run_and_record  # noqa: E402
from torch import Tensor  # noqa: E402

import ddetr_mm  # noqa: E402, F401  (before mmcv's ops: answers for the compiled ones)

from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # isort: skip  # noqa: E402

from ddetr_mm.models import fused_sampling  # noqa: E402
from ddetr_mm.models.deformable_attention import level_layout  # noqa: E402
from ddetr_mm.models.sampling_choice import agree  # noqa: E402
from ddetr_mm.models.triton_attention import backward_candidates, forward_candidates  # noqa: E402

STRIDES, CHANNELS, POINTS = (8, 16, 32, 64), 32, 4
PYTORCH, MMCV, DEFORMOPS = "PyTorch form", "mmcv", "deformops"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("fused-forward", "fused-backward", "forward", "backward")
"""From offsets and logits, as the network samples; and sampling alone, from locations and weights."""
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
    spread, logits = 0.03 * random(*shape, 2), random(shape)
    sizes_wh = torch.tensor([size[::-1] for size in sizes_hw], device=device)
    return {
        "sizes_hw": sizes_hw,
        "value": random(args.batch, num_values, args.heads, CHANNELS),
        "locations": centers[None, :, None, None, None] + spread,
        "weights": logits.flatten(3).softmax(-1).view(shape),
        "upstream": random(args.batch, len(centers), args.heads * CHANNELS),
        # The same as a network computes it.
        "references": centers[None, :, None].expand(1, -1, len(sizes_hw), -1).contiguous(),
        "offsets": spread * sizes_wh[:, None],
        "logits": logits,
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


def deformops_forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor, starts: Tensor, **options: Any
) -> tuple:
    """The package's functional form, with the backend that it chooses."""
    msda = importlib.import_module("deformops.registry").msda
    return (msda(value, shapes, starts, locations, weights.flatten(3), **options),)


def deformops_backward(
    upstream: Tensor, value: Tensor, locations: Tensor, weights: Tensor, *layout: Tensor
) -> tuple:
    """Forward and all gradients."""
    needed = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    return torch.autograd.grad(deformops_forward(*needed, *layout)[0], needed, upstream)


def deformops_fused_forward(
    value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor, shapes: Tensor, starts: Tensor
) -> tuple:
    """The same with its own softmax; locations are computed before."""
    locations = references[:, :, None, :, None] + offsets.float() / shapes.flip(-1).float()[:, None]
    return deformops_forward(value, locations, logits, shapes, starts, method="softmax")


def deformops_fused_backward(
    upstream: Tensor, _: Tensor, value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor,
    *layout: Tensor,
) -> tuple:  # fmt: skip
    """Forward and all gradients."""
    needed = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
    output = deformops_fused_forward(needed[0], references, *needed[1:], *layout)[0]
    return torch.autograd.grad(output, needed, upstream)


def contestants(direction: str, given: dict[str, Any], device: torch.device) -> dict[str, Run]:
    """The contestants; the one that all are compared with first.

    Args:
        direction: of :data:`DIRECTIONS`.
        given: the inputs.
        device: where they run.
    """
    find, pytorch, deformops = {
        "forward": (
            forward_candidates,
            functools.partial(pytorch_forward, given["sizes_hw"]),
            deformops_forward,
        ),
        "backward": (
            backward_candidates,
            functools.partial(pytorch_backward, given["sizes_hw"]),
            deformops_backward,
        ),
        "fused-forward": (
            fused_sampling.forward_candidates,
            fused_sampling.PYTORCH_FORM["forward"].run,
            deformops_fused_forward,
        ),
        "fused-backward": (
            fused_sampling.backward_candidates,
            fused_sampling.PYTORCH_FORM["backward"].run,
            deformops_fused_backward,
        ),
    }[direction]
    found: dict[str, Run] = {PYTORCH: pytorch}
    found |= {candidate.name: candidate.run for candidate in find(device)}
    if importlib.util.find_spec("deformops"):
        found[DEFORMOPS] = deformops
    return found


def arguments_of(
    direction: str, given: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Arguments of the contestants in a dtype, and of the PyTorch form in float32.

    Args:
        direction: of :data:`DIRECTIONS`.
        given: the inputs.
        dtype: of the values, and of what else a network gives in it.
    """
    layout = level_layout(given["sizes_hw"], given["value"].device)
    half = {name: given[name].to(dtype) for name in ("value", "upstream", "offsets", "logits")}
    if direction in ("forward", "backward"):
        exact = (given["value"], given["locations"], given["weights"], *layout)
        tensors = (half["value"], *exact[1:])
        if direction == "backward":
            return (half["upstream"], *tensors), (given["upstream"], *exact)
        return tensors, exact
    # Offsets that are rounded sample elsewhere: all begin with the rounded ones.
    tensors = (half["value"], given["references"], half["offsets"], half["logits"], *layout)
    exact = (*(tensor.float() for tensor in tensors[:4]), *layout)
    if direction == "fused-backward":
        _, log_sums = fused_sampling.PYTORCH_FORM["forward"].run(*exact)
        return (half["upstream"], log_sums, *tensors), (half["upstream"].float(), log_sums, *exact)
    return tensors, exact


def judged(
    run: Run, tensors: tuple[Tensor, ...], expected: list[tuple[Tensor, ...]]
) -> tuple[float, bool, tuple[Tensor, ...]]:
    """How far a contestant's results are from the PyTorch form's in float32, and whether that is too far.

    Args:
        run: the contestant.
        tensors: its arguments.
        expected: the results; where it is empty, those of this contestant become it.
    """
    found = run(*tensors)
    if not expected:
        expected.append(found)
    # Judged by the dtype of the values, in which all results but locations' gradients come.
    dtype = found[0].dtype
    # deformops does not give the log-sum-exp of the logits.
    pairs = [(one.to(dtype), other.to(dtype)) for one, other in zip(found, expected[0], strict=False)]
    zeros = any(other.any() and not one.any() for one, other in pairs)
    apart = max(_quantile_apart(one, other) for one, other in pairs)
    return apart, not zeros and agree(*zip(*pairs, strict=True)), found


def _quantile_apart(found: Tensor, expected: Tensor) -> float:
    """The 999th of 1,000 differences, relative to the largest value: locations on a cell's edge jump."""
    apart = (found.float() - expected.float()).abs().flatten() / expected.float().abs().max()
    return float(apart.kthvalue(max(1, int(0.999 * apart.numel()))).values)


def measure(args: argparse.Namespace) -> None:
    """Encoder and decoder, all dtypes, forward and backward; figures go to ``--figures``."""
    time_limit = Deadline(args.seconds)
    device = device_of(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    height, width = args.size
    levels = [[-(-height // stride), -(-width // stride)] for stride in STRIDES]
    whole = Figures(args.figures, NAME)
    environment = {**describe_device(device, DEFORMOPS), "heads": args.heads, "batch": args.batch}
    whole.append("environment", **environment, levels=levels)
    if not importlib.util.find_spec("deformops"):
        text = "deformops is not installed (it needs Python 3.12 or 3.13): pip install deformops"
        whole.append("note", text=text)
    for part, queries in (("encoder", None), ("decoder", args.queries)):
        given = inputs(args, queries, device)
        for dtype in args.dtypes:
            for direction in DIRECTIONS:
                title = f"{part}, {given['upstream'].shape[1]:,} {dtype} {direction}"
                compare(args, given, dtype, direction, whole.of_row(title), time_limit)
    whole.append("environment", load_after=load_average())


def compare(
    args: argparse.Namespace,
    given: dict[str, Any],
    dtype: str,
    direction: str,
    figures: Figures,
    time_limit: Deadline,
) -> None:
    """All contestants on one row: each alone, then alternating."""
    if any(one["event"] == "times" for one in figures.events()):
        return  # a process before this one did it
    device = given["value"].device
    tensors, exact = arguments_of(direction, given, DTYPES[dtype])
    expected: list[tuple[Tensor, ...]] = []
    runs = contestants(direction, given, device)
    with contextlib.suppress(torch.cuda.OutOfMemoryError):  # then the row has no contestant
        judged(runs[PYTORCH], exact, expected)
    steps: dict[str, Step] = {}

    def alone(name: str, run: Run) -> Step | None:
        apart, agrees, _ = judged(run, tensors, expected)
        figures.append("alone", name, differs=apart, wrong=not agrees)
        if not agrees:
            return None
        step = functools.partial(run, *tensors)
        figures.append("alone", name, alone_ms=time_ms(step, 3, device))
        figures.append("alone", name, memory_mb=peak_mb(device, step))
        return step

    for name, run in runs.items():
        step = attempt(figures, name, functools.partial(alone, name, run), time_limit, device)
        if step is not None:
            steps[name] = step
    yardstick = MMCV if MMCV in steps else PYTORCH
    if not time_limit.has_passed():
        times = alternate_on(device, steps, args.rounds, yardstick, 1, 5, figures, time_limit)
        for name, found in times.items():
            figures.append("times", name, **found)
        print(f"{figures.row}: {', '.join(times)}", flush=True)


def main() -> int:
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
    add_process_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.size, args.batch, args.queries, args.heads, args.rounds = [16, 24], 1, 3, 1, 1
    if args.figures:
        measure(args)
        return 0
    return run_and_record(Path(__file__), [[]], args)


if __name__ == "__main__":
    sys.exit(main())
