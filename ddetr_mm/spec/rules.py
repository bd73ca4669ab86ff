"""Rules between the fields of a spec, and what each subtask needs.

A rule is a function in a table. It names the fields it reads and is skipped when one of them is wrong, so
that one mistake gives one message, and when the subtask does not read one of them
(:mod:`~ddetr_mm.spec.readers`). It yields a :class:`Fault` for every violation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddetr_mm.files import fill_name
from ddetr_mm.spec.fields import get_field
from ddetr_mm.spec.readers import Reader
from ddetr_mm.spec.schema import ConvertSpec, EvaluateConfig, ExperimentSpec, InferenceConfig, Spec, root_of

Check = Callable[[Any], Iterator["Fault"]]

SIDE_MULTIPLE = 32
GROUP_NORM_GROUPS = 32
NOT_SHOWN: Any = object()


@dataclass(frozen=True)
class Fault:
    """A violated rule: the field, what is wrong, its value, what is allowed, and a hint."""

    path: str
    what: str
    value: Any = NOT_SHOWN
    allowed: str | None = None
    hint: str | None = None

    def words(self) -> dict[str, Any]:
        """Keyword arguments for a problem: value, allowed, hint."""
        words: dict[str, Any] = {"allowed": self.allowed, "hint": self.hint}
        if self.value is not NOT_SHOWN:
            words["value"] = self.value
        return words


@dataclass(frozen=True)
class Rule:
    """A check and what it is about.

    Attributes:
        name: the function's name.
        doc: the rule in one sentence.
        root: the kind of spec it is about.
        reads: dotted paths of the fields it looks at.
        check: yields the faults.
    """

    name: str
    doc: str
    root: type
    reads: tuple[str, ...]
    check: Check


RULES: list[Rule] = []


def rule(*reads: str, root: type = ExperimentSpec) -> Callable[[Check], Check]:
    """Put a function into :data:`RULES`."""

    def register(check: Check) -> Check:
        doc = (check.__doc__ or "").strip()
        RULES.append(Rule(check.__name__, doc, root, reads, check))
        return check

    return register


def violations(spec: Spec, reader: Reader, faulty: Collection[str]) -> Iterator[Fault]:
    """The faults of all rules that apply.

    Args:
        spec: the typed spec.
        reader: what is read of it.
        faulty: dotted paths that have a problem already: fields, sections, and items (``path[2]``).
    """
    for one in RULES:
        if not isinstance(spec, one.root) or any(_concerns(path, faulty) for path in one.reads):
            continue
        if not all(map(reader.reads, one.reads)):
            continue
        yield from one.check(spec)


def _concerns(path: str, faulty: Collection[str]) -> bool:
    """Whether one of the faulty paths is a field, a part of it, or a section it is in."""
    return any(
        one == path or one.startswith((path + ".", path + "[")) or path.startswith(one + ".")
        for one in faulty
    )


# Model


@rule("model.return_interm_indices", "model.num_feature_levels")
def levels_match_indices(spec: ExperimentSpec) -> Iterator[Fault]:
    """return_interm_indices has num_feature_levels entries."""
    indices, levels = spec.model.return_interm_indices, spec.model.num_feature_levels
    if len(indices) != levels:
        yield Fault(
            "model.return_interm_indices",
            f"has {len(indices)} entries, but model.num_feature_levels is {levels}",
            indices,
            allowed=f"{levels} entries",
            hint=f"set model.num_feature_levels to {len(indices)} or list {levels} indices",
        )


@rule("model.return_interm_indices")
def indices_ascend(spec: ExperimentSpec) -> Iterator[Fault]:
    """return_interm_indices ascends without repeats, and is not 4 alone."""
    indices = spec.model.return_interm_indices
    if any(low >= high for low, high in pairwise(indices)):
        yield Fault(
            "model.return_interm_indices",
            "must ascend without repeats",
            indices,
            allowed="for example [1, 2, 3, 4], [1, 2, 3] or [1]",
        )
    elif indices == [4]:
        yield Fault(
            "model.return_interm_indices",
            "has level 4 without a stage that it is made from",
            indices,
            hint="add a stage of the backbone, 0 to 3",
        )


@rule("model.hidden_dim", "model.nheads")
def heads_divide_width(spec: ExperimentSpec) -> Iterator[Fault]:
    """hidden_dim is a multiple of nheads."""
    width, heads = spec.model.hidden_dim, spec.model.nheads
    if width % heads:
        yield Fault(
            "model.nheads", f"does not divide model.hidden_dim, which is {width}", heads, allowed="a divisor"
        )


@rule("model.hidden_dim")
def width_fits_groups(spec: ExperimentSpec) -> Iterator[Fault]:
    """hidden_dim is a multiple of 32, for group normalisation and the sine encoding."""
    width = spec.model.hidden_dim
    if width % GROUP_NORM_GROUPS:
        below = max(width // GROUP_NORM_GROUPS, 1) * GROUP_NORM_GROUPS
        yield Fault(
            "model.hidden_dim",
            f"is not a multiple of {GROUP_NORM_GROUPS} (group normalisation has {GROUP_NORM_GROUPS} groups)",
            width,
            hint=f"use {below} or {below + GROUP_NORM_GROUPS}",
        )


@rule("model.num_select", "model.num_queries", "dataset.num_classes")
def selection_exists(spec: ExperimentSpec) -> Iterator[Fault]:
    """num_select is at most num_queries x num_classes."""
    most = spec.model.num_queries * spec.dataset.num_classes
    if spec.model.num_select > most:
        yield Fault(
            "model.num_select",
            f"is more than model.num_queries x dataset.num_classes = {most}",
            spec.model.num_select,
            allowed=f"1 to {most}",
        )


@rule("model.loss_types")
def some_loss(spec: ExperimentSpec) -> Iterator[Fault]:
    """loss_types names each loss once."""
    kinds = spec.model.loss_types
    if len(set(kinds)) < len(kinds):
        yield Fault("model.loss_types", "must name each loss once", kinds)


@rule("ddetr_mm.backbone")
def backbone_has_type(spec: ExperimentSpec) -> Iterator[Fault]:
    """A backbone configuration of ours names its class in ``type``."""
    backbone = spec.ddetr_mm.backbone
    if backbone is not None and (not isinstance(backbone.get("type"), str) or not backbone["type"]):
        yield Fault(
            "ddetr_mm.backbone",
            "has no type",
            backbone,
            hint="name an mmdet backbone, as in {type: ResNet, depth: 18}",
        )
    for path, name in unfit_type_names(backbone or {}):
        yield Fault(f"ddetr_mm.backbone{path}", "is no registered class", name, TYPE_NAMES)


# Data


@rule("dataset.augmentation.train_random_crop_min", "dataset.augmentation.train_random_crop_max")
def crop_range_ascends(spec: ExperimentSpec) -> Iterator[Fault]:
    """train_random_crop_min is at most train_random_crop_max."""
    low, high = (
        spec.dataset.augmentation.train_random_crop_min,
        spec.dataset.augmentation.train_random_crop_max,
    )
    if low > high:
        yield Fault(
            "dataset.augmentation.train_random_crop_min",
            f"is more than train_random_crop_max, which is {high}",
            low,
            allowed=f"at most {high}",
        )


@rule("dataset.augmentation.fixed_random_crop")
def jitter_size_fits(spec: ExperimentSpec) -> Iterator[Fault]:
    """fixed_random_crop is divisible by 32."""
    side = spec.dataset.augmentation.fixed_random_crop
    if side is not None and side % SIDE_MULTIPLE:
        below = max(side // SIDE_MULTIPLE, 1) * SIDE_MULTIPLE
        yield Fault(
            "dataset.augmentation.fixed_random_crop",
            f"is not divisible by {SIDE_MULTIPLE}",
            side,
            hint=f"use {below} or {below + SIDE_MULTIPLE}",
        )


@rule("dataset.augmentation.input_mean", "dataset.augmentation.input_std")
def channels_of_statistics(spec: ExperimentSpec) -> Iterator[Fault]:
    """input_mean and input_std have 1 or 3 entries."""
    for name in ("input_mean", "input_std"):
        numbers = getattr(spec.dataset.augmentation, name)
        if len(numbers) not in (1, 3):
            yield Fault(
                f"dataset.augmentation.{name}", "has the wrong length", numbers, allowed="1 or 3 numbers"
            )


@rule("dataset.eval_class_ids", "dataset.num_classes")
def evaluated_classes_exist(spec: ExperimentSpec) -> Iterator[Fault]:
    """eval_class_ids holds category ids from 1 to num_classes - 1, each once."""
    ids, most = spec.dataset.eval_class_ids, spec.dataset.num_classes - 1
    if ids is None:
        return
    beyond = [one for one in ids if one > most]
    if beyond:
        yield Fault(
            "dataset.eval_class_ids",
            f"holds {beyond}, but dataset.num_classes is {most + 1}",
            ids,
            allowed=f"1 to {most} (num_classes - 1)",
        )
    if len(set(ids)) < len(ids):
        yield Fault("dataset.eval_class_ids", "holds an id twice", ids)


# Training


@rule("train.checkpoint_interval", "train.checkpoint_interval_unit", "train.num_epochs")
def some_checkpoint(spec: ExperimentSpec) -> Iterator[Fault]:
    """checkpoint_interval, in epochs, is at most num_epochs."""
    interval, epochs = spec.train.checkpoint_interval, spec.train.num_epochs
    if spec.train.checkpoint_interval_unit == "epoch" and interval > epochs:
        yield Fault(
            "train.checkpoint_interval",
            f"is more than train.num_epochs, which is {epochs}: no checkpoint would be written",
            interval,
            allowed=f"1 to {epochs}",
        )


@rule("train.validation_interval", "train.num_epochs")
def some_validation(spec: ExperimentSpec) -> Iterator[Fault]:
    """validation_interval is at most num_epochs."""
    interval, epochs = spec.train.validation_interval, spec.train.num_epochs
    if interval > epochs:
        yield Fault(
            "train.validation_interval",
            f"is more than train.num_epochs, which is {epochs}: no validation would be run",
            interval,
            allowed=f"1 to {epochs}",
        )


METRICS = ("val_mAP", "val_mAP50")
LOSSES = ("val_loss", "val_loss_cls", "val_loss_bbox", "val_loss_iou")
"""What a validation writes into status.json."""


def _metrics(spec: ExperimentSpec) -> tuple[str, ...]:
    return (*METRICS, *(LOSSES if spec.ddetr_mm.validation_loss else ()), "train_loss")


@rule(
    "train.checkpointer.enable_topk",
    "train.checkpointer.monitor",
    "ddetr_mm.early_stopping.patience",
    "ddetr_mm.early_stopping.monitor",
    "ddetr_mm.validation_loss",
)
def monitored_metric_exists(spec: ExperimentSpec) -> Iterator[Fault]:
    """The metric that chooses the best checkpoints or stops early is one of status.json."""
    chosen, stopping = spec.train.checkpointer, spec.ddetr_mm.early_stopping
    monitors = {}
    if chosen.enable_topk and chosen.monitor:
        monitors["train.checkpointer.monitor"] = chosen.monitor
    if stopping.patience is not None:
        monitors["ddetr_mm.early_stopping.monitor"] = stopping.monitor
    known = _metrics(spec)
    for path, monitor in monitors.items():
        if monitor not in known:
            hint = "set ddetr_mm.validation_loss=true" if monitor in LOSSES else None
            yield Fault(path, "is no metric of this run", monitor, ", ".join(known), hint)


@rule(
    "train.checkpointer.enable_topk",
    "train.checkpointer.filename",
    "train.checkpointer.save_top_k",
    "ddetr_mm.validation_loss",
)
def best_files_have_names(spec: ExperimentSpec) -> Iterator[Fault]:
    """filename gives each of the best checkpoints a name of its own."""
    chosen = spec.train.checkpointer
    if not chosen.enable_topk:
        return
    path, pattern = "train.checkpointer.filename", chosen.filename
    numbers = dict.fromkeys(_metrics(spec), 0.0)
    fields = ", ".join(f"{{{name}}}" for name in ("epoch", "step", *numbers))
    try:
        names = [fill_name(pattern, {"epoch": one, "step": one, **numbers}) for one in (0, 1)]
    except ValueError as error:
        yield Fault(path, str(error), pattern, f"a name without a folder, with {fields}")
        return
    if names[0].startswith(("model_epoch_", "dd_model_")):
        yield Fault(path, "is a name of the checkpoints of every interval", pattern, "any other name")
    elif names[0] == names[1] and chosen.save_top_k > 1:
        what = f"gives the {chosen.save_top_k} best checkpoints one name"
        yield Fault(path, what, pattern, "a name with {epoch} or {step}")


@rule("train.optim.lr_steps")
def decay_steps_ascend(spec: ExperimentSpec) -> Iterator[Fault]:
    """lr_steps ascends without repeats."""
    steps = spec.train.optim.lr_steps
    if any(low >= high for low, high in pairwise(steps)):
        yield Fault(
            "train.optim.lr_steps",
            "must ascend without repeats",
            steps,
            hint=f"write {sorted(set(steps))}",
        )


def _gpus_named_once(name: str) -> Check:
    def gpus_named_once(spec: ExperimentSpec) -> Iterator[Fault]:
        """gpu_ids names each GPU once."""
        ids = getattr(spec, name).gpu_ids
        if len(set(ids)) < len(ids):
            yield Fault(f"{name}.gpu_ids", "must name each GPU once", ids)

    return gpus_named_once


for _name in ("train", "evaluate", "inference"):
    rule(f"{_name}.gpu_ids")(_gpus_named_once(_name))


@rule("ddetr_mm.ema", "train.distributed_strategy")
def averaged_weights_are_whole(spec: ExperimentSpec) -> Iterator[Fault]:
    """ddetr_mm.ema needs train.distributed_strategy: ddp."""
    if spec.ddetr_mm.ema and spec.train.distributed_strategy == "fsdp":
        yield Fault("ddetr_mm.ema", "averages whole weights, which fsdp shards", True, hint="use ddp")


@rule("model.precise_msda", "ddetr_mm.attention")
def deterministic_attention_exists(spec: ExperimentSpec) -> Iterator[Fault]:
    """model.precise_msda needs an attention that has a deterministic form: auto or triton."""
    if spec.model.precise_msda and spec.ddetr_mm.attention in ("mmcv", "torch"):
        yield Fault(
            "ddetr_mm.attention",
            "is not deterministic on a GPU, but model.precise_msda is true",
            spec.ddetr_mm.attention,
            allowed="auto or triton",
        )


# Inference, export, engines


@rule("evaluate.input_width", "evaluate.input_height")
def both_sides_of_evaluation(spec: ExperimentSpec) -> Iterator[Fault]:
    """evaluate.input_width and input_height are given together."""
    yield from _both_sides("evaluate", spec.evaluate)


@rule("inference.input_width", "inference.input_height")
def both_sides_given(spec: ExperimentSpec) -> Iterator[Fault]:
    """inference.input_width and input_height are given together."""
    yield from _both_sides("inference", spec.inference)


def _both_sides(name: str, settings: EvaluateConfig | InferenceConfig) -> Iterator[Fault]:
    width, height = settings.input_width, settings.input_height
    if (width is None) != (height is None):
        given, missing = ("width", "height") if height is None else ("height", "width")
        yield Fault(
            f"{name}.input_{missing}",
            f"is not given, but {name}.input_{given} is",
            hint="give both or neither",
        )


@rule("export.input_channel")
def three_channels(spec: ExperimentSpec) -> Iterator[Fault]:
    """The exported network takes 3 channels."""
    if spec.export.input_channel != 3:
        yield Fault("export.input_channel", "cannot be exported", spec.export.input_channel, allowed="3")


@rule("export.format")
def onnx_only(spec: ExperimentSpec) -> Iterator[Fault]:
    """export writes ONNX."""
    if spec.export.format != "onnx":
        yield Fault("export.format", "cannot be written here", spec.export.format, allowed="onnx")


def _batch_not_empty(name: str) -> Check:
    def batch_not_empty(spec: ExperimentSpec) -> Iterator[Fault]:
        """A batch size is -1 or at least 1, never 0."""
        if getattr(spec, name).batch_size == 0:
            yield Fault(f"{name}.batch_size", "is out of range", 0, allowed="-1, or at least 1")

    return batch_not_empty


for _name in ("export", "evaluate", "inference"):
    rule(f"{_name}.batch_size")(_batch_not_empty(_name))


_TRT = "gen_trt_engine.tensorrt."


@rule(_TRT + "min_batch_size", _TRT + "opt_batch_size", _TRT + "max_batch_size")
def batches_ascend(spec: ExperimentSpec) -> Iterator[Fault]:
    """min_batch_size <= opt_batch_size <= max_batch_size."""
    options = spec.gen_trt_engine.tensorrt
    sizes = [options.min_batch_size, options.opt_batch_size, options.max_batch_size]
    if sizes != sorted(sizes):
        yield Fault(
            _TRT + "opt_batch_size",
            "does not lie between min_batch_size and max_batch_size",
            sizes,
            allowed="min <= opt <= max",
        )


# Quantization


@dataclass(frozen=True)
class QuantizeBackend:
    """What a backend of quantize takes.

    Attributes:
        mode: its only mode.
        algorithms: those it knows, its own choice first; empty where it reads none.
        dtypes: number formats beside native.
        kwargs: keys of ``quantize.backend_kwargs``.
        writes_onnx: whether it writes a Q/DQ graph, which has one number format.
    """

    mode: str
    algorithms: tuple[str, ...]
    dtypes: tuple[str, ...]
    kwargs: tuple[str, ...] = ()
    writes_onnx: bool = False


INT4_ALGORITHMS = ("awq_clip", "awq_lite", "awq_full", "rtn_dq")
_INT8_OR_E4M3 = ("int8", "fp8_e4m3fn")
QUANTIZE_BACKENDS = {
    "torchao": QuantizeBackend("weight_only_ptq", (), (*_INT8_OR_E4M3, "fp8_e5m2")),
    "modelopt.pytorch": QuantizeBackend("static_ptq", ("max", "minmax", "entropy"), _INT8_OR_E4M3),
    "modelopt.onnx": QuantizeBackend(
        "static_ptq",
        ("max", "entropy", *INT4_ALGORITHMS),
        _INT8_OR_E4M3,
        ("quantize_mode", "high_precision_dtype", "block_size"),
        writes_onnx=True,
    ),
    "onnxruntime": QuantizeBackend(
        "static_ptq",
        ("minmax", "entropy", "percentile"),
        ("int8",),
        ("sensitivity", "sensitivity_images", "percentile", "per_channel", "symmetric", "reduce_range"),
        writes_onnx=True,
    ),
}


def quantize_backend(spec: ExperimentSpec) -> tuple[str, QuantizeBackend]:
    """The backend that a spec names, torchao where it names none."""
    name = spec.quantize.backend or "torchao"
    return name, QUANTIZE_BACKENDS[name]


_Q = "quantize."


@rule(_Q + "backend", _Q + "mode", _Q + "algorithm", _Q + "backend_kwargs")
def quantize_backend_has_mode(spec: ExperimentSpec) -> Iterator[Fault]:
    """The backend of quantize has its mode, its algorithm and its backend_kwargs."""
    name, backend = quantize_backend(spec)
    mode, algorithm = spec.quantize.mode, spec.quantize.algorithm
    kwargs = spec.quantize.backend_kwargs or {}
    if mode not in (None, backend.mode):
        hint = f"set quantize.mode={backend.mode}"
        yield Fault(_Q + "mode", f"is not a mode of {name}", mode, backend.mode, hint)
    if backend.algorithms and algorithm not in (None, *backend.algorithms):
        allowed = ", ".join(backend.algorithms)
        yield Fault(_Q + "algorithm", f"is not an algorithm of {name}", algorithm, allowed)
    elif name == "modelopt.onnx" and algorithm is not None:
        is_int4 = kwargs.get("quantize_mode") == "int4"
        if is_int4 is not (algorithm in INT4_ALGORITHMS):
            what = "needs" if not is_int4 else "does not go with"
            allowed = ", ".join(INT4_ALGORITHMS if is_int4 else ("max", "entropy"))
            yield Fault(
                _Q + "algorithm", f"{what} backend_kwargs {{quantize_mode: int4}}", algorithm, allowed
            )
    for key in kwargs:
        if key not in backend.kwargs:
            allowed = ", ".join(backend.kwargs) or "none"
            yield Fault(f"{_Q}backend_kwargs.{key}", f"is not an argument of {name}", kwargs[key], allowed)


_KWARG_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quantize_mode": (lambda value: value in ("int8", "fp8", "int4"), "int8, fp8, int4"),
    "high_precision_dtype": (lambda value: value in ("fp32", "fp16", "bf16"), "fp32, fp16, bf16"),
    "percentile": (
        lambda value: isinstance(value, (int, float)) and 50 < value <= 100,
        "a number above 50, up to 100",
    ),
    **dict.fromkeys(
        ("block_size", "sensitivity_images"),
        (lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0, "at least 1"),
    ),
    **dict.fromkeys(
        ("sensitivity", "per_channel", "symmetric", "reduce_range"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
}
"""Argument of a backend → whether a value is taken, and which are, in words."""


@rule(_Q + "backend_kwargs")
def quantize_arguments_have_values(spec: ExperimentSpec) -> Iterator[Fault]:
    """Each of quantize.backend_kwargs has a value that the backend takes."""
    for key, value in (spec.quantize.backend_kwargs or {}).items():
        taken, words = _KWARG_VALUES.get(key, (lambda _: True, ""))
        if not taken(value):
            yield Fault(f"{_Q}backend_kwargs.{key}", "cannot be used", value, words)


@rule(_Q + "backend", _Q + "layers", _Q + "algorithm")
def quantized_layers_have_formats(spec: ExperimentSpec) -> Iterator[Fault]:
    """Every entry of quantize.layers has a pattern, and number formats that the backend has."""
    name, backend = quantize_backend(spec)
    allowed = ", ".join((*backend.dtypes, "native"))
    used: dict[str, str] = {}
    for index, layer in enumerate(spec.quantize.layers or ()):
        path = f"{_Q}layers[{index}]"
        if not layer.module_name:
            yield Fault(f"{path}.module_name", "is not given", hint="name layers, or '*' for all")
        for part in ("weights", "activations"):
            tensor = getattr(layer, part)
            if tensor is None:
                continue
            if tensor.dtype not in ("", "native", *backend.dtypes):
                yield Fault(f"{path}.{part}.dtype", f"is not a format of {name}", tensor.dtype, allowed)
            elif tensor.dtype not in ("", "native"):
                used[f"{path}.{part}.dtype"] = tensor.dtype
            if tensor.quant_axis not in ((None, 0) if part == "weights" else (None,)):
                words = "null or 0" if part == "weights" else "null"
                yield Fault(f"{path}.{part}.quant_axis", "cannot be used", tensor.quant_axis, words)
        dtypes = [getattr(one, "dtype", None) or "native" for one in (layer.weights, layer.activations)]
        if backend.writes_onnx and layer.activations is not None and dtypes[0] != dtypes[1]:
            what = "is another format than that of the weights, which a Q/DQ graph does not have"
            yield Fault(f"{path}.activations.dtype", what, dtypes[1], dtypes[0])
    if spec.quantize.algorithm == "entropy" and name == "modelopt.pytorch":
        for path, dtype in used.items():
            if dtype != "int8" and ".activations" in path:
                yield Fault(path, "has no entropy calibration", dtype, "int8", "set quantize.algorithm=max")
    if backend.writes_onnx and len(set(used.values())) > 1:
        place = next(iter(used))
        yield Fault(place, f"is not the only format, and {name} writes one", sorted(set(used.values())))


@rule(_Q + "backend", _Q + "model_path")
def quantize_takes_the_file(spec: ExperimentSpec) -> Iterator[Fault]:
    """modelopt.onnx takes an ONNX file, torchao and modelopt.pytorch a checkpoint, onnxruntime either."""
    name, backend = quantize_backend(spec)
    path = spec.quantize.model_path
    if not path:
        return
    suffix = Path(path).suffix.lower()
    is_onnx = suffix == ".onnx"
    hint = "name the checkpoint" if is_onnx else "export the checkpoint first: ddetr-mm export"
    if suffix in (".engine", ".trt", ".plan") or (is_onnx and not backend.writes_onnx):
        hint = "name the checkpoint, or the .onnx file with backend onnxruntime or modelopt.onnx"
        yield Fault(_Q + "model_path", f"cannot be quantized by {name}", path, "a checkpoint", hint)
    elif name == "modelopt.onnx" and not is_onnx:
        yield Fault(_Q + "model_path", f"cannot be quantized by {name}", path, "an .onnx file", hint)


def _missing_to_quantize(spec: ExperimentSpec) -> Iterator[Fault]:
    """A fault where nothing would be quantized, or static_ptq has no images to find ranges with."""
    name, backend = quantize_backend(spec)
    is_int4 = (spec.quantize.backend_kwargs or {}).get("quantize_mode") == "int4"
    tensors = [one for layer in spec.quantize.layers or () for one in (layer.weights, layer.activations)]
    is_used = any(one is not None and one.dtype not in ("", "native") for one in tensors)
    if not is_used and name != "onnxruntime" and not is_int4:
        hint = "add an entry such as {module_name: '*', weights: {dtype: int8}}"
        yield Fault(_Q + "layers", f"names no format, and {name} quantizes nothing without", hint=hint)
    is_needed = backend.mode == "static_ptq" and spec.quantize.algorithm != "rtn_dq"
    if is_needed and spec.dataset.quant_calibration_data_sources is None:
        hint = "give image_dir and json_file of some hundred images, for example of the training data"
        path = "dataset.quant_calibration_data_sources"
        yield Fault(path, f"is needed for {name} and not given", hint=hint)


# Conversion


@rule("partition_mode", "num_partitions", root=ConvertSpec)
def partitions_fit_mode(spec: ConvertSpec) -> Iterator[Fault]:
    """Without a mode there is 1 partition; random makes exactly 2."""
    mode, count = spec.partition_mode, spec.num_partitions
    if mode is None and count != 1:
        yield Fault(
            "num_partitions",
            "needs a partition_mode when it is more than 1",
            count,
            allowed="1 without a mode",
            hint="add partition_mode: sequence, or partition_mode: random with num_partitions: 2",
        )
    if mode == "random" and count != 2:
        yield Fault(
            "num_partitions",
            "does not fit partition_mode: random, which makes a validation and a training fold",
            count,
            allowed="2",
        )


# Registered names


SCOPES = ("mmdet", "mmpretrain", "mmcls", "mmseg", "mmyolo", "mmrotate")
"""Packages whose registries a ``type`` may name."""

TYPE_NAMES = "a registered name such as ResNet, or one with its package: mmpretrain.ConvNeXt"

_FITS = re.compile(rf"((?:{'|'.join(SCOPES)})\.)?[A-Za-z][A-Za-z0-9_]*")


def unfit_type_names(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every ``type`` and ``_scope_`` of a configuration that does not name a registered class.

    mmengine looks a ``type`` up in its registries; what it does not find there it imports as the path of a
    Python object and calls: ``{type: os.system, command: ...}`` would run a command.

    Args:
        config: nested mappings and lists.
        path: prefix of the places, e.g. ``".norm_cfg"``.

    Yields:
        The place (``".norm_cfg.type"``) and the name.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            here = f"{path}.{key}"
            if (key == "type" and not _is_name(value)) or (key == "_scope_" and value not in SCOPES):
                yield here, value
            else:
                yield from unfit_type_names(value, here)
    elif isinstance(config, (list, tuple)):
        for index, item in enumerate(config):
            yield from unfit_type_names(item, f"{path}[{index}]")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _FITS.fullmatch(value) is not None


# What a subtask needs


@dataclass(frozen=True)
class Requirement:
    """A field that a subtask needs.

    Attributes:
        subtask: the subtask.
        path: dotted path of the field.
        unless: another field that replaces it when set, or None.
        hint: how to give it.
        only_with: a field and the value for which the requirement applies, or None.
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
    Requirement("automl", "dataset.train_data_sources", hint=_SOURCES),
    Requirement("automl", "dataset.val_data_sources", hint=_SOURCES),
    Requirement("evaluate", "evaluate.checkpoint", unless="evaluate.trt_engine"),
    Requirement("evaluate", "dataset.test_data_sources", hint=_ONE_SOURCE),
    Requirement("inference", "inference.checkpoint", unless="inference.trt_engine"),
    Requirement("inference", "dataset.infer_data_sources", hint=_IMAGES),
    Requirement("export", "export.checkpoint"),
    Requirement("export", "export.onnx_file"),
    Requirement("quantize", "quantize.model_path"),
    Requirement("gen_trt_engine", "gen_trt_engine.onnx_file"),
    Requirement("gen_trt_engine", _CALIBRATION + "cal_image_dir", only_with=_INT8),
    Requirement("gen_trt_engine", _CALIBRATION + "cal_cache_file", only_with=_INT8),
)


