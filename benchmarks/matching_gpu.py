"""Assignment of queries to objects: by SciPy on the host, and by torch-linear-assignment on the GPU.

Six decoder layers, eight images, 300 queries, and 7, 50 or 300 objects an image, costs on the GPU. SciPy
takes one copy to the host and one back. The package (Apache 2.0) solves all problems of a batch with a
Triton kernel on NVIDIA GPUs from compute capability 8.0 on, and with SciPy elsewhere. Both must find pairs of
the same total cost. It takes part where it is installed.

Run: ``python benchmarks/matching_gpu.py`` (``--record`` writes
``benchmarks/records/matching_gpu.{jsonl,json,md}``; ``--device cpu --quick`` tries it out).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from environment import load_average  # noqa: E402
from gpu_alternating import Step, alternate_on, attempt, describe_device, device_of, time_ms  # noqa: E402
from gpu_process import Deadline, Figures, add_process_arguments, run_and_record  # noqa: E402
from torch import Tensor  # noqa: E402

import ddetr_mm.register  # noqa: E402, F401
from ddetr_mm.models.losses import SCIPY, TORCH_LINEAR_ASSIGNMENT, assign_all_layers  # noqa: E402

NAME = Path(__file__).stem
OURS, PACKAGE = "SciPy", TORCH_LINEAR_ASSIGNMENT
LAYERS, QUERIES, CLASSES = 6, 300, 80


def costs_of(objects: int, batch: int, device: torch.device) -> Tensor:
    """Random costs (layers, batch * objects, queries) float32."""
    generator = torch.Generator().manual_seed(objects)
    return torch.rand(LAYERS, batch * objects, QUERIES, generator=generator).to(device)


def match(matcher: str, costs: Tensor, batch: int) -> Tensor:
    """The product's function; returns pairs (4, M): layer, image, query, object of the batch."""
    count = costs.shape[1] // batch
    image_index = torch.arange(batch, device=costs.device).repeat_interleave(count)
    objects = SimpleNamespace(counts=(count,) * batch, image_index=image_index)
    found = assign_all_layers(costs, objects, CLASSES, matcher)  # type: ignore[arg-type]
    return torch.stack((found.layer, found.image, found.query, found.target))


def total_costs(costs: Tensor, pairs: Tensor) -> Tensor:
    """(layers,) float64: the sum of the costs of each layer's pairs.

    Raises:
        ValueError: a query or an object of a layer is in two pairs.
    """
    layer, image, query, target = pairs.cpu()
    for one in ((layer * 10_000 + image) * QUERIES + query, layer * costs.shape[1] + target):
        if len(one.unique()) != len(one):
            raise ValueError("a query or an object is in two pairs")
    chosen = costs.cpu().double()[layer, target, query]
    return torch.zeros(LAYERS, dtype=torch.float64).index_add(0, layer, chosen)


def measure(args: argparse.Namespace) -> None:
    """All numbers of objects; figures go to ``--figures``."""
    time_limit, device = Deadline(args.seconds), device_of(args.device)
    whole = Figures(args.figures, NAME)
    whole.append("environment", **describe_device(device, PACKAGE), batch=args.batch)
    runs = {OURS: functools.partial(match, SCIPY)}
    if importlib.util.find_spec("torch_linear_assignment"):
        runs[PACKAGE] = functools.partial(match, TORCH_LINEAR_ASSIGNMENT)
    else:
        whole.append("note", text=f"{PACKAGE} is not installed: pip install {PACKAGE}")
    for objects in args.objects:
        figures = whole.of_row(f"{objects} objects")
        costs = costs_of(objects, args.batch, device)
        expected = total_costs(costs, match(SCIPY, costs, args.batch))

        def alone(name: str, run: Any, costs: Tensor, expected: Tensor, figures: Figures) -> Step:
            step = functools.partial(run, costs, args.batch)
            apart = float(((total_costs(costs, step()) - expected) / expected).abs().max())
            figures.append("alone", name, differs=apart)
            if not apart < 1e-5:
                raise ValueError(f"the pairs cost {apart:.1e} more")
            figures.append("alone", name, alone_ms=time_ms(step, 3, device))
            return step

        steps = {}
        for name, run in runs.items():
            work = functools.partial(alone, name, run, costs, expected, figures)
            step = attempt(figures, name, work, time_limit, device)
            if step is not None:
                steps[name] = step
        for name, found in alternate_on(device, steps, args.rounds, OURS, 1, 3, figures, time_limit).items():
            figures.append("times", name, **found)
        print(f"{objects} objects: {', '.join(steps)}", flush=True)
    whole.append("environment", load_after=load_average())


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--objects", type=int, nargs="+", default=[7, 50, 300], help="of an image")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two images, one round")
    add_process_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.rounds = 2, 1
    if max(args.objects) > QUERIES:
        parser.error(f"at most {QUERIES} objects")
    if args.figures:
        measure(args)
        return 0
    return run_and_record(Path(__file__), [[]], args)


if __name__ == "__main__":
    sys.exit(main())
