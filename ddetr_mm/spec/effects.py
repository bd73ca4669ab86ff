"""Fields that are accepted and change nothing, and why: one table.

A user who sets one of them is told so in one line at start. Whoever makes a field act removes its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ddetr_mm.spec.fieldpath import get_field
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.schema.common import WandbConfig
from ddetr_mm.spec.walk import fields_of

_AUGMENTED = "the size comes from dataset.augmentation"
_QUANTIZE = "there is no quantize subtask"
_LATER = "it belongs to a later release (7.3)"
_ENGINE_SIZE = "the engine's input is that of the ONNX file"

NO_EFFECT: dict[str, str] = {
    "model_name": "nothing is named after it",
    "model.dld_model_dir_path": "it points into a model store inside NVIDIA",
    "model.clip_max_norm": "gradients are clipped by train.clip_grad_norm",
    "model.precise_msda": "deformable attention is sampled in full precision at any train.precision",
    "dataset.quant_calibration_data_sources": _QUANTIZE,
    "train.optim.monitor_name": "no scheduler watches a value",
    "train.input_width": _AUGMENTED,
    "train.input_height": _AUGMENTED,
    "train.checkpointer": _LATER,
    "evaluate.input_width": _AUGMENTED,
    "evaluate.input_height": _AUGMENTED,
    "gen_trt_engine.batch_size": "the ONNX file decides",
    "gen_trt_engine.input_channel": _ENGINE_SIZE,
    "gen_trt_engine.input_width": _ENGINE_SIZE,
    "gen_trt_engine.input_height": _ENGINE_SIZE,
    "gen_trt_engine.opset_version": "the opset is chosen at export: export.opset_version",
    "quantize": _QUANTIZE,
}
"""Dotted path of a field or a whole section → why it has no effect."""

ALWAYS_TOLD = frozenset(
    path for path in NO_EFFECT if path.startswith("gen_trt_engine.") and "batch" not in path
)
"""Fields of old releases that the reference itself refuses today: told even at their default."""


@dataclass(frozen=True)
class Condition:
    """A field that has no effect while other fields stand as they do.

    Attributes:
        path: the field.
        applies: whether it is without effect in a given spec.
        reason: why, following "has no effect because".
        root: the kind of spec it is about.
    """

    path: str
    applies: Callable[[Any], bool]
    reason: str
    root: type = ExperimentSpec


def _other_backbone(spec: ExperimentSpec) -> bool:
    return spec.ddetr_mm.backbone is not None


_AUG = "dataset.augmentation."
_CAL = "gen_trt_engine.tensorrt.calibration"
_JITTER = "fixed_random_crop replaces the resize and crop of training"

CONDITIONS: tuple[Condition, ...] = (
    Condition("model.backbone", _other_backbone, "ddetr_mm.backbone is set"),
    Condition("model.dilation", _other_backbone, "ddetr_mm.backbone is set"),
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
    Condition(
        "dataset.train_sampler",
        lambda spec: (
            spec.dataset.dataset_type != "default" and spec.dataset.train_sampler != "default_sampler"
        ),
        "dataset_type is not default",
    ),
    *(
        Condition(_AUG + name, lambda spec: spec.dataset.augmentation.fixed_random_crop is not None, _JITTER)
        for name in ("train_random_resize", "train_random_crop_min", "train_random_crop_max")
    ),
    Condition(
        "evaluate.checkpoint", lambda spec: bool(spec.evaluate.trt_engine), "evaluate.trt_engine is set"
    ),
    Condition(
        "inference.checkpoint", lambda spec: bool(spec.inference.trt_engine), "inference.trt_engine is set"
    ),
    Condition(
        _CAL,
        lambda spec: spec.gen_trt_engine.tensorrt.data_type != "INT8",
        "gen_trt_engine.tensorrt.data_type is not INT8",
    ),
    Condition(
        "val_split", lambda spec: spec.partition_mode is None, "partition_mode is null", root=ConvertSpec
    ),
)


@cache
def _default(root: type) -> object:
    return root()


def _changed(spec: object, path: str, given: Mapping[str, str]) -> str | None:
    """Where the user set ``path``, or something below it, to other than the default; None if nowhere."""
    kind: Any = spec.__class__
    default = _default(kind)
    for name, where in given.items():
        if name == path or name.startswith((path + ".", path + "[")):
            try:
                same = get_field(spec, name) == get_field(default, name)
            except KeyError:
                same = False  # an item or entry that the default does not have
            if not same or path in ALWAYS_TOLD:
                return where
    return None


def notes_without_effect(spec: ExperimentSpec | ConvertSpec, given: Mapping[str, str]) -> Iterator[str]:
    """One line per field the user set to other than its default, and that changes nothing.

    Args:
        spec: the typed spec.
        given: dotted path → ``"line 12"`` or ``"override"`` of everything the user wrote.
    """
    rows = list(NO_EFFECT.items()) if isinstance(spec, ExperimentSpec) else []
    rows += [(one.path, one.reason) for one in CONDITIONS if isinstance(spec, one.root) and one.applies(spec)]
    told = set()
    for path, reason in rows:
        where = _changed(spec, path, given)
        if where is not None and path not in told:
            told.add(path)
            yield f"{path} ({where}) has no effect because {reason}"


def notes_of_doubt(spec: ExperimentSpec | ConvertSpec, given: Mapping[str, str]) -> Iterator[str]:
    """One line per setting that is allowed and probably not what was meant."""
    if isinstance(spec, ConvertSpec):
        return
    for name in ("evaluate", "inference"):
        threshold = getattr(spec, name).conf_threshold
        if threshold > 1:
            yield f"{name}.conf_threshold {threshold:g} leaves nothing: scores lie between 0 and 1"
    longest, largest = spec.dataset.augmentation.random_resize_max_size, max(spec.dataset.augmentation.scales)
    if longest < largest:
        yield (
            f"dataset.augmentation.random_resize_max_size {longest} caps the long side below the largest of "
            f"scales, {largest}"
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
