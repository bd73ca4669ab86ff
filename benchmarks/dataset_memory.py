"""Time and memory of annotation datasets at COCO scale: ours, mmdet's and torchvision's, side by side.

Writes a COCO file of the size of train2017 (118,287 images, 860,001 boxes, polygons, about 330 MB), then
measures, each in processes of its own:

1. start: seconds until the dataset answers, its resident memory and its peak, for ``CocoDataset`` (mmdet),
   ``CocoDetection`` (torchvision) and ``SerializedCocoDataset`` cold (no cache file) and warm;
2. growth: what two forked workers add while they draw samples;
3. a whole machine: 8 ranks with 8 forked workers each. The sum of the proportional set sizes (PSS) of all
   72 processes, less the same with an annotation file of ten images, after the workers drew 100,000 samples.

Memory is read from ``/proc/<pid>/smaps_rollup``. Run: ``python benchmarks/dataset_memory.py``
(``--images 5000`` for a quick look; ``--record`` writes ``benchmarks/records/dataset_memory.md``).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, heading, report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "dataset_memory.md"
CONTESTANTS = ("mmdet CocoDataset", "torchvision CocoDetection", "ours, cold", "ours, warm")


def write_coco(path: Path, num_images: int, boxes_per_image: float = 7.27) -> None:
    """Generate an annotation file with COCO's fields, sizes and number of polygon points."""
    rng = np.random.default_rng(0)
    num_boxes = int(num_images * boxes_per_image)
    widths, heights = rng.integers(400, 641, num_images), rng.integers(300, 641, num_images)
    categories = [{"id": i, "name": f"class {i}", "supercategory": "thing"} for i in range(1, 91) if i % 9]
    category_ids = rng.choice([category["id"] for category in categories], num_boxes)
    rows = rng.integers(0, num_images, num_boxes)
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for i in range(num_images):
            name = f"{i + 9:012d}.jpg"
            url = (
                f'"coco_url": "http://images.cocodataset.org/train2017/{name}", "date_captured": "2013-11-14"'
            )
            size = f'"height": {heights[i]}, "width": {widths[i]}'
            file.write(
                f'{", " if i else ""}{{"license": 1, "file_name": "{name}", {url}, {size}, "id": {i + 9}}}'
            )
        file.write('], "annotations": [')
        for k in range(num_boxes):
            width, height = widths[rows[k]], heights[rows[k]]
            box_wh = rng.random(2) * [width, height] * 0.5 + 2
            box_xy = rng.random(2) * ([width, height] - box_wh)
            points = rng.random((int(rng.integers(4, 24)), 2)) * box_wh + box_xy
            polygon = ", ".join(f"{value:.2f}" for value in points.ravel())
            box = ", ".join(f"{value:.2f}" for value in (*box_xy, *box_wh))
            file.write(
                f'{", " if k else ""}{{"segmentation": [[{polygon}]], "area": {box_wh.prod() * 0.7:.4f}, '
                f'"iscrowd": 0, "image_id": {rows[k] + 9}, "bbox": [{box}], '
                f'"category_id": {category_ids[k]}, "id": {k + 1}}}'
            )
        file.write('], "categories": ' + json.dumps(categories) + "}")


def memory_mb(pid: int | str = "self") -> dict[str, float]:
    """Resident and proportional set size of a process, and its peak, in MB."""
    values = {}
    for name in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            key, _, rest = line.partition(":")
            if rest.strip().endswith("kB"):
                values[key] = int(rest.split()[0]) / 1000
    return {"rss": values["Rss"], "pss": values["Pss"], "peak": values["VmHWM"]}


def build_ours(ann_file: Path) -> Any:
    import ddetr_mm.datasets.coco as module

    return module.SerializedCocoDataset(ann_file=str(ann_file), data_prefix={"img": "images"})


def build_mmdet(ann_file: Path) -> Any:
    importlib.import_module("ddetr_mm")  # before mmdet: answers for mmcv's compiled ops
    from mmdet.datasets import CocoDataset

    end = ann_file.read_bytes()[-100_000:]
    names = [category["name"] for category in json.loads(end.split(b'"categories": ')[1][:-1])]
    return CocoDataset(ann_file=str(ann_file), data_prefix={"img": "images"}, metainfo={"classes": names})


def build_torchvision(ann_file: Path) -> Any:
    from torchvision.datasets import CocoDetection

    return CocoDetection("images", str(ann_file))


def draw(dataset: Any, index: int) -> None:
    """One sample's annotations, without its pixels."""
    if hasattr(dataset, "get_data_info"):
        dataset.get_data_info(index)
    else:
        dataset._load_target(dataset.ids[index])


class Children:
    """Forked processes that do some work, say so, and live on until they are ended."""

    def __init__(self, work: Sequence[Callable[[], list[int]]]) -> None:
        """Fork one child per function; wait until all have returned. Each gives process ids to add."""
        ready_read, ready_write = os.pipe()
        stop_read, self._stop_write = os.pipe()
        self._own = []
        for task in work:
            pid = os.fork()
            if pid == 0:
                os.close(self._stop_write)
                os.write(ready_write, (json.dumps(task()) + "\n").encode())
                os.read(stop_read, 1)  # returns when the parent closes its end or dies
                os._exit(0)
            self._own.append(pid)
        os.close(ready_write)
        os.close(stop_read)
        with os.fdopen(ready_read) as lines:
            self.pids = [*self._own, *(pid for _ in work for pid in json.loads(lines.readline()))]

    def pss_mb(self) -> float:
        """Sum of the proportional set sizes of all of them."""
        return sum(memory_mb(pid)["pss"] for pid in self.pids)

    def end(self) -> None:
        """Let all of them end."""
        os.close(self._stop_write)
        for pid in self._own:
            os.waitpid(pid, 0)


