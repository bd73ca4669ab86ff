"""``ddetr-mm check``: prove spec and data before a long run."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ddetr_mm.data.sources import list_images
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import write_text_whole
from ddetr_mm.preflight.annotations import SplitReport, look_over
from ddetr_mm.spec import ConvertSpec, ExperimentSpec, load_spec, task_results_dir
from ddetr_mm.spec.schema import DataSource
from ddetr_mm.tasks.session import say_notes


def run(arguments: Namespace) -> None:
    """Check; prints a report, leaves ``check.json``, raises when the run cannot start.

    Raises:
        SpecError: when the spec is wrong.
        DataError: with every fault of the data.
    """
    subtask = arguments.subtask
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, subtask)
    say_notes(loaded)
    spec = loaded.spec
    console = Console()
    console.print(f"spec {arguments.experiment_spec}: valid for {subtask}", highlight=False)
    if isinstance(spec, ConvertSpec):
        problems, content = check_convert(spec), {}
        folder = Path(spec.results_dir)
    else:
        reports = [
            look_over(split, sources, spec.dataset.num_classes, spec.dataset.eval_class_ids)
            for split, sources in splits(spec, subtask)
        ]
        problems = [problem for report in reports for problem in report.problems]
        problems += check_inputs(spec, subtask)
        content = {report.split: report.to_dict() for report in reports}
        if reports:
            console.print(overview(reports))
        folder = task_results_dir(spec, subtask)
    verdict = dict(subtask=subtask, passed=not problems, problems=[str(problem) for problem in problems])
    write_text_whole(folder / "check.json", json.dumps(verdict | dict(splits=content), indent=2) + "\n")
    DataError.collect(problems)
    console.print(f"the run can start; report: {folder / 'check.json'}", highlight=False)


def splits(spec: ExperimentSpec, subtask: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The annotated data that a subtask will read, by split."""

    def plain(sources: list[DataSource]) -> list[dict[str, str]]:
        return [dict(image_dir=source.image_dir, json_file=source.json_file) for source in sources]

    dataset = spec.dataset
    if subtask == "train":
        yield "train", plain(dataset.train_data_sources)
        yield "val", plain(dataset.val_data_sources)
    elif subtask == "evaluate":
        if dataset.test_data_sources:
            yield "test", plain([dataset.test_data_sources])
        else:
            yield "val", plain(dataset.val_data_sources)


def check_inputs(spec: ExperimentSpec, subtask: str) -> list[Problem]:
    """Files beside annotations that a subtask needs."""
    problems = []
    if subtask == "inference":
        list_images(spec.dataset.infer_data_sources.image_dir)
    if subtask in ("evaluate", "inference", "export"):
        checkpoint = getattr(spec, subtask).checkpoint
        if checkpoint and not Path(checkpoint).exists():
            problems.append(Problem("does not exist", file=checkpoint, where=f"{subtask}.checkpoint"))
    return problems


def check_convert(spec: ConvertSpec) -> list[Problem]:
    """Folders that a conversion needs."""
    source = Path(spec.input_source)
    if not source.is_file():
        return [
            Problem(
                "does not exist", file=source, where="input_source", mend="list one sequence folder a line"
            )
        ]
    problems = []
    root = Path(spec.data_root or "")
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        folder = root / line.strip()
        if line.strip() and not folder.is_dir():
            problems.append(
                Problem(
                    "sequence folder does not exist", file=source, where=f"line {number}", value=str(folder)
                )
            )
    return problems


def overview(reports: list[SplitReport]) -> Table:
    """Counts of all splits side by side."""
    table = Table(title="annotations")
    table.add_column("")
    for report in reports:
        table.add_column(report.split, justify="right")
    rows = ("num_images", "num_images_without_objects", "num_boxes", "num_crowds", "num_invisible")
    for row in rows:
        label = row.removeprefix("num_").replace("_", " ")
        table.add_row(label, *(str(getattr(report, row)) for report in reports))
    for name in dict.fromkeys(name for report in reports for name in report.boxes_by_class):
        table.add_row(f"class {name}", *(str(report.boxes_by_class.get(name, 0)) for report in reports))
    return table
