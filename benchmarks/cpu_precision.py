"""bf16 against fp32 on a CPU: time of a step and of an inference, AP, loss of a training run.

Times: ours with ResNet-50, in turn, on one generated image. AP: ``ddetr-mm evaluate`` of a trained
checkpoint in both precisions. Loss: two training runs of the same spec and seed, which differ in
``train.precision`` alone.

    python benchmarks/cpu_precision.py --spec configs/specs/shapes_resnet18.yaml --checkpoint FILE --record
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from alternating import alternate
from detectors_cpu import OURS, batch, infer, our_config, predicting, stock_model, train
from environment import describe, heading, load_average, report
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from ddetr_mm.preflight.resources import BFLOAT16_FLAGS, flags_of_cpu

RECORD = Path(__file__).resolve().parent / "records" / "cpu_precision"
PRECISIONS = ("fp32", "bf16")


def times(size_hw: tuple[int, int], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of an inference and of a training step in both precisions, in turn."""
    register_all_modules(init_default_scope=True)
    stock = stock_model()
    found = {}
    given = batch(size_hw, 7)
    for mode, make in (("inference", infer), ("train", train)):
        steps = {}
        for precision in PRECISIONS:
            config = our_config(zero_padded_values=False)
            if mode == "inference" and precision == "bf16":
                config.predict_dtype = "bfloat16"
            model = MODELS.build(config)
            model.load_state_dict(stock.state_dict())
            model = predicting({OURS: model})[OURS].eval() if mode == "inference" else model.train()
            steps[precision] = _in(precision if mode == "train" else "fp32", make(OURS, model, given))
        found[mode] = alternate(steps, rounds, "fp32")
    return found


def _in(precision: str, step: Any) -> Any:
    """A step under autocast, as ``train.precision`` runs it."""

    def run() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return step()

    return run


def command(folder: Path, task: str, spec: str, *overrides: str) -> Path:
    """Run a task into a folder of its own."""
    words = [task, "-e", spec, *overrides, f"{task}.results_dir={folder}", "ddetr_mm.quick_check=false"]
    subprocess.run([sys.executable, "-m", "ddetr_mm", *words], check=True, stdout=subprocess.DEVNULL)
    return folder


def evaluated(spec: str, checkpoint: str, folder: Path) -> dict[str, dict[str, float]]:
    """AP and AP50 of a checkpoint in both precisions."""
    found = {}
    for precision in PRECISIONS:
        words = (f"evaluate.checkpoint={checkpoint}", f"ddetr_mm.predict_precision={precision}")
        results = json.loads(
            (command(folder / precision, "evaluate", spec, *words) / "results.json").read_text()
        )
        found[precision] = {name: results[name] for name in ("AP", "AP50")}
    return found


def trained(spec: str, epochs: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Mean loss of every epoch, AP at the end and median seconds of a step, in both precisions."""
    found = {}
    for precision in PRECISIONS:
        words = [f"train.precision={precision}", f"train.num_epochs={epochs}", "ddetr_mm.log_interval=1"]
        words += [f"train.{name}_interval={epochs}" for name in ("checkpoint", "validation")]
        words += [f"train.optim.lr_steps=[{max(1, epochs - 1)}]"]
        results = command(folder / f"train_{precision}", "train", spec, *words)
        (scalars,) = results.glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in scalars.read_text().splitlines()]
        steps = [line for line in lines if "loss" in line and "time" in line]
        by_epoch: dict[int, list[float]] = {}
        for line in steps:
            by_epoch.setdefault(line["epoch"], []).append(line["loss"])
        found[precision] = {
            "losses": [statistics.fmean(values) for _, values in sorted(by_epoch.items())],
            "AP": next(line["coco/bbox_mAP"] for line in reversed(lines) if "coco/bbox_mAP" in line),
            "step_s": statistics.median(line["time"] for line in steps),
        }
    return found


def text(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("bf16 on a CPU", result["environment"])
    lines += ["", "ResNet-50, 4 levels, refinement, batch 1; seconds: median (smallest to largest).", ""]
    lines += ["| | fp32 | bf16 | times fp32's speed |", "| --- | --- | --- | --- |"]
    for mode, rows in result["times"].items():
        cells = [
            f"{row['median_ms'] / 1e3:.2f} ({row['min_ms'] / 1e3:.2f} to {row['max_ms'] / 1e3:.2f})"
            for row in rows.values()
        ]
        lines.append(f"| {mode} | {' | '.join(cells)} | {rows['bf16']['speedup']:.2f} |")
    if "evaluated" in result:
        lines += ["", "The same checkpoint evaluated in both:", "", "| | AP | AP50 |", "| --- | --- | --- |"]
        lines += [
            f"| {name} | {one['AP']:.4f} | {one['AP50']:.4f} |" for name, one in result["evaluated"].items()
        ]
    if "trained" in result:
        runs = result["trained"]
        lines += ["", "Two training runs of the same spec and seed, mean loss of each epoch:", ""]
        lines += ["| epoch | " + " | ".join(runs) + " |", "| --- " * (len(runs) + 1) + "|"]
        for epoch, values in enumerate(zip(*(run["losses"] for run in runs.values()), strict=True), start=1):
            lines.append(f"| {epoch} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
        lines.append("| AP at the end | " + " | ".join(f"{run['AP']:.3f}" for run in runs.values()) + " |")
        lines.append(
            "| s a step, median | " + " | ".join(f"{run['step_s']:.2f}" for run in runs.values()) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--spec", help="of the checkpoint and of the training runs; without it only times")
    parser.add_argument("--checkpoint", help="a trained checkpoint of that spec")
    parser.add_argument("--epochs", type=int, default=5, help="of each training run (default 5; 0: none)")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}.md and .json")
    given = parser.parse_args()
    environment = describe("torch", "mmdet", "ddetr_mm")
    found = sorted(flags_of_cpu().intersection(BFLOAT16_FLAGS))
    environment |= {"instructions": ", ".join(found) or "none for bfloat16", "threads": given.threads}
    environment["image"] = "x".join(map(str, given.size))
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"times": times(tuple(given.size), given.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        if given.spec and given.checkpoint:
            result["evaluated"] = evaluated(given.spec, given.checkpoint, Path(folder))
        if given.spec and given.epochs:
            result["trained"] = trained(given.spec, given.epochs, Path(folder))
    environment["load_after"] = load_average()
    result["environment"] = environment
    report(result, text(result), RECORD if given.record else None)


if __name__ == "__main__":
    main()
