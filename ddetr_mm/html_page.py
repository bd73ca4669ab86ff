"""The frame of our HTML pages: tables, tiles and charts in one file that loads nothing.

The report of an evaluation, the curves of a training run and the comparison of runs are made of these parts.
Whatever comes from data is escaped by the function that takes it; :data:`Html` marks what is HTML already.
The page's policy lets it run one script, known by its digest, and load nothing but the pictures inside it.

Charts are drawn here as SVG, so that they show without the script, which adds hovering and zooming. Their
text is HTML beside the SVG: it keeps its size in pixels at any width.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NewType

from ddetr_mm.html_assets import SCRIPT, STYLE

Html = NewType("Html", str)
"""Text that is HTML: made here, or escaped."""

NUM_COLORS = 10
"""Colours of series; further ones repeat them with dashed lines."""


def text(value: object) -> Html:
    """Escaped text; bytes that are not UTF-8 (in file names) become question marks."""
    return Html(html.escape(str(value).encode("utf-8", "replace").decode("utf-8")))


def join(parts: Iterable[Html]) -> Html:
    """Parts one below the other."""
    return Html("\n".join(parts))


# --- the page ---


def page(title: str, parts: Iterable[Html], *, refresh_s: int | None = None) -> str:
    """A whole page.

    Args:
        title: for the browser's tab.
        parts: the content of the body.
        refresh_s: the page reloads after so many seconds; a zoomed chart stays zoomed. None: never.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    again = f'<noscript><meta http-equiv="refresh" content="{refresh_s}"></noscript>\n' if refresh_s else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n"
        f'<body data-refresh="{refresh_s or 0}">\n<main>\n{join(parts)}\n</main>\n'
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def heading(title: str, level: int = 2) -> Html:
    """A heading."""
    return Html(f"<h{level}>{text(title)}</h{level}>")


def paragraph(sentence: str, kind: str = "") -> Html:
    """A paragraph; ``kind``: ``quiet``, ``note``, ``alarm`` or empty."""
    return Html(f'<p class="{kind}">{text(sentence)}</p>' if kind else f"<p>{text(sentence)}</p>")


def tiles(values: Mapping[str, str], notes: Mapping[str, str] | None = None) -> Html:
    """Large figures side by side, each with its name below and, in ``notes``, a word more."""
    notes = notes or {}
    items = [
        f"<div><b>{text(value)}</b><span>{text(name)}</span>"
        + (f"<small>{text(notes[name])}</small>" if name in notes else "")
        + "</div>"
        for name, value in values.items()
    ]
    return Html(f'<div class="tiles">{"".join(items)}</div>')


def facts(values: Mapping[str, str]) -> Html:
    """Names and values, such as the file that was evaluated."""
    items = [f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in values.items()]
    return Html(f'<dl class="facts">{"".join(items)}</dl>')


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """Names of colours: pairs of a CSS class and a name."""
    items = [f'<li><span class="key {text(kind)}"></span>{text(name)}</li>' for kind, name in entries]
    return Html(f'<ul class="legend">{"".join(items)}</ul>')


# --- tables ---


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        value: what it is sorted by; None: by its text, or last where the column has numbers.
        share: 0..1: length of a bar behind the text; None: no bar.
        kind: CSS classes: ``better`` and ``worse`` colour it.
        title: shown when the pointer rests on it.
    """

    text: str
    value: float | None = None
    share: float | None = None
    kind: str = ""
    title: str = ""


def number(value: float | None, digits: int = 3, *, bar: bool = False) -> Cell:
    """A cell with a number; None, NaN and COCO's -1 (undefined) are a dash, sorted last."""
    if value is None or not math.isfinite(value) or value == -1:
        return Cell("–")
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"
    return Cell(shown, float(value), min(max(float(value), 0.0), 1.0) if bar else None)


