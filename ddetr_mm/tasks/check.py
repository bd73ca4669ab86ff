"""``ddetr-mm check``: prove spec and data before a long run."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_mm.errors import DataError, InputError, Problem
from ddetr_mm.spec import ConvertSpec, ExperimentSpec, LoadedSpec, load_spec, task_results_dir
from ddetr_mm.spec.schema import DataSource
from ddetr_mm.tasks.session import choose_device, require_gpus, say_notes

if TYPE_CHECKING:
    from rich.console import Console

    from ddetr_mm.preflight.report import Report, Section, Split

# The heavy parts are imported where they are needed: a spec that is wrong is told in a second.


def run(arguments: Namespace) -> None:
    """Check; prints a report, leaves ``check.json``, raises when the run cannot start.

    Raises:
        SpecError: when the spec is wrong.
        DataError: with everything that stands against the run.
    """
    from rich.console import Console

    subtask = arguments.subtask
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, subtask)
    say_notes(loaded)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(f"spec {arguments.experiment_spec}: valid for {subtask}", highlight=False, soft_wrap=True)
    if isinstance(loaded.spec, ConvertSpec):
        _finish_convert(loaded.spec, console)
        return
    report, splits, folder = _report(loaded, arguments, console)
    path = report.write(folder / "check.json", splits)
    for text in report.not_done:
        console.print(f"- not done: {text}", highlight=False, soft_wrap=True, markup=False)
    DataError.collect(finding.problem for finding in report.failing)
    console.print(f"the run can start; report: {path}", highlight=False, soft_wrap=True)


def _report(loaded: LoadedSpec, arguments: Namespace, console: Console) -> tuple[Report, list[Split], Path]:
    """Look at everything, cheap things first; what depends on something broken is left out."""
    from ddetr_mm.preflight.annotations import read_splits, thorough_sections
    from ddetr_mm.preflight.pictures import check_normalisation
    from ddetr_mm.preflight.report import Finding, Report, Section, overview
    from ddetr_mm.preflight.resources import check_disk_writable

    spec, subtask = loaded.spec, arguments.subtask
    folder = task_results_dir(spec, subtask)
    report = Report(subtask, accept=arguments.accept or (), tolerate=allowed_kinds(spec))
    augmentation = spec.dataset.augmentation
    values = Section("spec", findings=check_normalisation(augmentation.input_mean, augmentation.input_std))
    values.findings += check_disk_writable(folder)
    values.findings += [Finding("file-missing", problem) for problem in check_inputs(spec, subtask)]
    report.add(values)
    splits, failures = read_splits(named_sources(spec, subtask))
    for section in failures:
        report.add(section)
    if splits:
        console.print(overview(splits))
        classes = spec.dataset.num_classes, spec.dataset.eval_class_ids
        for section in thorough_sections(splits, *classes, augmentation, full=arguments.full):
            report.add(section)
    report.show(console)
    if arguments.quick or subtask == "gen_trt_engine":
        report.not_done.append(
            "the network was not built (--quick)" if arguments.quick else "no network is built"
        )
    elif report.failing:
        report.not_done.append("pipeline, training step and memory: mend the above first")
    else:
        _look_at_network(loaded, arguments, report, splits, folder, console)
    return report, splits, folder


def _look_at_network(
    loaded: LoadedSpec,
    arguments: Namespace,
    report: Report,
    splits: list[Split],
    folder: Path,
    console: Console,
) -> None:
    """Build the network and send real batches through; input errors become findings."""
    from ddetr_mm.preflight.report import Finding, Section

    spec, subtask = loaded.spec, arguments.subtask
    task = getattr(spec, subtask)
    choose_device(spec, task.gpu_ids if hasattr(task, "gpu_ids") else [task.gpu_id])
    require_gpus(spec, getattr(task, "num_gpus", 1), where=f"{subtask}.num_gpus")
    shown = len(report.sections)
    try:
        for section in _network_sections(loaded, subtask, splits, folder, arguments.full):
            report.add(section)
            report.show(console, shown)
            shown += 1
    except InputError as error:
        report.add(Section("network", findings=[Finding("network", problem) for problem in error.problems]))
        report.show(console, shown)


def _network_sections(
    loaded: LoadedSpec, subtask: str, splits: list[Split], folder: Path, full: bool
) -> Iterator[Section]:
    from mmengine.config import Config
    from mmengine.logging import MMLogger

    from ddetr_mm.preflight import network
    from ddetr_mm.tasks.runner import build_model, config_source, is_exported, register_scope

    # mmengine tells of every parameter; what matters is in the report.
    MMLogger.get_instance("ddetr_mm_check", log_level="ERROR")
    spec = loaded.spec
    if subtask != "train":
        checkpoint = getattr(spec, subtask).checkpoint
        if checkpoint and not is_exported(checkpoint):
            build_model(loaded, subtask, checkpoint, where=f"{subtask}.checkpoint")
        if not splits:
            return
    config = Config.fromstring(config_source(loaded, subtask if subtask == "train" else "evaluate"), ".py")
    register_scope(config)
    names = [name for _, name in sorted(splits[0].table.category_names.items())]
    model = network.build_network(config, spec, names)
    loader, metric = config.test_dataloader, config.test_evaluator
    for split in splits:
        yield from network.check_round_trip(model, split, loader, metric, folder, full=full)
    if subtask == "train":
        yield from network.check_training_step(
            model, config, spec, splits[0], folder, network.device_for(spec)
        )


def named_sources(spec: ExperimentSpec, subtask: str) -> dict[str, list[dict[str, str]]]:
    """The annotated data that a subtask will read, by split."""

    def plain(sources: list[DataSource]) -> list[dict[str, str]]:
        return [dict(image_dir=source.image_dir, json_file=source.json_file) for source in sources]

    dataset = spec.dataset
    if subtask == "train":
        return dict(train=plain(dataset.train_data_sources), val=plain(dataset.val_data_sources))
    if subtask == "evaluate":
        if dataset.test_data_sources:
            return dict(test=plain([dataset.test_data_sources]))
        return dict(val=plain(dataset.val_data_sources))
    return {}


def check_inputs(spec: ExperimentSpec, subtask: str) -> list[Problem]:
    """Files beside annotations that a subtask needs."""
    problems = []
    if subtask == "inference":
        from ddetr_mm.datasets.sources import list_images

        try:
            list_images(spec.dataset.infer_data_sources.image_dir)
        except DataError as error:
            problems += error.problems
    named = {
        "train": ("pretrained_model_path", "resume_training_checkpoint_path"),
        "gen_trt_engine": ("onnx_file",),
    }
    keys = [f"{subtask}.{name}" for name in named.get(subtask, ("checkpoint",))]
    paths = [getattr(getattr(spec, subtask), key.partition(".")[2]) for key in keys]
    if subtask == "train":
        keys.append("model.pretrained_backbone_path")
        paths.append(spec.model.pretrained_backbone_path)
    for key, path in zip(keys, paths, strict=True):
        if path and not Path(path).exists():
            problems.append(Problem("does not exist", file=path, where=key, hint="correct the path"))
    return problems


def allowed_kinds(spec: ExperimentSpec) -> tuple[str, ...]:
    """Kinds of findings that a spec allows: images that cannot be read, where they may be replaced."""
    from ddetr_mm.preflight.report import MISSING_IMAGE_KINDS

    return MISSING_IMAGE_KINDS if spec.ddetr_mm.missing_images == "replace" else ()


def quick_check(loaded: LoadedSpec) -> None:
    """What ``train`` proves by itself before it builds anything: a second at most.

    Suspicions are told and do not stop the run; facts do.

    Raises:
        DataError: with every fault.
    """
    from ddetr_mm.engine.status import on_first_rank
    from ddetr_mm.preflight.annotations import quick_sections, read_splits
    from ddetr_mm.preflight.pictures import check_normalisation
    from ddetr_mm.preflight.report import FAULT, SUSPICION, tolerated

    spec = loaded.spec
    if not spec.ddetr_mm.quick_check:
        return
    # Shared columns are what the run reads next: nothing is parsed twice.
    storage = "shared" if spec.dataset.dataset_type == "serialized" else "process"
    splits, sections = read_splits(named_sources(spec, "train"), storage)
    sections += quick_sections(splits, spec.dataset.num_classes, spec.dataset.eval_class_ids)
    augmentation = spec.dataset.augmentation
    findings = check_normalisation(augmentation.input_mean, augmentation.input_std)
    found = [finding for section in sections for finding in section.findings]
    findings += tolerated(found, allowed_kinds(spec))
    for finding in findings:
        if finding.weight == SUSPICION and on_first_rank():
            print(f"warning: {finding.kind}: {finding.problem}", file=sys.stderr)
    DataError.collect(finding.problem for finding in findings if finding.weight == FAULT)


def _finish_convert(spec: ConvertSpec, console: Console) -> None:
    from ddetr_mm.files import write_text_whole

    problems = check_convert(spec)
    verdict: Mapping[str, object] = dict(
        subtask="convert", passed=not problems, problems=[str(problem) for problem in problems]
    )
    path = write_text_whole(Path(spec.results_dir) / "check.json", json.dumps(verdict, indent=2) + "\n")
    DataError.collect(problems)
    console.print(f"the run can start; report: {path}", highlight=False, soft_wrap=True)


def check_convert(spec: ConvertSpec) -> list[Problem]:
    """Folders that a conversion needs."""
    source = Path(spec.input_source)
    if not source.is_file():
        return [
            Problem(
                "does not exist", file=source, where="input_source", hint="list one sequence folder a line"
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
