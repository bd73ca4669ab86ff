"""Hours of training and ten thousand images through an ONNX file: does anything grow?

Two commands run side by side, each as a user starts it, on pictures that ``projects/shapes`` draws: a
training of a tiny model with four data workers, interrupted (SIGTERM) when its time is over, and an
``inference`` over many pictures with the exported graph. All the while the memory, the descriptors and the
shared memory of each command's whole process tree are read from ``/proc``. Afterwards a line is fitted to
what came after the warm-up; see ``soak_analysis.py`` for what counts as flat.

    python benchmarks/soak.py --hours 2 --images 10000 --folder /tmp/soak/run
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import describe
from process_tree import sample_tree
from soak_analysis import record_text, summarise, verdict

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "configs" / "specs" / "shapes_resnet18.yaml"
TINY_DETECTOR = ROOT / "projects" / "shapes" / "tiny.txt"
RECORDS = Path(__file__).resolve().parent / "records"
RESULTS = Path("results/shapes")
CHECKPOINT = str(RESULTS / "seed" / "dd_model_latest.pth")
ONNX_FILE = str(RESULTS / "export" / "tiny.onnx")

TINY = (
    *TINY_DETECTOR.read_text(encoding="utf-8").split(),
    "dataset.batch_size=4",
    "export.input_width=96",
    "export.input_height=64",
    "ddetr_mm.log_interval=50",
    "ddetr_mm.backbone.base_channels=16",
)


@dataclass
class Watched:
    """A command that runs, and what was seen of it.

    Attributes:
        name: for the record.
        process: the command.
        stop_after: seconds after which it is interrupted; None lets it end by itself.
        started: time.monotonic at its start.
        samples: what was seen, in order.
        pids: every process of its tree ever seen.
        names: every name in shared memory that its tree ever held.
        interrupted: whether its time was over.
    """

    name: str
    process: subprocess.Popen
    stop_after: float | None
    started: float
    samples: list[dict[str, float]] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    interrupted: bool = False

    def look(self) -> None:
        """Take one sample, and interrupt the command when its time is over."""
        seconds = time.monotonic() - self.started
        sample = sample_tree(self.process.pid)
        self.pids |= sample.pids
        self.names |= sample.shared_memory_names
        if sample.processes:
            self.samples.append(
                dict(
                    seconds=round(seconds, 1),
                    processes=sample.processes,
                    rss_mb=round(sample.rss_mb, 2),
                    pss_mb=round(sample.pss_mb, 2),
                    pss_own_mb=round(sample.pss_own_mb, 2),
                    root_rss_mb=round(sample.root_rss_mb, 2),
                    descriptors=sample.descriptors,
                    shared_memory_mappings=sample.shared_memory_mappings,
                    shared_memory_names=len(sample.shared_memory_names),
                )
            )
        if self.stop_after is not None and seconds >= self.stop_after and not self.interrupted:
            # SIGINT may be ignored by what a shell has put into the background.
            self.process.send_signal(signal.SIGTERM)
            self.interrupted = True

    def left_behind(self) -> dict[str, Any]:
        """Processes that still run and names that are still in shared memory."""
        return dict(
            processes=sorted(pid for pid in self.pids if Path(f"/proc/{pid}").exists()),
            shared_memory=sorted(name for name in self.names if Path(name).exists()),
        )


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Pictures, annotations, a first checkpoint and its ONNX file."""
    counts = ("--train", str(arguments.pictures), "--val", "40", "--test", str(arguments.images))
    generate = str(ROOT / "projects" / "shapes" / "generate.py")
    subprocess.run([sys.executable, generate, str(RESULTS / "data"), *counts], cwd=folder, check=True)
    convert = ("convert", "-e", str(ROOT / "configs" / "specs" / "shapes_convert.yaml"))
    subprocess.run(command(*convert), cwd=folder, check=True)
    once = ("train.num_epochs=1", "train.checkpoint_interval=1", "train.validation_interval=1")
    subprocess.run(
        command("train", "-e", str(SPEC), *TINY, *once, f"train.results_dir={RESULTS / 'seed'}"),
        cwd=folder,
        check=True,
    )
    export = (f"export.checkpoint={CHECKPOINT}", f"export.onnx_file={ONNX_FILE}")
    subprocess.run(command("export", "-e", str(SPEC), *TINY, *export), cwd=folder, check=True)


