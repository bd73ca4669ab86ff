"""``ddetr-mm compare``: runs side by side: differing spec fields, curves, AP by class.

Prints tables and writes one HTML file. Reads what the runs left (``experiment.yaml``, ``status.json``,
``results.json``, ``results_detail.json``), so it needs neither torch
nor the data, and works while a run trains.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ddetr_mm.engine.status import EVAL_METRICS, LOOP_STARTED, RESUMING, TRAIN_METRICS, numbers_of, read_lines
from ddetr_mm.errors import DataError, Problem, SpecError, printable
from ddetr_mm.files import SECRETS, parse_json, write_text_whole
from ddetr_mm.html_page import (
    CHART_HELP,
    Cell,
    Chart,
    Html,
    Series,
    chart,
    difference,
    heading,
    number,
    page,
    paragraph,
    table,
    text,
)
from ddetr_mm.outputs import protected_inputs, require_free
from ddetr_mm.spec.yaml_source import Branch, Leaf, Tree, parse_yaml, read_text

PAGE_NAME = "compare.html"
STATUS_NAME, SPEC_NAME = "status.json", "experiment.yaml"
RESULTS_NAME, DETAILS_NAME = "results.json", "results_detail.json"
SUBTASKS = ("train", "evaluate")
MISSING = "–"

CURVES = {
    "val_mAP": "AP of validation",
    "val_mAP50": "AP50 of validation",
    "train_loss": "Loss of training",
    "val_loss": "Loss of validation",
}
"""Names in ``status.json`` → titles of charts."""

_NEVER_THE_SAME = ("results_dir", "train.results_dir", "evaluate.results_dir", "wandb.run_id")


@dataclass
class Run:
    """What a run left.

    Attributes:
        name: the part of its path that no other run shares.
        folders: its results folders, of train or evaluate or both.
        fields: the spec's fields by dotted path; values as text.
        curves: name in ``status.json`` → epoch (from 1) → value.
        metrics: of ``results.json``.
        classes: class → AP; empty where the run has none.
        classes_from: where these are from.
        state: the last line's status.
        files: files that were read.
    """

    name: str
    folders: Sequence[Path]
    fields: dict[str, str] = field(default_factory=dict)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    classes: dict[str, float] = field(default_factory=dict)
    classes_from: str = ""
    state: str = MISSING
    files: list[Path] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return max((max(points) for points in self.curves.values() if points), default=0)

    def best(self, name: str) -> tuple[float, int] | None:
        """The highest value of a curve and its epoch."""
        points = self.curves.get(name)
        if not points:
            return None
        epoch = max(points, key=lambda one: (points[one], -one))
        return points[epoch], epoch


def run(arguments: Namespace) -> None:
    """Compare; prints tables and writes the page.

    Raises:
        DataError: a folder is no results folder, or is given twice, or there is only one.
        SpecError: an ``experiment.yaml`` cannot be read.
    """
    runs = read_runs(arguments.runs)
    with protected_inputs([path for one in runs for path in one.files]):
        require_free([arguments.output])
        write_text_whole(arguments.output, page_text(runs))
    print_tables(runs)
    print(f"{arguments.output}: the same with curves")


# --- what the runs left ---


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in some folders, in the order given.

    Raises:
        DataError: see :func:`run`.
        SpecError: likewise.
    """
    if len(paths) < 2:
        raise DataError(Problem("at least two runs are compared", where="RUN", value=list(paths)))
    problems, found = [], []
    for path in paths:
        folders = results_folders(Path(path))
        if not folders:
            problems.append(
                Problem(
                    "is no results folder of train or evaluate",
                    file=path,
                    hint=f"give a folder with {STATUS_NAME}, or one that has train/ or evaluate/",
                )
            )
        elif folders in [known for known, _ in found]:
            problems.append(Problem("is given twice", file=path))
        else:
            found.append((folders, path))
    DataError.collect(problems)
    names = run_names([Path(path) for _, path in found])
    return [_read_run(name, folders) for name, (folders, _) in zip(names, found, strict=True)]


def results_folders(path: Path) -> list[Path]:
    """The results folders of train and evaluate at or below a path, resolved."""
    if any((path / name).is_file() for name in (STATUS_NAME, DETAILS_NAME)):
        return [path.resolve()]
    below = [path / subtask for subtask in SUBTASKS]
    return [folder.resolve() for folder in below if (folder / STATUS_NAME).is_file()]


def run_names(paths: Sequence[Path]) -> list[str]:
    """Names for runs: as few parts of their paths as keep them apart, without ``train`` and ``evaluate``."""
    whole = [path.resolve() for path in paths]
    shorter = [path.parent if path.name in SUBTASKS else path for path in whole]
    if len(set(shorter)) == len(shorter):
        whole = shorter
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]


