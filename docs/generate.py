"""Writes the pages and pictures of docs/ that are made from code: ``python docs/generate.py``.

``commands.md`` comes from the parser of the command line, ``field-differences.md`` from
``field_differences.py``, ``performance.md`` and ``performance.svg`` from the records of the benchmarks,
``concepts.svg`` from a translated spec. A test fails when a page is out of date.

``python docs/generate.py --tour`` runs ``tour.ipynb`` (ten minutes) and stores its outputs, made small.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from ddetr_mm.cli import build_parser
from ddetr_mm.spec.describe import flow

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from field_differences import DEFAULTS, RANGES  # noqa: E402 - beside this script

RECORDS = DOCS.parent / "benchmarks" / "records"
SPEC = DOCS.parent / "configs" / "specs" / "shapes_resnet18.yaml"


def commands_page() -> str:
    """Every command with its arguments, as Markdown."""
    parser = build_parser()
    lines = [
        "# Commands",
        "",
        "Exit status: 0 done, 2 wrong input, 130 interrupted, 1 anything else. `--debug` shows tracebacks",
        "for wrong input, too. `python -m ddetr_mm` is the same command.",
        "",
    ]
    for name, command, summary in _subcommands(parser):
        lines += _command_lines(f"ddetr-mm {name}", command, summary, level=2)
    return "\n".join(lines) + "\n"


def _command_lines(name: str, parser: argparse.ArgumentParser, summary: str, level: int) -> list[str]:
    lines = [f"{'#' * level} `{name}`", "", f"{summary[:1].upper()}{summary[1:]}.", ""]
    rows = [
        f"| `{_argument(action)}` | {(action.help or '').replace('|', ' or ')}{_choices(action)} |"
        for action in parser._actions
        if action.dest not in ("help", "debug") and not isinstance(action, argparse._SubParsersAction)
    ]
    if rows:
        lines += ["| argument | |", "| --- | --- |", *rows, ""]
    for action_name, action_parser, action_summary in _subcommands(parser):
        lines += _command_lines(f"{name} {action_name}", action_parser, action_summary, level + 1)
    return lines


def _argument(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if not action.option_strings:
        return f"{value} ..." if action.nargs in ("*", "+") else str(action.metavar or action.dest)
    return " ".join((", ".join(action.option_strings), str(value))).strip()


def _choices(action: argparse.Action) -> str:
    return f" ({', '.join(map(str, action.choices))})" if action.choices else ""


def _subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return [(name, sub, summaries.get(name, "")) for name, sub in action.choices.items()]
    return []


def field_differences_page() -> str:
    """Defaults and ranges on which TAO's documentation and its schema disagree, and what holds here."""
    lines = [
        "# Defaults and ranges that differ",
        "",
        "TAO has two sources for a field: its documentation and the schema in its code. Where they disagree,",
        "the documentation decides the default, and the wider of two ranges is accepted. The last column has",
        "the reason where something else was chosen. Fields that are not listed have the schema's values.",
        "",
    ]
    for heading, table in (("Defaults", DEFAULTS), ("Ranges", RANGES)):
        lines += [f"## {heading}", "", "| field | documentation | schema | here | why |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for one in table:
            values = (one.documentation, one.schema, one.ours)
            cells = (f"`{one.path}`", *map(_shown, values), one.why)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _shown(value: object) -> str:
    """A default as YAML has it; words as they are."""
    return value if isinstance(value, str) and value else flow(value)


PERFORMANCE = (
    (
        "attention_cpu",
        "Deformable attention on the CPU",
        "1.5 times mmcv's PyTorch form without a compiled op",
    ),
    (
        "detectors_cpu",
        "Whole detectors on the CPU",
        "1.2 times the fastest peer without a compiled op, 1.8 with",
    ),
    ("scaling_cpu", "How cost grows", "nothing grows faster than the algorithm must"),
    ("start", "Starting", "`-h` in 0.3 s, `check` of a spec in 1 s, the first training step in 15 s"),
    ("gcvit", "GCViT", "at least as fast as timm at 224 x 224"),
    ("pipeline", "Input pipeline", "1.5 times stock mmdet with TAO's pixels"),
    ("convert", "Conversion", "50 times TAO's 400 images a second"),
    ("dataset_memory", "Annotations in memory", "cold 5 s, warm 0.5 s, 150 MB for 8 ranks of 8 workers"),
    ("coco_eval", "COCO evaluation", "under a second for 5,000 images"),
    ("cpu_precision", "bf16 on a CPU", "1.8 times our fp32 in training where the CPU multiplies bfloat16"),
    ("onnx_latency", "Exported graph", "1.5 times the stock export on ONNX Runtime, a third of its nodes"),
    (
        "attention_gpu",
        "Deformable attention on a GPU",
        "1.3 times mmcv's op. What the compiler makes of the kernels, without a GPU: "
        "[record](../benchmarks/records/attention_kernels.md)",
    ),
    ("train_gpu", "Training on a GPU", "1.3 times stock mmdet like for like, 2.5 with bf16 and compile"),
    ("inference_gpu", "Inference on a GPU", "2 times stock mmdet in fp32"),
    ("pipeline_gpu", "Training from image files on a GPU", "as fast as from tensors on the GPU"),
)
"""Record, heading and what was aimed at."""
SCRIPTS = {"attention_cpu": "attention", "scaling_cpu": "scaling"}
"""Records that are not named as the script that writes them."""


def summary() -> list[tuple[str, str, float]]:
    """What was compared, with whom, and how many times as fast ours is, from the records."""

    def record(name: str) -> Any:
        return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))

    times = record("detectors_cpu")["times"]
    rows = [
        ("training step, ResNet-50, CPU", "mmdet", times["train"]["ours"]["speedup"]),
        ("inference, ResNet-50, CPU", "mmdet", times["inference"]["ours"]["speedup"]),
    ]
    onnx = record("onnx_latency")["times_by_threads"]["2"]
    rows.append(("exported graph, ONNX Runtime", "stock export of mmdet", onnx["ours"]["speedup"]))
    for row in record("attention_cpu")["rows"]:
        if row["size"] == "800x1333" and row["mode"] == "forward + backward":
            ours = row["times"]["ours"]
            rows.append(
                (f"attention of the {row['part']}, with gradients", "mmcv's PyTorch", ours["speedup"])
            )
            peer = row["times"]["torch-ms-deform-attn"]["median_ms"] / ours["median_ms"]
            rows.append((f"attention of the {row['part']}, with gradients", "torch-ms-deform-attn", peer))
    gcvit = record("gcvit")["at_224"]
    slowest = min(row["ratio"] for row in gcvit)
    rows.append(("GCViT at 224 x 224, the worst case", "timm", slowest))
    backends = record("coco_eval")["backends"]
    ours = backends["hotcoco (ours)"]["wall_s"]
    rows.append(("COCO evaluation, 5,000 images", "pycocotools", backends["pycocotools"]["wall_s"] / ours))
    slowest = min(row["ratio"] for row in record("convert")["summary"])
    rows.append(("KITTI to COCO, the worst case", "Pillow and json", slowest))
    return rows


