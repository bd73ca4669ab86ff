"""The main job in one go: KITTI labels → COCO → trained detector → annotated pictures → checked ONNX.

Every step is a ``ddetr-mm`` command that is printed before it runs, so each can be repeated by hand.
Started by ``make demo`` from the project's root; results go to ``results/shapes``, which is emptied first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("results/shapes")
SPEC = "configs/specs/shapes_resnet18.yaml"
CHECKPOINT = f"{RESULTS}/train/dd_model_latest.pth"
ONNX_FILE = f"{RESULTS}/export/shapes.onnx"


def steps(train_overrides: list[str]) -> list[tuple[str, list[str]]]:
    """The commands of the demo with a heading each."""
    ddetr_mm = [sys.executable, "-m", "ddetr_mm"]
    return [
        (
            "Draw pictures with KITTI labels",
            [sys.executable, "projects/shapes/generate.py", f"{RESULTS}/data"],
        ),
        (
            "Convert the labels to COCO shards",
            [*ddetr_mm, "convert", "-e", "configs/specs/shapes_convert.yaml"],
        ),
        ("Check spec and data", [*ddetr_mm, "check", "-e", SPEC]),
        ("Train", [*ddetr_mm, "train", "-e", SPEC, *train_overrides]),
        (
            "Evaluate on unseen pictures",
            [*ddetr_mm, "evaluate", "-e", SPEC, f"evaluate.checkpoint={CHECKPOINT}"],
        ),
        (
            "Annotate unseen pictures",
            [*ddetr_mm, "inference", "-e", SPEC, f"inference.checkpoint={CHECKPOINT}"],
        ),
        (
            "Export to ONNX, checked",
            [
                *ddetr_mm,
                "export",
                "-e",
                SPEC,
                f"export.checkpoint={CHECKPOINT}",
                f"export.onnx_file={ONNX_FILE}",
            ],
        ),
    ]


def run_step(console: Console, number: int, heading: str, command: list[str]) -> float:
    """Print and run one command; stops the demo when it fails. Returns its seconds."""
    shown = (
        shlex.join(command)
        .replace(f"{sys.executable} -m ddetr_mm", "ddetr-mm")
        .replace(sys.executable, "python")
    )
    console.rule(f"{number}. {heading}")
    console.print(f"$ {shown}", style="bold", highlight=False, soft_wrap=True)
    start = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status != 0:
        console.print(f"stopped: the command above ended with exit status {status}", style="red")
        sys.exit(status)
    return time.monotonic() - start


def contact_sheet(
    pictures: list[Path], output: Path, columns: int = 6, cell_wh: tuple[int, int] = (240, 240)
) -> None:
    """The pictures side by side on one sheet, enlarged to their cells."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_wh[0], rows * cell_wh[1]), "white")
    for index, path in enumerate(pictures):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        scale = min((cell_wh[0] - 6) / picture.width, (cell_wh[1] - 6) / picture.height)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        sheet.paste(picture, ((index % columns) * cell_wh[0] + 3, (index // columns) * cell_wh[1] + 3))
    sheet.save(output)


def summary(seconds: dict[str, float]) -> Table:
    """What the demo reached, read from the files its commands left."""
    scores = json.loads((ROOT / RESULTS / "evaluate" / "results.json").read_text())
    parity = json.loads((ROOT / RESULTS / "export" / "shapes.parity.json").read_text())
    table = Table(title="Coloured shapes, learnt from random weights", show_header=False)
    table.add_row("AP50 on unseen pictures", f"{scores['AP50']:.3f}")
    table.add_row("AP on unseen pictures", f"{scores['AP']:.3f}")
    table.add_row("ONNX parity, boxes (0..1)", f"within {parity['max_abs_diff_boxes']:.1e}")
    table.add_row("ONNX parity, logits", f"within {parity['max_abs_diff_logits']:.1e}")
    table.add_row("Checkpoint", CHECKPOINT)
    table.add_row("Curves", f"{RESULTS}/train/curve_*.png")
    table.add_row("Annotated pictures", f"{RESULTS}/inference/images_annotated")
    table.add_row("Contact sheet", f"{RESULTS}/contact_sheet.png")
    table.add_row("ONNX file", ONNX_FILE)
    table.add_section()
    for heading, duration in seconds.items():
        table.add_row(heading, f"{duration:.0f} s")
    table.add_row("In all", f"{sum(seconds.values()):.0f} s")
    return table


def main() -> None:
    """Run all steps, then show the table and write the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to the training command")
    overrides = parser.parse_args().overrides
    console = Console()
    shutil.rmtree(ROOT / RESULTS, ignore_errors=True)
    seconds = {}
    for number, (heading, command) in enumerate(steps(overrides), start=1):
        seconds[heading] = run_step(console, number, heading, command)
    annotated = sorted((ROOT / RESULTS / "inference" / "images_annotated").glob("*.png"))
    contact_sheet(annotated[:18], ROOT / RESULTS / "contact_sheet.png")
    console.rule("Done")
    console.print(summary(seconds))


if __name__ == "__main__":
    main()
