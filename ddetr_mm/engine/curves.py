"""Training curves: read from mmengine's ``scalars.json``, drawn as PNG and as one HTML page.

mmengine writes the logged scalars, one JSON object a line, into
``<work_dir>/<start time>/vis_data/scalars.json``: one folder for each start. :class:`RunScalars` joins the
folders of a run that was resumed; :class:`CurvesHook` draws while training runs.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.engine.hooks import learning_rates
from ddetr_mm.evaluation.report import freed_figures, new_figure, save_png
from ddetr_mm.files import parse_json, write_text_whole
from ddetr_mm.html_page import CHART_HELP, Chart, Html, chart, heading, page, paragraph, tiles
from ddetr_mm.html_page import Series as ChartSeries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- Scalars of a run ---

Point = dict[str, float | None]
"""One line of ``scalars.json``: scalar name to value, None where it was not finite. ``step`` counts optimizer
steps in points of training, and epochs in points of validation."""

SCALARS_PATTERN = "*/vis_data/scalars.json"
# mmdet's analyze_logs takes every line for a step's, unless a key has a slash: hence one in these.
RESUMED_STEP, RESUMED_EPOCH = "resumed/at_step", "resumed/at_epoch"
"""Scalars that :class:`CurvesHook` writes at each start: steps and epochs that were already done."""
VALIDATED_STEP, VALIDATED_EPOCH = "validated/at_step", "validated/at_epoch"
"""Scalars that :class:`CurvesHook` writes after each validation: steps and epochs that were done then."""

RATE_PREFIX = "lr_"
"""Prefix of the learning rate of one group of parameters."""


class RunScalars:
    """The scalars of a run, read again from where the last reading ended.

    Points after the step that a later start resumed from belong to lost work and are dropped. Files of starts
    without :class:`CurvesHook` (dry runs, tests) are left out: they do not begin with :data:`RESUMED_STEP`.

    Args:
        work_dir: results folder of the run, with one folder for each start.
        last: the last folder to read, by name; all when None.

    Attributes:
        train: points of training, in order.
        val: points of validation, in order.
    """

    def __init__(self, work_dir: str | os.PathLike[str], last: str | None = None) -> None:
        self.work_dir = Path(work_dir)
        self.last = last
        self.train: list[Point] = []
        self.val: list[Point] = []
        self._read_bytes: dict[Path, int] = {}

    def update(self) -> None:
        """Read what was written since the last call.

        Raises:
            ValueError: a complete line is not a JSON object.
        """
        for path in sorted(self.work_dir.glob(SCALARS_PATTERN)):
            if self.last is None or path.parent.parent.name <= self.last:
                self._read(path)

    def _read(self, path: Path) -> None:
        start = self._read_bytes.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
        # Text after the last line end is a line that is being written, or that a kill has cut off.
        complete = content[: content.rfind(b"\n") + 1]
        points = [_point(line, path) for line in complete.decode("utf-8").splitlines()]
        if start == 0 and points and RESUMED_STEP not in points[0]:
            return
        self._read_bytes[path] = start + len(complete)
        for point in points:
            self._add(point)

    def _add(self, point: Point) -> None:
        if RESUMED_STEP in point:
            step, epoch = point[RESUMED_STEP] or 0, point.get(RESUMED_EPOCH) or 0
            self.train = [known for known in self.train if _step(known) <= step]
            self.val = [known for known in self.val if _step(known) <= epoch]
        elif VALIDATED_STEP in point:
            if self.val and _step(self.val[-1]) == point.get(VALIDATED_EPOCH):
                self.val[-1][VALIDATED_STEP] = point[VALIDATED_STEP]
        elif "iter" in point:
            self.train.append(point)
        elif any("/" in name for name in point):
            self.val.append(point)


def _point(line: str, path: Path) -> Point:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{path}: a line is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a line is not a JSON object")
    return {str(name): _finite(value) for name, value in values.items() if not isinstance(value, str)}


def _finite(value: Any) -> float | None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return None


def _step(point: Point) -> float:
    return point.get("step") or 0


# --- Curves as PNG ---

LOSS_PICTURE, RATE_PICTURE, AP_PICTURE = "curve_loss.png", "curve_lr.png", "curve_ap.png"

_MOST_POINTS = 1500
VALIDATION_LOSS = "val_loss"
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


def draw_curves(scalars: RunScalars, folder: str | Path) -> list[Path]:
    """Draw losses, learning rates and average precision, as far as there are values.

    Args:
        scalars: the run's scalars.
        folder: where to put the PNG files.

    Returns:
        The files drawn.
    """
    plots = (
        (LOSS_PICTURE, loss_series(scalars), "optimizer steps", "loss", True),
        (RATE_PICTURE, rate_series(scalars), "optimizer steps", "learning rate", True),
        (AP_PICTURE, ap_series(scalars), "epochs", "average precision (COCO)", False),
    )
    drawn = []
    for name, series, x_label, y_label, may_be_log in plots:
        if series:
            path = Path(folder) / name
            _draw(path, series, x_label, y_label, may_be_log=may_be_log)
            drawn.append(path)
    return drawn


def loss_series(scalars: RunScalars) -> Series:
    """Total loss and its parts of the last decoder layer, and the total of validation, over steps.

    The parts of the inner layers are left out: they would cover the others.
    """
    names = {name: name for name in _names(scalars.train) if _is_last_layer_loss(name)}
    validated = [
        {"step": point[VALIDATED_STEP], VALIDATION_LOSS: point[VALIDATION_LOSS]}
        for point in scalars.val
        if VALIDATION_LOSS in point and VALIDATED_STEP in point
    ]
    names_of_val = {VALIDATION_LOSS: VALIDATION_LOSS} if validated else {}
    return {**_series(scalars.train, names), **_series(validated, names_of_val)}


def rate_series(scalars: RunScalars) -> Series:
    """The learning rate of each group over steps; the first group's alone where no other is recorded."""
    names = _names(scalars.train)
    groups = {name: name.removeprefix(RATE_PREFIX) for name in names if name.startswith(RATE_PREFIX)}
    return _series(scalars.train, groups or {name: name for name in names if name == "lr"})


