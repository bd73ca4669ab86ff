"""Notes about a spec: fields without effect, doubtful values, and which GPUs are used.

A note is one line of the log at start. A field that gains an effect leaves :data:`NO_EFFECT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ddetr_mm.spec.fields import fields_of, get_field
from ddetr_mm.spec.schema import (
    CheckpointerConfig,
    ConvertSpec,
    DistributedTask,
    ExperimentSpec,
    WandbConfig,
)
from ddetr_mm.spec.yaml_source import OVERRIDE, Branch

_AUGMENTED = "the size comes from dataset.augmentation"
_ENGINE_SIZE = "the engine's input is that of the ONNX file"

NO_EFFECT: dict[str, str] = {
    "model_name": "nothing is named after it",
    "model.dld_model_dir_path": "it points into a model store inside NVIDIA",
    "model.clip_max_norm": "gradients are clipped by train.clip_grad_norm",
    "train.optim.monitor_name": "no scheduler watches a value",
    "train.input_width": _AUGMENTED,
    "train.input_height": _AUGMENTED,
    "gen_trt_engine.batch_size": "the ONNX file decides",
    "gen_trt_engine.input_channel": _ENGINE_SIZE,
    "gen_trt_engine.input_width": _ENGINE_SIZE,
    "gen_trt_engine.input_height": _ENGINE_SIZE,
    "gen_trt_engine.opset_version": "the opset is chosen at export: export.opset_version",
}
"""Dotted path of a field or a whole section → why it has no effect."""

ALWAYS_REPORTED = frozenset(
    path for path in NO_EFFECT if path.startswith("gen_trt_engine.") and "batch" not in path
)
"""Fields of TAO 5.1 that TAO rejects today: reported even at their default."""


@dataclass(frozen=True)
class Condition:
    """A field that has no effect with certain values of other fields.

    Attributes:
        path: the field.
        applies: whether it has no effect in a given spec.
        reason: why; follows "has no effect because".
        root: the kind of spec.
    """

    path: str
    applies: Callable[[Any], bool]
    reason: str
    root: type = ExperimentSpec


def _other_backbone(spec: ExperimentSpec) -> bool:
    return spec.ddetr_mm.backbone is not None


def _predicts_with_graph(name: str, spec: ExperimentSpec) -> bool:
    """Whether ``evaluate`` or ``inference`` names an exported graph."""
    from ddetr_mm.spec.readers import is_exported  # which needs NO_EFFECT

    settings = getattr(spec, name)
    return bool(settings.trt_engine) or is_exported(settings.checkpoint or "")


_AUG = "dataset.augmentation."
_CAL = "gen_trt_engine.tensorrt.calibration"
_WEIGHTS_ALONE = "torchao quantizes weights alone, without images"
_JITTER = "fixed_random_crop replaces the resize and crop of training"

CONDITIONS: tuple[Condition, ...] = (
    Condition("model.backbone", _other_backbone, "ddetr_mm.backbone is set"),
    Condition("model.dilation", _other_backbone, "ddetr_mm.backbone is set"),
    Condition(
        "model.pretrained_backbone_path",
        lambda spec: bool(spec.train.pretrained_model_path),
        "train.pretrained_model_path has the backbone too",
    ),
    Condition(
        "model.dilation",
        lambda spec: spec.model.dilation and spec.model.backbone != "resnet_50",
        "only resnet_50 can be dilated",
    ),
    Condition(
        "train.optim.momentum",
        lambda spec: spec.train.optim.optimizer == "AdamW",
        "AdamW has no momentum",
    ),
    Condition(
        "train.optim.lr_steps",
        lambda spec: spec.train.optim.lr_scheduler == "StepLR",
        "lr_scheduler is StepLR",
    ),
    Condition(
        "train.optim.lr_step_size",
        lambda spec: spec.train.optim.lr_scheduler == "MultiStep",
        "lr_scheduler is MultiStep",
    ),
    Condition(
        "train.optim.lr_backbone",
        lambda spec: not spec.model.train_backbone,
        "model.train_backbone is false",
    ),
    *(
        Condition(f"wandb.{name}", lambda spec: not spec.wandb.enable, "wandb.enable is false")
        for name in fields_of(WandbConfig)
        if name != "enable"
    ),
    *(
        Condition(f"train.{name}", lambda spec: spec.train.is_dry_run, "train.is_dry_run is true")
        for name in (
            "num_epochs",
            "checkpoint_interval",
            "checkpoint_interval_unit",
            "validation_interval",
            "resume_training_checkpoint_path",
        )
    ),
    *(
        Condition(
            f"train.checkpointer.{name}",
            lambda spec: not spec.train.checkpointer.enable_topk,
            "train.checkpointer.enable_topk is false",
        )
        for name in fields_of(CheckpointerConfig)
        if name != "enable_topk"
    ),
    Condition(
        "ddetr_mm.keep_best",
        lambda spec: spec.train.checkpointer.enable_topk,
        "train.checkpointer.enable_topk is true",
    ),
    *(
        Condition(
            f"ddetr_mm.early_stopping.{name}",
            lambda spec: spec.ddetr_mm.early_stopping.patience is None,
            "ddetr_mm.early_stopping.patience is null",
        )
        for name in ("monitor", "mode", "min_delta")
    ),
    Condition("ddetr_mm.ema_momentum", lambda spec: not spec.ddetr_mm.ema, "ddetr_mm.ema is false"),
    Condition(
        "dataset.train_sampler",
        lambda spec: (
            spec.dataset.dataset_type != "default" and spec.dataset.train_sampler != "default_sampler"
        ),
        "dataset_type is not default",
    ),
    Condition(
        "ddetr_mm.cover_all_images",
        lambda spec: (
            spec.dataset.dataset_type != "default" or spec.dataset.train_sampler == "default_sampler"
        ),
        "the default sampler takes every image",
    ),
    *(
        Condition(_AUG + name, lambda spec: spec.dataset.augmentation.fixed_random_crop is not None, _JITTER)
        for name in ("scales", "train_random_resize", "train_random_crop_min", "train_random_crop_max")
    ),
    Condition(
        "evaluate.checkpoint", lambda spec: bool(spec.evaluate.trt_engine), "evaluate.trt_engine is set"
    ),
    Condition(
        "inference.checkpoint", lambda spec: bool(spec.inference.trt_engine), "inference.trt_engine is set"
    ),
    *(
        Condition(
            f"{name}.input_{side}",
            partial(_predicts_with_graph, name),
            "the file is an exported graph, which has one size",
        )
        for name in ("evaluate", "inference")
        for side in ("width", "height")
    ),
    Condition(
        _CAL,
        lambda spec: spec.gen_trt_engine.tensorrt.data_type != "INT8",
        "gen_trt_engine.tensorrt.data_type is not INT8",
    ),
    Condition(
        "quantize.algorithm",
        lambda spec: spec.quantize.backend in (None, "torchao"),
        "torchao takes the ranges of weights from the weights",
    ),
    *(
        Condition(path, lambda spec: spec.quantize.backend in (None, "torchao"), _WEIGHTS_ALONE)
        for path in ("dataset.quant_calibration_data_sources", "ddetr_mm.quantize_images")
    ),
    Condition(
        "val_split", lambda spec: spec.partition_mode is None, "partition_mode is null", root=ConvertSpec
    ),
)


@cache
def _default(root: type) -> object:
    return root()


def _changed(spec: object, path: str, given: Mapping[str, str]) -> str | None:
    """Where ``path``, or a field below it, was set to another value than its default; None if nowhere."""
    kind: Any = spec.__class__
    default = _default(kind)
    for name, where in given.items():
        if name == path or name.startswith((path + ".", path + "[")):
            try:
                same = get_field(spec, name) == get_field(default, name)
            except KeyError:
                same = False  # an item or entry that the default does not have
            if not same or path in ALWAYS_REPORTED:
                return where
    return None


def notes_without_effect(spec: ExperimentSpec | ConvertSpec, given: Mapping[str, str]) -> Iterator[str]:
    """One line for every field without effect that was set to another value than its default.

    Args:
        spec: the typed spec.
        given: dotted path → ``"line 12"`` or ``"override"`` of everything the user wrote.
    """
    rows = list(NO_EFFECT.items()) if isinstance(spec, ExperimentSpec) else []
    rows += [(one.path, one.reason) for one in CONDITIONS if isinstance(spec, one.root) and one.applies(spec)]
    reported = set()
    for path, reason in rows:
        where = _changed(spec, path, given)
        if where is not None and path not in reported:
            reported.add(path)
            yield f"{path} ({where}) has no effect because {reason}"


def notes_of_doubt(spec: ExperimentSpec | ConvertSpec, given: Mapping[str, str]) -> Iterator[str]:
    """One line for every value that is valid and probably a mistake."""
    if isinstance(spec, ConvertSpec):
        return
    for name in ("evaluate", "inference"):
        threshold = getattr(spec, name).conf_threshold
        if threshold > 1:
            yield f"{name}.conf_threshold {threshold:g} removes every prediction: scores lie between 0 and 1"
    yield from _notes_of_layers(spec)
    longest, largest = spec.dataset.augmentation.random_resize_max_size, max(spec.dataset.augmentation.scales)
    if longest < largest:
        yield (
            f"dataset.augmentation.random_resize_max_size {longest} limits the long side to less than the "
            f"largest of scales, {largest}"
        )
    if spec.dataset.num_classes == 1:
        yield "dataset.num_classes 1 leaves no class: column 0 is the background"
    steps, epochs = spec.train.optim.lr_steps, spec.train.num_epochs
    late = [step for step in steps if step >= epochs]
    if (
        late
        and spec.train.optim.lr_scheduler == "MultiStep"
        and _changed(spec, "train.optim.lr_steps", given)
    ):
        yield f"train.optim.lr_steps {late} are never reached: train.num_epochs is {epochs}"


def _notes_of_layers(spec: ExperimentSpec) -> Iterator[str]:
    """One line for every setting of a quantized layer that changes nothing."""
    weights_alone = spec.quantize.backend in (None, "torchao")
    for index, layer in enumerate(spec.quantize.layers or ()):
        for name in ("weights", "activations"):
            tensor, path = getattr(layer, name), f"quantize.layers[{index}].{name}"
            if tensor is None:
                continue
            for key in ("observer_or_fake_quant", "observer_or_fake_quant_kwargs"):
                if getattr(tensor, key):
                    reason = "quantize.algorithm chooses how ranges are found"
                    yield f"{path}.{key} has no effect because {reason}"
            if name == "activations" and weights_alone and tensor.dtype not in ("", "native"):
                yield f"{path} has no effect because torchao quantizes weights alone"


GPU_SECTIONS = ("train", "evaluate", "inference")
_PAIR = ("num_gpus", "gpu_ids")


def drop_overruled_gpus(tree: Branch) -> list[str]:
    """Remove ``num_gpus`` and ``gpu_ids`` of the file where the command line gives either of them.

    A ``gpu_ids: [0, 1]`` in the file must not enlarge a ``train.num_gpus=1`` on the command line.

    Returns:
        One note for every value removed.
    """
    notes = []
    for name in GPU_SECTIONS:
        part = tree.items.get(name)
        if not isinstance(part, Branch):
            continue
        given = {key: part.items[key].where for key in _PAIR if key in part.items}
        if OVERRIDE not in given.values():
            continue
        for key, where in given.items():
            if where != OVERRIDE:
                del part.items[key]
                notes.append(f"{name}.{key} ({where}) has no effect because the command line names the GPUs")
    return notes


def agree_on_gpus(spec: ExperimentSpec, given: set[str]) -> list[str]:
    """Make ``num_gpus == len(gpu_ids)`` in every section; the larger number of GPUs is used.

    Args:
        spec: changed in place.
        given: dotted paths the user wrote.

    Returns:
        One note for every section in which both were given and disagree.
    """
    notes = []
    for name in GPU_SECTIONS:
        task: DistributedTask = getattr(spec, name)
        count, ids = task.num_gpus, list(task.gpu_ids)
        if count == len(ids):
            continue
        if count > len(ids):
            task.gpu_ids = list(range(count))
        else:
            task.num_gpus = len(ids)
        if {f"{name}.num_gpus", f"{name}.gpu_ids"} <= given:
            notes.append(
                f"{name}.num_gpus {count} and {name}.gpu_ids {ids} disagree; the larger number is used: "
                f"num_gpus {task.num_gpus}, gpu_ids {task.gpu_ids}"
            )
    return notes
