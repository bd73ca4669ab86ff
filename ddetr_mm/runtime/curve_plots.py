"""Training curves as pictures: losses, learning rates, average precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddetr_mm.evaluation.figures import freed_figures, save_png
from ddetr_mm.runtime.curve_record import Point

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
        points: of a :class:`~ddetr_mm.runtime.curve_record.CurveRecord`.
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
