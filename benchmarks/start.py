"""How long commands take to start: ``-h``, ``check`` of a spec, and ``train`` up to its first step.

``train`` gets as many images and boxes as COCO's train2017 (118,287 and about 860,000; hard links to a few
generated JPEGs), the tiny model of ``configs/specs/shapes_resnet18.yaml``, and one worker. It is started
twice: the first run fills the annotation cache, the second finds it. The first step is over when the first
line of the log is there. Each figure is the median of ``--rounds`` starts (two training runs in all), wall
and processor time of the process and its children.

Run: ``python benchmarks/start.py`` (``--images 2000 --rounds 1`` for a quick look; ``--record`` writes
``benchmarks/records/start.{json,md}``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from environment import describe, heading, load_average, report

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).parent / "records" / "start"
SPEC = ROOT / "configs" / "specs" / "shapes_resnet18.yaml"
NUM_FILES, NUM_CLASSES, SIZE_HW = 64, 4, (120, 160)
SETTINGS = ("ddetr_mm.log_interval=1", "dataset.workers=1")
FIRST_STEP = "training: "


def write_data(folder: Path, num_images: int) -> None:
    """Images as hard links to a few files, and one COCO file."""
    rng = np.random.default_rng(0)
    height, width = SIZE_HW
    (folder / "images").mkdir(parents=True)
    for index in range(NUM_FILES):
        noise = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.jpg"), cv2.resize(noise, (width, height)))
    for index in range(num_images):
        os.link(folder / f"{index % NUM_FILES}.jpg", folder / "images" / f"{index:08d}.jpg")
    images = [
        {"id": index, "file_name": f"images/{index:08d}.jpg", "width": width, "height": height}
        for index in range(num_images)
    ]
    num_boxes = round(num_images * 7.27)
    rows, labels = rng.integers(0, num_images, num_boxes), rng.integers(1, NUM_CLASSES + 1, num_boxes)
    sides = rng.uniform(8, 60, (num_boxes, 2)).round(1)
    corners = (rng.random((num_boxes, 2)) * (np.array([width, height]) - sides)).round(1)
    annotations = [
        {"id": k + 1, "image_id": int(rows[k]), "category_id": int(labels[k]), "iscrowd": 0,
         "bbox": [*corners[k].tolist(), *sides[k].tolist()], "area": float(sides[k].prod())}
        for k in range(num_boxes)
    ]  # fmt: skip
    categories = [{"id": index, "name": f"class {index}"} for index in range(1, NUM_CLASSES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def run(words: list[str]) -> dict[str, float]:
    """Seconds of a whole command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "ddetr_mm", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def train_to_first_step(words: list[str], limit: float = 900) -> dict[str, float]:
    """Seconds until the log has its first step; the training is then killed."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ddetr_mm", "train", *words],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while True:
                output.seek(0)
                text = output.read()
                wall = time.perf_counter() - began
                if FIRST_STEP in text:
                    break
                if process.poll() is not None or wall > limit:
                    raise SystemExit(f"no first step:\n{text[-2000:]}")
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """All rows."""
    data = folder / "data"
    write_data(data, args.images)
    write_data(folder / "few", NUM_FILES)
    rows: dict[str, dict[str, float]] = {}
    for name, words in (
        ("ddetr-mm -h", ["-h"]),
        ("ddetr-mm spec train", ["spec", "train"]),
        ("check of a convert spec", ["check", "--for", "convert", "-e", _convert_spec(folder)]),
    ):
        times = [run(words) for _ in range(args.rounds + 1)][1:]
        rows[name] = {key: statistics.median(one[key] for one in times) for key in ("wall", "cpu")}
        print(name, rows[name], flush=True)
    _train(folder / "few", folder)  # compiles what has no byte code yet
    for name in ("train to the first step, cache empty", "train to the first step, cached"):
        rows[name] = _train(data, folder)
        print(name, rows[name], flush=True)
    return rows


def _train(data: Path, folder: Path) -> dict[str, float]:
    """Seconds to the first step on images of :func:`write_data`."""
    overrides = [
        f"dataset.{kind}_data_sources.0.{key}={value}"
        for kind in ("train", "val")
        for key, value in (("image_dir", data), ("json_file", data / "annotations.json"))
    ]
    found = train_to_first_step(["-e", str(SPEC), *overrides, *SETTINGS, f"results_dir={folder / 'results'}"])
    shutil.rmtree(folder / "results")
    return found


def _convert_spec(folder: Path) -> str:
    """A spec whose data are there and small: what is timed is reading the spec."""
    sequence = folder / "kitti" / "s"
    for name in ("images", "labels"):
        (sequence / name).mkdir(parents=True)
    shutil.copy(folder / "data" / "0.jpg", sequence / "images" / "0.jpg")
    (sequence / "labels" / "0.txt").write_text("class 0 0 0 1 1 9 9 0 0 0 0 0 0 0\n")
    (folder / "kitti" / "sequences.txt").write_text("s\n")
    path = folder / "convert.yaml"
    path.write_text(
        f"input_source: {folder / 'kitti' / 'sequences.txt'}\ndata_root: {folder / 'kitti'}\n"
        f"results_dir: {folder / 'coco'}\nimage_dir_name: images\nlabel_dir_name: labels\n"
        "image_extension: .jpg\nnum_partitions: 1\nnum_shards: 1\n"
    )
    return str(path)


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("Starting", result["environment"])
    lines += ["", "| | seconds | of it processor |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['wall']:.2f} | {row['cpu']:.2f} |" for name, row in result["rows"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write the record")
    args = parser.parse_args()
    # Without byte code every start would compile all sources.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environment = {**describe("torch", "mmdet", "transformers", "ddetr_mm"), "images": args.images}
    with tempfile.TemporaryDirectory() as folder:
        result = {"environment": environment, "rows": measure(args, Path(folder))}
    environment["load_after"] = load_average()
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
