"""``ddetr-mm check``: the order of the checks, cheap ones first. The checks are in ``ddetr_mm.preflight``.

Heavy modules are imported inside functions, so that a wrong spec is reported in a second.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_mm.classes import named_columns
from ddetr_mm.errors import DataError, InputError, WeightsError
from ddetr_mm.files import write_text_whole
from ddetr_mm.outputs import protected_inputs, require_free, results_root
from ddetr_mm.spec import ConvertSpec, ExperimentSpec, LoadedSpec, load_spec, task_results_dir
from ddetr_mm.tasks.session import choose_device, encryption_key_of, input_files, print_notes, require_gpus

if TYPE_CHECKING:
    from rich.console import Console

    from ddetr_mm.preflight.inputs import Split
    from ddetr_mm.preflight.report import Finding, Report, Section


def run(arguments: Namespace) -> None:
    """Check; prints a report, writes ``check.json``, raises when the run cannot start.

    Raises:
        SpecError: the spec is wrong.
        DataError: with everything that stops the run.
    """
    from rich.console import Console

    subtask = arguments.subtask
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, subtask)
    print_notes(loaded)
    console = Console(force_jupyter=False, width=None if sys.stdout.isatty() else 200)
    console.print(f"spec {arguments.experiment_spec}: valid for {subtask}", highlight=False, soft_wrap=True)
    folder = task_results_dir(loaded.spec, subtask)
    with protected_inputs(input_files(loaded, subtask)), results_root(folder):
        require_free([folder / "check.json"])
        if isinstance(loaded.spec, ConvertSpec):
            path = _check_conversion(loaded.spec)
        else:
            with encryption_key_of(loaded.spec):
                path = _check_experiment(loaded, arguments, console)
    console.print(f"the run can start; report: {path}", highlight=False, soft_wrap=True)


def early_check(loaded: LoadedSpec, *, resumes: bool) -> None:
    """Check the files that a training run names, its key and its disk, before anything is built.

    Args:
        loaded: the spec.
        resumes: the results folder has a checkpoint to resume from: pretrained weights are not loaded.

    Raises:
        WeightsError: a file is missing, empty, a URL or encrypted with another key.
        DataError: the disk is full.
    """
    from ddetr_mm.preflight.inputs import check_frozen, check_named_file, named_files
    from ddetr_mm.preflight.resources import check_disk_writable, check_free_space

    spec = loaded.spec
    named = named_files(spec, "train")
    if resumes:
        named = {key: path for key, path in named.items() if "pretrained" not in key}
    WeightsError.collect(
        finding.problem
        for key, path in named.items()
        for finding in check_named_file(key, path, spec.encryption_key)
    )
    folder = task_results_dir(spec, "train")
    findings = check_disk_writable(folder) + check_free_space(folder, named)
    DataError.collect(finding.problem for finding in findings)
    for finding in [*shared_memory_findings(spec, "train"), *([] if resumes else check_frozen(spec))]:
        print(f"warning: {finding.kind}: {finding.problem}", file=sys.stderr)


def shared_memory_findings(spec: ExperimentSpec, subtask: str) -> list[Finding]:
    """Whether what data workers hold ready fits into shared memory, at the spec's largest size."""
    from ddetr_mm.preflight.resources import check_shared_memory

    task, augmentation = getattr(spec, subtask), spec.dataset.augmentation
    own_batch = getattr(task, "batch_size", -1)
    batch = own_batch if own_batch > 0 else spec.dataset.batch_size
    train_short = augmentation.fixed_random_crop or max(augmentation.scales)
    short = train_short if subtask == "train" else augmentation.test_random_resize
    largest_hw = (short, max(short, augmentation.random_resize_max_size))
    return check_shared_memory(spec.dataset.workers * max(task.num_gpus, 1), batch, largest_hw)


def quick_check(loaded: LoadedSpec) -> None:
    """The checks that ``train`` makes before it builds anything: a second at most.

    Faults stop the run, suspicions are printed.

    Raises:
        DataError: with every fault.
    """
    from ddetr_mm.engine.distributed import is_first_rank
    from ddetr_mm.preflight.annotations import quick_sections
    from ddetr_mm.preflight.inputs import read_splits, split_sources
    from ddetr_mm.preflight.pictures import check_normalisation
    from ddetr_mm.preflight.report import FAULT, SUSPICION, tolerated

    spec = loaded.spec
    if not spec.ddetr_mm.quick_check:
        return
    # The run reads the shared columns next: nothing is parsed twice.
    storage = "shared" if spec.dataset.dataset_type == "serialized" else "process"
    splits, sections = read_splits(split_sources(spec, "train"), storage, **_reading_options(loaded, "train"))
    sections += quick_sections(splits, spec.dataset.num_classes, spec.dataset.eval_class_ids)
    augmentation = spec.dataset.augmentation
    findings = check_normalisation(augmentation.input_mean, augmentation.input_std)
    findings += [finding for section in sections for finding in section.findings]
    findings = tolerated(findings, tolerated_kinds(spec))
    for finding in findings:
        if finding.weight == SUSPICION and is_first_rank():
            print(f"warning: {finding.kind}: {finding.problem}", file=sys.stderr)
    DataError.collect(finding.problem for finding in findings if finding.weight == FAULT)


