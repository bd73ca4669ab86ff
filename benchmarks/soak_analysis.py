"""Slopes of the soak's figures with their confidence, and the words of its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

SERIES = (
    "rss_mb",
    "pss_mb",
    "pss_own_mb",
    "root_rss_mb",
    "descriptors",
    "shared_memory_mappings",
    "shared_memory_names",
)
NOT_JUDGED = ("pss_mb",)
"""Recorded only: its share of the libraries' pages moves when any other program starts or ends."""

WARM_UP_SHARE = 0.25
"""The first quarter is left out: caches fill, allocators reach their working size."""

BLOCKS = 24
"""Samples that follow each other are alike, so a line is fitted to the medians of so many blocks."""

NEGLIGIBLE_GROWTH = 0.02
"""Growth over the watched time below this share of the level counts as flat whatever its confidence."""


def summarise(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """The slope of every series of one run."""
    start = samples[-1]["seconds"] * WARM_UP_SHARE
    watched = [sample for sample in samples if sample["seconds"] >= start]
    hours = np.array([sample["seconds"] for sample in watched]) / 3600
    return {name: slope(hours, np.array([sample[name] for sample in watched])) for name in SERIES}


def slope(hours: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """A line through a series by Theil and Sen's medians, which single peaks do not move.

    Args:
        hours: when.
        values: what was seen.

    Returns:
        Level (the median), slope an hour with its 95 % interval, the growth over the watched time as a
        share of the level, and whether the series is flat: its interval reaches zero or less, or the growth
        is negligible.
    """
    blocks = [block for block in np.array_split(np.arange(len(hours)), BLOCKS) if len(block)]
    times = np.array([hours[block].mean() for block in blocks])
    medians = np.array([np.median(values[block]) for block in blocks])
    per_hour, _, low, high = stats.theilslopes(medians, times, 0.95)
    level = float(np.median(values))
    growth = per_hour * float(times[-1] - times[0]) / max(level, 1.0)
    return dict(
        level=round(level, 2),
        lowest=round(float(values.min()), 2),
        highest=round(float(values.max()), 2),
        first_block=round(float(medians[0]), 2),
        last_block=round(float(medians[-1]), 2),
        per_hour=round(float(per_hour), 3),
        per_hour_95=[round(float(low), 3), round(float(high), 3)],
        growth_share=round(float(growth), 4),
        flat=bool(low <= 0 or growth < NEGLIGIBLE_GROWTH),
    )


def verdict(series: str, row: dict[str, Any]) -> str:
    """What is said of a series' slope: ``yes``, it is flat, ``NO``, or ``not judged``."""
    if series in NOT_JUDGED:
        return "not judged"
    return "yes" if row["flat"] else "NO"


def record_text(result: dict[str, Any]) -> str:
    """The record in Markdown."""
    lines = ["# Soak", "", "`" + result["environment"]["command"] + "`", ""]
    lines += [
        f"- {key.replace('_', ' ')}: {value}"
        for key, value in result["environment"].items()
        if key != "command"
    ]
    for name in ("train", "inference"):
        run = result[name]
        facts = {key: value for key, value in run.items() if key != "series"}
        lines += ["", f"## {name}", ""]
        lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()]
        lines += [
            "",
            "| of the process tree | level | first | last | an hour | 95 % | share of the level | flat |",
            "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- |",
        ]
        for series, row in run["series"].items():
            low, high = row["per_hour_95"]
            lines.append(
                f"| {series} | {row['level']} | {row['first_block']} | {row['last_block']} | "
                f"{row['per_hour']:+} | {low:+} … {high:+} | {row['growth_share']:+.2%} | "
                f"{verdict(series, row)} |"
            )
    lines += [
        "",
        f"The first {WARM_UP_SHARE:.0%} of each run is warm-up. The slope is Theil and Sen's, through the",
        f"medians of {BLOCKS} blocks. Flat: the 95 % interval reaches zero or less, or the growth over",
        f"the watched time is under {NEGLIGIBLE_GROWTH:.0%} of the level. `root_rss_mb` is the command's",
        "own process; PSS divides shared pages among those that share them. `pss_own_mb` is the part of it",
        "without the pages of files (libraries), of which other programs take their share and give it back:",
        "the whole PSS is recorded and not judged.",
        "",
        f"**{'Passed' if result['passed'] else 'Not passed'}.**",
        "",
    ]
    return "\n".join(lines)