def requirements_of(path: str, root: type) -> list[Requirement]:
    """The requirements on a field of one kind of spec, for documentation."""
    return [one for one in REQUIREMENTS if one.path == path and root_of(one.subtask) is root]


def missing_fields(spec: Spec, subtask: str) -> Iterator[Fault]:
    """A fault for every field that ``subtask`` needs and the spec does not give."""
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
    if isinstance(spec, ExperimentSpec) and subtask == "quantize":
        yield from _missing_to_quantize(spec)
    if isinstance(spec, ExperimentSpec) and not results_dir_setting(spec, subtask):
        yield Fault(
            "results_dir",
            f"is empty, and so is {subtask}.results_dir",
            hint="name a folder for the results: results_dir=/path/to/results",
        )


_PARTS = {
    "train_data_sources": ("image_dir", "json_file"),
    "val_data_sources": ("image_dir", "json_file"),
    "test_data_sources": ("image_dir", "json_file"),
    "infer_data_sources": ("image_dir",),
    "quant_calibration_data_sources": ("image_dir", "json_file"),
}
"""A source of ``dataset`` → the parts that it needs."""


def drop_blank_sources(spec: ExperimentSpec) -> None:
    """Set sources to null of which nothing is given, as templates write them for the user to fill in."""
    for name in _PARTS:
        value = getattr(spec.dataset, name)
        items = value if isinstance(value, list) else [value] if value is not None else []
        if not any(_is_set(getattr(item, part)) for item in items for part in type(item).model_fields):
            setattr(spec.dataset, name, None)


def incomplete_sources(spec: ExperimentSpec, reader: Reader) -> Iterator[Fault]:
    """A fault for every data source that is read and lacks its folder or annotation file."""
    for name, parts in _PARTS.items():
        path, value = f"dataset.{name}", getattr(spec.dataset, name)
        if value is None or not reader.reads(path):
            continue
        many = isinstance(value, list)
        for index, source in enumerate(value if many else [value]):
            for part in parts:
                if not _is_set(getattr(source, part)):
                    place = f"{path}[{index}].{part}" if many else f"{path}.{part}"
                    yield Fault(place, "is not given", hint=f"add {part}: to the source")


def _is_set(value: Any) -> bool:
    """Whether a value is neither null nor empty."""
    return value is not None and value != "" and value != []


def results_dir_setting(spec: Spec, subtask: str) -> str | None:
    """The results folder as the spec gives it: ``<subtask>.results_dir``, else ``results_dir/<subtask>``."""
    if isinstance(spec, ConvertSpec):
        return spec.results_dir or None
    own = getattr(getattr(spec, subtask, None), "results_dir", None)
    if own:
        return str(own)
    return str(Path(spec.results_dir) / subtask) if spec.results_dir else None
