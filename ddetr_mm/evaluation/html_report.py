"""An evaluation as one HTML file that needs nothing else: pictures inside, no script, names escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddetr_mm.evaluation.coco_eval import METRIC_NAMES, UNDEFINED, CocoResult
from ddetr_mm.evaluation.matching import Matching
from ddetr_mm.evaluation.worst_images import (
    MISSED,
    NOTHING_THERE,
    RIGHT,
    WRONG_CLASS,
    WorstImage,
)
from ddetr_mm.files import write_text_whole

# A page that could load or run anything would not be safe to open: class and file names come from outside.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px;
       margin: 24px auto; padding: 0 16px }
h1 { font-size: 24px; margin-bottom: 4px } h2 { font-size: 19px; margin: 32px 0 8px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e4e4e4 }
th { font-weight: 600; background: #f6f6f6 }
.name { text-align: left; overflow-wrap: anywhere; max-width: 420px }
img { max-width: 100%; height: auto }
.note { background: #fff6dd; border-left: 4px solid #e6a700; padding: 6px 12px; margin: 6px 0 }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 18px }
figure { margin: 0 } figcaption { font-size: 13px; overflow-wrap: anywhere }
.key { display: inline-block; width: 12px; height: 12px; margin: 0 5px 0 14px; vertical-align: -1px }
.quiet { color: #666 }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        title: its heading.
        content: PNG or JPEG bytes.
        text: a sentence on how to read it.
    """

    title: str
    content: bytes
    text: str = ""


@dataclass(frozen=True)
class Page:
    """What an evaluation's page shows.

    Attributes:
        result: the figures.
        sources: those of single sources, by name.
        matching: the matching that pictures of mistakes were drawn from.
        plots: pictures of the whole evaluation.
        worst: images with mistakes, the worst first, each with its picture where it could be drawn.
    """

    result: CocoResult
    sources: Mapping[str, CocoResult]
    matching: Matching
    plots: Sequence[Picture]
    worst: Sequence[tuple[WorstImage, bytes | None]] = field(default=())


def write_page(path: str | Path, page: Page) -> Path:
    """Write the page, whole or not at all."""
    return write_text_whole(path, page_text(page))


def page_text(page: Page) -> str:
    """The page as HTML."""
    result, matching = page.result, page.matching
    parts = [
        f"<h1>Evaluation: AP {_figure(result['AP'])}</h1>",
        f'<p class="quiet">{result.num_images:,} images, {result.num_boxes:,} objects, '
        f"{result.num_detections:,} detections; scored by {_text(result.backend)} with COCO's rules.</p>",
        *(f'<p class="note">{_text(sentence)}</p>' for sentence in result.notes),
        _table(METRIC_NAMES, [[_figure(result[name]) for name in METRIC_NAMES]]),
        _threshold_sentence(matching),
    ]
    for picture in page.plots:
        parts.append(f"<h2>{_text(picture.title)}</h2>")
        parts += [f"<p>{_text(picture.text)}</p>"] if picture.text else []
        parts.append(_image(picture.content, picture.title))
    parts += ["<h2>Classes</h2>", _class_table(result)]
    if page.sources:
        parts += ["<h2>Sources</h2>", _source_table(page.sources)]
    parts += _worst_section(page)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Evaluation: AP {_figure(result['AP'])}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _threshold_sentence(matching: Matching) -> str:
    if not matching.f1:
        return "<p>No detection hits an object of its class at an overlap of 0.5.</p>"
    return (
        f"<p>In use, a score threshold of <b>{matching.threshold:.2f}</b> gives the best balance at an "
        f"overlap of 0.5: precision {matching.precision:.3f}, recall {matching.recall:.3f}, "
        f"F1 {matching.f1:.3f} over all classes.</p>"
    )


def _class_table(result: CocoResult) -> str:
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
    rows = [
        [
            str(entry.category_id),
            entry.name,
            f"{entry.num_boxes:,}",
            f"{entry.num_detections:,}",
            *(_figure(getattr(entry, name)) for name in columns),
        ]
        for entry in result.per_class
    ]
    return _table(("id", "class", "objects", "detections", *columns), rows, name_column=1)


def _source_table(sources: Mapping[str, CocoResult]) -> str:
    rows = [
        [name, f"{one.num_images:,}", *(_figure(one[metric]) for metric in METRIC_NAMES)]
        for name, one in sources.items()
    ]
    return _table(("source", "images", *METRIC_NAMES), rows, name_column=0)


def _worst_section(page: Page) -> list[str]:
    if not page.worst:
        return ["<h2>Worst images</h2>", "<p>No image has a mistake at this threshold.</p>"]
    keys = (
        (RIGHT, "found"),
        (MISSED, "missed"),
        (WRONG_CLASS, "wrong class"),
        (NOTHING_THERE, "nothing there"),
    )
    legend = "".join(f'<span class="key" style="background:{color}"></span>{name}' for color, name in keys)
    figures = []
    for worst, content in page.worst:
        counts = (
            f"{worst.num_missed} missed, {worst.num_wrong_class} wrong class, "
            f"{worst.num_nothing_there} nothing there, {worst.num_right} found"
        )
        name = worst.path or f"image {worst.image_id}"
        shown = _image(content, name) if content else '<p class="quiet">the picture cannot be read</p>'
        figures.append(f"<figure>{shown}<figcaption>{_text(name)}<br>{counts}</figcaption></figure>")
    return [
        f"<h2>The {len(page.worst)} images with the most mistakes</h2>",
        f"<p>{legend}</p>",
        '<div class="worst">',
        *figures,
        "</div>",
    ]


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], name_column: int | None = None) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="name"' if column == name_column else ""
        return f"<{tag}{kind}>{_text(text)}</{tag}>"

    head = "".join(cell("th", column, text) for column, text in enumerate(headers))
    lines = ["".join(cell("td", column, text) for column, text in enumerate(row)) for row in rows]
    return f"<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(content: bytes, alt: str) -> str:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(content).decode("ascii")
    return f'<img alt="{_text(alt)}" src="data:image/{kind};base64,{data}">'


def _figure(value: float) -> str:
    return "–" if value == UNDEFINED else f"{value:.3f}"


def _text(text: str) -> str:
    """Text from outside, made harmless; bytes that are no UTF-8 (file names) become question marks."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))
