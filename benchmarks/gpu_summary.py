"""Tables and ratios of the figures that the GPU benchmarks have written, complete or not.

No torch here, as in :mod:`gpu_process`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from environment import heading

YARDSTICK = "mmdet, fp32"
TITLES = {
    "train_gpu": "Training on a GPU",
    "inference_gpu": "Inference on a GPU",
    "attention_gpu": "Deformable sampling on a GPU",
    "pipeline_gpu": "Training from image files on a GPU",
    "matching_gpu": "Assignment of queries to objects on a GPU",
}
MMCV, PYTORCH = "mmcv", "PyTorch form"
LIKE_FOR_LIKE = ("fp32", "tf32", "bf16", "fp16")
OUR_MATCHING = "SciPy"
PIPELINE_YARDSTICK = "mmdet, fp32"

Part = dict[str, Any]


def fold(figures: Iterable[dict[str, Any]]) -> dict[str, Part]:
    """All figures as one mapping a benchmark.

    Returns:
        Benchmark to ``environment``, ``rows`` (row to contestant to its figures; of one that takes part in
        several processes those of the first),
        ``left_out`` and ``skipped`` (lists of row, contestant and reason) and ``notes``.
    """
    found: dict[str, Part] = {}
    for one in figures:
        part = found.setdefault(
            one["benchmark"], {"environment": {}, "rows": {}, "left_out": [], "skipped": [], "notes": []}
        )
        event, row, name = one["event"], one["row"], one["contestant"]
        part_renews = one["benchmark"] == "pipeline_gpu"
        values = {
            key: value for key, value in one.items() if key not in ("benchmark", "row", "contestant", "event")
        }
        if event == "environment":
            part["environment"] |= values
        elif event == "note":
            part["notes"].append(values["text"])
        elif event in ("left_out", "skipped"):
            part[event].append([row, name, values["reason"]])
        elif event in ("alone", "times"):
            own = part["rows"].setdefault(row, {}).setdefault(name, {})
            for name_of, value in (values if event == "alone" else {"times": values}).items():
                # A pipeline's means are renewed as it goes; a repeated yardstick changes nothing.
                if part_renews or name_of not in own:
                    own[name_of] = value
        elif event == "round":
            part["rows"].setdefault(row, {}).setdefault(name, {}).setdefault("rounds_ms", []).append(
                values["ms"]
            )
    for part in found.values():
        done = {(row, name) for row, own in part["rows"].items() for name in own}
        part["skipped"] = [one for one in part["skipped"] if (one[0], one[1]) not in done]
    return found


def milliseconds(own: dict[str, Any]) -> float | None:
    """Median time of a contestant: alternating where there is one, else of the rounds so far, else alone."""
    if "times" in own:
        return float(own["times"]["median_ms"])
    if own.get("rounds_ms"):
        rounds = sorted(own["rounds_ms"])
        return float(rounds[len(rounds) // 2])
    return own.get("alone_ms")


def ratio(row: dict[str, dict[str, Any]], name: str, yardstick: str) -> float | None:
    """How many times the speed of the yardstick a contestant has; None where a time is missing."""
    own, other = row.get(name, {}), row.get(yardstick, {})
    if own.get("times", {}).get("yardstick") == yardstick:
        return float(own["times"]["speedup"])
    mine, theirs = milliseconds(own), milliseconds(other)
    return theirs / mine if mine and theirs else None


def time_text(own: dict[str, Any]) -> str:
    """Median and spread for a table; a star where the contestant was timed alone."""
    times, median = own.get("times"), milliseconds(own)
    if times:
        return f"{times['median_ms']:.2f} ({times['min_ms']:.2f} to {times['max_ms']:.2f})"
    return "" if median is None else f"{median:.2f}*"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _speed_text(row: dict[str, dict[str, Any]], name: str, yardstick: str) -> str:
    found = ratio(row, name, yardstick)
    same = row[name].get("times", {}).get("yardstick") == yardstick
    return "" if found is None else f"{found:.2f}{'' if same else '†'}"


EXPLAINED = (
    "Milliseconds: median (smallest to largest). `*`: timed alone, not alternating. `†`: compared with a",
    "time of another process or one that was taken alone.",
)


# --- Tables ---


def train_table(part: Part) -> list[str]:
    """A line a contestant."""
    batch = part["environment"].get("batch", 0)
    lines = [
        "Speed: how many times mmdet's in float32. Memory: peak of a step beyond weights, optimizer and",
        "images, MB. Waits: of the host for the GPU in a step. Losses: how far the first, and all on",
        "average, are from mmdet's in float32 (relative).",
        "",
        "| | ms | images/s | speed | memory | waits | first loss | losses |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    row = part["rows"].get("", {})
    expected = row.get(YARDSTICK, {}).get("losses")
    for name, own in row.items():
        median = milliseconds(own)
        first, mean = _curve_apart(own.get("losses"), expected)
        lines.append(
            f"| {name} | {time_text(own)} | {_number(1e3 * batch / median if median else None, '.1f')} "
            f"| {_speed_text(row, name, YARDSTICK)} | {_number(own.get('memory_mb'), ',.0f')} "
            f"| {own.get('host_reads_per_step', '')} | {_number(first, '.1e')} | {_number(mean, '.1e')} |"
        )
    for name, own in row.items():
        if "regions" in own:
            lines += ["", f"Regions of {name}, profiled, milliseconds:", "", *_regions(own["regions"])]
    return lines


def _curve_apart(
    found: list[float] | None, expected: list[float] | None
) -> tuple[float, float] | tuple[None, None]:
    """Difference of the first loss, and the mean difference over the curve, relative."""
    if not found or not expected:
        return None, None
    apart = [abs(one - other) / other for one, other in zip(found, expected, strict=False)]
    return apart[0], sum(apart) / len(apart)


def _regions(regions: dict[str, dict[str, float]]) -> list[str]:
    names = list(next(iter(regions.values())))
    lines = [f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for what, times in regions.items():
        shown = [_number(times.get(name), ",.1f") for name in names]
        lines.append(f"| {what.removesuffix('_ms')} | {' | '.join(shown)} |")
    return lines


def inference_table(part: Part) -> list[str]:
    """A line a contestant and batch size."""
    lines = [
        "Speed: how many times mmdet's in float32. Memory: peak beyond weights and images, MB. Differences",
        "of scores and boxes (0..1) from it.",
        "",
        "| batch | | ms | images/s | speed | memory | largest score, box | mean score, box |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, row in part["rows"].items():
        batch = int(title.split()[-1])
        for name, own in row.items():
            median, differ = milliseconds(own), own.get("agreement", {})
            shown = [
                ", ".join(_number(differ.get(f"{how} {what} difference"), ".1e") for what in ("score", "box"))
                for how in ("largest", "mean")
            ]
            lines.append(
                f"| {batch} | {name} | {time_text(own)} "
                f"| {_number(1e3 * batch / median if median else None, '.1f')} "
                f"| {_speed_text(row, name, YARDSTICK)} | {_number(own.get('memory_mb'), ',.0f')} "
                f"| {shown[0]} | {shown[1]} |"
            )
    return lines


def attention_table(part: Part) -> list[str]:
    """A line a contestant, direction, dtype and number of queries."""
    lines = [
        "Speed: how many times mmcv's op, or the PyTorch form where that is not installed. Differs: largest",
        "difference from the PyTorch form in float32, relative to the largest value and but for one element",
        "of a thousand. Memory: peak beyond the inputs, MB. `triton 32x4`: 32 queries a program, 4 warps;",
        "`gather`: the deterministic gradient of the values. `fused`: from offsets and logits, softmax and",
        "locations included. The backward passes of the PyTorch form and of deformops include the forward",
        "pass, except the fused one of the PyTorch form.",
        "",
        "| queries | values | | | ms | speed | differs | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, row in part["rows"].items():
        where, dtype, direction = title.rsplit(" ", 2)
        yardstick = MMCV if milliseconds(row.get(MMCV, {})) else PYTORCH
        for name, own in row.items():
            speed = "" if own.get("wrong") else _speed_text(row, name, yardstick)
            lines.append(
                f"| {where} | {dtype} | {direction} | {name} "
                f"| {'differs' if own.get('wrong') else time_text(own)} "
                f"| {speed} | {_number(own.get('differs'), '.1e')} "
                f"| {_number(own.get('memory_mb'), ',.0f')} |"
            )
    return lines


def pipeline_table(part: Part) -> list[str]:
    """A line a contestant."""
    lines = [
        "A whole training run each, in a process of its own: image files, data workers, copies, steps. Data:",
        "waiting for the next batch. Means over the steps after the first ones, with the smallest and the",
        "largest. Speed: how many times the images a second of mmdet in float32.",
        "",
        "| | step ms | data ms | images/s | speed | steps | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    row = part["rows"].get("", {})
    for name, own in row.items():
        speed = ratio(row, name, PIPELINE_YARDSTICK)
        lines.append(
            f"| {name} | {_number(own.get('alone_ms'), '.1f')} | {_number(own.get('data_ms'), '.1f')} "
            f"| {_number(own.get('images_s'), '.1f')} | {_number(speed, '.2f')} | {own.get('steps', '')} "
            f"| {_number(own.get('memory_mb'), ',.0f')} |"
        )
    return lines


def matching_table(part: Part) -> list[str]:
    """A line a contestant and number of objects."""
    lines = [
        "Speed: how many times ours. Differs: total cost of the pairs, relative to ours.",
        "",
        "| objects an image | | ms | speed | differs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, row in part["rows"].items():
        for name, own in row.items():
            lines.append(
                f"| {title.split()[0]} | {name} | {time_text(own)} | {_speed_text(row, name, OUR_MATCHING)} "
                f"| {_number(own.get('differs'), '.1e')} |"
            )
    return lines


TABLES = {
    "train_gpu": train_table,
    "inference_gpu": inference_table,
    "attention_gpu": attention_table,
    "pipeline_gpu": pipeline_table,
    "matching_gpu": matching_table,
}


def left_out_lines(part: Part) -> list[str]:
    """What is missing, and why."""
    lines = [
        f"- {f'{row}: ' if row else ''}{name}: {reason}"
        for row, name, reason in (*part["left_out"], *part["skipped"])
    ]
    lines += [f"- {note}" for note in part["notes"]]
    return ["", "Left out:", "", *lines] if lines else []


def record_lines(benchmark: str, part: Part) -> list[str]:
    """The record of one benchmark for people."""
    lines = heading(TITLES[benchmark], part["environment"])
    return [*lines, "", *EXPLAINED, *TABLES[benchmark](part), *left_out_lines(part)]


# --- Ratios over all benchmarks ---


def ratio_lines(found: dict[str, Part]) -> list[str]:
    """The ratios that matter most: like for like, and the fastest of ours against mmdet in float32."""
    lines = ["| | ours | against | times as fast |", "| --- | --- | --- | ---: |"]
    for benchmark in ("train_gpu", "pipeline_gpu", "inference_gpu"):
        for title, row in found.get(benchmark, {"rows": {}})["rows"].items():
            what = f"{TITLES[benchmark]}{f', {title}' if title else ''}"
            for precision in LIKE_FOR_LIKE:
                lines += _ratio_line(what, row, f"ours, {precision}", f"mmdet, {precision}")
            lines += _ratio_line(what, row, "ours, bf16", YARDSTICK)
            best = _fastest(row, [name for name in row if name.startswith("ours")])
            if best is not None and best != "ours, bf16":
                lines += _ratio_line(what, row, best, YARDSTICK)
    for title, row in found.get("attention_gpu", {"rows": {}})["rows"].items():
        best = _fastest(row, [name for name in row if name.startswith("triton")])
        if best is not None:
            other = MMCV if milliseconds(row.get(MMCV, {})) else PYTORCH
            lines += _ratio_line(f"Sampling, {title}", row, best, other)
    return lines


def _fastest(row: dict[str, dict[str, Any]], names: Sequence[str]) -> str | None:
    times = {name: milliseconds(row[name]) for name in names if not row[name].get("wrong")}
    known = {name: value for name, value in times.items() if value}
    return min(known, key=known.__getitem__) if known else None


def _ratio_line(what: str, row: dict[str, dict[str, Any]], name: str, yardstick: str) -> list[str]:
    found = ratio(row, name, yardstick)
    return [] if found is None or name == yardstick else [f"| {what} | {name} | {yardstick} | {found:.2f} |"]


def summary_lines(figures: Iterable[dict[str, Any]]) -> list[str]:
    """All benchmarks of one call: ratios first, then every table."""
    found = fold(figures)
    own = found.get("call", {"environment": {}})["environment"]
    first = next((part["environment"] for name, part in found.items() if name in TABLES), {})
    environment = {name: value for name, value in first.items() if name not in ("batch", "image")} | own
    lines = [*heading("GPU benchmarks", environment), "", *ratio_lines(found), "", *EXPLAINED]
    for benchmark, table in TABLES.items():
        if benchmark in found:
            lines += ["", f"## {TITLES[benchmark]}", "", *table(found[benchmark])]
            lines += left_out_lines(found[benchmark])
    others = [note for name, part in found.items() if name not in TABLES for note in part["notes"]]
    if others:
        lines += ["", "## Notes", "", *(f"- {note}" for note in others)]
    return lines
