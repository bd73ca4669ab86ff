"""Two processes over gloo: what they compute is what one computes, and none outlives the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.test_tasks.conftest import TINY, Project

# A square canvas: what a batch is padded to must not depend on who shares it. Frozen batch
# statistics, for the same reason.
COMPARABLE = (
    *TINY,
    "dataset.augmentation.random_resize_max_size=64",
    "dataset.augmentation.fixed_padding=true",
    "ddetr_mm.backbone.norm_eval=true",
    "ddetr_mm.deterministic=true",
    "ddetr_mm.device=cpu",
    "inference.conf_threshold=0.01",
)
RUNS = """
import json, sys
import ddetr_mm
from ddetr_mm.cli import main
from ddetr_mm.engine.distributed import process_group

with process_group():  # once for all commands of this process
    for arguments in json.loads(sys.argv[1]):
        status = main(arguments)
        if status:
            sys.exit(status)
"""


def commands(project: Project, ranks: int) -> list[list[str]]:
    """Train, evaluate and run inference into folders of this number of ranks; with two, train by fsdp too."""
    folder = project.folder / f"ranks_{ranks}"
    checkpoint = folder / "train" / "model_epoch_000.pth"

    def command(name: str, out: str, *overrides: str) -> list[str]:
        return [name, "-e", project.spec, *COMPARABLE, f"{name}.results_dir={folder / out}", *overrides]

    train = (f"dataset.batch_size={4 // ranks}", "train.num_epochs=1", "train.validation_interval=1")
    # Both evaluate the weights of the run on two ranks, with equal batches.
    shared = project.folder / "ranks_2" / "train" / "model_epoch_000.pth"
    found = [command("train", "train", *train)]
    if ranks == 2:
        found.append(command("train", "fsdp", *train, "train.distributed_strategy=fsdp"))
    else:
        resumed = project.folder / "ranks_2" / "fsdp" / "model_epoch_000.pth"
        found.append(
            command(
                "train",
                "resumed",
                *train,
                f"train.resume_training_checkpoint_path={resumed}",
                "train.num_epochs=2",
            )
        )
        checkpoint = shared
    for name in ("evaluate", "inference"):
        found.append(command(name, name, f"{name}.checkpoint={checkpoint}", "dataset.batch_size=2"))
    return found


def run_all(project: Project, ranks: int) -> str:
    """Run the commands in one process, or, as ``torchrun`` starts them, in several; returns the output."""
    script = project.folder / "runs.py"
    script.write_text(RUNS)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(script), json.dumps(commands(project, ranks))],
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def two_ranks(data_project: Project) -> tuple[Path, str]:
    """Folder and output of the commands on two ranks, under an outer torchrun."""
    output = run_all(data_project, 2)
    return data_project.folder / "ranks_2", output


@pytest.fixture(scope="module")
def one_rank(data_project: Project, two_ranks: tuple[Path, str]) -> Path:
    """Folder of the same commands in one process with batches of twice the size."""
    run_all(data_project, 1)
    return data_project.folder / "ranks_1"


BROKEN_LOSS = """
import os, sys
import ddetr_mm.register
from ddetr_mm.cli import main
from ddetr_mm.models.head import TAODeformableDETRHead as Head

loss, calls = Head.loss, []

def broken_in_the_second_step_of_rank_1(self, *args, **kwargs):
    calls.append(None)
    factor = float("nan") if (os.environ["RANK"], len(calls)) == ("1", 2) else 1.0
    return {name: value * factor for name, value in loss(self, *args, **kwargs).items()}