def _reading_options(loaded: LoadedSpec, subtask: str) -> dict[str, Any]:
    """How a subtask reads its annotations, for ``read_coco_sources``.

    Raises:
        DataError: classes are numbered by name, and an annotation file cannot be read.
    """
    own = loaded.spec.ddetr_mm
    options = dict(strict=own.strict_annotations, merge_categories=own.merge_categories)
    if subtask not in ("train", "evaluate"):
        return options
    from ddetr_mm.tasks.runner import category_numbering, exported_input, is_exported

    checkpoint = loaded.spec.evaluate.checkpoint if subtask == "evaluate" else None
    exported = None
    if checkpoint and is_exported(checkpoint) and Path(checkpoint).exists() and own.category_ids == "by_name":
        exported = exported_input(checkpoint, loaded.spec.evaluate.trt_engine, where=subtask)
    numbering = category_numbering(loaded, subtask, checkpoint, exported)
    return options | dict(numbered_names=numbering)


def tolerated_kinds(spec: ExperimentSpec) -> tuple[str, ...]:
    """Kinds of findings that a spec tolerates: unreadable images, where they may be replaced."""
    from ddetr_mm.preflight.report import MISSING_IMAGE_KINDS

    return MISSING_IMAGE_KINDS if spec.ddetr_mm.missing_images == "replace" else ()


def _check_experiment(loaded: LoadedSpec, arguments: Namespace, console: Console) -> Path:
    from ddetr_mm.preflight.annotations import thorough_sections
    from ddetr_mm.preflight.inputs import (
        check_frozen,
        check_named_files,
        named_files,
        read_splits,
        split_sources,
    )
    from ddetr_mm.preflight.pictures import check_normalisation
    from ddetr_mm.preflight.report import Report, Section, overview
    from ddetr_mm.preflight.resources import check_disk_writable, check_free_space

    spec, subtask = loaded.spec, arguments.subtask
    folder = task_results_dir(spec, subtask)
    report = Report(subtask, accept=arguments.accept or (), tolerate=tolerated_kinds(spec))
    augmentation = spec.dataset.augmentation
    values = Section("spec", findings=check_normalisation(augmentation.input_mean, augmentation.input_std))
    values.findings += check_disk_writable(folder)
    values.findings += check_named_files(spec, subtask)
    if subtask == "train":
        values.findings += check_free_space(folder, named_files(spec, subtask)) + check_frozen(spec)
    if subtask in ("train", "evaluate", "inference"):
        values.findings += shared_memory_findings(spec, subtask)
    values.findings += _tensorrt_findings(spec, subtask)
    report.add(values)
    splits, failures = read_splits(split_sources(spec, subtask), **_reading_options(loaded, subtask))
    for section in failures:
        report.add(section)
    counts = {split.name: split.counts() for split in splits}
    if splits:
        console.print(overview(counts))
        classes = spec.dataset.num_classes, spec.dataset.eval_class_ids
        for section in thorough_sections(splits, *classes, augmentation, full=arguments.full):
            report.add(section)
    report.show(console)
    if arguments.quick:
        report.not_done.append("the network was not built (--quick)")
    elif subtask == "gen_trt_engine":
        report.not_done.append("no network is built")
    elif report.failing:
        report.not_done.append("pipeline, training step and memory: fix the above first")
    else:
        _check_network(loaded, arguments, report, splits, folder, console)
    path = report.write(folder / "check.json", counts)
    for text in report.not_done:
        console.print(f"- not done: {text}", highlight=False, soft_wrap=True, markup=False)
    DataError.collect(finding.problem for finding in report.failing)
    return path


