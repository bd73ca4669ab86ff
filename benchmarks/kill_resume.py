"""Kills a training run with SIGKILL at random moments, starts the same command again each time, and checks.

After every kill: all checkpoints of the folder are complete, ``dd_model_latest.pth`` loads, the next run
resumes from it, and nothing is lost but the steps after it (at most the interval between two checkpoints,
and the one that was being written). At the end: bit for bit the weights, optimizer and schedulers of a run
that was never killed.

The training is the real command on a tiny model and data set. So that 50 kills take minutes, not an hour,
processes are forked from one that has imported the libraries; ``--fresh`` starts new interpreters instead.

Without ``--record`` nothing is kept; the record is ``benchmarks/records/kill_resume.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from environment import describe, heading

import ddetr_mm.register
import ddetr_mm.tasks.runner
import ddetr_mm.tasks.train  # noqa: F401 - imported here once, so that forked processes need not
from ddetr_mm.cli import main as ddetr_mm_main
from ddetr_mm.engine.checkpoint import LATEST_NAME, find_latest_checkpoint, is_whole, list_checkpoints
from ddetr_mm.engine.hooks import ProgressHook

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "kill_resume.md"
SPEC = ROOT / "configs" / "specs" / "shapes_resnet18.yaml"
TINY_DETECTOR = ROOT / "projects" / "shapes" / "tiny.txt"
INTERVAL = 2
IN_START_UP = 0.3
"""Share of the kills at any moment after the start; the others come after some steps."""

OPTIONS = (
    *TINY_DETECTOR.read_text(encoding="utf-8").split(),
    "dataset.batch_size=4",
    "train.optim.lr_steps=[20,50]",
    "train.checkpoint_interval_unit=step",
    f"train.checkpoint_interval={INTERVAL}",
    "ddetr_mm.deterministic=true",
    "ddetr_mm.log_interval=1000",
    "ddetr_mm.backbone.base_channels=16",
)


class Training:
    """One training folder, and the processes that train in it."""

    def __init__(self, folder: Path, data: Path, epochs: int, workers: int, fresh: bool) -> None:
        self.folder, self.data, self.fresh = folder, data, fresh
        self.steps_file = folder.with_suffix(".steps")
        self.arguments = ["train", "-e", str(SPEC), *OPTIONS, f"dataset.workers={workers}"]
        self.arguments += [
            f"train.num_epochs={epochs}",
            f"train.validation_interval={min(epochs, 10)}",
            f"train.results_dir={folder}",
        ]

    def start(self) -> int:
        """Start the command; returns its process id."""
        sys.stdout.flush()
        if self.fresh:
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--child",
                str(self.folder),
                *self.arguments,
            ]
            with self.log() as log:
                return subprocess.Popen(command, cwd=self.data, stdout=log, stderr=log).pid
        pid = os.fork()
        if pid:
            return pid
        try:
            os.chdir(self.data)
            with self.log() as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            run_child(self.folder, self.arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def log(self) -> Any:
        """The file that the processes' output goes to, open."""
        return self.folder.with_suffix(".log").open("ab")

    def end_of_log(self) -> str:
        """What the last process said last."""
        return self.folder.with_suffix(".log").read_text()[-3000:]

    def wait_for_steps(self, number: int, pid: int) -> None:
        """Wait until the process has trained so many steps, or has ended."""
        while not self.steps_file.exists() or self.steps_file.read_bytes().count(b"\n") < number:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            time.sleep(0.005)

    def steps(self) -> list[int]:
        """The steps that were trained since this was last asked, in order."""
        done = [int(line) for line in self.steps_file.read_text().split()] if self.steps_file.exists() else []
        self.steps_file.unlink(missing_ok=True)
        return done


