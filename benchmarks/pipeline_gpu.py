"""Training from image files on a GPU: a whole run of ours and of stock mmdet, with data workers.

Generated JPEGs of 1280x720 with boxes go through each one's own pipeline (decoding, flip, resize, crop),
data workers, collation, copies to the GPU, training steps, logging. Ours is ``ddetr-mm train`` on a spec,
mmdet's is its Runner on its own config of the same network; both pad to the largest image of a batch. So
the waits show that ``train_gpu``, whose batches are on the GPU already, leaves out. Time is taken between
two points at which the GPU has finished its work; every contestant has a process of its own.

Run: ``python benchmarks/pipeline_gpu.py`` (``--record`` writes
``benchmarks/records/pipeline_gpu.{jsonl,json,md}``; ``--device cpu --quick`` tries it out on tiny images and
a small network).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from environment import load_average  # noqa: E402
from gpu_alternating import attempt, describe_device, device_of, synchronize  # noqa: E402
from gpu_process import Deadline, Figures, add_process_arguments, run_and_record  # noqa: E402

NAME = Path(__file__).stem
DIFFERENT_IMAGES = 32
WINDOW = 5
"""Steps between two waits for the GPU, whose time is one figure."""

# --- Data ---


def write_data(folder: Path, size_hw: tuple[int, int], count: int) -> Path:
    """Image files and ``annotations.json``, with seven boxes an image; what is there already stays.

    Args:
        folder: for both.
        size_hw: of every image.
        count: of images; beyond :data:`DIFFERENT_IMAGES` they repeat.

    Returns:
        The annotation file.
    """
    from mmdet.datasets import CocoDataset
    from pipeline import write_images

    annotation_file = folder / "annotations.json"
    if annotation_file.exists():
        return annotation_file
    images = folder / "images"
    samples = write_images(images, size_hw, min(count, DIFFERENT_IMAGES))
    height, width = size_hw
    rng = np.random.default_rng(0)
    coco: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate(CocoDataset.METAINFO["classes"], start=1):
        coco["categories"].append({"id": number, "name": name})
    for number in range(count):
        sample = samples[number % len(samples)]
        path = images / f"{number}.jpg"
        if not path.exists():
            shutil.copyfile(sample["img_path"], path)
        coco["images"].append({"id": number, "file_name": path.name, "height": height, "width": width})
        for instance in sample["instances"]:
            left, top, right, bottom = instance["bbox"]
            sides = max(4.0, right - left), max(4.0, bottom - top)
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]),
                    "image_id": number,
                    "category_id": int(rng.integers(1, 81)),
                    "bbox": [min(left, width - 5), min(top, height - 5), *sides],
                    "area": sides[0] * sides[1],
                    "iscrowd": 0,
                }
            )
    annotation_file.write_text(json.dumps(coco))
    return annotation_file


# --- Times of a run ---


def watch_steps(
    figures: Figures,
    contestant: str,
    args: argparse.Namespace,
    deadline: Deadline,
    finish: Callable[[], NoReturn],
) -> None:
    """Have every mmengine Runner of this process write its step times and end after some steps.

    Args:
        figures: gets the mean after every :data:`WINDOW` steps.
        contestant: the name there.
        args: ``warm_up`` steps do not count, ``steps`` do.
        deadline: no window begins after it.
        finish: ends the process after the last step.
    """
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    device = device_of(args.device)

    class StepTimes(Hook):
        """Times of steps and of waiting for data."""

        def __init__(self) -> None:
            self.done, self.began, self.data_s = 0, 0.0, 0.0
            self.windows: list[tuple[float, float]] = []  # seconds of a step, of them waiting for data
            self.waits_since = 0.0

        def before_train_epoch(self, runner: Any) -> None:
            self.waits_since = time.perf_counter()

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            self.data_s += time.perf_counter() - self.waits_since

        def after_train_iter(
            self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
        ) -> None:
            self.done += 1
            counted = self.done - args.warm_up
            if counted >= 0 and counted % WINDOW == 0:
                synchronize(device)
                now = time.perf_counter()
                if counted:
                    self.windows.append(((now - self.began) / WINDOW, self.data_s / WINDOW))
                    write_means(figures, contestant, self.windows, args.batch, device)
                self.began, self.data_s = time.perf_counter(), 0.0
                if counted >= args.steps or (counted and deadline.has_passed()):
                    finish()
            self.waits_since = time.perf_counter()

    train = Runner.train

    def train_watched(self: Runner) -> Any:
        self.register_hook(StepTimes(), priority="LOWEST")
        return train(self)

    Runner.train = train_watched


def write_means(
    figures: Figures,
    contestant: str,
    windows: list[tuple[float, float]],
    batch: int,
    device: torch.device,
) -> None:
    """Write the means so far.

    Args:
        figures: where to.
        contestant: whose.
        windows: seconds of a step, and of them waiting for data.
        batch: images a step.
        device: whose memory is read.
    """
    steps, waits = zip(*windows, strict=True)
    mean = sum(steps) / len(steps)
    figures.append(
        "alone",
        contestant,
        alone_ms=1e3 * mean,
        min_ms=1e3 * min(steps),
        max_ms=1e3 * max(steps),
        data_ms=1e3 * sum(waits) / len(waits),
        images_s=batch / mean,
        steps=WINDOW * len(steps),
        memory_mb=torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
    )


# --- Contestants ---

CONTESTANTS = {
    "mmdet, fp32": ("mmdet", "fp32"),
    "ours, bf16": ("ours", "bf16"),
    "mmdet, bf16": ("mmdet", "bf16"),
    "ours, tf32": ("ours", "tf32"),
    "mmdet, tf32": ("mmdet", "tf32"),
    "ours, fp32": ("ours", "fp32"),
    "mmdet, defaults": ("mmdet", "defaults"),
    "ours, bf16, compile": ("ours", "bf16, compile"),
}
"""Name to whose it is and its precision; the compiled one pads all images to one size."""


def scales(args: argparse.Namespace) -> tuple[list[int], int]:
    """Short sides of the resize, and the limit of the long side."""
    return ([64, 72], 128) if args.quick else (list(range(480, 801, 32)), 1333)


def run_ours(precision: str, args: argparse.Namespace, folder: Path, annotation_file: Path) -> None:
    """``ddetr-mm train`` in this process.

    Args:
        precision: see :data:`CONTESTANTS`.
        args: the command line.
        folder: for results.
        annotation_file: of the data.
    """
    from ddetr_mm.cli import main as ddetr_mm_main

    sides, longest = scales(args)
    source = {"image_dir": str(annotation_file.parent / "images"), "json_file": str(annotation_file)}
    small = dict(enc_layers=1, dec_layers=2, num_queries=20, num_select=20) if args.quick else {}
    spec = {
        "results_dir": str(folder / "results"),
        "dataset": {
            "train_data_sources": [source],
            "val_data_sources": [source],
            "num_classes": 81,
            "batch_size": args.batch,
            "workers": args.workers,
            "augmentation": {
                "scales": sides,
                "random_resize_max_size": longest,
                "train_random_resize": [48, 64] if args.quick else [400, 500, 600],
                "train_random_crop_min": 32 if args.quick else 384,
                "train_random_crop_max": 64 if args.quick else 600,
                "test_random_resize": sides[-1],
                "fixed_padding": "compile" in precision,
            },
        },
        "model": {"with_box_refine": True, "dropout_ratio": 0.0, **small},
        "train": {
            "num_epochs": 1000,
            "validation_interval": 1000,
            "checkpoint_interval": 1000,
            "precision": "bf16" if precision.startswith("bf16") else "fp32",
            "activation_checkpoint": False,
        },
        "ddetr_mm": {
            "tf32": precision != "fp32",
            "device": "cuda" if args.device.startswith("cuda") else "cpu",
            "compile": "all" if "compile" in precision else "none",
        },
    }
    path = folder / "spec.yaml"
    path.write_text(json.dumps(spec))  # JSON is YAML
    status = ddetr_mm_main(["train", "-e", str(path)])  # the hook ends it
    raise RuntimeError(f"train ended with status {status}")


def run_stock(precision: str, args: argparse.Namespace, folder: Path, annotation_file: Path) -> None:
    """mmdet's Runner on its own config, in this process.

    Args:
        precision: see :data:`CONTESTANTS`.
        args: the command line.
        folder: for results.
        annotation_file: of the data.
    """
    from gpu_detectors import prepare_stock_ops, smaller
    from mmdet.utils import register_all_modules
    from mmengine.runner import Runner

    register_all_modules(init_default_scope=True)
    prepare_stock_ops(device_of(args.device))
    if precision != "defaults":
        tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    config = stock_run_config(precision, args, folder, annotation_file)
    if args.quick:
        smaller(config.model)
    Runner.from_cfg(config).train()


def stock_run_config(
    precision: str, args: argparse.Namespace, folder: Path, annotation_file: Path
) -> Any:  # an mmengine Config
    """mmdet's own training config on the generated data."""
    from detectors_cpu import STOCK_CONFIG, stock_config
    from mmengine.hub import get_config

    config = get_config(STOCK_CONFIG)
    config.model = stock_config()
    config.work_dir = str(folder / "work_dir")
    loader = config.train_dataloader
    loader.batch_size, loader.num_workers = args.batch, args.workers
    loader.persistent_workers = args.workers > 0
    loader.dataset.update(
        data_root="", ann_file=str(annotation_file), data_prefix=dict(img=f"{annotation_file.parent}/images/")
    )
    if args.quick:
        sides, longest = scales(args)
        multi_scale = dict(type="RandomChoiceResize", keep_ratio=True, scales=[(s, longest) for s in sides])
        pipeline = loader.dataset.pipeline
        loader.dataset.pipeline = [*pipeline[:3], multi_scale, pipeline[-1]]
    config.train_cfg.max_epochs = 1000
    config.train_cfg.val_interval = 1001
    for name in ("dataloader", "evaluator", "cfg"):
        config[f"val_{name}"] = config[f"test_{name}"] = None
    config.default_hooks.checkpoint = None
    config.default_hooks.pop("visualization")
    config.load_from = None
    if precision.startswith("bf16"):
        config.optim_wrapper.update(type="AmpOptimWrapper", dtype="bfloat16")
    return config


