"""Disk and memory that a run needs, against what the machine has. Arithmetic only, no torch."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.files import existing_parent, size_text
from ddetr_mm.preflight.report import Finding, Section, fault, note

GIB = 1 << 30
RESERVE = 0.05
"""Share of the memory that allocators cannot use."""


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a network's state.

    Attributes:
        weights: all parameters and buffers.
        trained: the trained parameters.
        optimizer_copies: numbers the optimizer keeps for each of those (AdamW 2, SGD with momentum 1).
    """

    weights: int
    trained: int
    optimizer_copies: int = 2

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return self.trained * self.optimizer_copies

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint that training can resume from."""
        return self.weights + self.optimizer

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch: weights, gradients, optimizer."""
        return self.weights + self.trained + self.optimizer


@dataclass(frozen=True)
class MemoryNeed:
    """Estimate of the memory of one training step at the largest padded batch.

    Attributes:
        size: the network's.
        per_image: bytes kept for the backward pass by one image of the largest padded size.
        batch_size: images in a batch.
        padded_hw: that size.
    """

    size: ModelSize
    per_image: int
    batch_size: int
    padded_hw: tuple[int, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.at(self.batch_size)

    def at(self, batch_size: int) -> int:
        """Bytes in all with another batch size."""
        return self.size.fixed + self.per_image * batch_size


def num_checkpoints(num_epochs: int, interval: int, unit: str, steps_an_epoch: int) -> int:
    """Number of checkpoints of a whole training run, the last one included."""
    units = num_epochs if unit == "epoch" else num_epochs * max(steps_an_epoch, 1)
    return math.ceil(units / interval)


def check_disk(folder: Path, num_files: int, bytes_each: int) -> Section:
    """Whether a run's checkpoints fit on the disk that its results go to.

    Args:
        folder: the results folder, which need not exist.
        num_files: checkpoints in all.
        bytes_each: of one.
    """
    section = Section("disk")
    free = shutil.disk_usage(existing_parent(folder)).free
    need = num_files * bytes_each
    section.lines.append(
        f"{num_files} checkpoints of {size_text(bytes_each)} need {size_text(need)}; "
        f"{size_text(free)} are free"
    )
    section.data = dict(free_bytes=free, needed_bytes=need, num_checkpoints=num_files)
    fitting = max(free // max(bytes_each, 1), 1)
    if need > free:
        section.findings.append(
            fault(
                "disk-too-small",
                f"{num_files} checkpoints need {size_text(need)}, and {size_text(free)} are free",
                file=existing_parent(folder),
                where="results_dir",
                hint=f"free space, choose another results_dir, or keep at most {fitting}: raise "
                f"train.checkpoint_interval {math.ceil(num_files / fitting)} times",
            )
        )
    elif need > 0.8 * free:
        section.findings.append(
            note(
                "disk-nearly-full",
                f"the checkpoints take {need / free:.0%} of the free space",
                where="results_dir",
            )
        )
    return section


def check_disk_writable(folder: Path) -> list[Finding]:
    """Whether results can be written, without writing."""
    parent = existing_parent(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        return [
            fault(
                "results-not-writable",
                "the results folder cannot be written to",
                file=parent,
                where="results_dir",
                hint="name a folder you may write to: results_dir=…",
            )
        ]
    return []


LEAST_FREE = 256 << 20
"""Bytes that a training run needs on the disk of its results, whatever its network: checkpoints and logs."""


def check_free_space(folder: Path, named: Mapping[str, str]) -> list[Finding]:
    """Whether one checkpoint fits on the disk of the results, before the network is built.

    Args:
        folder: the results folder, which need not exist.
        named: spec key → file of weights that the run starts from; a checkpoint is no smaller.
    """
    sizes = [Path(path).stat().st_size for path in named.values() if Path(path).is_file()]
    free, least = shutil.disk_usage(existing_parent(folder)).free, max([LEAST_FREE, *sizes])
    if free >= least:
        return []
    return [
        fault(
            "disk-too-small",
            f"a checkpoint and logs need {size_text(least)}, and {size_text(free)} are free",
            file=existing_parent(folder),
            where="results_dir",
            hint="free space, or choose another results_dir",
        )
    ]


def check_memory(need: MemoryNeed, available: int, device: str, options: dict[str, bool]) -> Section:
    """Whether a training step fits into memory, and if not, options that make it fit.

    Args:
        need: the estimate.
        available: free bytes of the device.
        device: its name, for messages.
        options: spec field → whether changing it saves memory.
    """
    section = Section("memory")
    height, width = need.padded_hw
    size = need.size
    section.lines += [
        f"weights {size_text(size.weights)}, gradients {size_text(size.trained)}, optimizer "
        f"{size_text(size.optimizer)}",
        f"activations {size_text(need.per_image)} an image at {width}x{height} (width x height), "
        f"{size_text(need.per_image * need.batch_size)} for a batch of {need.batch_size}",
        f"about {size_text(need.total)} in all; {device} has {size_text(available)} free",
    ]
    section.data = dict(
        needed_bytes=need.total,
        available_bytes=available,
        per_image_bytes=need.per_image,
        fixed_bytes=size.fixed,
        padded_hw=list(need.padded_hw),
    )
    usable = available * (1 - RESERVE)
    if need.total > usable:
        section.findings.append(
            fault(
                "memory-too-small",
                f"a step needs about {size_text(need.total)}, and {device} has {size_text(available)}",
                where="dataset.batch_size",
                value=need.batch_size,
                hint="any of these: " + "; ".join(ways_to_fit(need, usable, options)),
            )
        )
    elif need.total > 0.85 * usable:
        section.findings.append(
            note("memory-tight", f"a step takes about {need.total / available:.0%} of the memory of {device}")
        )
    return section


def ways_to_fit(need: MemoryNeed, usable: float, options: dict[str, bool]) -> Iterator[str]:
    """Options that make a step fit, the surest first."""
    room = usable - need.size.fixed
    batch = int(room // need.per_image) if need.per_image else 0
    if batch >= 1:
        yield f"dataset.batch_size={batch} (about {size_text(need.at(batch))})"
    if options.get("train.activation_checkpoint"):
        yield "train.activation_checkpoint=True (recomputes activations instead of keeping them)"
    if options.get("train.precision"):
        yield "train.precision=bf16 (about half of the activations)"
    if room > 0:
        scale = math.sqrt(room / (need.per_image * need.batch_size))
        yield f"images {scale:.2f} times as large: dataset.augmentation.scales and random_resize_max_size"
    if options.get("model.train_backbone"):
        yield "model.train_backbone=False (no gradients, optimizer state and activations of the backbone)"
    if room <= 0:
        yield "a smaller network: its weights alone do not fit"


def available_host_memory() -> int:
    """Bytes of main memory that this process may still take.

    That is what the kernel calls available, within the limit of the control group (containers).
    """
    available = _meminfo_available()
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = Path(limit_file).read_text().strip(), Path(used_file).read_text().strip()
        except OSError:
            continue  # no such control group here
        if limit.isdigit() and int(limit) < 1 << 60:
            available = min(available, max(int(limit) - int(used), 0))
    return available


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- Shared memory of data workers ---

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to
PREFETCHED = 2
"""Batches that each worker holds ready, torch's default."""


def shared_memory_free(folder: str = SHARED_MEMORY) -> int | None:
    """Free bytes of the memory that data workers pass tensors through; None where the system has none."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def check_shared_memory(
    workers: int, batch_size: int, largest_hw: tuple[int, int], free: int | None = None
) -> list[Finding]:
    """Whether the batches that workers hold ready fit into shared memory; Docker gives 64 MB by default.

    Args:
        workers: data workers of all ranks of this machine.
        batch_size: images in a batch.
        largest_hw: height and width of the largest image that a worker gives, pixels.
        free: bytes; None: those of the system.
    """
    free = shared_memory_free() if free is None else free
    need = workers * PREFETCHED * batch_size * 3 * largest_hw[0] * largest_hw[1]
    if free is None or need <= free:
        return []
    return [
        note(
            "shared-memory-small",
            f"{workers} data workers hold up to {size_text(need)} of images ready, and /dev/shm has "
            f"{size_text(free)} free: a batch may never come",
            where="dataset.workers",
            hint="give the container more (`--shm-size=1g`), or lower dataset.workers (0: none)",
        )
    ]


# --- Precision on a CPU ---


BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
"""What Linux calls the instructions that multiply bfloat16; measured: benchmarks/records/cpu_precision.md."""


def flags_of_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Names of this CPU's instruction sets, as Linux has them; empty where that is not known."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set() if flags is None else set(flags[1].split())


def check_cpu_precision(key: str, value: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Section]:
    """A note where a run on this CPU would be faster in bfloat16.

    Args:
        key: the spec's field, ``train.precision`` or ``ddetr_mm.predict_precision``.
        value: of the field.
        cpuinfo: what Linux says of the CPU.
    """
    if value != "fp32" or flags_of_cpu(cpuinfo).isdisjoint(BFLOAT16_FLAGS):
        return []
    finding = note(
        "cpu-bf16",
        "this CPU multiplies bfloat16 in hardware (AMX or AVX-512)",
        where=key,
        value=value,
        hint=f"{key}=bf16 is faster, at nearly the same AP: docs/performance.md",
    )
    return [Section("precision", findings=[finding])]