def draw_summary(path: Path) -> None:
    """A bar for each row of the summary, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ddetr_mm"})
    from matplotlib.figure import Figure

    rows = summary()[::-1]
    figure = Figure(figsize=(9, 0.42 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    values = [value for *_, value in rows]
    axes.barh(
        range(len(rows)),
        [value - 1 for value in values],
        left=1,
        height=0.62,
        color=["#1f77b4" if value >= 1 else "#d62728" for value in values],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
    axes.set_xlim(0.45, 200)
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [f"{what} / {peer}" for what, peer, _ in rows])
    for place, value in enumerate(values):
        axes.text(max(value, 1) * 1.06, place, f"{value:.2g}" if value < 10 else f"{value:.0f}", va="center")
    axes.set_xlabel("times as fast as the peer, in the same run")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def performance_page() -> str:
    """The summary, the tables of all records, and what has none yet."""
    lines = [
        "# Compare speed and memory with other implementations",
        "",
        "Every figure comes from a script under `benchmarks/` that runs ours and its peers in turn, on the",
        "same inputs, in one run, and stops where their results differ. The records have the machine, the",
        "versions, the date and the command; `make bench` runs all scripts, `make bench ARGS=attention` one.",
        "",
        "![How many times as fast as its peers](performance.svg)",
        "",
        "| | against | times as fast |",
        "| --- | --- | ---: |",
        *(f"| {what} | {peer} | {value:.2f} |" for what, peer, value in summary()),
        "",
        "Two cores of an Intel Xeon, without a GPU; below 1 ours is slower. No GPU has been measured.",
        "",
    ]
    unmeasured = []
    for name, heading, aim in PERFORMANCE:
        record = RECORDS / f"{name}.md"
        if not record.is_file():
            unmeasured.append(f"- {heading} (`benchmarks/{SCRIPTS.get(name, name)}.py`). Aim: {aim}.")
            continue
        lines += [f"## {heading}", "", f"Aim: {aim}. [Record](../benchmarks/records/{name}.md).", ""]
        lines += [*_without_head(record.read_text(encoding="utf-8")), ""]
        if name == "scaling_cpu" and (DOCS / "scaling.svg").is_file():
            lines += ["![Cost against each axis](scaling.svg)", ""]
    if unmeasured:
        lines += [
            "## Not measured yet",
            "",
            "The scripts are there and tested, and run [in one call](gpu-run.md); no machine was there.",
            "",
            *unmeasured,
        ]
    return "\n".join(lines).rstrip() + "\n"


def _without_head(text: str) -> list[str]:
    """A record's body: no title, no environment; its headings two levels down."""
    lines = text.splitlines()[1:]
    while lines and (not lines[0].strip() or lines[0].startswith("- ")):
        lines.pop(0)
    while lines and not lines[-1].strip():
        lines.pop()
    return [f"#{line}" if line.startswith("#") else line for line in lines]


