"""Training curves as PNG and HTML."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ddetr_mm.engine.hooks import learning_rates
from ddetr_mm.evaluation.report import freed_figures, save_png
from ddetr_mm.files import write_text_whole

# --- The record that training curves are drawn from: one JSON object a line, appended while training runs ---
# Two kinds of lines: ``train`` with ``step``, ``epoch``, ``losses`` (name → mean since the last line) and
# ``learning_rates`` (group → value), and ``val`` with ``step``, ``epoch`` and ``metrics``. ``step`` counts
# optimizer steps done, ``epoch`` epochs done, both since the beginning of training, not of the process.
# A number that is not finite is null.

Point = dict[str, Any]


class CurveRecord:
    """The points of a training run, in memory and in a file.

    Args:
        path: the file.
        resumed_step: steps that are already done. Points after it are dropped: they belong to work that
            was lost. At 0 an old file is replaced.
    """

    def __init__(self, path: str | os.PathLike[str], resumed_step: int = 0) -> None:
        self.path = Path(path)
        known = read_points(self.path) if resumed_step > 0 else []
        self.points = [point for point in known if point["step"] <= resumed_step]
        write_text_whole(self.path, "".join(_line(point) for point in self.points))

    def add_train(
        self, step: int, epoch: float, losses: Mapping[str, float], learning_rates: Mapping[str, float]
    ) -> None:
        """Add a point of training."""
        self._add(
            {
                "kind": "train",
                "step": step,
                "epoch": epoch,
                "losses": losses,
                "learning_rates": learning_rates,
            }
        )

    def add_val(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Add a point of validation."""
        self._add({"kind": "val", "step": step, "epoch": epoch, "metrics": metrics})

    def _add(self, point: Mapping[str, Any]) -> None:
        plain = _plain(point)
        self.points.append(plain)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(plain))


def read_points(path: str | os.PathLike[str]) -> list[Point]:
    """The points of a file; none if it is missing. A last line that a kill has cut off is left out.

    Raises:
        ValueError: a line before the last one is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    # What follows the last line's end is empty, unless the process was killed while it wrote.
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole_lines]


def _line(point: Point) -> str:
    return json.dumps(point, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        # One string for the same name in all points: a long run has tens of thousands.
        return {sys.intern(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (str, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


# --- Training curves as pictures: losses, learning rates, average precision ---

LOSS_PICTURE, RATE_PICTURE, AP_PICTURE = "curve_loss.png", "curve_lr.png", "curve_ap.png"

_MOST_POINTS = 1500
_AP_NAMES = {
    "bbox_mAP": "AP",
    "bbox_mAP_50": "AP50",
    "bbox_mAP_75": "AP75",
    "bbox_mAP_s": "AP small",
    "bbox_mAP_m": "AP medium",
    "bbox_mAP_l": "AP large",
}
_OF_INNER_LAYER = re.compile(r"(^|\.)(d\d+\.|enc_|dn_)|\.d\d+")

Series = dict[str, tuple[np.ndarray, np.ndarray]]


def draw_curves(points: Sequence[Point], folder: str | Path) -> list[Path]:
    """Draw all curves there are points for.

    Args:
        points: of a :class:`~ddetr_mm.engine.curves.CurveRecord`.
        folder: where to put the pictures; each is written whole or not at all.

    Returns:
        The pictures drawn.
    """
    plots = (
        (LOSS_PICTURE, loss_series(points), "optimizer steps", "loss", True),
        (RATE_PICTURE, rate_series(points), "optimizer steps", "learning rate", True),
        (AP_PICTURE, ap_series(points), "epochs", "average precision (COCO)", False),
    )
    drawn = []
    for name, series, x_label, y_label, may_be_log in plots:
        if series:
            path = Path(folder) / name
            _draw(path, series, x_label, y_label, may_be_log=may_be_log)
            drawn.append(path)
    return drawn


def loss_series(points: Sequence[Point]) -> Series:
    """Total loss and its parts of the last decoder layer, over steps.

    The same parts of the other layers are in the record; drawn, they would hide the picture.
    """
    names = {name: name for name in _keys(points, "losses") if not _OF_INNER_LAYER.search(name)}
    return _series(points, "losses", "step", names)


def rate_series(points: Sequence[Point]) -> Series:
    """The learning rate of each group, over steps."""
    return _series(points, "learning_rates", "step", {name: name for name in _keys(points, "learning_rates")})


def ap_series(points: Sequence[Point]) -> Series:
    """COCO's six precisions over epochs; undefined ones (-1) are left out."""
    keys = {key.rsplit("/", 1)[-1]: key for key in _keys(points, "metrics")}
    names = {keys[ending]: label for ending, label in _AP_NAMES.items() if ending in keys}
    series = _series(points, "metrics", "epoch", names)
    return {name: (x, y) for name, (x, y) in series.items() if (y >= 0).any()}


def _keys(points: Sequence[Point], group: str) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point.get(group, ())))