def difference(value: float | None, digits: int = 3) -> Cell:
    """A cell with a signed difference, coloured where it is not zero."""
    if value is None or not math.isfinite(value):
        return Cell("–")
    shown = f"{value:+.{digits}f}"
    zero = float(shown) == 0
    return Cell(
        f"{0:.{digits}f}" if zero else shown, value, kind="" if zero else "better" if value > 0 else "worse"
    )


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    *,
    name: str,
    names: Sequence[int] = (0,),
    sortable: bool = False,
) -> Html:
    """A table that scrolls sideways where the window is narrow; its first column stays.

    Args:
        headers: names of the columns.
        rows: texts and cells.
        name: what the table is, for screen readers.
        names: columns of text; the others hold numbers, to the right.
        sortable: a click on a header sorts by its column.
    """

    def head(column: int, title: str) -> str:
        shown = f'<button type="button">{text(title)}</button>' if sortable else text(title)
        kind = "name" if column in names else "number"
        return f'<th scope="col" class="{kind}">{shown}</th>'

    def cell(column: int, given: str | Cell) -> str:
        one = given if isinstance(given, Cell) else Cell(given)
        kind = " ".join(filter(None, ("name" if column in names else "number", one.kind)))
        attributes = f' class="{kind}"'
        if one.value is not None:
            attributes += f' data-value="{one.value!r}"'
        if one.title:
            attributes += f' title="{text(one.title)}"'
        if one.share is not None:
            attributes += f' style="--share:{one.share * 100:.1f}%"'
        tag = "th" if column == 0 and 0 in names else "td"
        scope = ' scope="row"' if tag == "th" else ""
        return f"<{tag}{scope}{attributes}>{text(one.text)}</{tag}>"

    lines = ["".join(cell(column, given) for column, given in enumerate(row)) for row in rows]
    kind = ' class="sortable"' if sortable else ""
    heads = "".join(head(column, title) for column, title in enumerate(headers))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return scrolled(f"<table{kind}><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>", name=name)


def scrolled(content: str, *, name: str) -> Html:
    """HTML in a frame that scrolls sideways, by keyboard too."""
    return Html(f'<div class="scroll" role="region" tabindex="0" aria-label="{text(name)}">{content}</div>')


# --- charts ---

SIDE = 1000
"""Width and height of the coordinates that a chart's SVG uses."""


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: shown in the legend.
        x: ascending.
        y: None where there is no value.
        dots: points that no line joins.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of lines or steps.

    Attributes:
        title: for screen readers.
        x_label, y_label: names of the axes.
        series: the lines.
        log: logarithmic y axis; values that are not positive lie at its lower end.
        step: width of the bars of a histogram, whose ``x`` are their centres; 0: lines.
        x_range, y_range: limits of the axes; None: by the values.
        marks: vertical lines: place and name, which the legend shows.
        colors: number of each series' colour; empty: in order.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log: bool = False
    step: float = 0.0
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    marks: Sequence[tuple[float, str]] = field(default=())
    colors: Sequence[int] = field(default=())