def ap_series(scalars: RunScalars) -> Series:
    """COCO's six average precisions over epochs; undefined ones (-1) are left out."""
    endings = {name.rsplit("/", 1)[-1]: name for name in _names(scalars.val)}
    names = {endings[ending]: label for ending, label in _AP_NAMES.items() if ending in endings}
    series = _series(scalars.val, names)
    for _, y in series.values():
        y[y < 0] = np.nan
    return {name: (x, y) for name, (x, y) in series.items() if not np.isnan(y).all()}


def _is_last_layer_loss(name: str) -> bool:
    return "loss" in name and not _OF_INNER_LAYER.search(name)


def _names(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point))


def _series(points: Sequence[Point], labels: Mapping[str, str]) -> Series:
    series = {}
    for name, label in labels.items():
        pairs = [(_step(point), point[name]) for point in points if name in point]
        x, y = np.array([[step, np.nan if value is None else value] for step, value in pairs], dtype=float).T
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
    figure = new_figure(9, 5)
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


# --- Curves as one HTML page ---

PAGE_NAME = "curves.html"

BEST_NAMES = ("AP", "AP50")


@dataclass(frozen=True)
class RunState:
    """How far a training run is.

    Attributes:
        name: of the run.
        progress: e.g. ``"epoch 3 of 50, step 1,200 of 20,000"``.
        seconds_left: None where unknown, and when training has ended.
        finished: whether training has ended.
        alarms: sentences about what looks wrong.
    """

    name: str
    progress: str = ""
    seconds_left: float | None = None
    finished: bool = False
    alarms: Sequence[str] = ()


def write_curve_page(
    path: Path, scalars: RunScalars, state: RunState, *, refresh_s: int | None = None
) -> Path:
    """Write the page of a run: alarms, the best results, the time left, and the curves.

    Args:
        path: the HTML file.
        scalars: the run's scalars.
        state: how far the run is.
        refresh_s: the page reloads after so many seconds; None when training has ended.
    """
    word = "finished" if state.finished else "training"
    parts = [
        heading(state.name, 1),
        paragraph(f"{word} · {state.progress}" if state.progress else word, "quiet"),
        *(paragraph(sentence, "alarm") for sentence in state.alarms),
        *_best_tiles(scalars, state),
    ]
    charts = (
        ("Loss", "optimizer steps", loss_series(scalars), True),
        ("Average precision", "epochs", ap_series(scalars), False),
        ("Learning rates", "optimizer steps", rate_series(scalars), True),
    )
    shown = [entry for entry in charts if entry[2]]
    for title, x_label, series, may_be_log in shown:
        drawn = Chart(
            title,
            x_label,
            title.lower(),
            [ChartSeries(name, x.tolist(), y.tolist()) for name, (x, y) in series.items()],
            log=may_be_log and _spans_decades(series),
        )
        parts += [heading(title), chart(drawn)]
    parts.append(paragraph(CHART_HELP if shown else "No values have been logged yet.", "quiet"))
    return write_text_whole(path, page(f"{state.name}: training curves", parts, refresh_s=refresh_s))


def _best_tiles(scalars: RunScalars, state: RunState) -> list[Html]:
    """The best results with their epochs, the last loss, and the time left."""
    values: dict[str, str] = {}
    notes: dict[str, str] = {}
    precision = ap_series(scalars)
    for name in BEST_NAMES:
        if name in precision:
            x, y = precision[name]
            best = int(np.nanargmax(y))
            values[f"best {name}"] = f"{y[best]:.3f}"
            notes[f"best {name}"] = f"epoch {x[best]:g}"
    losses = [point["loss"] for point in scalars.train if "loss" in point]
    if losses:
        values["loss"] = "not finite" if losses[-1] is None else f"{losses[-1]:.4g}"
        notes["loss"] = f"step {_step(scalars.train[-1]):,g}"
    if state.seconds_left is not None:
        values["time left"] = duration_text(state.seconds_left)
    return [tiles(values, notes)] if values else []


