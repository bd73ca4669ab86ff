"""What a process and all its descendants hold, read from ``/proc`` (Linux only)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a place to look at, not to write to


@dataclass
class TreeSample:
    """One look at a process tree.

    Attributes:
        processes: how many there are.
        rss_mb: resident memory summed over the processes, shared pages counted once for each, MB.
        pss_mb: the same with every shared page divided among those that share it, MB. Other programs that map
            the same libraries take their part of it, so it moves when they start and end.
        pss_own_mb: the part without files, anonymous pages and shared memory, MB. Only the
            tree itself shares these, so no other program moves it.
        root_rss_mb: resident memory of the first process alone, MB.
        descriptors: open descriptors of all processes.
        shared_memory_mappings: mappings of files in shared memory, unlinked ones included.
        shared_memory_names: names in shared memory that the tree holds and that still exist.
        pids: the processes.
    """

    processes: int = 0
    rss_mb: float = 0.0
    pss_mb: float = 0.0
    pss_own_mb: float = 0.0
    root_rss_mb: float = 0.0
    descriptors: int = 0
    shared_memory_mappings: int = 0
    shared_memory_names: set[str] = field(default_factory=set)
    pids: set[int] = field(default_factory=set)


def sample_tree(root: int) -> TreeSample:
    """Look at a process and its descendants; those that end meanwhile are left out."""
    sample = TreeSample()
    for pid in descendants(root):
        try:
            _add(sample, pid, is_root=pid == root)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sample


def descendants(root: int) -> list[int]:
    """The process and all its descendants that run."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            parent = _parent(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    found, ahead = [], [root]
    while ahead:
        pid = ahead.pop()
        found.append(pid)
        ahead += children.get(pid, [])
    return found


def _parent(entry: Path) -> int | None:
    try:
        status = (entry / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name of the command is in brackets and may hold anything.
    state, parent = status.rpartition(")")[2].split()[:2]
    return None if state == "Z" else int(parent)


def _add(sample: TreeSample, pid: int, *, is_root: bool) -> None:
    folder = PROC / str(pid)
    kilobytes = {}
    for line in (folder / "smaps_rollup").read_text().splitlines()[1:]:
        name, amount = line.split()[:2]
        kilobytes[name] = int(amount)
    held = [_link(path) for path in (folder / "fd").iterdir()]
    mapped = [
        line.split(maxsplit=5)[5]
        for line in (folder / "maps").read_text().splitlines()
        if f" {SHARED_MEMORY}/" in line
    ]
    sample.processes += 1
    sample.pids.add(pid)
    sample.rss_mb += kilobytes["Rss:"] / 1024
    sample.pss_mb += kilobytes["Pss:"] / 1024
    sample.pss_own_mb += (kilobytes["Pss_Anon:"] + kilobytes["Pss_Shmem:"]) / 1024
    if is_root:
        sample.root_rss_mb = kilobytes["Rss:"] / 1024
    sample.descriptors += len(held)
    sample.shared_memory_mappings += len(mapped)
    sample.shared_memory_names |= {
        name for name in (*held, *mapped) if name.startswith(SHARED_MEMORY + "/") and os.path.exists(name)
    }


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""