@dataclass(frozen=True)
class Axes:
    """Limits of a chart; those of y are logarithms (base 10) where ``log``."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """SVG coordinates of a point of the data."""
        low, high = self.y
        height = (math.log10(y) if y > 0 else low) if self.log else y
        across = (x - self.x[0]) / (self.x[1] - self.x[0]) * SIDE
        return round(across, 1), round((high - max(height, low)) / (high - low) * SIDE, 1)


def chart_axes(given: Chart) -> Axes:
    """The limits of a chart that shows all values."""
    xs = [x for series in given.series for x in series.x] + [x for x, _ in given.marks]
    ys = [y for series in given.series for y in series.y if y is not None and math.isfinite(y)]
    half = given.step / 2
    x_range = given.x_range or _widened(min(xs, default=0.0) - half, max(xs, default=1.0) + half, 0.0)
    if given.log:
        ys = [math.log10(y) for y in ys if y > 0]
        # The lowest step is of height 1, which must be seen.
        low = min(ys, default=0.0) - (0.3 if given.step else 0.0)
        return Axes(x_range, _widened(low, max(ys, default=1.0), 0.03), log=True)
    if given.y_range is not None:
        return Axes(x_range, given.y_range)
    low = min([0.0, *ys]) if given.step else min(ys, default=0.0)
    return Axes(x_range, _widened(low, max(ys, default=1.0), 0.0 if given.step else 0.03))


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """Limits with a margin, and never of no width."""
    if high <= low:
        reach = abs(low) * 0.1 or 0.5
        return low - reach, high + reach
    return low - (high - low) * margin, high + (high - low) * margin


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values within limits, at most ``most``, evenly spread."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Logarithms of round values: powers of ten, or 1, 2 and 5 of each where there is room."""
    for factors in ((1, 2, 5), (1,)):
        found = [
            power + math.log10(factor)
            for power in range(math.floor(low), math.ceil(high) + 1)
            for factor in factors
        ]
        found = [place for place in found if low <= place <= high]
        if 2 <= len(found) <= most:
            return found
    every = math.ceil((high - low) / most)
    powers = range(math.ceil(low), math.floor(high) + 1)
    return [float(power) for power in powers if power % every == 0] or [low, high]


def tick_text(value: float) -> str:
    """A value on an axis."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


MOST_X_TICKS, MOST_Y_TICKS = 6, 7


def chart(given: Chart) -> Html:
    """A chart with its legend below it."""
    axes = chart_axes(given)
    spec = {
        "x": axes.x,
        "y": axes.y,
        "log": int(given.log),
        "step": given.step,
        "fixed": int(given.y_range is not None),
        "marks": [x for x, _ in given.marks],
        "series": [[_short(series.x), _short(series.y), int(series.dots)] for series in given.series],
    }
    kinds = [_series_class(place) for place in given.colors or range(len(given.series))]
    # A line of one point would be a speck.
    kinds = [
        f"{kind} point"
        if series.dots or (sum(y is not None for y in series.y) == 1 and not given.step)
        else kind
        for kind, series in zip(kinds, given.series, strict=True)
    ]
    lines = [
        f'<path class="{kind}" d="{_path(series, axes, given.step)}"/>'
        for kind, series in zip(kinds, given.series, strict=True)
    ]
    lines += [f'<path class="mark" d="M{axes.place(x, axes.y[0])[0]} 0V{SIDE}"/>' for x, _ in given.marks]
    x_ticks = ticks(*axes.x, MOST_X_TICKS)
    y_ticks = (log_ticks if given.log else ticks)(*axes.y, MOST_Y_TICKS)
    y_places = [(place - axes.y[0]) / (axes.y[1] - axes.y[0]) * 100 for place in y_ticks]
    x_places = [(place - axes.x[0]) / (axes.x[1] - axes.x[0]) * 100 for place in x_ticks]
    grid = "".join(f"M0 {SIDE - place * SIDE / 100:.1f}H{SIDE}" for place in y_places)
    grid += "".join(f"M{place * SIDE / 100:.1f} 0V{SIDE}" for place in x_places)
    x_texts = "".join(
        f'<span style="left:{place:.2f}%">{tick_text(value)}</span>'
        for place, value in zip(x_places, x_ticks, strict=True)
    )
    y_texts = "".join(
        f'<span style="bottom:{place:.2f}%">{tick_text(10**value if given.log else value)}</span>'
        for place, value in zip(y_places, y_ticks, strict=True)
    )
    entries = "".join(
        f'<li><span class="key {kind}"></span>{text(series.name)}<output></output></li>'
        for kind, series in zip(kinds, given.series, strict=True)
    )
    entries += "".join(f'<li><span class="key mark"></span>{text(name)}</li>' for _, name in given.marks)
    scale = ", logarithmic" if given.log else ""
    data = json.dumps(spec, separators=(",", ":"))
    return Html(
        f'<figure class="chart{" steps" if given.step else ""}" data-chart="{text(data)}">'
        f'<p class="y-label">{text(given.y_label)}{scale}</p>'
        f'<div class="plot"><div class="y-ticks">{y_texts}</div>'
        f'<div class="area" tabindex="0" role="img" aria-label="{text(given.title)}">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/>{"".join(lines)}</svg>'
        '<div class="cursor" hidden></div><div class="chosen" hidden></div></div>'
        f'<div class="x-ticks">{x_texts}</div></div>'
        f'<p class="x-label">{text(given.x_label)}<output></output></p>'
        '<div class="tools"><button type="button" data-zoom="in">Zoom in</button>'
        '<button type="button" data-zoom="out">Zoom out</button>'
        '<button type="button" data-zoom="all">Show all</button></div>'
        f'<ul class="legend">{entries}</ul></figure>'
    )


CHART_HELP = (
    "Point at a chart to read its values; drag over a part of it, or use the buttons, to zoom in. "
    "By keyboard: the arrow keys move, + and - zoom, 0 shows all."
)


def _series_class(place: int) -> str:
    dashed = " dashed" if place >= NUM_COLORS else ""
    return f"s{place % NUM_COLORS}{dashed}"


def _short(values: Sequence[float | None]) -> list[float | None]:
    """Values with six digits, null where there is none."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.6g}") for value in values]