def duration_text(seconds: float) -> str:
    """A duration for a reader, to two units: ``2 d 3 h``, ``1 h 20 min``, ``45 s``."""
    whole = timedelta(seconds=round(seconds))
    hours, rest = divmod(whole.seconds, 3600)
    minutes, left = divmod(rest, 60)
    units = [(whole.days, "d"), (hours, "h"), (minutes, "min"), (left, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), len(units) - 1)
    shown = [f"{count} {unit}" for count, unit in units[first : first + 2] if count]
    return " ".join(shown) or "0 s"


def run_name(folder: str | os.PathLike[str]) -> str:
    """The name of a run: its results folder without the folder of the subtask."""
    whole = Path(folder).resolve()
    return whole.parent.name if whole.name == "train" and whole.parent.name else whole.name


# --- The hook ---


@HOOKS.register_module()
class CurvesHook(Hook):
    """Draws losses, learning rates of every group and validation metrics while training runs.

    Adds the learning rates of all groups to the logged scalars (mmengine logs the first group's), so they
    are in ``scalars.json`` and TensorBoard too. The PNG files (``curve_loss.png``, ``curve_lr.png``,
    ``curve_ap.png``) and the page ``curves.html`` are in the runner's ``work_dir``. A resumed run keeps the
    earlier points; those of steps that were lost are dropped.

    Args:
        redraw_s: seconds between two drawings at least; the end of training is always drawn.
        out_dir: folder of the drawings; the runner's ``work_dir`` when None.
    """

    # After LoggerHook (BELOW_NORMAL), which writes the scalars.
    priority = "LOW"

    def __init__(self, redraw_s: float = 10.0, out_dir: str | os.PathLike[str] | None = None) -> None:
        self.redraw_s = redraw_s
        self.out_dir = out_dir
        self._scalars: RunScalars | None = None
        self._drawn_at = float("-inf")
        self._begun_at, self._begun_step = 0.0, 0
        self._group_rates: list[float] = []
        self._rates: dict[str, float] = {}

    def before_train(self, runner: Any) -> None:
        """Note where this start begins, so that readers of the scalars drop lost points."""
        self._begun_at, self._begun_step = time.monotonic(), runner.iter
        if not is_first_rank():
            return
        backend = runner.visualizer.get_backend("LocalVisBackend")
        if backend is None:
            runner.logger.warning(
                "no curves are drawn: the visualizer has no LocalVisBackend, whose file they need"
            )
            return
        done = {RESUMED_STEP: runner.iter, RESUMED_EPOCH: runner.epoch}
        backend.add_scalars(done, step=runner.iter)
        self._scalars = RunScalars(runner.work_dir)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Add the learning rate of every group to the logged scalars."""
        now = [group["lr"] for group in runner.optim_wrapper.param_groups]
        if now != self._group_rates:  # naming the groups takes a while, and rates change seldom
            self._group_rates, self._rates = now, learning_rates(runner)
        for name, rate in self._rates.items():
            runner.message_hub.update_scalar(f"train/{RATE_PREFIX}{name}", rate)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Draw, unless that was done a moment ago."""
        self._draw(runner)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Note after which step this was, and draw the new metrics."""
        if self._scalars is not None:
            done = {VALIDATED_STEP: runner.iter, VALIDATED_EPOCH: runner.epoch}
            runner.visualizer.get_backend("LocalVisBackend").add_scalars(done, step=runner.iter)
        self._draw(runner)

    def after_train(self, runner: Any) -> None:
        """Draw everything."""
        self._draw(runner, finished=True)

    def _draw(self, runner: Any, finished: bool = False) -> None:
        if self._scalars is None or not (finished or time.monotonic() - self._drawn_at >= self.redraw_s):
            return
        self._scalars.update()
        folder = Path(self.out_dir or runner.work_dir)
        draw_curves(self._scalars, folder)
        state = RunState(
            name=run_name(runner.work_dir),
            progress=f"epoch {runner.epoch} of {runner.max_epochs}, step {runner.iter} of {runner.max_iters}",
            seconds_left=None if finished else self._seconds_left(runner),
            finished=finished,
            alarms=runner.message_hub.runtime_info.get("alarms", []),
        )
        refresh_s = None if finished else max(round(self.redraw_s), 5)
        write_curve_page(folder / PAGE_NAME, self._scalars, state, refresh_s=refresh_s)
        # Measured from the end, so that drawing can never take most of the time.
        self._drawn_at = time.monotonic()

    def _seconds_left(self, runner: Any) -> float | None:
        """Time to the last step at the speed of this start so far, validations included."""
        done = runner.iter - self._begun_step
        if done <= 0:
            return None
        return (time.monotonic() - self._begun_at) / done * max(runner.max_iters - runner.iter, 0)
