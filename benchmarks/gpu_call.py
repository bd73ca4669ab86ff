"""All GPU benchmarks in one call of limited time: most wanted rows first, figures as they come, a summary.

``python benchmarks/run.py --gpu --budget-s 540 --out DIR``. Every stage is a child process with a share of
the time; what it does not use goes to the later ones. A child that hangs is killed at its share,
one that crashes is started again without what crashed it. DIR gets ``figures.jsonl`` (a line a figure, as it
comes), ``summary.md`` and ``summary.json`` (written anew after every stage: ratios, then all tables), and
``log.txt``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_summary
from gpu_process import Deadline, Figures, read_figures, run_group

FOLDER = Path(__file__).resolve().parent
END_S = 3.0
"""Kept for the summary."""
WHOLE_S = 540
"""The budget that the seconds of the stages are meant for; they are scaled to another."""


@dataclass(frozen=True)
class Stage:
    """One child process.

    Attributes:
        name: in the log and in ``--only``.
        script: the benchmark.
        seconds: it may take of :data:`WHOLE_S`, beside what the stages before it did not use.
        options: its arguments.
        compiled: whether ``torch.compile`` is part of it, which ``--quick`` leaves out.
    """

    name: str
    script: str
    seconds: float
    options: tuple[str, ...]
    compiled: bool = False


def _only(*names: str) -> tuple[str, ...]:
    return ("--only", *names)


LIKE_FOR_LIKE = _only(
    "mmdet, fp32", "ours, fp32", "ours, bf16", "mmdet, bf16", "ours, tf32", "mmdet, tf32", "mmdet, defaults"
)
TRAIN = ("--steps", "8", "--data", "2", "--rounds", "5")
INFERENCE = ("--rounds", "5")
PIPELINE = ("--steps", "30", "--warm-up", "8")

STAGES = (
    Stage("train", "train_gpu", 120, (*TRAIN, *LIKE_FOR_LIKE)),
    Stage("pipeline ours bf16", "pipeline_gpu", 30, (*PIPELINE, *_only("ours, bf16"))),
    Stage("pipeline mmdet bf16", "pipeline_gpu", 34, (*PIPELINE, *_only("mmdet, bf16"))),
    Stage("inference", "inference_gpu", 50, (*INFERENCE, "--batches", "8", "1", *LIKE_FOR_LIKE)),
    Stage("train bf16 compiled", "train_gpu", 106, (*TRAIN, *_only("ours, bf16, compile")), True),
    Stage("attention", "attention_gpu", 70, ("--dtypes", "float32", "bfloat16", "--rounds", "5")),
    Stage("pipeline mmdet fp32", "pipeline_gpu", 40, (*PIPELINE, *_only("mmdet, fp32"))),
    Stage("pipeline ours tf32", "pipeline_gpu", 28, (*PIPELINE, *_only("ours, tf32"))),
    Stage(
        "inference bf16 compiled",
        "inference_gpu",
        40,
        (*INFERENCE, "--batches", "8", *_only("ours, bf16, compile")),
        True,
    ),
    Stage(
        "inference bf16 CUDA graphs",
        "inference_gpu",
        22,
        (*INFERENCE, "--batches", "1", *_only("ours, bf16, CUDA graphs")),
        True,
    ),
    # From here on with the time that others did not use.
    Stage("matching", "matching_gpu", 20, ()),
    Stage(
        "train others",
        "train_gpu",
        60,
        (
            *TRAIN,
            *_only("mmdet, fp32", "Hugging Face, tf32", "Hugging Face, bf16", "ours, bf16, recomputing"),
        ),
    ),
    Stage(
        "inference others",
        "inference_gpu",
        40,
        (
            *INFERENCE,
            "--batches",
            "8",
            *_only("mmdet, fp32", "Hugging Face, tf32", "Hugging Face, bf16", "ours, fp16", "mmdet, fp16"),
        ),
    ),
    Stage("train tf32 compiled", "train_gpu", 100, (*TRAIN, *_only("ours, tf32, compile")), True),
    Stage(
        "train Hugging Face compiled",
        "train_gpu",
        100,
        (*TRAIN, *_only("Hugging Face, bf16, compile")),
        True,
    ),
)
"""In their order, most wanted first."""


def run(
    out: Path,
    budget_s: float,
    common: Sequence[str] = (),
    stages: Sequence[Stage] = STAGES,
    least_s: float = 15,
) -> list[str]:
    """Run the stages one after the other within the time.

    Args:
        out: folder of the results; figures of an earlier call there stay, its own are added.
        budget_s: for everything, the summary included.
        common: arguments of every child, such as ``--device cpu --quick``.
        stages: in their order.
        least_s: a stage with less time than this is not begun.

    Returns:
        Names of the stages that did not end by themselves with status 0, or did not begin.
    """
    deadline = Deadline(budget_s - END_S)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "figures.jsonl"
    notes, incomplete = Figures(path, "call"), []
    command = " ".join(["python", *sys.argv])
    notes.append("environment", command=command, budget_s=budget_s)
    chosen = [one for one in stages if not (one.compiled and "--quick" in common)]
    scale = (budget_s - END_S) / min(WHOLE_S, sum(one.seconds for one in chosen))
    planned_s = 0.0
    for stage in chosen:
        left_s = deadline.left_s()
        planned_s += scale * stage.seconds
        so_far_s = budget_s - END_S - left_s
        limit_s = min(left_s, max(least_s, planned_s - so_far_s))
        if left_s < least_s:
            notes.append("note", text=f"{stage.name}: not begun, {left_s:.0f} s were left")
            incomplete.append(stage.name)
            continue
        print(f"== {stage.name}: {limit_s:.0f} of {left_s:.0f} s", flush=True)
        began = time.monotonic()
        script = FOLDER / f"{stage.script}.py"
        log = out / "log.txt"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"== {stage.name}\n")
        ended = run_group(script, [*common, *stage.options], path, limit_s, log)
        took_s = time.monotonic() - began
        if not ended or ended[-1].status != 0:
            incomplete.append(stage.name)
        reason = ended[-1].reason if ended else "not begun"
        notes.append("stage", stage.name, seconds=round(took_s, 1), limit_s=round(limit_s, 1), ended=reason)
        write_summary(out)
    write_summary(out)
    return incomplete


def write_summary(out: Path) -> str:
    """Write ``summary.md`` and ``summary.json`` from the figures so far; returns the text."""
    figures = read_figures(out / "figures.jsonl")
    text = "\n".join(gpu_summary.summary_lines(figures)) + "\n"
    (out / "summary.json").write_text(json.dumps(gpu_summary.fold(figures), indent=1) + "\n")
    (out / "summary.md").write_text(text)
    return text


def call(arguments: Sequence[str]) -> int:
    """Read the command line of ``run.py --gpu --budget-s``.

    Returns:
        0 where every stage ended well; 1 where the record is in part.
    """
    parser = argparse.ArgumentParser(prog="run.py --gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--budget-s", type=float, required=True, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures, summary and logs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, nothing compiled: a rehearsal")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="; ".join(one.name for one in STAGES))
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.only or ()) - {one.name for one in STAGES})
    if unknown:
        parser.error(f"no such stage: {', '.join(unknown)}")
    stages = [one for one in STAGES if not args.only or one.name in args.only]
    common = ["--device", args.device, *(["--quick"] if args.quick else [])]
    incomplete = run(args.out, args.budget_s, common, stages)
    print((args.out / "summary.md").read_text())
    if incomplete:
        print(f"in part: {', '.join(incomplete)}", file=sys.stderr)
    return int(bool(incomplete))