def _path(series: Series, axes: Axes, step: float) -> str:
    """The SVG path of a line, broken where a value is missing, or of a histogram's outline."""
    parts: list[str] = []
    pen_is_down = False
    for x, y in zip(series.x, series.y, strict=True):
        if y is None or not math.isfinite(y):
            pen_is_down = False
            continue
        if step:
            left, top = axes.place(x - step / 2, y)
            parts.append(f"M{left} {SIDE}V{top}H{axes.place(x + step / 2, y)[0]}V{SIDE}")
            continue
        across, down = axes.place(x, y)
        parts.append(f"{'L' if pen_is_down else 'M'}{across} {down}")
        # A single value would be invisible.
        if not pen_is_down:
            parts.append("h.1")
        pen_is_down = not series.dots
    return "".join(parts)


# --- pictures ---


@dataclass(frozen=True)
class Mark:
    """A box on a picture.

    Attributes:
        box_xyxy: shares of the picture's width and height, 0..1.
        kind: CSS class, which is its colour.
        label: shown on the enlarged picture.
    """

    box_xyxy: tuple[float, float, float, float]
    kind: str
    label: str


def image(content: bytes, alt: str) -> Html:
    """A PNG or JPEG."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(content).decode("ascii")
    return Html(f'<img alt="{text(alt)}" src="data:image/{kind};base64,{data}">')


def marked_picture(content: bytes, name: str, marks: Iterable[Mark], caption: Html) -> Html:
    """A picture with boxes that a click or Enter enlarges; its labels are shown then.

    A box is a coloured line between a dark and a light one, so that it is seen on any picture.
    """
    rectangles = []
    for mark in marks:
        x1, y1, x2, y2 = (round(min(max(side, 0.0), 1.0) * SIDE, 1) for side in mark.box_xyxy)
        place = f'x="{x1}" y="{y1}" width="{max(x2 - x1, 1):.1f}" height="{max(y2 - y1, 1):.1f}"'
        rectangles.append(
            f'<rect class="dark" {place}/><rect class="light" {place}/>'
            f'<rect class="box {text(mark.kind)}" {place} data-label="{text(mark.label)}"/>'
        )
    boxes = "".join(rectangles)
    return Html(
        f'<figure class="marked"><button type="button" class="enlarge" aria-label="Enlarge {text(name)}">'
        f'<span class="frame">{image(content, name)}'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">{boxes}</svg></span>'
        f"</button><figcaption>{caption}</figcaption></figure>"
    )