def run_child(folder: Path, arguments: list[str]) -> None:
    """Run the command in this process, with a line in a file for every step, and exit with its status."""
    original = ProgressHook.after_train_iter

    def after_train_iter(self: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        with folder.with_suffix(".steps").open("a") as file:
            file.write(f"{runner.iter}\n")
        original(self, runner, *args, **kwargs)

    ProgressHook.after_train_iter = after_train_iter
    status = ddetr_mm_main(arguments)
    folder.with_suffix(".modules").write_text("\n".join(sys.modules))
    sys.stdout.flush()
    os._exit(status)


def import_as_a_training_does(training: Training) -> None:
    """Run training in a process of its own, then import here all that it has imported."""
    finish(training)
    for name in training.folder.with_suffix(".modules").read_text().splitlines():
        with contextlib.suppress(Exception):  # parts of packages that do not import by themselves
            importlib.import_module(name)


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(itertools.starmap(same, zip(one, other, strict=True)))
    return bool(one == other)


def check_after_kill(training: Training, expected_start: int) -> tuple[str, int, int]:
    """Check the folder after a kill.

    Returns:
        Where it was killed, steps in the latest checkpoint, steps lost.
    """
    steps = training.steps()
    broken = [path.name for path in list_checkpoints(training.folder) if not is_whole(path)]
    demand(not broken, f"broken files: {broken}")
    latest = find_latest_checkpoint(training.folder)
    saved = 0
    if latest is not None:
        link = training.folder / LATEST_NAME
        demand(link.resolve() == latest, f"{link} points at {link.resolve()}, not at {latest}")
        saved = load(link)["meta"]["iter"]
    demand(saved >= expected_start, f"went back from step {expected_start} to {saved}")
    if not steps:
        demand(saved == expected_start, f"step {saved} was saved without being trained")
        return "before the first step", saved, 0
    wanted = list(range(expected_start, expected_start + len(steps)))
    demand(steps == wanted, f"trained steps {steps}, not {wanted}")
    lost = steps[-1] + 1 - saved
    # the steps since the last checkpoint, or those that the one being written would have held
    demand(0 <= lost <= INTERVAL, f"lost {lost} steps")
    return ("while a file was written" if half_files(training.folder) else "in training"), saved, lost


def half_files(folder: Path) -> list[str]:
    """Temporary files of writers that did not finish."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


def demand(holds: bool, fault: str) -> None:
    """End the script with a message where a claim does not hold."""
    if not holds:
        raise SystemExit(f"FAILED: {fault}")


def forget_old(folder: Path) -> None:
    """Remove all but the newest checkpoints, which would fill the disk."""
    for path in list_checkpoints(folder)[:-4]:
        path.unlink()


def kill_often(training: Training, kills: int, longest_s: float, rng: random.Random) -> list[tuple]:
    """Start and kill until so many kills have hit a running process."""
    rows: list[tuple] = []
    saved = 0
    while len(rows) < kills:
        started = time.monotonic()
        pid = training.start()
        if rng.random() < IN_START_UP:
            time.sleep(rng.uniform(0, longest_s))
        else:
            # after some steps, so that starts that take long leave time for training
            training.wait_for_steps(rng.randint(1, 5), pid)
            time.sleep(rng.uniform(0, 1.0))
        delay = time.monotonic() - started
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            raise SystemExit(f"the training ended by itself:\n{training.end_of_log()}")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        where, saved, lost = check_after_kill(training, saved)
        rows.append((len(rows) + 1, f"{delay:.2f}", where, saved, lost))
        print("kill {}: after {} s, {}; {} steps are saved, {} lost".format(*rows[-1]), flush=True)
        forget_old(training.folder)
    return rows


def finish(training: Training) -> dict[str, Any]:
    """Train to the end; returns the last checkpoint."""
    _, status = os.waitpid(training.start(), 0)
    demand(os.waitstatus_to_exitcode(status) == 0, training.end_of_log())
    demand(not half_files(training.folder), f"half-written files: {half_files(training.folder)}")
    return load(training.folder / LATEST_NAME)


def make_data(folder: Path) -> None:
    generate = str(ROOT / "projects" / "shapes" / "generate.py")
    sizes = ["--train", "12", "--val", "5", "--test", "2"]
    convert = ["-m", "ddetr_mm", "convert", "-e", str(ROOT / "configs" / "specs" / "shapes_convert.yaml")]
    for command in ([generate, "results/shapes/data", *sizes], convert):
        subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)


def write_record(rows: list[tuple], about: dict[str, Any], steps: int) -> None:
    moments = {where: sum(row[2] == where for row in rows) for where in sorted({row[2] for row in rows})}
    lost = [row[4] for row in rows]
    lines = heading("SIGKILL at random moments, and resuming", about)
    lines += [
        "",
        f"{len(rows)} kills in a row of one training ({steps} steps, a checkpoint every {INTERVAL}): "
        + ", ".join(f"{count} {where}" for where, count in moments.items())
        + ".",
        "",
        "- every checkpoint in the folder was whole after every kill, and `dd_model_latest.pth` loaded",
        "- every start went on from it, at the very next step",
        f"- at most {max(lost)} steps were lost by a kill, {sum(lost)} by all",
        "- weights, optimizer, schedulers and random states at the end are bit for bit those of a run that"
        " was never killed",
        "",
        "| kill | after s | moment | steps saved | lost |",
        "| ---: | ---: | --- | ---: | ---: |",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
    RECORD.write_text("\n".join(lines) + "\n")
    print(f"written: {RECORD}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--longest", type=float, default=6.0, help="latest moment of a kill, s after the start"
    )
    parser.add_argument("--epochs", type=int, default=120, help="3 steps each")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every start")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = describe("torch", "mmengine", "ddetr_mm")
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        make_data(data)
        settings = (data, options.epochs, options.workers, options.fresh)
        if not options.fresh:
            import_as_a_training_does(Training(data / "first", data, 1, options.workers, False))
        training = Training(data / "killed", *settings)
        rows = kill_often(training, options.kills, options.longest, random.Random(options.seed))
        end = finish(training)
        straight = finish(Training(data / "straight", *settings))
    for part in ("state_dict", "optimizer", "param_schedulers", "rng_states"):
        demand(same(end[part], straight[part]), f"{part} differ")
    print(f"after {len(rows)} kills the end is bit for bit that of a run that was never killed")
    if options.record:
        write_record(rows, about, end["meta"]["iter"])
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(Path(sys.argv[2]), sys.argv[3:])
    sys.exit(main())
