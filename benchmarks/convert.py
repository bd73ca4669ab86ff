"""KITTI to COCO: our converter beside a straightforward one, at several sizes, in one run.

The straightforward converter is what one writes first, and close to TAO's: Pillow decodes every image,
``numpy.genfromtxt`` reads every label, ``json.dump`` writes, one process. A second one only opens the images
(header), all else alike.

For each size a folder of 640x480 JPEG files with 8 to 20 labels each is generated (separate files; a few
distinct pixel contents) and read once, so that all files are in the page cache. Then the converters take
turns, each in a process of its own, and the ratio is that of neighbours. The slow ones convert the first
``--baseline-images`` images only; their rate does not depend on the number. Peak memory is the sum of the
peak resident sizes of all processes of a converter.

``headers``: JPEG headers are ``alike``, as the frames of one camera, or ``distinct``, with a comment of its
own in each file.

Run: ``python benchmarks/convert.py`` (``--sizes 1000 --rounds 1`` for a quick look; ``--record`` writes
``benchmarks/records/convert.{json,md}``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from environment import describe, heading, load_average, report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "convert"
REFERENCE_RATE = 400


def run_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: convert once and print the figures."""
    output = arguments.folder / "out"
    kind, _, number = arguments.one.partition(":")
    from convert_contestants import convert_ours, convert_simply

    if kind == "ours":
        from ddetr_mm.convert import convert  # noqa: F401  (imported before the clock starts)

        workers = None if number == "auto" else int(number)
        work: Callable[[], int] = lambda: convert_ours(arguments.folder, output, workers)  # noqa: E731
    else:
        from PIL import Image  # noqa: F401

        work = lambda: convert_simply(arguments.folder, output, int(number), kind == "decoding")  # noqa: E731
    cpu, began = sum(os.times()[:4]), time.perf_counter()
    num_images = work()
    seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - cpu
    print(json.dumps({"images": num_images, "seconds": seconds, "cpu_seconds": cpu}))


