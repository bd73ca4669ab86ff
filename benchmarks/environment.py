"""What a benchmark's figures depend on, and its record: the head, and the files it is kept in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def describe(*packages: str) -> dict[str, Any]:
    """Machine, load, versions, date and command.

    Args:
        packages: distributions whose versions matter.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "cpu": _first_line(Path("/proc/cpuinfo"), "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": load_average(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def load_average() -> float:
    """How many processes wanted to run in the last minute, on average."""
    return round(os.getloadavg()[0], 1)


MOST_LOAD = 1.0
"""Load before a run above which its times are marked: something else used the machine."""


def heading(title: str, environment: dict[str, Any]) -> list[str]:
    """The first lines of a record for people: the title, what its figures depend on, and a mark when busy."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in environment.items())]
    if environment.get("load_before", 0.0) > MOST_LOAD:
        lines.append(f"- **not idle**: the load before was above {MOST_LOAD:g}; times and ratios say little")
    return lines


def report(result: dict[str, Any] | None, text: str, record: Path | None) -> None:
    """Print what was found, and keep it where a record is asked for.

    Args:
        result: the figures, for ``<record>.json``; None writes no such file.
        text: the record for people, for ``<record>.md``; it ends with a line's end.
        record: path of both, whose own suffix, if any, does not count; None writes nothing.
    """
    print(text)
    if record is None:
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    if result is not None:
        record.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    record.with_suffix(".md").write_text(text)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _first_line(path: Path, key: str) -> str:
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return platform.machine()
