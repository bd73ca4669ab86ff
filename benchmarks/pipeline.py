"""The training input pipeline, one worker, one thread: ours and stock mmdet's, side by side.

Decodes generated JPEGs of 640x480 and 1920x1080 and runs the whole training augmentation (flip; then
either a resize to 480-800, or a resize to 400-600, a crop and a resize to 480-800) down to the packed
tensor. The contestants alternate on the same images; figures are images a second of processor time,
which other load on the machine disturbs less than wall time, medians over the rounds.

- stock mmdet: the pipeline of its Deformable DETR config;
- Pillow: the same steps with Pillow's decoder and resize, as TAO's transforms do them;
- ours: pixels as Pillow's to one grey level;
- ours, fast: plain bilinear resize (as stock mmdet), and scaled decoding where it loses nothing visible.

Run: ``python benchmarks/pipeline.py`` (``--images 10 --rounds 2`` for a quick look; ``--record`` writes
``benchmarks/records/pipeline.md``).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from environment import describe, heading, report
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "pipeline.md"


from mmcv.transforms import Compose, LoadImageFromFile  # noqa: E402
from mmdet.registry import TRANSFORMS  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

import ddetr_mm.register  # noqa: E402, F401
from ddetr_mm.datasets.geometry import resize_size_hw  # noqa: E402

SCALES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
SIZES_HW = {"640x480": (480, 640), "1920x1080": (1080, 1920), "3840x2160": (2160, 3840)}


def write_images(folder: Path, size_hw: tuple[int, int], count: int) -> list[dict[str, Any]]:
    """JPEGs with structure at all scales (about 1.5 bits a pixel), each with seven boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = size_hw
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        path = folder / f"{index}.jpg"
        picture = np.zeros((height, width, 3), np.float32)
        for step in (2, 4, 8, 16, 32, 64):
            coarse = rng.normal(0, 3 + step / 2, (height // step, width // step, 3)).astype(np.float32)
            picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        if not path.exists():
            cv2.imwrite(
                str(path), np.clip(picture + 120, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90]
            )
        corners = np.sort(rng.uniform(0, 1, (7, 2, 2)), axis=1).reshape(7, 4) * [width, height, width, height]
        instances = [{"bbox": box, "bbox_label": 0, "ignore_flag": 0} for box in corners.tolist()]
        samples.append(
            {"img_path": str(path), "img_id": index, "height": height, "width": width, "instances": instances}
        )
    return samples


def stock() -> list[dict[str, Any]]:
    """Stock mmdet's steps, from its Deformable DETR config."""
    multi_scale = {"type": "RandomChoiceResize", "scales": [(s, 1333) for s in SCALES], "keep_ratio": True}
    first = {**multi_scale, "scales": [(s, 4200) for s in (400, 500, 600)]}
    crop = {
        "type": "RandomCrop",
        "crop_type": "absolute_range",
        "crop_size": (384, 600),
        "allow_negative_crop": True,
    }
    # The class, since importing ddetr_mm puts its own loader under mmdet's name.
    return steps({"type": LoadImageFromFile}, multi_scale, first, crop, "PackDetInputs")


def ours(backend: str, load: dict[str, Any]) -> list[dict[str, Any]]:
    """Our steps, as a translated spec has them."""
    multi_scale = {"type": "TAORandomResize", "scales": SCALES, "max_size": 1333, "backend": backend}
    first = {"type": "TAORandomResize", "scales": [400, 500, 600], "backend": backend}
    crop = {"type": "TAORandomSizeCrop", "min_size": 384, "max_size": 600}
    return steps(load, multi_scale, first, crop, "TAOPackDetInputs")


def steps(load: dict[str, Any], multi_scale: Any, first: Any, crop: Any, pack: str) -> list[dict[str, Any]]:
    """The train policy around the steps that differ."""
    return [
        load,
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "RandomFlip", "prob": 0.5},
        {
            "type": "RandomChoice",
            "transforms": [[multi_scale], [first, crop, multi_scale]],
            "prob": [0.5, 0.5],
        },
        {"type": pack},
    ]


def pillow(results: dict[str, Any]) -> torch.Tensor:
    """The same policy on the image alone, with Pillow."""
    image = Image.open(results["img_path"]).convert("RGB")
    if np.random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def resize(image: Image.Image, scales: list[int], max_size: int | None) -> Image.Image:
        height, width = resize_size_hw(
            image.height, image.width, scales[np.random.randint(len(scales))], max_size
        )
        return image.resize((width, height), Image.Resampling.BILINEAR)

    if np.random.random() < 0.5:
        image = resize(image, [400, 500, 600], None)
        width, height = (np.random.randint(384, min(600, side) + 1) for side in image.size)
        left, top = np.random.randint(image.width - width + 1), np.random.randint(image.height - height + 1)
        image = image.crop((left, top, left + width, top + height))
    image = resize(image, SCALES, 1333)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def contestants() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Name to pipeline."""
    fast_load = {"type": "TAOLoadImageFromFile", "min_short_side": max(SCALES)}
    configs = {
        "stock mmdet": stock(),
        "ours": ours("pillow", {"type": "TAOLoadImageFromFile"}),
        "ours, fast": ours("fast", fast_load),
    }
    built = {name: Compose([TRANSFORMS.build(step) for step in config]) for name, config in configs.items()}
    return {"Pillow": pillow, **built}


def measure(samples: list[dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Images a second of processor and of wall time, the contestants taking turns."""
    pipelines = contestants()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    for turn in range(-1, rounds):  # the first turn warms up
        for name, pipeline in pipelines.items():
            np.random.seed(turn + 1)
            copies = copy.deepcopy(samples)
            cpu, wall = time.process_time(), time.perf_counter()
            for sample in copies:
                pipeline(sample)
            if turn >= 0:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    medians = {name: np.median(np.array(values), axis=0) for name, values in times.items()}
    return {
        name: {"cpu": len(samples) / cpu, "wall": len(samples) / wall}
        for name, (cpu, wall) in medians.items()
    }


def stages(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time per image in each step."""
    result: dict[str, dict[str, float]] = {}
    for name, pipeline in contestants().items():
        if not isinstance(pipeline, Compose):
            continue
        totals = dict.fromkeys((type(step).__name__ for step in pipeline.transforms), 0.0)
        np.random.seed(0)
        for sample in copy.deepcopy(samples):
            for step in pipeline.transforms:
                start = time.process_time()
                sample = step(sample)
                totals[type(step).__name__] += time.process_time() - start
        result[name] = {step: 1000 * total / len(samples) for step, total in totals.items()}
    return result


def markdown(found: dict[str, Any], environment: dict[str, Any], args: argparse.Namespace) -> str:
    """The figures as Markdown."""
    lines = heading("Training input pipeline, one worker, one thread", environment)
    lines += [
        "",
        f"Images a second of processor time (of wall time), medians of {args.rounds} alternating rounds.",
    ]
    for size, (rates, shares) in found.items():
        lines += [
            "",
            f"## {size}",
            "",
            "| pipeline | images/s | against stock mmdet |",
            "| --- | --- | --- |",
        ]
        for name, rate in rates.items():
            ratio = rate["cpu"] / rates["stock mmdet"]["cpu"]
            lines.append(f"| {name} | {rate['cpu']:.0f} ({rate['wall']:.0f}) | {ratio:.2f} |")
        lines += ["", "Milliseconds per image and step:", ""]
        lines += [
            f"- {name}: " + ", ".join(f"{step} {value:.2f}" for step, value in share.items())
            for name, share in shares.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES_HW), choices=list(SIZES_HW))
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "pipeline")
    parser.add_argument("--record", type=Path, nargs="?", const=RECORD, help="write the record, or a file")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    init_default_scope("mmdet")
    environment = describe("torch", "mmdet", "opencv-python-headless", "simplejpeg", "pillow", "numpy")
    found = {}
    for size in args.sizes:
        samples = write_images(args.work_dir / size, SIZES_HW[size], args.images)
        found[size] = (measure(samples, args.rounds), stages(samples))
        print(size, found[size], flush=True)
    report(None, markdown(found, environment, args), args.record)


if __name__ == "__main__":
    main()