def _series(points: Sequence[Point], group: str, axis: str, names: Mapping[str, str]) -> Series:
    series = {}
    for key, label in names.items():
        pairs = [(point[axis], point[group][key]) for point in points if key in point.get(group, ())]
        x, y = np.array([[a, np.nan if b is None else b] for a, b in pairs], dtype=float).T
        if group == "metrics":
            y[y < 0] = np.nan
        series[label] = _thinned(x, y)
    return series


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most :data:`_MOST_POINTS` points, each the mean of its neighbourhood."""
    if len(x) <= _MOST_POINTS:
        return x, y
    parts = np.linspace(0, len(x), _MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff([*parts, len(x)])
    return np.add.reduceat(x, parts) / counts, np.add.reduceat(y, parts) / counts


@freed_figures()
def _draw(path: Path, series: Series, x_label: str, y_label: str, *, may_be_log: bool) -> None:
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(series.items()):
        first = number == 0
        axes.plot(
            x,
            y,
            label=name,
            linewidth=2.0 if first else 1.2,
            marker="o" if len(x) < 40 else None,
            markersize=3,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, alpha=0.3)
    if may_be_log and _spans_decades(series):
        axes.set_yscale("log")
    elif not may_be_log:
        _limit_to_precision(axes, series)
    axes.legend(loc="best", fontsize=8)
    save_png(path, figure)


def _spans_decades(series: Series) -> bool:
    values = np.concatenate([y[np.isfinite(y)] for _, y in series.values()])
    return bool(len(values) and values.min() > 0 and values.max() / values.min() > 30)


def _limit_to_precision(axes: Axes, series: Series) -> None:
    top = max((float(np.nanmax(y)) for _, y in series.values() if np.isfinite(y).any()), default=1.0)
    axes.set_ylim(0, min(max(top * 1.1, 0.01), 1.02))


# --- Training curves as one HTML page that renews itself while training runs and needs nothing else ---

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
        points: of a :class:`~ddetr_mm.engine.curves.CurveRecord`; the last ones are shown as numbers.
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


# --- The hook that records training curves and draws them while training runs ---

RECORD_NAME = "curves.jsonl"


@HOOKS.register_module()
class CurvesHook(Hook):
    """Records loss parts, learning rates of every group and validation figures; draws them as PNG and HTML.

    The record (``curves.jsonl``) and the pictures (``curve_loss.png``, ``curve_lr.png``,
    ``curve_ap.png``) lie in the runner's ``work_dir``, with a page of all of it (``curves.html``) that renews
    itself in a browser while training runs. A resumed run goes on with the earlier points;
    those of steps that were lost are dropped.

    Args:
        interval: record a point every so many steps; losses are averaged in between.
        redraw_s: draw again at most every so many seconds; the end of training is always drawn.
        out_dir: folder; the runner's ``work_dir`` when None.
    """

    priority = "LOW"

    def __init__(
        self, interval: int = 10, redraw_s: float = 10.0, out_dir: str | os.PathLike[str] | None = None
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, not {interval}")
        self.interval = interval
        self.redraw_s = redraw_s
        self.out_dir = out_dir
        self._record: CurveRecord | None = None
        self._steps_since_point = 0
        self._drawn_at = float("-inf")

    def before_train(self, runner: Any) -> None:
        """Open the record, with the points of the run that is resumed."""
        if is_main_process():
            self._record = CurveRecord(self._folder(runner) / RECORD_NAME, resumed_step=runner.iter)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | tuple | list | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Record a point every ``interval`` steps."""
        self._steps_since_point += 1
        if self._record is None or (runner.iter + 1) % self.interval != 0:
            return
        steps = self._steps_since_point
        self._steps_since_point = 0
        losses = {
            key.removeprefix("train/"): float(buffer.mean(steps))
            for key, buffer in runner.message_hub.log_scalars.items()
            if key.startswith("train/") and "loss" in key
        }
        epoch = runner.epoch + (batch_idx + 1) / len(runner.train_dataloader)
        self._record.add_train(runner.iter + 1, epoch, losses, learning_rates(runner))
        self._draw(runner)

    def after_train_epoch(self, runner: Any) -> None:
        """Draw."""
        self._draw(runner)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Record the validation figures and draw."""
        if self._record is not None and metrics:
            # Validation follows the epoch, which the loop has counted by now.
            self._record.add_val(runner.iter, runner.epoch, metrics)
            self._draw(runner)

    def after_train(self, runner: Any) -> None:
        """Draw everything."""
        self._draw(runner, now_or_never=True)

    def _draw(self, runner: Any, now_or_never: bool = False) -> None:
        if self._record is None:
            return
        if now_or_never or time.monotonic() - self._drawn_at >= self.redraw_s:
            self._draw_now(runner, self._record.points, finished=now_or_never)
            # Measured from the end, so that drawing can never take most of the time.
            self._drawn_at = time.monotonic()

    def _draw_now(self, runner: Any, points: list[Point], finished: bool) -> None:
        folder = self._folder(runner)
        pictures = draw_curves(points, folder)
        write_curve_page(
            folder / PAGE_NAME,
            points,
            pictures,
            alarms=runner.message_hub.runtime_info.get("alarms", []),
            refresh_s=None if finished else max(round(self.redraw_s), 5),
            progress=f"epoch {runner.epoch} of {runner.max_epochs}, step {runner.iter} of {runner.max_iters}",
        )

    def _folder(self, runner: Any) -> Path:
        return Path(self.out_dir or runner.work_dir)
