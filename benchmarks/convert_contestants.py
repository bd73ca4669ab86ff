"""The data and the converters that ``benchmarks/convert.py`` compares."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("person", "face", "backpack")


def generate(folder: Path, num_images: int, headers: str) -> None:
    """Write ``num_images`` images and labels of one sequence."""
    from PIL import Image

    (folder / "seq" / "images").mkdir(parents=True)
    (folder / "seq" / "labels").mkdir()
    (folder / "sequences.txt").write_text("seq\n")
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(8):
        coarse = rng.integers(0, 255, (18, 24, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=75)
        pictures.append(buffer.getvalue())
    labels = [_label_text(rng, int(number)) for number in rng.integers(8, 21, 500)]
    for number in range(num_images):
        picture = pictures[number % len(pictures)]
        if headers == "distinct":
            picture = picture[:2] + b"\xff\xfe\x00\x0c" + f"{number:010d}".encode() + picture[2:]
        (folder / "seq" / "images" / f"frame_{number:07d}.jpg").write_bytes(picture)
        (folder / "seq" / "labels" / f"frame_{number:07d}.txt").write_bytes(labels[number % len(labels)])


def _label_text(rng: np.random.Generator, num_boxes: int) -> bytes:
    x = np.sort(rng.uniform(0, 640, (num_boxes, 2)))
    y = np.sort(rng.uniform(0, 480, (num_boxes, 2)))
    rows = zip(rng.choice(CLASSES, num_boxes), x[:, 0], y[:, 0], x[:, 1], y[:, 1], strict=True)
    return "".join(
        f"{name} 0.00 0 0.00 {left:.2f} {top:.2f} {right:.2f} {bottom:.2f}{' 0.00' * 7}\n"
        for name, left, top, right, bottom in rows
    ).encode()


def convert_simply(folder: Path, output: Path, num_images: int, decode: bool) -> int:
    """The straightforward converter; returns the number of images."""
    from PIL import Image

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name in sorted(os.listdir(folder / "seq" / "images"))[:num_images]:
        with Image.open(folder / "seq" / "images" / name) as image:
            if decode:
                image.load()
            width, height = image.size
        images.append(
            {"id": len(images), "file_name": f"seq/images/{name}", "width": width, "height": height}
        )
        label = folder / "seq" / "labels" / name.replace(".jpg", ".txt")
        for row in np.atleast_1d(np.genfromtxt(label, dtype=None, encoding="utf-8")):
            left, top, right, bottom = (float(row[column]) for column in range(4, 8))
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": len(images) - 1,
                    "category_id": CLASSES.index(row[0]) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    with output.open("w") as file:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, file)
    return len(images)


def convert_ours(folder: Path, output: Path, num_workers: int | None) -> int:
    """Our converter with 32 shards; returns the number of images."""
    from ddetr_mm.convert.convert import ConvertOptions, convert_kitti

    options = ConvertOptions(
        folder / "sequences.txt", output, folder, "images", "labels", num_shards=32, num_workers=num_workers
    )
    report = convert_kitti(options)
    if report.problem_counts:
        raise RuntimeError(f"the generated data have problems: {report.problem_counts}")
    return report.num_images


def minimal_size(path: str) -> tuple[int, int]:
    """What a reader of our own would do for a JPEG without EXIF, and no more: for comparison."""
    descriptor = os.open(path, os.O_RDONLY)
    head = os.read(descriptor, 2048)
    os.close(descriptor)
    position = 2
    while head[position + 1] not in (0xC0, 0xC1, 0xC2):
        position += 2 + int.from_bytes(head[position + 2 : position + 4], "big")
    height = int.from_bytes(head[position + 5 : position + 7], "big")
    return int.from_bytes(head[position + 7 : position + 9], "big"), height


def parse_simply(text: bytes) -> list[tuple[str, list[float]]]:
    """Labels line by line, without any check."""
    rows = []
    for line in text.decode().splitlines():
        fields = line.split()
        rows.append((fields[0], [float(field) for field in fields[4:8]]))
    return rows
