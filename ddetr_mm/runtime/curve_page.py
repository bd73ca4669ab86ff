"""Training curves as one HTML page that renews itself while training runs and needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddetr_mm.files import write_text_whole
from ddetr_mm.runtime.curve_record import Point

PAGE_NAME = "curves.html"

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1040px;
       margin: 24px auto; padding: 0 16px }
h1 { font-size: 23px; margin-bottom: 4px } h2 { font-size: 18px; margin: 26px 0 6px }
img { max-width: 100% } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 2px 14px 2px 0; text-align: left; border-bottom: 1px solid #e8e8e8 }
.alarm { background: #fdecea; border-left: 4px solid #c62828; padding: 6px 12px; margin: 6px 0 }
.quiet { color: #666 }
"""
_TITLES = {"curve_loss.png": "Loss", "curve_lr.png": "Learning rates", "curve_ap.png": "Average precision"}


def write_curve_page(
    path: Path,
    points: Sequence[Point],
    pictures: Sequence[Path],
    *,
    alarms: Sequence[str] = (),
    refresh_s: int | None = None,
    progress: str = "",
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: the page.
        points: of a :class:`~ddetr_mm.runtime.curve_record.CurveRecord`; the last ones are shown as numbers.
        pictures: PNG files to put in.
        alarms: sentences about what looks wrong.
        refresh_s: the browser reads the page again after so many seconds; None when training is over.
        progress: how far training is, e.g. ``"epoch 3 of 50"``.
    """
    again = f'<meta http-equiv="refresh" content="{refresh_s}">\n' if refresh_s else ""
    state = "training" if refresh_s else "finished"
    parts = [
        f"<h1>Training curves</h1>\n<p class='quiet'>{html.escape(progress)} · {state}</p>",
        *(f'<p class="alarm">{html.escape(sentence)}</p>' for sentence in alarms),
        *_numbers(points),
    ]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        title = html.escape(_TITLES.get(picture.name, picture.stem))
        parts.append(f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">')
    return write_text_whole(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n{again}'
        f"<title>Training curves</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n",
    )


def _numbers(points: Sequence[Point]) -> list[str]:
    """The last point of training and of validation, as a table."""
    rows: list[tuple[str, Any]] = []
    train = next((point for point in reversed(points) if point["kind"] == "train"), None)
    val = next((point for point in reversed(points) if point["kind"] == "val"), None)
    if train:
        rows += [("steps", train["step"]), ("epochs", round(train["epoch"], 2))]
        rows += _items(train.get("losses", {}), inner=False)
        rows += [(f"learning rate, {name}", value) for name, value in train.get("learning_rates", {}).items()]
    if val:
        # An average over nothing is -1 in COCO.
        shown = {name: "–" if value == -1 else value for name, value in val.get("metrics", {}).items()}
        rows += [(f"{name} (epoch {val['epoch']})", value) for name, value in shown.items()]
    if not rows:
        return []
    lines = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{_number(value)}</td></tr>" for name, value in rows
    )
    return [f"<h2>Now</h2>\n<table>\n{lines}\n</table>"]


def _items(values: Mapping[str, float | None], inner: bool) -> list[tuple[str, float | None]]:
    """Loss parts; those of inner decoder layers (``d0.loss_cls``) only when asked for."""
    return [(name, value) for name, value in values.items() if inner or "." not in name]


def _number(value: float | str | None) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
