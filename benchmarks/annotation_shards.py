"""Time and memory an image costs when sharded annotations are read: unit costs for docs/scale.md.

Writes shards as ``ddetr-mm convert`` leaves them (7 boxes an image, no polygons), then reads all of them in
a fresh process, once as every machine of a job does first, and once more from the mapped file that this
leaves. Memory is the growth of the resident size from just before reading: its peak, and what stays.

Run: ``python benchmarks/annotation_shards.py [--record]``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, heading, report

RECORD = Path(__file__).parent / "records" / "annotation_shards.md"
BOXES_AN_IMAGE = 7
IMAGES_A_SHARD = 5000


def write_shards(folder: Path, num_images: int) -> int:
    """Write the shards; returns their bytes."""
    rng = np.random.default_rng(0)
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 11)]
    written = 0
    for start in range(0, num_images, IMAGES_A_SHARD):
        rows = range(start, min(start + IMAGES_A_SHARD, num_images))
        images = [
            {"id": row, "file_name": f"sequence_{row // 10_000:05d}/images/{row:09d}.jpg", "width": 1920}
            | {"height": 1080}
            for row in rows
        ]
        boxes = rng.integers(1, 900, (len(rows) * BOXES_AN_IMAGE, 4)).tolist()
        annotations = [
            {
                "id": start * BOXES_AN_IMAGE + number,
                "image_id": rows[number // BOXES_AN_IMAGE],
                "category_id": 1 + number % 10,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, box in enumerate(boxes)
        ]
        content = dict(images=images, annotations=annotations, categories=categories)
        path = folder / f"shard-{start // IMAGES_A_SHARD:05d}.json"
        written += path.write_bytes(json.dumps(content, separators=(",", ":")).encode())
    return written


def memory_kb(name: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` (now) of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def read(folder: Path) -> dict[str, Any]:
    """Read all shards; call it in a fresh process."""
    from ddetr_mm.datasets.sources import read_coco_sources

    before = memory_kb("VmRSS")
    wall, processor = time.perf_counter(), time.process_time()
    table = read_coco_sources([dict(image_dir="", json_file=str(folder))], storage="shared")
    touched = int(table.image_ids.sum()) + float(table.boxes_xywh.sum())
    return dict(
        wall_s=time.perf_counter() - wall,
        processor_s=time.process_time() - processor,
        peak_bytes=(memory_kb("VmHWM") - before) * 1024,
        mapped_bytes=table.path.stat().st_size,  # type: ignore[attr-defined]
        images=table.num_images,
        touched=touched,
    )


def in_fresh_process(folder: Path) -> dict[str, Any]:
    """:func:`read` in a process of its own."""
    words = [sys.executable, __file__, "--read", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(Path(options.read))))
        return
    lines = heading("Sharded annotations", describe("numpy", "msgspec"))
    lines += [
        "",
        f"{BOXES_AN_IMAGE} boxes an image, {IMAGES_A_SHARD:,} images a shard; costs of one image.",
        "",
        "| images | | JSON, bytes | processor, µs | peak, bytes | mapped file, bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for num_images in options.images:
        with tempfile.TemporaryDirectory() as name:
            os.environ["DDETR_MM_CACHE"] = str(Path(name) / "cache")
            folder = Path(name) / "shards"
            folder.mkdir()
            size = write_shards(folder, num_images)
            for kind in ("first", "again"):
                one = in_fresh_process(folder)
                lines.append(
                    f"| {num_images:,} | {kind} | {size / num_images:.0f} "
                    f"| {one['processor_s'] / num_images * 1e6:.1f} | {one['peak_bytes'] / num_images:.0f} "
                    f"| {one['mapped_bytes'] / num_images:.0f} |"
                )
    report(None, "\n".join(lines) + "\n", RECORD if options.record else None)


if __name__ == "__main__":
    main()
