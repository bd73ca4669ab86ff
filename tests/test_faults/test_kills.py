"""SIGKILL at any moment: no half file under a final name; the same command again gives the whole result."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from bad_input_project import contents, copy_project, run_here
from PIL import Image
from safetensors.torch import load_file

SPEC = ("-e", "spec.yaml")
COMMANDS = {
    "convert": ("convert", "-e", "convert.yaml", "results_dir=out"),
    "train": ("train", *SPEC, "results_dir=out", "train.num_epochs=2", "ddetr_mm.deterministic=true"),
    "export": ("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=out/x.onnx", "--force"),
    "inference": (
        *("inference", *SPEC, "results_dir=out"),
        *("inference.checkpoint=random.pth", "inference.conf_threshold=0"),
    ),
    "weights": ("weights", "random.pth", "out/x.safetensors", "--to", "tao"),
    "quantize": (
        *("quantize", *SPEC, "results_dir=out", "quantize.backend=onnxruntime", "quantize.mode=static_ptq"),
        *(
            "quantize.model_path=random.pth",
            "ddetr_mm.quantize_max_ap_drop=100",
            "ddetr_mm.quantize_images=2",
        ),
        "dataset.quant_calibration_data_sources={image_dir: data, json_file: coco/val}",
    ),
    "predict": ("predict", "random.pth", "data/val/images", "--out", "out", "--save-txt"),
}
"""Command lines that write below ``out`` alone."""

OF_A_MOMENT = re.compile(
    r"events\.out|/\d{8}_\d{6}/|status\.json$|\.ddetr_mm_|parity\.json$|\.html$|\.safetensors$"
)
"""Files that hold times or processes, or entries in any order: whole, but of other bytes each time."""


def is_png(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def ends_with_a_line(path: Path) -> None:
    text = path.read_text()
    assert not text or text.endswith("\n")


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.name == "status.json"
        else json.loads(path.read_text())
    ),
    ".pth": lambda path: torch.load(path, weights_only=False, map_location="cpu"),
    ".safetensors": load_file,
    ".onnx": lambda path: onnx.checker.check_model(onnx.load(path)),
    ".png": is_png,
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".py": lambda path: compile(path.read_text(), str(path), "exec"),
    ".txt": ends_with_a_line,
}


def assert_files_are_whole(folder: Path) -> None:
    """Whatever has its final name can be read to its end."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix in READERS:
            try:
                READERS[path.suffix](path)
            except Exception as error:
                raise AssertionError(f"{path.relative_to(folder)} is no whole file: {error}") from error


def results(folder: Path) -> dict[str, str]:
    """Digests of the results that a run of the same command repeats bit by bit."""
    return {name: digest for name, digest in contents(folder).items() if not OF_A_MOMENT.search(name)}


def killed_at(project: Path, command: str, seconds: float) -> bool:
    """Run the command, kill it after some time; returns whether it still ran."""
    try:
        ended = run_here(project, *COMMANDS[command], timeout=seconds, fork=command != "train")
    except (TimeoutError, subprocess.TimeoutExpired):
        return True
    assert ended.status == 0, ended.message
    return False


def check_kills(project: Path, folder: Path, command: str, number: int) -> None:
    """Kill the command ``number`` times at random moments, each in a new copy of the project."""
    # One path for all copies: some results hold it.
    copy = copy_project(project, folder / "copy")
    start = time.monotonic()
    assert not killed_at(copy, command, 600)
    seconds = time.monotonic() - start
    expected = results(copy / "out")
    assert expected
    moments = random.Random(command)
    kills = 0
    for index in range(3 * number):  # some runs end before their moment
        if kills == number:
            break
        # The first part of a command reads and imports; most of what can break comes after.
        share = moments.uniform(0.0 if index % 3 == 0 else 0.5, 1.0)
        shutil.rmtree(copy)
        copy_project(project, copy)
        kills += killed_at(copy, command, seconds * share)
        if (copy / "out").exists():
            assert_files_are_whole(copy / "out")
        again = run_here(copy, *COMMANDS[command], fork=command != "train")
        assert again.status == 0, f"after {share:.2f} of {seconds:.1f} s:\n{again.message[-3000:]}"
        assert_files_are_whole(copy / "out")
        left = [path.name for path in (copy / "out").rglob("*") if ".tmp" in path.name]
        assert not left, f"after {share:.2f} of {seconds:.1f} s: {left}"
        assert results(copy / "out") == expected, f"after {share:.2f} of {seconds:.1f} s"
        assert contents(copy / "data") == contents(project / "data")
    assert kills, "every run had ended before it was killed"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("train", "quantize")])
def test_a_few_kills(project: Path, tmp_path: Path, command: str):
    check_kills(project, tmp_path, command, 2)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.timeout(1800)
def test_many_kills(project: Path, tmp_path: Path, command: str):
    check_kills(project, tmp_path, command, 20)
