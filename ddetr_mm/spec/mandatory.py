"""What each subtask cannot do without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ddetr_mm.spec.fieldpath import get_field
from ddetr_mm.spec.results import results_dir_setting
from ddetr_mm.spec.rules import Fault
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.walk import root_of


@dataclass(frozen=True)
class Requirement:
    """A field that a subtask needs.

    Attributes:
        subtask: the subtask.
        path: dotted path of the field.
        unless: another field that makes it superfluous when set, or None.
        mend: how to give it.
        only_with: a field and its value without which the requirement does not apply, or None.
    """

    subtask: str
    path: str
    unless: str | None = None
    hint: str | None = None
    only_with: tuple[str, Any] | None = None


_CALIBRATION = "gen_trt_engine.tensorrt.calibration."
_INT8 = ("gen_trt_engine.tensorrt.data_type", "INT8")
_SOURCES = "list image_dir and json_file of at least one data set"
_ONE_SOURCE = "give image_dir and json_file of the data set to evaluate on"
_IMAGES = "give image_dir, the folder of the images"

REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement("convert", "input_source"),
    Requirement("convert", "results_dir"),
    Requirement("convert", "image_dir_name"),
    Requirement("convert", "label_dir_name"),
    Requirement("train", "dataset.train_data_sources", hint=_SOURCES),
    Requirement("train", "dataset.val_data_sources", hint=_SOURCES),
    Requirement("evaluate", "evaluate.checkpoint", unless="evaluate.trt_engine"),
    Requirement("evaluate", "dataset.test_data_sources", hint=_ONE_SOURCE),
    Requirement("inference", "inference.checkpoint", unless="inference.trt_engine"),
    Requirement("inference", "dataset.infer_data_sources", hint=_IMAGES),
    Requirement("export", "export.checkpoint"),
    Requirement("export", "export.onnx_file"),
    Requirement("gen_trt_engine", "gen_trt_engine.onnx_file"),
    Requirement("gen_trt_engine", _CALIBRATION + "cal_image_dir", only_with=_INT8),
    Requirement("gen_trt_engine", _CALIBRATION + "cal_cache_file", only_with=_INT8),
)

_SOURCE_LISTS = ("train_data_sources", "val_data_sources")


def requirements_of(path: str, root: type) -> list[Requirement]:
    """The requirements that name a field of one kind of spec; for documentation."""
    return [one for one in REQUIREMENTS if one.path == path and root_of(one.subtask) is root]


def missing_fields(spec: ExperimentSpec | ConvertSpec, subtask: str) -> Iterator[Fault]:
    """A fault for everything ``subtask`` needs and the spec does not give."""
    for one in REQUIREMENTS:
        if one.subtask != subtask or _is_set(get_field(spec, one.path)):
            continue
        if one.unless is not None and _is_set(get_field(spec, one.unless)):
            continue
        if one.only_with is not None and get_field(spec, one.only_with[0]) != one.only_with[1]:
            continue
        hint = one.hint or f"set it in the spec, or on the command line: {one.path}=..."
        if one.unless is not None:
            hint += f" (or {one.unless})"
        yield Fault(one.path, f"is needed for {subtask} and not given", hint=hint)
    if isinstance(spec, ExperimentSpec) and not results_dir_setting(spec, subtask):
        yield Fault(
            "results_dir",
            f"is empty, and so is {subtask}.results_dir",
            hint="name a folder for the results: results_dir=/path/to/results",
        )


def incomplete_sources(spec: ExperimentSpec) -> Iterator[Fault]:
    """A fault for every data source that lacks one of its parts."""
    sources: list[tuple[str, Any, tuple[str, ...]]] = []
    for name in _SOURCE_LISTS:
        for index, source in enumerate(getattr(spec.dataset, name) or []):
            sources.append((f"dataset.{name}[{index}]", source, ("image_dir", "json_file")))
    if spec.dataset.test_data_sources is not None:
        sources.append(
            ("dataset.test_data_sources", spec.dataset.test_data_sources, ("image_dir", "json_file"))
        )
    if spec.dataset.infer_data_sources is not None:
        sources.append(("dataset.infer_data_sources", spec.dataset.infer_data_sources, ("image_dir",)))
    for path, source, parts in sources:
        for part in parts:
            if not _is_set(getattr(source, part)):
                yield Fault(f"{path}.{part}", "is not given", hint=f"add {part}: to the source")


def _is_set(value: Any) -> bool:
    """Whether a field holds something: not null, not empty."""
    return value is not None and value != "" and value != []