Head.loss = broken_in_the_second_step_of_rank_1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_all_ranks_meet_the_broken_loss_of_one(
    data_project: Project, tmp_path: Path, strategy: str, action: str
):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN_LOSS)
    arguments = [*COMPARABLE, "train.num_epochs=1", "train.validation_interval=1", "dataset.batch_size=2"]
    arguments += [f"train.distributed_strategy={strategy}", f"ddetr_mm.non_finite={action}"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        + ["train", "-e", data_project.spec, *arguments, f"train.results_dir={tmp_path}"],
        cwd=data_project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    text = " ".join(done.stdout.split())
    assert "the loss is not finite in step 1 (" in text
    assert [path.name for path in tmp_path.glob("non_finite*")] == ["non_finite_step_00001_rank_1.pth"]
    last = json.loads((tmp_path / "status.json").read_text().splitlines()[-1])
    if action == "stop":
        assert done.returncode != 0 and last["status"] == "FAILURE"
        assert "the loss is not finite in step 1" in last["message"] and "rank_1.pth" in last["message"]
        return
    assert done.returncode == 0 and last["status"] == "SUCCESS", done.stdout[-3000:]
    weights = torch.load(tmp_path / "dd_model_latest.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in weights["state_dict"].values())
    assert weights["optimizer"]["state"][0]["step"] == weights["meta"]["iter"] - 1


FAILING = """
import os, sys
import ddetr_mm.register
from ddetr_mm.cli import main
from ddetr_mm.models.head import TAODeformableDETRHead as Head

loss, calls = Head.loss, []

def broken_in_the_third_step_of_rank_1(self, *args, **kwargs):
    calls.append(None)
    if (os.environ["RANK"], len(calls)) == ("1", 3):
        raise RuntimeError("broken on purpose")
    return loss(self, *args, **kwargs)

Head.loss = broken_in_the_third_step_of_rank_1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_error_of_one_rank_leaves_a_checkpoint_that_both_resume(
    data_project: Project, tmp_path: Path, strategy: str
):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    arguments = [*COMPARABLE, "train.num_epochs=1", "train.validation_interval=1", "dataset.batch_size=1"]
    arguments += [f"train.distributed_strategy={strategy}", f"train.results_dir={tmp_path / 'train'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def train(*program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, *program, "train", "-e", data_project.spec, *arguments],
            cwd=data_project.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    done = train(str(script))
    assert done.returncode != 0 and "broken on purpose" in done.stdout
    last = tmp_path / "train" / "dd_model_latest.pth"
    if strategy == "fsdp":
        assert not last.exists() and "its state cannot be saved" in done.stdout, done.stdout[-3000:]
        return
    assert "Its state after 2 steps is in" in done.stdout, done.stdout[-3000:]
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["meta"]["iter"] == 2 and checkpoint["optimizer"]["state"][0]["step"] == 2
    done = train("-m", "ddetr_mm")
    assert done.returncode == 0 and "resumes from" in done.stdout, done.stdout[-3000:]
    assert torch.load(last, weights_only=True)["meta"]["iter"] > 3


def scalars(folder: Path) -> list[dict]:
    """The steps that a training has logged."""
    (path,) = folder.glob("*/vis_data/scalars.json")
    return [entry for entry in map(json.loads, path.read_text().splitlines()) if "loss" in entry]


@pytest.mark.parametrize("strategy", ["train", "fsdp"])
def test_two_ranks_learn_what_one_learns_with_twice_the_batch(two_ranks, one_rank: Path, strategy: str):
    alone, together = scalars(one_rank / "train"), scalars(two_ranks[0] / strategy)
    assert len(alone) == len(together) == 3
    for step, other in zip(alone, together, strict=True):
        for name in ("loss", "loss_cls", "loss_bbox", "loss_iou", "d0.loss_cls", "grad_norm", "lr"):
            assert other[name] == pytest.approx(step[name], rel=1e-5), name


def test_there_is_one_log_and_one_status_file(two_ranks):
    folder, output = two_ranks
    assert len(list((folder / "train").glob("*/*.log"))) == 1
    assert len(list((folder / "train").rglob("events.out.tfevents.*"))) == 1
    lines = [json.loads(line) for line in (folder / "train" / "status.json").read_text().splitlines()]
    messages = [line["message"] for line in lines]
    assert messages.count("Starting Deformable DETR train.") == messages.count("Starting Training Loop.") == 1
    assert [line["status"] for line in lines].count("SUCCESS") == 1 and lines[-1]["status"] == "SUCCESS"
    assert output.count("objects in 6 images") == 1
    # The first step's line, once for ddp, once for fsdp.
    assert len(re.findall(r"^training: 1/\d+ steps", output, re.M)) == 2


def test_evaluation_does_not_depend_on_the_number_of_ranks(two_ranks, one_rank: Path):
    results = [
        json.loads((folder / "evaluate" / "results.json").read_text()) for folder in (two_ranks[0], one_rank)
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    files = [(folder / "evaluate" / "predictions.json").read_text() for folder in (two_ranks[0], one_rank)]
    assert files[0] == files[1] and json.loads(files[0])


@pytest.mark.parametrize("kind", ["labels", "images_annotated"])
def test_inference_files_do_not_depend_on_the_number_of_ranks(two_ranks, one_rank: Path, kind: str):
    contents = [
        {path.name: path.read_bytes() for path in (folder / "inference" / kind).iterdir()}
        for folder in (two_ranks[0], one_rank)
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 6


def test_a_sharded_training_leaves_a_whole_checkpoint_that_one_process_resumes(two_ranks, one_rank: Path):
    sharded, plain = (
        torch.load(two_ranks[0] / name / "model_epoch_000.pth", weights_only=True)
        for name in ("fsdp", "train")
    )
    for part in ("state_dict", "optimizer"):
        assert sharded[part].keys() == plain[part].keys()
    for name, tensor in plain["state_dict"].items():
        assert type(sharded["state_dict"][name]) is torch.Tensor
        # Adam's first steps have the size of the learning rate, whatever the gradient's.
        torch.testing.assert_close(sharded["state_dict"][name], tensor, rtol=0, atol=1e-3)
    for number, state in plain["optimizer"]["state"].items():
        assert sharded["optimizer"]["state"][number]["exp_avg"].shape == state["exp_avg"].shape
    resumed = torch.load(one_rank / "resumed" / "model_epoch_001.pth", weights_only=True)
    assert resumed["meta"]["iter"] == 6 and resumed["optimizer"]["state"][0]["step"] == 6


@pytest.fixture
def endless(data_project: Project, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """``ddetr-mm train`` on two ranks, started by the command itself, far from its end."""
    folder = tmp_path / "train"
    arguments = [*COMPARABLE, "train.num_gpus=2", "train.num_epochs=1000", f"train.results_dir={folder}"]
    arguments += ["train.checkpoint_interval=1000", "train.validation_interval=1000", "dataset.batch_size=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ddetr_mm", "train", "-e", data_project.spec, *arguments],
        cwd=data_project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, folder
    process.kill()
    process.wait()


def wait_for_step(process: subprocess.Popen[str]) -> None:
    """Read the output up to the first step."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("training: "):
            return
    raise AssertionError("".join(seen))


def ranks_of(launcher: int) -> dict[int, int]:
    """Process number by rank of the children of a launching process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        ranks = [int(item[5:]) for item in environment if item.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(entry.name)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_job_with_a_message(endless):
    process, folder = endless
    wait_for_step(process)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.search(rf"error: rank 1 of 2 \(process {ranks[1]}\) was killed by SIGKILL", output)
    last = json.loads((folder / "status.json").read_text().splitlines()[-1])
    assert last["status"] == "FAILURE" and "rank 1 of 2" in last["message"]
    deadline = time.monotonic() + 30
    while ranks_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ranks_of(process.pid)