def worker(dataset: Any, samples: int, reopen: bool, seed: int) -> list[int]:
    """Draw samples; with ``reopen`` from a dataset as a spawned worker gets it."""
    if reopen:
        dataset = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    for index in np.random.default_rng(seed).integers(0, len(dataset), samples).tolist():
        draw(dataset, index)
    return []


def rank(ann_file: Path, num_workers: int, samples: int, reopen: bool, seed: int) -> list[int]:
    """Build the dataset, fork its workers, give their process ids."""
    dataset = build_ours(ann_file)
    gc.collect()
    seeds = [seed * num_workers + index for index in range(num_workers)]
    workers = Children([partial(worker, dataset, samples, reopen, each) for each in seeds])
    KEPT.append((dataset, workers))
    return workers.pids


KEPT: list[Any] = []
"""What a rank holds as long as it lives."""


def role_start(name: str, ann_file: Path, samples: int) -> dict[str, float]:
    """Build one dataset in this process; then two forked workers draw samples."""
    builders = {"mmdet CocoDataset": build_mmdet, "torchvision CocoDetection": build_torchvision}
    build = builders.get(name, build_ours)
    build(ann_file.with_name("tiny.json"))  # imports are not what is measured
    gc.collect()
    before = memory_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    dataset = build(ann_file)
    draw(dataset, 0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    gc.collect()
    after = memory_mb()
    sums = []
    for count in (0, samples // 2):
        children = Children([partial(worker, dataset, count, False, seed) for seed in range(2)])
        sums.append(children.pss_mb() + memory_mb()["pss"])
        children.end()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rss_mb": after["rss"] - before["rss"],
        "peak_mb": after["peak"] - before["rss"],
        "growth_mb": sums[1] - sums[0],
    }


def role_machine(ann_file: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Annotation memory of all ranks and workers.

    The ranks are forks of this process, which has imported everything and read nothing: code is shared
    with it, annotations are not.
    """
    tiny = ann_file.with_name("tiny.json")
    build_ours(tiny)
    each = args.samples // (args.ranks * args.workers)
    result: dict[str, dict[str, float]] = {}
    for label, reopen in (("forked workers", False), ("workers that reopen the file", True)):
        result[label] = {}
        for moment, samples in (("before_mb", 0), ("after_mb", each)):
            sums = []
            for path in (tiny, ann_file):
                work = [partial(rank, path, args.workers, samples, reopen, n) for n in range(args.ranks)]
                ranks = Children(work)
                sums.append(ranks.pss_mb())
                ranks.end()
            result[label][moment] = sums[1] - sums[0]
    return result


def run_role(name: str, ann_file: Path, args: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """Run one part in a process of its own."""
    command = [sys.executable, __file__, "--role", name, "--ann-file", str(ann_file)]
    for option in ("samples", "ranks", "workers"):
        command += [f"--{option}", str(getattr(args, option))]
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(name, found, flush=True)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, one part after the other."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    ann_file = args.work_dir / f"coco-{args.images}.json"
    if not ann_file.exists():
        print(f"writing {ann_file} ...", flush=True)
        write_coco(ann_file, args.images)
    write_coco(args.work_dir / "tiny.json", 10)
    cache = args.work_dir / "cache"
    env = {**os.environ, "DDETR_MM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(args.repeats):  # alternating, so that the machine's moods meet all alike
        for name in CONTESTANTS:
            if name == "ours, cold":
                shutil.rmtree(cache, ignore_errors=True)
            starts[name].append(run_role(name, ann_file, args, env))
    medians = {
        name: {key: float(np.median([found[key] for found in runs])) for key in runs[0]}
        for name, runs in starts.items()
    }
    machine = run_role("machine", ann_file, args, env)
    return {"json_mb": ann_file.stat().st_size / 1e6, "starts": medians, "machine": machine}


def markdown(result: dict[str, Any], args: argparse.Namespace, environment: dict[str, Any]) -> str:
    lines = [
        *heading("Annotation datasets at COCO scale", environment),
        f"- annotation file: {args.images:,} images, {result['json_mb']:.0f} MB, in the page cache",
        "",
        f"Medians of {args.repeats} alternating runs. Growth: what two forked workers add by drawing "
        f"{args.samples:,} samples together.",
        "",
        "| dataset | start, s | of it processor, s | resident, MB | peak, MB | growth, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["starts"].items():
        times = f"{row['seconds']:.2f} | {row['cpu_seconds']:.2f}"
        memory = f"{row['rss_mb']:.0f} | {row['peak_mb']:.0f} | {row['growth_mb']:.1f}"
        lines.append(f"| {name} | {times} | {memory} |")
    lines += [
        "",
        f"All annotation memory of {args.ranks} ranks with {args.workers} workers each (PSS, less that of "
        f"the same processes with ten images), before and after drawing {args.samples:,} samples:",
        "",
        "| ours | before, MB | after, MB |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {row['before_mb']:.1f} | {row['after_mb']:.1f} |"
            for name, row in result["machine"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "dataset_memory")
    parser.add_argument("--record", type=Path, nargs="?", const=RECORD, help="write the record, or a file")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--ann-file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "machine":
        print(json.dumps(role_machine(args.ann_file, args)))
    elif args.role:
        print(json.dumps(role_start(args.role, args.ann_file, args.samples)))
    else:
        environment = describe("torch", "torchvision", "mmdet", "msgspec", "numpy")
        report(None, markdown(run(args), args, environment), args.record)


if __name__ == "__main__":
    main()
