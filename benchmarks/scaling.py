"""How the cost of a training step grows: with image size, queries, levels, batch and objects per image.

One axis at a time is varied around a base (ResNet-50, 256 x 320 pixels, four levels, 300 queries, batch 1,
10 objects); a step is forward, loss and backward on the CPU. The exponent is the slope of a line through the
logarithms of axis and time: 1 is proportional, 2 quadratic. What the algorithm must do grows at most in
proportion to pixels and batch; with queries there is a small quadratic part, the decoder's
self-attention, and with objects the assignment's.

Run: ``python benchmarks/scaling.py`` (``--rounds 1`` for a quick look; ``--record`` writes
``benchmarks/records/scaling_cpu.{json,md}`` and ``docs/scaling.svg``).
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "scaling_cpu"
PICTURE = ROOT / "docs" / "scaling.svg"

import torch  # noqa: E402
from detectors_cpu import MODELS, batch, our_config, register_all_modules  # noqa: E402
from environment import describe, heading, load_average, report  # noqa: E402
from torch import nn  # noqa: E402

BASE = {"pixels": 256 * 320, "queries": 300, "levels": 4, "batch": 1, "objects": 10}
AXES = {
    "pixels": [128 * 160, 192 * 256, 256 * 320, 384 * 480, 512 * 640],
    "queries": [100, 300, 900, 1800],
    "levels": [2, 3, 4, 5],
    "batch": [1, 2, 4],
    "objects": [1, 10, 100, 300],
}
SIZES_HW = {height * width: (height, width)
            for height, width in ((128, 160), (192, 256), (256, 320), (384, 480), (512, 640))}  # fmt: skip


def build(queries: int, levels: int) -> nn.Module:
    """Our detector with random weights."""
    config = our_config(zero_padded_values=False)
    config.num_queries, config.num_feature_levels = queries, levels
    stages = min(levels, 4) if levels < 4 else 3
    config.backbone.out_indices = list(range(4 - stages, 4))
    config.neck.in_channels = [256 * 2**stage for stage in config.backbone.out_indices]
    config.neck.num_outs = levels
    config.encoder.layer_cfg.self_attn_cfg.num_levels = levels
    config.decoder.layer_cfg.cross_attn_cfg.num_levels = levels
    return MODELS.build(config)


def step_seconds(settings: dict[str, int], rounds: int) -> float:
    """Median processor time of a step; other load disturbs it less than wall time."""
    torch.manual_seed(0)
    model = build(settings["queries"], settings["levels"]).train()
    given = batch(SIZES_HW[settings["pixels"]], settings["objects"])
    images = given["image"].expand(settings["batch"], -1, -1, -1)
    times = []
    for number in range(rounds + 1):
        samples = copy.deepcopy(given["samples"] * settings["batch"])
        began = time.process_time()
        loss, _ = model.parse_losses(model.loss(images, samples))
        loss.backward()
        if number:
            times.append(time.process_time() - began)
        model.zero_grad()
    return statistics.median(times)


def exponent(values: list[int], seconds: list[float]) -> float:
    """Slope of the least squares line through the logarithms."""
    xs, ys = [math.log(value) for value in values], [math.log(value) for value in seconds]
    center_x, center_y = statistics.fmean(xs), statistics.fmean(ys)
    return sum((x - center_x) * (y - center_y) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - center_x) ** 2 for x in xs
    )


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("How a training step's cost grows", result["environment"])
    lines += ["", "Seconds of processor time a step, and the exponent of the growth:", ""]
    lines += ["| axis | value: seconds | exponent |", "| --- | --- | --- |"]
    for axis, row in result["axes"].items():
        told = ", ".join(
            f"{value:,}: {seconds:.2f}" for value, seconds in zip(row["values"], row["seconds"], strict=True)
        )
        lines.append(f"| {axis} | {told} | {row['exponent']:.2f} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """One small plot an axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ddetr_mm"})
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, len(result["axes"]), figsize=(14, 2.8), sharey=True)
    for plot, (axis, row) in zip(plots, result["axes"].items(), strict=True):
        plot.loglog(row["values"], row["seconds"], marker="o")
        plot.set_title(f"{axis}, exponent {row['exponent']:.2f}", fontsize=10)
        plot.set_xticks(row["values"], [f"{value:,}" for value in row["values"]], rotation=40, fontsize=8)
        plot.minorticks_off()
        plot.grid(alpha=0.3)
    plots[0].set_ylabel("seconds a step")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help="write the record and the picture")
    args = parser.parse_args()
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"environment": describe("torch", "mmdet", "ddetr_mm"), "axes": {}}
    for axis, values in AXES.items():
        seconds = [step_seconds({**BASE, axis: value}, args.rounds) for value in values]
        result["axes"][axis] = {"values": values, "seconds": seconds, "exponent": exponent(values, seconds)}
        print(axis, result["axes"][axis], flush=True)
    result["environment"]["load_after"] = load_average()
    report(result, markdown(result), RECORD if args.record else None)
    if args.record:
        draw(result, PICTURE)


if __name__ == "__main__":
    main()