def measure(folder: Path, what: str) -> dict[str, float]:
    """Run a converter in its own process: images, seconds, processor seconds, peak memory."""
    command = [sys.executable, __file__, "--one", what, "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for pid in _family(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), _peak_kilobytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    result = folder / "out"
    shutil.rmtree(result) if result.is_dir() else result.unlink()
    if process.returncode:
        raise RuntimeError(f"{what} failed")
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return {**figures, "rate": figures["images"] / figures["seconds"], "peak_mb": sum(peaks.values()) / 1000}


def _family(pid: int) -> list[int]:
    family = [pid]
    for member in family:
        try:
            children = Path(f"/proc/{member}/task/{member}/children").read_text()
        except OSError:
            continue
        family.extend(map(int, children.split()))
    return family


def _peak_kilobytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def compare(folder: Path, args: argparse.Namespace, num_images: int, headers: str) -> list[dict[str, Any]]:
    """All converters in turn on one folder, ``args.rounds`` times."""
    subset = min(num_images, args.baseline_images)
    contestants = [
        f"decoding:{subset}",
        f"header:{subset}",
        "ours:auto",
        *(f"ours:{n}" for n in args.workers),
    ]
    rows = []
    for _ in range(args.rounds):
        row: dict[str, Any] = {"num_images": num_images, "headers": headers}
        for what in contestants:
            row[what.partition(":")[0] if "ours" not in what else what] = measure(folder, what)
        row["ratio"] = row["ours:auto"]["rate"] / row["decoding"]["rate"]
        row["ratio_header"] = row["ours:auto"]["rate"] / row["header"]["rate"]
        print(_row_text(row), flush=True)
        rows.append(row)
    return rows


def _row_text(row: dict[str, Any]) -> str:
    rates = {what: round(figures["rate"]) for what, figures in row.items() if isinstance(figures, dict)}
    return f"{row['num_images']} images, headers {row['headers']}: {rates}, ratio {row['ratio']:.0f}"


def stages(folder: Path, num_images: int = 4096) -> dict[str, float]:
    """Processor microseconds an image that each stage takes in one process (median of five runs)."""
    import imagesize
    from convert_contestants import minimal_size, parse_simply
    from PIL import Image

    from ddetr_mm.convert import kitti, plan, reader
    from ddetr_mm.convert.kitti import DEFAULT_CLASS_MAPPING, category_ids
    from ddetr_mm.convert.sequences import KittiSequence
    from ddetr_mm.datasets import image_size
    from ddetr_mm.files import garbage_collection_paused

    image_dir, label_dir = folder / "seq" / "images", folder / "seq" / "labels"
    names = sorted(os.listdir(image_dir))[:num_images]
    images = [f"{image_dir}/{name}" for name in names]
    labels = [f"{label_dir}/{name[:-4]}.txt" for name in names]
    ids = category_ids(DEFAULT_CLASS_MAPPING.values())
    class_ids = {name: ids[category] for name, category in DEFAULT_CLASS_MAPPING.items()}
    piece_reader = reader.PieceReader(reader.ReadingRules(class_ids))
    sequence = KittiSequence("seq", folder, image_dir, label_dir, "seq/images/", "seq/labels/")
    lookup = kitti.ClassLookup(class_ids)
    texts = [Path(path).read_bytes() for path in labels]
    batches = [texts[start : start + 256] for start in range(0, len(texts), 256)]
    pieces = [plan.Piece(sequence, 0, 0, names[start : start + 256]) for start in range(0, len(names), 256)]
    contents = [piece_reader.read([piece])[0] for piece in pieces]

    def pillow(path: str) -> None:
        with Image.open(path) as image:
            image.size  # noqa: B018

    def write() -> None:
        writer = plan.ShardWriter(folder / "stage.json", "", [], 0, 0)
        for piece, content in zip(pieces, contents, strict=True):
            writer.add(
                piece.names, content.sizes_wh, content.boxes_xywh, content.category_ids, content.image_index
            )
        writer.close()

    work: dict[str, Callable[[], Any]] = {
        "list a folder": lambda: sorted(os.listdir(image_dir)),
        "read a label file": lambda: _drain(map(reader._read_file, labels)),
        "size: ours": lambda: _drain(map(image_size.read_image_size, images)),
        "size: imagesize alone": lambda: _drain(map(imagesize.get, images)),
        "size: Pillow, header only": lambda: _drain(map(pillow, images)),
        "size: a minimal reader": lambda: _drain(map(minimal_size, images)),
        "parse labels": lambda: _drain(kitti.parse_labels(batch, lookup) for batch in batches),
        "parse labels line by line": lambda: _drain(map(parse_simply, texts)),
        "piece as a whole": lambda: _drain(piece_reader.read([piece]) for piece in pieces),
        "encode and write": write,
    }
    table = {}
    with garbage_collection_paused():
        for name, function in work.items():
            seconds = []
            for _ in range(5):
                began = time.process_time()
                function()
                seconds.append(time.process_time() - began)
            divisor = len(os.listdir(image_dir)) if name.startswith("list") else num_images
            table[name] = statistics.median(seconds) / divisor * 1e6
    return table


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds of each size."""
    result = []
    for key in dict.fromkeys((row["num_images"], row["headers"]) for row in rows):
        own = [row for row in rows if (row["num_images"], row["headers"]) == key]
        names = [name for name, value in own[0].items() if isinstance(value, dict)]
        result.append(
            {
                "num_images": key[0],
                "headers": key[1],
                "ratio": statistics.median(row["ratio"] for row in own),
                "ratio_header": statistics.median(row["ratio_header"] for row in own),
                "rate": {name: statistics.median(row[name]["rate"] for row in own) for name in names},
                "cpu_us": {
                    name: statistics.median(
                        1e6 * row[name]["cpu_seconds"] / row[name]["images"] for row in own
                    )
                    for name in names
                },
                "peak_mb": {name: statistics.median(row[name]["peak_mb"] for row in own) for name in names},
            }
        )
    return result


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("KITTI to COCO", result["environment"])
    lines += [f"- load after: {result['load_after']}", "", (__doc__ or "").split("\n\nRun:")[0], ""]
    lines += ["## Images a second (medians), and how many times the decoding converter", ""]
    names = list(result["summary"][0]["rate"])
    lines += [
        "| images | headers | " + " | ".join(names) + " | x decoding | x header only | x 400/s |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for row in result["summary"]:
        rates = " | ".join(f"{row['rate'][name]:,.0f}" for name in names)
        times = (row["ratio"], row["ratio_header"], row["rate"]["ours:auto"] / REFERENCE_RATE)
        cells = " | ".join(f"{value:.0f}" for value in times)
        lines.append(f"| {row['num_images']:,} | {row['headers']} | {rates} | {cells} |")
    for title, key in (("Processor time an image, microseconds", "cpu_us"), ("Peak memory, MB", "peak_mb")):
        lines += ["", f"## {title}", "", "| images | headers | " + " | ".join(names) + " |"]
        lines.append("| --- " * (len(names) + 2) + "|")
        for row in result["summary"]:
            values = " | ".join(f"{row[key][name]:,.0f}" for name in names)
            lines.append(f"| {row['num_images']:,} | {row['headers']} | {values} |")
    lines += [
        "",
        "## Where the time goes, processor microseconds an image in one process",
        "",
        "| stage | us |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {value:.1f} |" for name, value in result["stages"].items()]
    if result["stages"]:
        lines += ["", *limit(result["stages"])]
    return "\n".join(lines) + "\n"


def limit(stages: dict[str, float]) -> list[str]:
    """Where the limit is: the stages that every image must pass, and what would move it."""
    shared = [stages[name] for name in ("list a folder", "read a label file", "parse labels")]
    lines = ["## The limit", ""]
    total = sum(shared) + stages["size: ours"] + stages["encode and write"]
    lines += [
        f"- The stages take {total:.0f} us an image, so one core cannot pass {1e6 / total:,.0f} images a "
        f"second, nor two {2e6 / total:,.0f} ({2e6 / total / REFERENCE_RATE:.0f} times {REFERENCE_RATE}).",
        "- Opening, reading and closing two files are system calls that no code avoids; a box costs about a",
        "  microsecond each to split, to convert and to encode, which only compiled code would change.",
        "- One writer gives the numbers, in order: encoding is not spread over processes.",
        "- A thousand images take as long as making the shards' files; a second process pays from some",
        "  thousand images on where it can be forked, from twenty thousand where it must be spawned.",
    ]
    return lines


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate, measure and clean up."""
    from convert_contestants import generate

    environment = describe("ddetr_mm", "numpy", "pillow", "imagesize", "msgspec")
    rows: list[dict[str, Any]] = []
    table: dict[str, float] = {}
    for num_images in args.sizes:
        for headers in args.headers:
            with tempfile.TemporaryDirectory(dir=args.folder, prefix="kitti-") as place:
                folder = Path(place) / "data"
                generate(folder, num_images, headers)
                measure(folder, "ours:0")  # all files into the page cache
                rows += compare(folder, args, num_images, headers)
                if num_images >= 4096 and headers == "alike" and not table:
                    table = stages(folder)
    return {
        "environment": environment,
        "load_after": load_average(),
        "summary": summary(rows),
        "stages": table,
        "rounds": rows,
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--headers", nargs="+", choices=("alike", "distinct"), default=["alike", "distinct"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--baseline-images", type=int, default=1_000)
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="numbers of processes to try"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to generate")
    parser.add_argument("--record", action="store_true", help="write the record")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args)
        return
    result = run(args)
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
