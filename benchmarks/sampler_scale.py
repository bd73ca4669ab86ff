"""The sampler for 1,024 ranks and 20 million images: time and memory of one rank's set-up, and the claims.

Checked over all ranks: every image once an epoch, equally many steps on every rank, and no rank more than one
batch apart. The set-up of a rank is what happens from a new process to its first batch: the epoch's order and
this rank's part of it; it runs in a process of its own, so that its peak of memory is its own.

Without ``--record`` nothing is kept; the record is ``benchmarks/records/sampler_scale.md``.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, heading, report

from ddetr_mm.datasets.samplers import (
    ElasticBatchSampler,
    ElasticDistributedSampler,
    epoch_order,
    samples_of_rank,
    shard_sizes,
    shards_of_rank,
)

RECORD = Path(__file__).resolve().parent / "records" / "sampler_scale.md"
BATCH_SIZE = 4


class Images:
    """Only a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def peak_mb() -> float:
    """The largest memory that this process has used, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def set_up_one_rank(num_images: int, num_ranks: int) -> None:
    """Print seconds of CPU time and of the clock, and MB beyond the imports, for a rank's first batch."""
    before_mb, cpu, clock = peak_mb(), time.process_time(), time.perf_counter()
    sampler = ElasticDistributedSampler(Images(num_images), seed=1, rank=num_ranks // 2, num_ranks=num_ranks)
    next(iter(ElasticBatchSampler(sampler, BATCH_SIZE)))
    print(time.process_time() - cpu, time.perf_counter() - clock, peak_mb() - before_mb)


def check_all_ranks(num_images: int, num_ranks: int, num_shards: int) -> dict[str, Any]:
    """Deal out an epoch to all ranks by both samplers and count what each image and rank gets.

    Raises:
        SystemExit: an image is missing or repeated, or ranks are out of balance.
    """
    order = epoch_order(num_images, seed=1, epoch=0)
    seen = np.zeros(num_images, np.uint8)
    sizes = []
    for rank in range(num_ranks):
        part = samples_of_rank(order, rank, num_ranks)
        seen[part] += 1
        sizes.append(len(part))
    steps = {-(-size // BATCH_SIZE) for size in sizes}
    if not (seen == 1).all() or max(sizes) - min(sizes) > 1 or max(steps) - min(steps) > 1:
        raise SystemExit("FAILED: an image is missing or repeated, or ranks are out of balance")
    shards = (np.arange(num_images, dtype=np.int64) * num_shards // num_images).astype(np.int32)
    owned = shard_sizes(shards, num_ranks)
    rank = num_ranks // 2
    example = shards_of_rank(order, shards, rank, num_ranks, uneven="repeat")
    if set(np.unique(shards[example] % num_ranks)) != {rank} or owned.sum() != num_images:
        raise SystemExit("FAILED: a rank got samples of another rank's shards")
    return {
        "samples a rank": f"{min(sizes):,} to {max(sizes):,}",
        "steps a rank": f"{-(-max(sizes) // BATCH_SIZE):,} on every rank (fillers included)",
        f"samples of a rank's own shards ({num_shards:,} shards)": f"{owned.min():,} to {owned.max():,}",
    }


def main() -> int:
    """Measure, check, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=8192)
    parser.add_argument("--record", action="store_true", help="write the record")
    parser.add_argument("--one-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_rank:
        set_up_one_rank(options.images, options.ranks)
        return 0
    about = describe("numpy", "torch", "ddetr_mm")
    command = [sys.executable, __file__, "--one-rank", "--images", str(options.images), "--ranks"]
    runs = [
        [float(value) for value in subprocess.check_output([*command, str(options.ranks)], text=True).split()]
        for _ in range(3)
    ]
    cpu, clock = (min(run[part] for run in runs) for part in (0, 1))
    found = {
        "set-up of one rank, seconds of CPU time": f"{cpu:.2f}",
        "the same by the clock": f"{clock:.2f}",
        "memory beyond the imports at its peak, MB": f"{max(run[2] for run in runs):.0f}",
        **check_all_ranks(options.images, options.ranks, options.shards),
    }
    lines = heading(f"The sampler for {options.ranks:,} ranks and {options.images:,} images", about)
    lines += ["", "Every image came once over all ranks. Least of three for times, most for memory.", ""]
    lines += ["| | |", "| --- | ---: |", *(f"| {key} | {value} |" for key, value in found.items())]
    report(None, "\n".join(lines) + "\n", RECORD if options.record else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
