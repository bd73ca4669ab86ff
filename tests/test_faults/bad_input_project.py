"""A small project that every kind of bad input is tried on, and commands run in this process."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import yaml
from mmdet.registry import MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import init_default_scope
from mmengine.visualization import Visualizer

import ddetr_mm.register  # noqa: F401 - before mmdet's registries are used
from ddetr_mm.cli import main
from ddetr_mm.outputs import LOCK_NAME, OWNED_NAME
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.runner import config_source

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ROOT / "projects" / "shapes" / "generate.py"

SPEC: dict[str, Any] = {
    "dataset": {
        "train_data_sources": [{"image_dir": "data", "json_file": "coco/train"}],
        "val_data_sources": [{"image_dir": "data", "json_file": "coco/val"}],
        "test_data_sources": {"image_dir": "data", "json_file": "coco/val"},
        "infer_data_sources": {"image_dir": "data/val/images"},
        "num_classes": 5,
        "batch_size": 2,
        "workers": 0,
        "augmentation": {
            "scales": [48],
            "random_resize_max_size": 64,
            "train_random_resize": [48],
            "train_random_crop_min": 32,
            "train_random_crop_max": 48,
            "test_random_resize": 48,
            "fixed_padding": False,
        },
    },
    "model": {
        "num_feature_levels": 3,
        "return_interm_indices": [1, 2, 3],
        "hidden_dim": 32,
        "nheads": 4,
        "dim_feedforward": 32,
        "enc_layers": 1,
        "dec_layers": 1,
        "num_queries": 8,
        "num_select": 8,
    },
    "train": {"num_epochs": 1, "checkpoint_interval": 1, "validation_interval": 1},
    "inference": {"color_map": {"star": "red"}},
    "export": {"on_cpu": True, "input_width": 64, "input_height": 64},
    "ddetr_mm": {
        "backbone": {
            "type": "ResNet",
            "depth": 18,
            "base_channels": 16,
            "num_stages": 4,
            "out_indices": [1, 2, 3],
            "norm_cfg": {"type": "BN"},
            "style": "pytorch",
        }
    },
}

CONVERT_SPEC: dict[str, Any] = {
    "input_source": "data/sequences.txt",
    "data_root": "data",
    "results_dir": "coco",
    "image_dir_name": "images",
    "label_dir_name": "labels",
    "image_extension": ".png",
    "num_shards": 1,
    "num_partitions": 1,
    "mapping_path": "data/mapping.json",
}

FIRST_ENVIRONMENT = dict(os.environ)
"""As it was when the tests were collected: what they run in this process may set variables of a run."""

RUN_FILES = (
    "status.json",
    "experiment.yaml",
    "config.py",
    "check.json",
    "curves.html",
    OWNED_NAME,
    LOCK_NAME,
)
"""What a failed run may leave beside its logs: its record, never a result."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: the exit status.
        message: standard error.
        said: standard output.
        new: files that were not there before, relative to the folder.
        lost: files that are gone or hold something else.
    """

    status: int
    message: str
    said: str
    new: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)


def run_here(folder: Path, *arguments: str, timeout: float = 300.0, fork: bool = True) -> Ended:
    """Run ``ddetr-mm`` with ``folder`` as current folder, in a fork of this process.

    A fork has everything loaded already, where a new process needs seconds, and keeps what a command leaves
    in memory (loggers, registries, environment) from the next one. It cannot use CUDA where this process
    has used it: then a new process does it. So it does with ``fork=False``: whatever has threads in this
    process, such as a writer of TensorBoard's events, has none in a fork, which may wait for them; and
    autograd, once it has threads in this process, refuses a backward pass in a fork. So whatever trains to
    its end needs a new process.
    """
    before, records = contents(folder), status_files(folder)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if not fork or torch.cuda.is_initialized():
            command = [sys.executable, "-m", "ddetr_mm", *arguments]
            done = subprocess.run(
                command,
                cwd=folder,
                stdout=out,
                stderr=err,
                timeout=timeout,
                check=False,
                env=FIRST_ENVIRONMENT,
            )
            status = done.returncode
        else:
            status = _run_in_fork(folder, arguments, out.fileno(), err.fileno(), timeout)
        said, message = (_text_of(file) for file in (out, err))
    after = contents(folder)
    lost = {name for name, digest in before.items() if after.get(name) != digest}
    # A record of runs is only ever appended to.
    lost -= {name for name, text in records.items() if (folder / name).read_text().startswith(text)}
    return Ended(status, message, said, set(after) - set(before), lost)


def _run_in_fork(folder: Path, arguments: Sequence[str], out: int, err: int, timeout: float) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _command_of_a_fork(folder, arguments, out, err)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"{arguments} took longer than {timeout} s")


def _command_of_a_fork(folder: Path, arguments: Sequence[str], out: int, err: int) -> NoReturn:
    """What the console script does, with standard output and error in the given descriptors."""
    status: Any = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        # What other tests left has threads that are not in a fork: none may be waited for. Sessions of
        # ONNX Runtime are not to be collected, nor a visualizer with its writer to be used again.
        gc.freeze()
        for shared in (Visualizer, DetLocalVisualizer, MMLogger, MessageHub):
            shared._instance_dict.clear()
        os.chdir(folder)
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder but logs, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _is_log(name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def status_files(folder: Path) -> dict[str, str]:
    """The text of every ``status.json`` below a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("status.json")}


