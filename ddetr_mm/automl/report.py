"""``automl.html``: how a study went, in one file that loads nothing. Made of :mod:`ddetr_mm.html_page`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_mm.automl.space import Parameter, shown
from ddetr_mm.files import write_text_whole
from ddetr_mm.html_page import (
    CHART_HELP,
    Cell,
    Chart,
    Html,
    Series,
    chart,
    heading,
    number,
    page,
    paragraph,
    scrolled,
    table,
    text,
    tiles,
)

if TYPE_CHECKING:
    from ddetr_mm.automl.study import Study

FEWEST_FOR_IMPORTANCE = 4
MOST_CURVES = 40
_STATES = {"COMPLETE": "complete", "PRUNED": "ended early", "FAIL": "failed", "RUNNING": "running"}
_AXIS_STEP, _AXIS_HEIGHT, _AXIS_MARGIN = 150, 240, 46


def write_report(study: Study, path: Path) -> Path:
    """Write the page, whole or not at all."""
    return write_text_whole(path, report_text(study))


def report_text(study: Study) -> str:
    """The page as HTML."""
    trials = study.started()
    metric, best = study.settings.metric, study.best()
    running = any(not one.state.is_finished() for one in trials)
    title = f"AutoML: {metric} {best.value:.4g}" if best is not None else "AutoML: no trial has ended yet"
    parts = [heading(title, 1), _summary(study, trials), _tiles(study, trials)]
    if len(trials) == 0:
        return page(title, parts)
    parts += [heading("History"), *_history(study, trials)]
    parts += [heading("Curves"), *_curves(study, trials), paragraph(CHART_HELP, "quiet")]
    parts += [heading("Importance of each field"), *_importance(study)]
    parts += [heading("Parallel coordinates"), *_parallel(study, trials)]
    parts += [heading("Slices"), *_slices(study, trials)]
    parts += [heading("Trials"), _table(study, trials)]
    if study.space.notes:
        parts += [heading("Not searched"), *(paragraph(note, "quiet") for note in study.space.notes)]
    return page(title, parts, refresh_s=30 if running else None)


def _summary(study: Study, trials: Sequence[Any]) -> Html:
    settings = study.settings
    return paragraph(
        f"{settings.algorithm} search of {len(study.space.parameters)} fields; {len(trials)} of "
        f"{study.wanted()} trials of {settings.max_epochs} epochs at most. A trial counts with its best "
        f"validation.",
        "quiet",
    )


def _tiles(study: Study, trials: Sequence[Any]) -> Html:
    states = [one.state.name for one in trials]
    seconds = sum(one.user_attrs.get("seconds", 0.0) for one in trials)
    best, own = study.best(), _own(trials)
    values = {f"best {study.settings.metric}": f"{best.value:.4g}" if best is not None else "–"}
    notes = {f"best {study.settings.metric}": f"trial {best.number:03d}"} if best is not None else {}
    if own is not None:
        values["the spec's own values"] = f"{own:.4g}"
        notes["the spec's own values"] = "trial 000"
    values |= {_STATES[name]: str(states.count(name)) for name in _STATES if states.count(name)}
    values["time of all trials"] = str(timedelta(seconds=round(seconds)))
    return tiles(values, notes)


def _own(trials: Sequence[Any]) -> float | None:
    found = [_value(one) for one in trials if one.user_attrs.get("own")]
    return found[0] if found else None


def _value(trial: Any) -> float | None:
    """The best value of a trial so far."""
    if trial.value is not None:
        return float(trial.value)
    steps = trial.intermediate_values
    return float(steps[max(steps)]) if steps else None


# --- history and curves ---


def _history(study: Study, trials: Sequence[Any]) -> list[Html]:
    rows = [(one.number, _value(one), one.state.name) for one in trials]
    known = [(place, value, state) for place, value, state in rows if value is not None]
    if not known:
        return [paragraph("No trial has a validation yet.")]
    ended = [(place, value) for place, value, state in known if state == "COMPLETE"]
    places = [float(place) for place, _, _ in known]
    series = [Series("each trial", places, [value for _, value, _ in known], dots=True)]
    if ended:
        best = accumulate((value for _, value in ended), study.better)
        series.append(Series("best so far", [float(place) for place, _ in ended], list(best)))
    return [chart(Chart("Values of the trials", "trial", study.settings.metric, series))]


def _curves(study: Study, trials: Sequence[Any]) -> list[Html]:
    best = study.best()
    with_curves = [one for one in trials if one.user_attrs.get("curve")]
    sign = -1 if study.goal == "max" else 1
    order = sorted(with_curves, key=lambda one: sign * (_value(one) or 0.0))[:MOST_CURVES]
    if not order:
        return [paragraph("No trial has a validation yet.")]
    series = []
    for one in order:
        curve = {int(epoch): value for epoch, value in one.user_attrs["curve"].items()}
        name = f"trial {one.number:03d}" + (
            ", best" if best is not None and one.number == best.number else ""
        )
        series.append(Series(name, [float(epoch) for epoch in curve], list(curve.values())))
    parts = [chart(Chart("Validations of all trials", "epoch", study.settings.metric, series))]
    if len(with_curves) > len(order):
        parts.append(paragraph(f"The {len(order)} best of {len(with_curves)} trials are drawn.", "quiet"))
    return parts


# --- importance ---


def importances(study: Study) -> dict[str, float]:
    """How much of the spread of the values each field explains, the largest first; empty where too few.

    By Optuna's PED-ANOVA, of all trials with a validation, each with its best.
    """
    import optuna

    known = [one for one in study.trials() if _value(one) is not None and _has_all(study, one)]
    if len(known) < FEWEST_FOR_IMPORTANCE or len({_value(one) for one in known}) < 2:
        return {}
    values = optuna.create_study(direction=study.direction)
    for one in known:
        ended = optuna.create_trial(params=one.params, distributions=study.distributions, value=_value(one))
        values.add_trial(ended)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
            found = optuna.importance.get_param_importances(values, evaluator=evaluator)
    except (ValueError, RuntimeError, ZeroDivisionError):  # Optuna's words for too few different values
        return {}
    return {path: float(share) for path, share in found.items() if math.isfinite(share)}


def _importance(study: Study) -> list[Html]:
    found = importances(study)
    if not found:
        return [paragraph("Too few trials have a validation.")]
    rows = [[path, number(share, 2, bar=True)] for path, share in found.items()]
    few = " With so few trials it is a hint only." if len(study.trials()) < 30 else ""
    return [
        table(["field", "importance"], rows, name="Importance of each field"),
        paragraph(f"Share of the spread among trials that the field explains (PED-ANOVA).{few}", "quiet"),
    ]


# --- parallel coordinates and slices ---


def _share(parameter: Parameter, value: Any) -> float:
    """Where a value lies in its range, 0 to 1."""
    if parameter.choices is not None:
        places = list(parameter.choices)
        return places.index(value) / max(len(places) - 1, 1) if value in places else 0.0
    if value is None:
        return 0.0
    low, high, here = parameter.low, parameter.high, float(value)
    if parameter.log:
        low, high, here = math.log(low), math.log(high), math.log(max(here, 1e-300))
    return min(max((here - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def _ends(parameter: Parameter) -> tuple[str, str]:
    if parameter.choices is not None:
        return shown(parameter.choices[0]), shown(parameter.choices[-1])
    return shown(float(parameter.low)), shown(float(parameter.high))


def _rated(study: Study, trials: Sequence[Any]) -> list[tuple[Any, dict[str, Any], float, float]]:
    """Trials with values: trial, values of the fields, value, and its place between worst 0 and best 1."""
    found = [(one, study.values_of(one), _value(one)) for one in trials if _has_all(study, one)]
    known = [(one, values, value) for one, values, value in found if value is not None]
    if not known:
        return []
    low, high = min(value for *_, value in known), max(value for *_, value in known)
    spread = high - low or 1.0
    rated = [(one, values, value, (value - low) / spread) for one, values, value in known]
    if study.goal == "min":
        rated = [(one, values, value, 1 - share) for one, values, value, share in rated]
    return sorted(rated, key=lambda row: row[3])


def _has_all(study: Study, trial: Any) -> bool:
    return all(path in trial.params for path in study.space.parameters)


def _color(share: float) -> str:
    """From grey, the worst, to strong blue, the best; readable on light and on dark."""
    return f"hsl(212 {round(15 + 75 * share)}% {round(62 - 8 * share)}%)"


def _parallel(study: Study, trials: Sequence[Any]) -> list[Html]:
    rated = _rated(study, trials)
    if not rated:
        return [paragraph("No trial has a validation yet.")]
    parameters = list(study.space.parameters.values())
    values = [value for *_, value, _ in rated]
    width = _AXIS_STEP * len(parameters) + 2 * _AXIS_MARGIN + 40
    top, bottom = 54, 54 + _AXIS_HEIGHT
    lines, axes = [], []
    for one, chosen, value, share in rated:
        places = [_share(parameter, chosen[parameter.path]) for parameter in parameters]
        low, high = min(values), max(values)
        places.append((value - low) / (high - low) if high > low else 0.5)
        points = " ".join(
            f"{_AXIS_MARGIN + 20 + index * _AXIS_STEP},{bottom - place * _AXIS_HEIGHT:.0f}"
            for index, place in enumerate(places)
        )
        label = f"trial {one.number:03d}: {study.settings.metric} {value:.4g}"
        lines.append(
            f'<polyline points="{points}" fill="none" style="stroke:{_color(share)}" '
            f'stroke-width="{1 + 2 * share:.1f}"><title>{text(label)}</title></polyline>'
        )
    ends = [(one.path.rpartition(".")[2], *_ends(one)) for one in parameters]
    ends.append((study.settings.metric, shown(float(min(values))), shown(float(max(values)))))
    for index, (name, low_text, high_text) in enumerate(ends):
        x = _AXIS_MARGIN + 20 + index * _AXIS_STEP
        raised = 16 if index % 2 else 30
        axes.append(
            f'<path d="M{x} {top}V{bottom}" stroke="currentColor" opacity=".5"/>'
            f'<text x="{x}" y="{raised}" text-anchor="middle" font-weight="600">{text(name)}</text>'
            f'<text x="{x}" y="{top - 6}" text-anchor="middle" opacity=".7">{text(high_text)}</text>'
            f'<text x="{x}" y="{bottom + 16}" text-anchor="middle" opacity=".7">{text(low_text)}</text>'
        )
    picture = (
        f'<svg width="{width}" height="{bottom + 24}" viewBox="0 0 {width} {bottom + 24}" role="img" '
        f'aria-label="Parallel coordinates" style="font-size:12px;fill:currentColor;display:block">'
        f"{''.join(axes)}{''.join(lines)}</svg>"
    )
    return [
        scrolled(picture, name="Parallel coordinates"),
        paragraph("A line is a trial: the stronger its blue, the better it is.", "quiet"),
    ]


def _slices(study: Study, trials: Sequence[Any]) -> list[Html]:
    rated = _rated(study, trials)
    if not rated:
        return [paragraph("No trial has a validation yet.")]
    values = [value for *_, value, _ in rated]
    low, high = min(values), max(values)
    figures = [
        _slice(one, rated, low, high, study.settings.metric) for one in study.space.parameters.values()
    ]
    grid = "display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr))"
    return [Html(f'<div class="slices" style="{grid}">{"".join(figures)}</div>')]


def _slice(
    parameter: Parameter,
    rated: Sequence[tuple[Any, Mapping[str, Any], float, float]],
    low: float,
    high: float,
    metric: str,
) -> str:
    dots = []
    for one, chosen, value, share in rated:
        x = 58 + 230 * _share(parameter, chosen[parameter.path])
        y = 130 - 116 * ((value - low) / (high - low) if high > low else 0.5)
        label = f"trial {one.number:03d}: {shown(chosen[parameter.path])}, {metric} {value:.4g}"
        dots.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" style="fill:{_color(share)}">'
            f"<title>{text(label)}</title></circle>"
        )
    first, last = _ends(parameter)
    name = parameter.path.rpartition(".")[2] + (", logarithmic" if parameter.log else "")
    return (
        f'<figure style="margin:0"><figcaption>{text(name)}</figcaption>'
        f'<svg viewBox="0 0 304 160" width="304" height="160" role="img" aria-label="{text(parameter.path)}" '
        'style="font-size:12px;fill:currentColor;display:block">'
        '<path d="M52 10V134H296" fill="none" stroke="currentColor" opacity=".5"/>'
        f'<text x="48" y="17" text-anchor="end">{high:.2g}</text>'
        f'<text x="48" y="134" text-anchor="end">{low:.2g}</text>'
        f'<text x="54" y="150">{text(first)}</text>'
        f'<text x="296" y="150" text-anchor="end">{text(last)}</text>{"".join(dots)}</svg></figure>'
    )


# --- the table ---


def _table(study: Study, trials: Sequence[Any]) -> Html:
    paths = list(study.space.parameters)
    headers = ["trial", study.settings.metric, "epochs", "state", "minutes"]
    headers += [path.rpartition(".")[2] for path in paths]
    rows = []
    best = study.best()
    for one in trials:
        state = _STATES[one.state.name] + (", best" if best is not None and one.number == best.number else "")
        reason = one.user_attrs.get("reason", "")
        epochs = max(map(int, one.user_attrs.get("curve", {})), default=0)
        seconds = one.user_attrs.get("seconds")
        values = study.values_of(one) if _has_all(study, one) else {}
        row: list[str | Cell] = [
            Cell(f"{one.number:03d}", float(one.number)),
            number(_value(one), 4),
            number(epochs),
            Cell(f"{state}: {reason[:80]}" if reason else state, title=reason),
            number(None if seconds is None else seconds / 60, 1),
        ]
        row += [_value_cell(values.get(path)) for path in paths]
        rows.append(row)
    return table(headers, rows, name="All trials", names=(0, 3), sortable=True)


def _value_cell(value: Any) -> Cell:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(shown(value), float(value) if is_number else None)