def _read_run(name: str, folders: Sequence[Path]) -> Run:
    found = Run(name, folders)
    for folder in folders:
        spec, status = folder / SPEC_NAME, folder / STATUS_NAME
        if spec.is_file() and not found.fields:
            found.fields = read_fields(spec)
            found.files.append(spec)
        if status.is_file():
            found.files.append(status)
            _read_status(found, status)
        for file_name, reader in ((RESULTS_NAME, _read_metrics), (DETAILS_NAME, _read_classes)):
            if (folder / file_name).is_file():
                found.files.append(folder / file_name)
                reader(found, folder / file_name)
    return found


def read_fields(path: Path) -> dict[str, str]:
    """The fields of a spec file by dotted path; secrets are hidden.

    Raises:
        SpecError: it cannot be read, or is not YAML.
    """
    tree, problems = parse_yaml(read_text(path), path)
    SpecError.collect(problems)
    return {} if tree is None else dict(_leaves(tree, ""))


def _leaves(tree: Tree, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Branch) and tree.items:
        for name, item in tree.items.items():
            yield from _leaves(item, f"{path}.{name}" if path else name)
        return
    value = _plain(tree)
    if path.rsplit(".", 1)[-1] in SECRETS and value not in (None, ""):
        yield path, "(hidden)"
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plain(tree: Tree) -> Any:
    if isinstance(tree, Leaf):
        return tree.value
    if isinstance(tree, Branch):
        return {name: _plain(item) for name, item in tree.items.items()}
    return [_plain(item) for item in tree.items]