def draw_concepts(path: Path) -> None:
    """Spec sections → config sections → what the Runner builds, for a spec of this repository."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ddetr_mm"})
    from matplotlib import pyplot

    from ddetr_mm.spec import load_spec
    from ddetr_mm.tasks.runner import look_up_channels
    from ddetr_mm.translate import to_config

    loaded = load_spec(SPEC, [], "train")
    config = to_config(loaded, "train", look_up_channels=look_up_channels).to_dict()
    wanted = ("model", "train_pipeline", "train_dataloader", "val_evaluator", "optim_wrapper",
              "param_scheduler", "train_cfg", "custom_hooks")  # fmt: skip
    classes = {name: _class_names(config[name]) for name in wanted if name in config}
    sections = ("model", "dataset", "train", "evaluate", "ddetr_mm")

    figure, axes = pyplot.subplots(figsize=(10, 4.6))
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.5, len(classes) + 0.2)
    top = len(classes) - 1.0
    for column, title in (
        (1.0, "spec.yaml"),
        (4.2, "config.py"),
        (7.0, "mmdet's registries, built by the Runner"),
    ):
        axes.text(column, top + 0.85, title, weight="bold", ha="center" if column < 7 else "left")
    step = top / max(1, len(sections) - 1)
    for row, name in enumerate(sections):
        _box(axes, 1.0, top - row * step, f"{name}:", "#dbe9f6")
    for row, (name, built) in enumerate(classes.items()):
        _box(axes, 4.2, top - row, name, "#fde9cf")
        axes.annotate(
            "", (6.9, top - row), (5.25, top - row), arrowprops={"arrowstyle": "->", "color": "#888888"}
        )
        axes.text(7.0, top - row, built, va="center", fontsize=9, family="monospace")
    axes.annotate(
        "", (3.1, top / 2), (1.95, top / 2), arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 2}
    )
    axes.text(2.52, top / 2 + 0.18, "translate", ha="center", fontsize=9)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _box(axes, x: float, y: float, text: str, color: str) -> None:
    axes.text(
        x, y, text, ha="center", va="center", fontsize=10,
        bbox={"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": "#888888"},
    )  # fmt: skip


def _class_names(value: object) -> str:
    """The classes a section of a config names first, outermost first."""
    if isinstance(value, dict):
        inner = [
            value[key] for key in ("backbone", "dataset", "bbox_head") if isinstance(value.get(key), dict)
        ]
        return ", ".join(name for name in (value.get("type", ""), *map(_class_names, inner)) if name)
    if isinstance(value, list):
        names = [item["type"] for item in value]
        return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return str(value)


# --- the notebook with its outputs ---

MOST_LINES = 24
"""Lines of text that are kept of the output of a cell."""


def run_tour(path: Path) -> None:
    """Execute the notebook in a folder of its own, and store it with small outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "docs").mkdir()
        for name in ("configs", "projects"):
            (Path(folder) / name).symlink_to(DOCS.parent / name)
        where = {"metadata": {"path": str(Path(folder) / "docs")}}
        NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=where).execute()
        for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
            cell.outputs = small_outputs(cell, [folder, str(DOCS.parent)])
            cell.execution_count = number
            cell.metadata.pop("execution", None)  # times of day
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    nbformat.write(notebook, path)


def small_outputs(cell: Any, folders: list[str]) -> list[Any]:
    """The outputs of a cell: its text in one piece and shortened, without the folders, then its pictures."""
    import nbformat

    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.rstrip().splitlines()]
    left_out = len(lines) - MOST_LINES
    if left_out > 1:
        half = MOST_LINES // 2
        lines = [*lines[:half], f"[… {left_out} lines …]", *lines[-half:]]
    outputs = [nbformat.v4.new_output("stream", name="stdout", text="\n".join(lines) + "\n")] if text else []
    for output in cell.outputs:
        picture = output.get("data", {}).get("image/png")
        if picture:
            width = next(iter(output.get("metadata", {}).values()), {}).get("width")
            data = {"image/png": _small_png(base64.b64decode(picture), width)}
            outputs.append(nbformat.v4.new_output("display_data", data=data))
    return outputs


def _small_png(content: bytes, width: int | None) -> str:
    """A picture at the width at which the notebook shows it, with 128 colours, in base64."""
    from PIL import Image

    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if width and width < picture.width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.BOX)
    stored = io.BytesIO()
    picture.quantize(128).save(stored, "png", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tour", action="store_true", help="run tour.ipynb and store its outputs")
    if parser.parse_args().tour:
        run_tour(DOCS / "tour.ipynb")
        return
    (DOCS / "commands.md").write_text(commands_page(), encoding="utf-8")
    (DOCS / "field-differences.md").write_text(field_differences_page(), encoding="utf-8")
    (DOCS / "performance.md").write_text(performance_page(), encoding="utf-8")
    draw_concepts(DOCS / "concepts.svg")
    draw_summary(DOCS / "performance.svg")


if __name__ == "__main__":
    main()
