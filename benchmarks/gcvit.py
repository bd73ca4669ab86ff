"""GCViT: ours beside timm's in one process, the same weights, at 224 x 224; and ours alone at 800 x 1344.

Both backbones get timm's weights (ours through its loader) and the same images. Before the clock starts
their last feature and the gradients of all weights are compared; the benchmark stops where they differ. Then
the two alternate, each first in every other round, and the ratio is the median of the rounds' own ratios, so
that what else runs on the machine weighs on both. ``cpu`` is processor time over all threads.
timm's model is fixed to its training size; what it says at 800 x 1344 is in the record.

Run: ``python benchmarks/gcvit.py`` (``--variants xxtiny --rounds 3`` for a quick look; ``--record`` writes
``benchmarks/records/gcvit.{json,md}``; ``--device cuda`` on a GPU).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "gcvit"

import timm  # noqa: E402
import torch  # noqa: E402
from alternating import alternate  # noqa: E402
from environment import describe, heading, load_average, report  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ddetr_mm.models import GCViT  # noqa: E402
from ddetr_mm.weights import load_backbone  # noqa: E402

TOLERANCE = 1e-4
LARGE_HW = (800, 1344)
Step = Callable[[], None]


def pair(variant: str, device: str) -> tuple[nn.Module, GCViT, dict[str, str]]:
    """timm's model, ours with its weights, neither dropping anything, and timm's names with ours."""
    torch.manual_seed(0)
    theirs = timm.create_model(f"gcvit_{variant}", pretrained=False, num_classes=0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and position tables that matter
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours = GCViT(variant, out_indices=(3,), drop_path_rate=0.0)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), f"{folder}/timm.pth")
        report = load_backbone(ours, f"{folder}/timm.pth")
    if not report.complete:
        raise SystemExit(f"the weights cannot be converted: {report.summary()}")
    return theirs.to(device), ours.to(device), {key: name for key, (name,) in report.mapped.items()}


def loss(feature: Tensor) -> Tensor:
    """A number whose gradient is not zero: the mean square of a normalised feature would be constant."""
    return feature.pow(3).mean()


def gradients(feature: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the loss, flat."""
    model.zero_grad()
    loss(feature).backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}


def agreement(theirs: nn.Module, ours: GCViT, names: dict[str, str], images: Tensor) -> dict[str, float]:
    """Largest differences of the last feature and, relative to the largest, of the gradients.

    Raises:
        SystemExit: they differ, so their times say nothing.
    """
    theirs_feature, ours_feature = theirs.forward_features(images), ours(images)[0]
    feature = (theirs_feature - ours_feature).abs().max().item()
    expected, got = gradients(theirs_feature, theirs), gradients(ours_feature, ours)
    largest = max(value.abs().max().item() for value in expected.values())
    gradient = max((expected[name] - got[names[name]]).abs().max().item() for name in expected) / largest
    if max(feature, gradient) > TOLERANCE:
        raise SystemExit(f"results differ: feature {feature:.1e}, gradient {gradient:.1e}")
    return {"feature": feature, "gradient": gradient}


def steps(theirs: nn.Module, ours: GCViT, images: Tensor, training: bool) -> dict[str, Step]:
    """What one round runs of each."""

    def step(forward: Callable[[Tensor], Tensor], model: nn.Module) -> Step:
        def run() -> None:
            with torch.set_grad_enabled(training):
                feature = forward(images)
            if training:
                model.zero_grad()
                loss(feature).backward()
            if images.is_cuda:
                torch.cuda.synchronize()

        return run

    theirs.train(training)
    ours.train(training)
    return {"timm": step(theirs.forward_features, theirs), "ours": step(lambda x: ours(x)[0], ours)}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every variant and batch size, forward and forward + backward, at 224 x 224."""
    rows = []
    for variant in args.variants:
        theirs, ours, names = pair(variant, args.device)
        for batch in args.batches:
            images = torch.randn(batch, 3, 224, 224, device=args.device)
            same = agreement(theirs, ours, names, images)
            for training in (False, True):
                times = alternate(steps(theirs, ours, images, training), args.rounds, "timm")
                mode = "forward + backward" if training else "forward"
                rows.append({"variant": variant, "batch": batch, "mode": mode, "differ": same, **times})
                print(_row(rows[-1]), flush=True)
    return rows


def large(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours at 800 x 1344, all four features, and what timm says to that size."""
    rows = []
    images = torch.randn(1, 3, *LARGE_HW, device=args.device)
    for variant in args.variants:
        theirs = pair(variant, args.device)[0]
        try:
            with torch.no_grad():
                theirs.eval().forward_features(images)
            refusal = "runs"
        except (AssertionError, RuntimeError, ValueError) as error:
            refusal = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        del theirs
        model = GCViT(variant, drop_path_rate=0.0).to(args.device)

        def run(training: bool, model: GCViT = model) -> None:
            with torch.set_grad_enabled(training):
                features = model.train(training)(images)
            if training:
                model.zero_grad()
                torch.stack([loss(feature) for feature in features]).sum().backward()
            if images.is_cuda:
                torch.cuda.synchronize()

        for mode, training in (("forward", False), ("forward + backward", True)):
            step = {"ours": lambda training=training: run(training)}
            times = alternate(step, max(2, args.rounds // 3), "ours")
            rows.append({"variant": variant, "mode": mode, "timm": refusal, **times})
            print(variant, mode, f"{times['ours']['median_ms']:.0f} ms; timm: {refusal}", flush=True)
    return rows


def _row(row: dict[str, Any]) -> str:
    def told(times: dict[str, float]) -> str:
        return f"{times['median_ms']:.0f} ({times['min_ms']:.0f} to {times['max_ms']:.0f})"

    return (
        f"| {row['variant']} | {row['batch']} | {row['mode']} | {told(row['timm'])} | {told(row['ours'])} "
        f"| {row['ours']['speedup']:.2f} | {row['ours']['cpu_speedup']:.2f} |"
    )


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("GCViT, ours beside timm's", result["environment"])
    lines += [
        "",
        "224 x 224, float32, milliseconds: median (smallest to largest). The ratio is timm's time over ours.",
        "",
        "| variant | batch | | timm | ours | ratio | ratio of cpu time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(row) for row in result["at_224"]),
        "",
        f"Largest difference of the features: {_largest(result, 'feature'):.1e}; of the gradients, relative "
        f"to the largest: {_largest(result, 'gradient'):.1e}.",
        "",
        "800 x 1344, batch 1, four stages out, milliseconds:",
        "",
        "| variant | | ours | timm |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["at_800x1344"]:
        times = row["ours"]
        told = f"{times['median_ms']:.0f} ({times['min_ms']:.0f} to {times['max_ms']:.0f})"
        lines.append(f"| {row['variant']} | {row['mode']} | {told} | {row['timm']} |")
    return "\n".join(lines) + "\n"


def _largest(result: dict[str, Any], what: str) -> float:
    return max(row["differ"][what] for row in result["at_224"])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["xxtiny", "small"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="write the record")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment = describe("torch", "timm", "ddetr_mm")
    if args.device != "cpu":
        environment["device"] = torch.cuda.get_device_name(args.device)
    environment["threads"] = args.threads
    result = {"environment": environment, "at_224": compare(args), "at_800x1344": large(args)}
    environment["load_after"] = load_average()
    record = RECORD if args.device == "cpu" else RECORD.with_name(f"gcvit_{args.device}")
    report(result, markdown(result), record if args.record else None)


if __name__ == "__main__":
    main()