def _tensorrt_findings(spec: ExperimentSpec, subtask: str) -> list[Finding]:
    """Whether TensorRT reads the graph that is written, or that an engine is built of."""
    from ddetr_mm.deploy.onnx_file import (
        LINEAR_HINT,
        linear_sampling_note,
        q_dq_formats,
        require_sampling_for_tensorrt,
    )
    from ddetr_mm.preflight.report import Finding, note

    if subtask == "export" and spec.export.on_cpu:
        where, opset = "export.opset_version", spec.export.opset_version
        text = linear_sampling_note(opset)
        details = dict(where=where, value=opset, hint=f"for an engine {LINEAR_HINT}")
        return [note("tensorrt-sampling", text, **details)] if text else []
    graph = spec.gen_trt_engine.onnx_file
    if subtask != "gen_trt_engine" or not graph or not Path(graph).is_file():
        return []
    findings = []
    for name, look in {
        "tensorrt-sampling": require_sampling_for_tensorrt,
        "tensorrt-q-dq": q_dq_formats,
    }.items():
        try:
            look(graph, where="gen_trt_engine.onnx_file")
        except InputError as error:
            findings += [Finding(name, problem) for problem in error.problems]
    return findings


def _check_network(
    loaded: LoadedSpec,
    arguments: Namespace,
    report: Report,
    splits: list[Split],
    folder: Path,
    console: Console,
) -> None:
    """Build the network and send real batches through it; input errors become findings."""
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
    from ddetr_mm.preflight.resources import check_cpu_precision
    from ddetr_mm.tasks.runner import config_source, is_exported, register_scope

    # mmengine logs every parameter; what matters is in the report.
    MMLogger.get_instance("ddetr_mm_check", log_level="ERROR")
    spec = loaded.spec
    if subtask != "train":
        yield from _classes_section(loaded, subtask, splits)
        if not splits:
            return
    config = Config.fromstring(config_source(loaded, subtask if subtask == "train" else "evaluate"), ".py")
    register_scope(config)
    model = network.build_network(config, spec)
    loader, metric = config.test_dataloader, config.test_evaluator
    for split in splits:
        yield from network.check_round_trip(model, split, loader, metric, folder, full=full)
    device = network.device_for(spec)
    weights = getattr(spec, subtask).checkpoint if subtask != "train" else None
    if device.type == "cpu" and not (weights and is_exported(weights)):
        trains = subtask == "train"
        value = spec.train.precision if trains else spec.ddetr_mm.predict_precision
        yield from check_cpu_precision("train.precision" if trains else "ddetr_mm.predict_precision", value)
    if subtask == "train":
        yield from network.check_training_step(model, config, spec, splits[0], folder, device)


def _classes_section(loaded: LoadedSpec, subtask: str, splits: list[Split]) -> Iterator[Section]:
    """Load the network that a subtask predicts with; its classes against those of the data, by name."""
    from ddetr_mm.datasets.coco import build_label_map
    from ddetr_mm.preflight.report import Section
    from ddetr_mm.tasks.runner import (
        build_model,
        exported_input,
        graph_columns_note,
        is_exported,
        predicted_names,
        weights_selection,
    )
    from ddetr_mm.weights import read_checkpoint, to_category_ids

    task, num_classes = getattr(loaded.spec, subtask), loaded.spec.dataset.num_classes
    checkpoint, engine = task.checkpoint, getattr(task, "trt_engine", None)
    columns = None
    if splits and subtask == "evaluate":
        labels = build_label_map(splits[0].table, "category_id", num_classes=num_classes)
        columns = named_columns(labels.classes, labels.category_ids)
    section = Section("classes of the network")
    if engine or (checkpoint and is_exported(checkpoint)):
        exported = exported_input(checkpoint, engine, where=subtask)
        if exported is not None and subtask == "inference":
            predicted_names(loaded, subtask, exported.class_names)
        if exported is not None and columns is not None:
            section.lines.append(graph_columns_note(None, exported, columns, engine or checkpoint))
    elif checkpoint:
        build_model(loaded, subtask, checkpoint, where=f"{subtask}.checkpoint", class_names=columns)
        if columns is not None:
            read = read_checkpoint(checkpoint, selection=weights_selection(loaded.spec))
            known = len(read.notes)
            section.lines += to_category_ids(read, num_classes, columns).notes[known:]
    section.lines = [line for line in section.lines if line]
    if section.lines:
        yield section


def _check_conversion(spec: ConvertSpec) -> Path:
    from ddetr_mm.preflight.inputs import check_conversion

    problems = check_conversion(spec)
    verdict = dict(subtask="convert", passed=not problems, problems=[str(problem) for problem in problems])
    path = write_text_whole(Path(spec.results_dir) / "check.json", json.dumps(verdict, indent=2) + "\n")
    DataError.collect(problems)
    return path