def _is_log(name: str) -> bool:
    return name.endswith((".log", OWNED_NAME, LOCK_NAME)) or "vis_data/" in name


def assert_told(ended: Ended, *parts: str, status: int = 2) -> None:
    """One message with all parts, no traceback, no result, no half-written file, nothing lost."""
    assert ended.status == status, ended.message[-3000:]
    assert "Traceback" not in ended.message and "Traceback" not in ended.said, ended.message[-3000:]
    lines = [line for line in ended.message.splitlines() if line.startswith(("error: ", "ddetr-mm"))]
    told = [line for line in lines if "error: " in line]
    assert len(told) == 1, ended.message[-3000:]
    for part in parts:
        assert part in ended.message, f"{part!r} is not in:\n{ended.message[-3000:]}"
    left = {name for name in ended.new if Path(name).name not in RUN_FILES}
    assert not left, f"left behind: {sorted(left)}"
    assert not ended.lost, f"changed or gone: {sorted(ended.lost)}"


def write_yaml(path: Path, content: Any) -> Path:
    """A YAML file."""
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def make_project(folder: Path) -> Path:
    """Pictures, annotations, specs, and a checkpoint of random weights."""
    generate = runpy.run_path(str(GENERATE), run_name="generate")
    generate["write_dataset"](folder / "data", {"train": 6, "val": 3}, 0)
    write_yaml(folder / "convert.yaml", CONVERT_SPEC)
    write_yaml(folder / "spec.yaml", {"results_dir": "results", **SPEC})
    ended = run_here(folder, "convert", "-e", "convert.yaml")
    assert ended.status == 0, ended.message
    here = Path.cwd()
    os.chdir(folder)
    try:
        write_checkpoint(folder / "random.pth", "spec.yaml")
    finally:
        os.chdir(here)
    return folder


def write_checkpoint(path: Path, spec: str, *overrides: str) -> Path:
    """A checkpoint of the spec's detector with random weights, as a training writes it."""
    torch.manual_seed(0)
    loaded = load_spec(spec, list(overrides), "train")
    config = Config.fromstring(config_source(loaded, "train"), ".py")
    init_default_scope("mmdet")
    model = MODELS.build(config.model)
    model.init_weights()
    names = ("background", "triangle", "star", "rectangle", "circle")
    own = dict(source_format="mmdet", label_mode="category_id", background_column=0, zero_padded_values=False)
    meta = dict(cfg=config.pretty_text, dataset_meta=dict(classes=names), ddetr_mm=own)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


def copy_project(project: Path, folder: Path) -> Path:
    """A project of one's own to spoil."""
    return Path(shutil.copytree(project, folder, symlinks=True))


def edit_json(path: Path, change: Any) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