def command(*arguments: str) -> list[str]:
    """A ``ddetr-mm`` command line."""
    return [sys.executable, "-m", "ddetr_mm", *arguments]


def start(name: str, folder: Path, stop_after: float | None, *arguments: str) -> Watched:
    """Start a command with its output in ``<name>.log``."""
    temporary = folder / f"tmp_{name}"
    temporary.mkdir()
    environment = dict(os.environ, TMPDIR=str(temporary))
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command(name, "-e", str(SPEC), *TINY, *arguments),
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Watched(name, process, stop_after, time.monotonic())


def soak(folder: Path, arguments: argparse.Namespace) -> list[Watched]:
    """Run both commands and watch them until both have ended."""
    train = start(
        "train",
        folder,
        arguments.hours * 3600,
        f"dataset.workers={arguments.workers}",
        "train.num_epochs=1000000",
        "train.checkpoint_interval=50",
        "train.validation_interval=10",
    )
    # A low threshold: the seed of one epoch is sure of little, and boxes should be drawn too.
    inference = start(
        *("inference", folder, None, "dataset.workers=2", "inference.conf_threshold=0.05"),
        f"inference.checkpoint={ONNX_FILE}",
    )
    running = [train, inference]
    while running:
        time.sleep(arguments.every)
        for watched in list(running):
            if watched.process.poll() is not None:
                running.remove(watched)
            else:
                watched.look()
        (folder / "samples.json").write_text(json.dumps({w.name: w.samples for w in (train, inference)}))
    time.sleep(30)  # until ended children are gone
    return [train, inference]


def outcome(folder: Path, watched: Watched) -> dict[str, Any]:
    """How a command ended, what it did, what it left and how its figures moved."""
    done: dict[str, Any] = {}
    if watched.name == "train":
        lines = [
            json.loads(line) for line in (folder / RESULTS / "train/status.json").read_text().splitlines()
        ]
        steps = [line for line in lines if "step" in line]
        done = dict(
            steps=steps[-1]["step"] if steps else 0,
            epochs=steps[-1]["epoch"] + 1 if steps else 0,
            validations=sum("Eval metrics" in line["message"] for line in lines),
            last_status=lines[-1]["status"],
        )
    else:
        labels = list((folder / RESULTS / "inference" / "labels").glob("*.txt"))
        done = dict(images=len(labels))
    return dict(
        exit_status=watched.process.returncode,
        hours=round(watched.samples[-1]["seconds"] / 3600, 3),
        interrupted=watched.interrupted,
        **done,
        left_behind=watched.left_behind(),
        temporary_files=sorted(path.name for path in (folder / f"tmp_{watched.name}").iterdir()),
        series=summarise(watched.samples),
    )


def main() -> int:
    """Run, print and record; returns 0 when nothing grew and nothing was left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0, help="of training (default 2)")
    parser.add_argument("--images", type=int, default=10_000, help="for the ONNX file (default 10,000)")
    parser.add_argument("--pictures", type=int, default=200, help="to train on (default 200)")
    parser.add_argument("--workers", type=int, default=4, help="data workers of the training (default 4)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks (default 10)")
    parser.add_argument("--folder", type=Path, default=Path("results/soak"), help="emptied first")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where soak.md and soak.json go")
    arguments = parser.parse_args()
    environment = describe("torch", "mmdet", "onnxruntime")
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(folder, arguments)
    runs = {watched.name: outcome(folder, watched) for watched in soak(folder, arguments)}
    environment["command"] = (
        f"python benchmarks/soak.py --hours {arguments.hours:g} --images {arguments.images} "
        f"--workers {arguments.workers}"
    )
    result = dict(environment=environment, **runs)
    passed = all(
        run["exit_status"] == (130 if run["interrupted"] else 0)
        and not any(run["left_behind"].values())
        and all(verdict(name, row) != "NO" for name, row in run["series"].items())
        for run in runs.values()
    )
    result["passed"] = passed
    arguments.records.mkdir(parents=True, exist_ok=True)
    (arguments.records / "soak.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (arguments.records / "soak.md").write_text(record_text(result))
    print(record_text(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