def _json_object(content: str | bytes, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(Problem(f"is not JSON: {error}", file=path)) from None
    if not isinstance(value, dict):
        raise DataError(Problem("is not a JSON object", file=path))
    return value


def _read_status(found: Run, path: Path) -> None:
    """Curves, class figures and state from a status file; a line that a kill has cut off is left out."""
    epoch, resumed, state = 0, False, MISSING
    for line in read_lines(path):
        message = str(line.get("message", ""))
        state = str(line.get("status", MISSING))
        if message.startswith(RESUMING):
            resumed = True
        elif message == LOOP_STARTED:
            if not resumed:  # another run in this folder
                found.curves = {}
            resumed = False
        elif isinstance(line.get("max_epoch"), int) and isinstance(line.get("epoch"), int):
            epoch = line["epoch"] + 1
        elif message in (TRAIN_METRICS, EVAL_METRICS):
            for name, value in _numbers(line.get("kpi")).items():
                if name in CURVES:
                    found.curves.setdefault(name, {})[epoch] = value
            classes = line.get("categorical")
            by_class = _numbers(classes.get("AP")) if isinstance(classes, dict) else {}
            if by_class:
                found.classes, found.classes_from = by_class, f"validation of epoch {epoch}"
    if found.state == MISSING:  # that of train, where there is evaluate too
        found.state = state


def _read_metrics(found: Run, path: Path) -> None:
    found.metrics = {
        name: value for name, value in _numbers(_json_object(path.read_bytes(), path)).items() if value >= 0
    }


def _read_classes(found: Run, path: Path) -> None:
    entries = _json_object(path.read_bytes(), path).get("per_class")
    precisions = {
        str(entry["name"]): entry.get("AP")
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    }
    found.classes = {name: value for name, value in _numbers(precisions).items() if value >= 0}
    found.classes_from = "evaluate"


def _numbers(values: object) -> dict[str, float]:
    """The finite numbers of a dictionary."""
    return {name: value for name, value in numbers_of(values).items() if math.isfinite(value)}


# --- what differs ---


def differing_fields(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted path → value of each run, for the fields that are not the same in all that have a spec."""
    names = dict.fromkeys(name for one in runs for name in one.fields)
    rows = {name: [one.fields.get(name, MISSING) for one in runs] for name in names}
    with_spec = [place for place, one in enumerate(runs) if one.fields]
    return {
        name: row
        for name, row in rows.items()
        if name not in _NEVER_THE_SAME and len({row[place] for place in with_spec}) > 1
    }


def class_rows(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """Class → AP of each run, None where it has none, in the order of the first run that names it."""
    names = dict.fromkeys(name for one in runs for name in one.classes)
    return {name: [one.classes.get(name) for one in runs] for name in names}


def summary_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headers and a row for each run, all as text."""
    headers = [
        *("run", "state", "epochs", "best AP", "best AP50", "last training loss"),
        *("AP of evaluate", "AP50 of evaluate"),
    ]
    rows = []
    for one in runs:
        losses = one.curves.get("train_loss", {})
        rows.append(
            [
                one.name,
                one.state.lower() if one.state != MISSING else MISSING,
                str(one.epochs or MISSING),
                *(_best_text(one.best(name)) for name in ("val_mAP", "val_mAP50")),
                f"{losses[max(losses)]:.4g}" if losses else MISSING,
                *(_figure(one.metrics.get(name)) for name in ("AP", "AP50")),
            ]
        )
    return headers, rows


def _best_text(best: tuple[float, int] | None) -> str:
    return MISSING if best is None else f"{best[0]:.3f} (epoch {best[1]})"


def _figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _change(value: float | None, first: float | None) -> float | None:
    return None if value is None or first is None else value - first


# --- the terminal ---


def print_tables(runs: Sequence[Run]) -> None:
    """Print the runs, the differing fields and AP by class."""
    console = Console(force_jupyter=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(_rich_table("Runs", *summary_rows(runs)))
    fields = differing_fields(runs)
    if fields:
        headers = ["field", *(one.name for one in runs)]
        console.print(
            _rich_table("Differing fields", headers, [[name, *row] for name, row in fields.items()])
        )
    else:
        print("The specs do not differ.")
    classes = class_rows(runs)
    if classes:
        headers = [
            "class",
            *(one.name for one in runs),
            *(f"{one.name} - {runs[0].name}" for one in runs[1:]),
        ]
        rows = [
            [
                name,
                *map(_figure, row),
                *(MISSING if gap is None else f"{gap:+.3f}" for gap in _gaps(row)),
            ]
            for name, row in classes.items()
        ]
        console.print(_rich_table("AP by class", headers, rows))


def _gaps(row: Sequence[float | None]) -> list[float | None]:
    return [_change(value, row[0]) for value in row[1:]]


def _rich_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(title=title, title_justify="left", box=box.ASCII)
    for place, header in enumerate(headers):
        made.add_column(_plain_text(header), justify="right" if place else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(_plain_text, row))
    return made


def _plain_text(shown: str) -> str:
    """Text without control characters and without rich's markup."""
    return printable(shown).replace("[", r"\[")


# --- the page ---


def page_text(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    *others, last = (one.name for one in runs)
    title = f"{', '.join(others)} and {last}" if 0 < len(others) < 3 else f"{len(runs)} runs"
    headers, rows = summary_rows(runs)
    parts = [
        heading(f"Comparison of {title}", 1),
        paragraph("; ".join(str(folder) for one in runs for folder in one.folders), "quiet"),
        table(headers, rows, name="Runs", sortable=True),
        *_curve_section(runs),
        heading("Differing fields"),
        *_field_section(runs),
        heading("AP by class"),
        *_class_section(runs),
    ]
    return page(f"Comparison of {title}", parts)


def _curve_section(runs: Sequence[Run]) -> list[Html]:
    figures = []
    for name, title in CURVES.items():
        series = [
            Series(one.name, list(points), list(points.values()))
            for one in runs
            if (points := dict(sorted(one.curves.get(name, {}).items())))
        ]
        if series:
            # A run keeps its colour in every chart.
            drawn = chart(Chart(title, "epochs", title.split()[0], series, colors=_colors(runs, series)))
            figures.append(f"<div><h3>{text(title)}</h3>{drawn}</div>")
    if not figures:
        return []
    charts = Html(f'<div class="charts">{"".join(figures)}</div>')
    return [heading("Curves"), charts, paragraph(CHART_HELP, "quiet")]


def _colors(runs: Sequence[Run], series: Sequence[Series]) -> list[int]:
    places = {one.name: place for place, one in enumerate(runs)}
    return [places[one.name] for one in series]


def _field_section(runs: Sequence[Run]) -> list[Html]:
    without = [one.name for one in runs if not one.fields]
    parts = [paragraph(f"No {SPEC_NAME}: {', '.join(without)}", "note")] if without else []
    fields = differing_fields(runs)
    if not fields:
        return [*parts, paragraph("The specs do not differ.")]
    headers = ("field", *(one.name for one in runs))
    rows: list[Sequence[str | Cell]] = [[name, *row] for name, row in fields.items()]
    columns = tuple(range(len(headers)))
    return [*parts, table(headers, rows, name="Differing fields", names=columns)]


def _class_section(runs: Sequence[Run]) -> list[Html]:
    classes = class_rows(runs)
    if not classes:
        return [paragraph("No run has AP by class; evaluate, and validation in training, write it.")]
    origins = "; ".join(f"{one.name}: {one.classes_from or 'none'}" for one in runs)
    headers = ("class", *(one.name for one in runs), *(f"{one.name} − {runs[0].name}" for one in runs[1:]))
    rows: list[Sequence[str | Cell]] = [
        [name, *(number(value, bar=True) for value in row), *map(difference, _gaps(row))]
        for name, row in classes.items()
    ]
    return [
        paragraph(f"Differences are to {runs[0].name}. {origins}.", "quiet"),
        table(headers, rows, name="AP by class", sortable=True),
    ]