def measure(args: argparse.Namespace) -> None:
    """One contestant, ended by its hook after its steps; figures go to ``--figures``."""
    deadline = Deadline(args.seconds)
    device = device_of(args.device)
    figures = Figures(args.figures, NAME)
    (name,) = args.only
    kind, precision = CONTESTANTS[name]
    environment = {**describe_device(device), "batch": args.batch, "workers": args.workers}
    figures.append("environment", **environment, image="x".join(map(str, args.image_size)))
    args.folder.mkdir(parents=True, exist_ok=True)
    import ddetr_mm.register  # noqa: F401  (before mmdet)

    data = args.folder / "x".join(map(str, (*args.image_size, args.images)))
    annotation_file = write_data(data, tuple(args.image_size), args.images)
    results = Path(tempfile.mkdtemp(dir=args.folder))

    def finish() -> NoReturn:
        figures.append("end", name)
        figures.append("environment", load_after=load_average())
        shutil.rmtree(results, ignore_errors=True)
        sys.stdout.flush()
        os._exit(0)  # no checkpoint, no waiting for data workers

    watch_steps(figures, name, args, deadline, finish)
    start = run_ours if kind == "ours" else run_stock
    attempt(
        figures, name, functools.partial(start, precision, args, results, annotation_file), deadline, device
    )
    shutil.rmtree(results, ignore_errors=True)  # it failed


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--image-size", type=int, nargs=2, default=[720, 1280], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=512, help="files")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=max(1, min(8, len(os.sched_getaffinity(0)) - 2)))
    parser.add_argument("--warm-up", type=int, default=10, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=40, help="that count")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "ddetr_mm_pipeline_gpu"))
    parser.add_argument("--quick", action="store_true", help="tiny images, a small network, few steps")
    add_process_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.image_size, args.images, args.batch, args.workers = [72, 128], 16, 2, 1
        args.warm_up, args.steps = 1, WINDOW
    unknown = sorted(set(args.only or ()) - set(CONTESTANTS))
    if unknown:
        parser.error(f"no such contestant: {', '.join(unknown)}; there are: {'; '.join(CONTESTANTS)}")
    if args.figures:
        if len(args.only or ()) != 1:
            parser.error("--figures needs one contestant: --only NAME")
        measure(args)
        return 0
    return run_and_record(Path(__file__), [["--only", name] for name in args.only or CONTESTANTS], args)


if __name__ == "__main__":
    sys.exit(main())
