"""Which subtasks read a field: the one table behind the rules, the messages and the documentation.

A value that a subtask does not read is never an error there: specs are shared between subtasks, and
templates leave values of other subtasks blank or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ddetr_mm.spec.notes import NO_EFFECT

TRAIN = ("train",)
PREDICT = ("evaluate", "inference")
RUN = (*TRAIN, *PREDICT)
LOADS = (*RUN, "quantize")
NETWORK = (*RUN, "export", "quantize")
ALL = (*NETWORK, "gen_trt_engine")

AUTOML = ("automl",)
"""Starts training runs, so that it reads what train reads, too."""

ENGINE_SUFFIXES = (".engine", ".trt", ".plan")
EXPORTED_SUFFIXES = (".onnx", *ENGINE_SUFFIXES)
"""Endings of exported graphs, which evaluate and inference take in a checkpoint's place."""

READ_BY: dict[str, tuple[str, ...]] = {
    "encryption_key": ALL,
    "results_dir": ALL,
    "wandb": TRAIN,
    "model": NETWORK,
    **dict.fromkeys(
        (
            "model.pretrained_backbone_path",
            "model.cls_loss_coef",
            "model.bbox_loss_coef",
            "model.giou_loss_coef",
            "model.focal_alpha",
            "model.dropout_ratio",
            "model.aux_loss",
            "model.train_backbone",
            "model.loss_types",
            "model.backbone_names",
            "model.linear_proj_names",
            "model.precise_msda",
        ),
        TRAIN,
    ),
    "dataset": LOADS,
    "dataset.train_sampler": TRAIN,
    "dataset.train_data_sources": TRAIN,
    "dataset.val_data_sources": TRAIN,
    "dataset.test_data_sources": ("evaluate",),
    "dataset.infer_data_sources": ("inference",),
    "dataset.quant_calibration_data_sources": ("quantize",),
    "dataset.dataset_type": ("train", "evaluate", "quantize"),
    "dataset.eval_class_ids": ("train", "evaluate", "quantize"),
    "dataset.num_classes": NETWORK,
    "dataset.augmentation": TRAIN,
    "dataset.augmentation.input_mean": ALL,
    "dataset.augmentation.input_std": ALL,
    "dataset.augmentation.test_random_resize": LOADS,
    "dataset.augmentation.random_resize_max_size": LOADS,
    "dataset.augmentation.fixed_padding": LOADS,
    "dataset.augmentation.pad_size_divisor": LOADS,
    "train": TRAIN,
    "evaluate": ("evaluate",),
    "inference": ("inference",),
    "export": ("export",),
    **dict.fromkeys(
        ("export.input_width", "export.input_height", "export.opset_version", "export.batch_size"),
        ("export", "quantize"),
    ),
    **dict.fromkeys(
        ("evaluate.input_width", "evaluate.input_height", "evaluate.batch_size", "evaluate.conf_threshold"),
        ("evaluate", "quantize"),
    ),
    "quantize": ("quantize",),
    "gen_trt_engine": ("gen_trt_engine",),
    "ddetr_mm": TRAIN,
    "ddetr_mm.backbone": NETWORK,
    "ddetr_mm.zero_padded_values": NETWORK,
    "ddetr_mm.checkpoint_entry": NETWORK,
    "ddetr_mm.use_ema": NETWORK,
    "ddetr_mm.resize": LOADS,
    "ddetr_mm.category_ids": NETWORK,
    "ddetr_mm.merge_categories": ("train", "evaluate", "quantize"),
    "ddetr_mm.strict_annotations": ("train", "evaluate", "quantize"),
    "ddetr_mm.strict_images": ("inference",),
    "ddetr_mm.log_interval": LOADS,
    "ddetr_mm.data_timeout_s": LOADS,
    "ddetr_mm.deterministic": LOADS,
    "ddetr_mm.device": ALL,
    "ddetr_mm.attention": LOADS,
    "ddetr_mm.matcher": TRAIN,
    "ddetr_mm.compile": RUN,
    "ddetr_mm.compile_mode": RUN,
    "ddetr_mm.predict_precision": RUN,
    "ddetr_mm.tf32": RUN,
    "ddetr_mm.export_fp16": ("export",),
    "ddetr_mm.automl": AUTOML,
    "ddetr_mm.quantize_images": ("quantize",),
    "ddetr_mm.quantize_max_ap_drop": ("quantize",),
}
"""Dotted path of a field or section of an experiment → the subtasks that read it; of several rows for a
field the one with the longest path counts. :data:`~ddetr_mm.spec.notes.NO_EFFECT` lists what none reads."""

USED_IF_GIVEN: dict[str, tuple[str, ...]] = {
    "dataset.val_data_sources": ("inference", "export", "quantize", "gen_trt_engine"),
    "dataset.train_data_sources": ("inference", "export", "quantize"),
}
"""What a subtask uses where it is there and can be read, and can do without: names of the classes, and
images to compare an exported graph on."""

_NOT_OF_EXPORTED = (
    "model",
    "dataset.augmentation",
    "evaluate.input_width",
    "evaluate.input_height",
    "inference.input_width",
    "inference.input_height",
    *(
        f"ddetr_mm.{name}"
        for name in (
            "backbone",
            "zero_padded_values",
            "checkpoint_entry",
            "use_ema",
            "resize",
            "attention",
            "compile",
            "compile_mode",
            "predict_precision",
            "tf32",
        )
    ),
)
_OF_EXPORTED = ("model.num_select", "dataset.augmentation.input_mean", "dataset.augmentation.input_std")

_ITEM = re.compile(r"\[[^\]]*\]")


def is_exported(path: str | Path) -> bool:
    """Whether a file is an exported graph rather than a checkpoint, by its ending."""
    return Path(path).suffix in EXPORTED_SUFFIXES


@cache
def readers_of(path: str) -> tuple[str, ...]:
    """The subtasks that read a field of an experiment, or any field of a section.

    Args:
        path: dotted path; items of lists may be marked: ``a.b[2].c``.
    """
    found: set[str] = set(_row(path))
    found.update(*(READ_BY[one] for one in READ_BY if one.startswith(f"{path}.")))
    return tuple(subtask for subtask in (*ALL, *AUTOML) if subtask in found)


def _row(path: str) -> tuple[str, ...]:
    bare = _ITEM.sub("", path)
    for name in _enclosing(bare):
        if name in NO_EFFECT:
            return ()
        if name in READ_BY:
            return READ_BY[name]
    return ()


def _enclosing(path: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while path:
        yield path
        path = path.rpartition(".")[0]


@dataclass(frozen=True)
class Reader:
    """A subtask, and whether it runs an exported graph, which brings its own network.

    Attributes:
        subtask: None reads every field.
        exported: whether a graph is given in a checkpoint's place.
    """

    subtask: str | None
    exported: bool = False

    def reads(self, path: str) -> bool:
        """Whether a field, or any field of a section, is read."""
        if self.subtask is None or self.subtask == "convert":
            return True
        if self.exported and _is_of_network(_ITEM.sub("", path)):
            return False
        readers = readers_of(path)
        return self.subtask in readers or (self.subtask in AUTOML and TRAIN[0] in readers)


def reader_of(spec: object, subtask: str | None, *, must_be_given: bool = False) -> Reader:
    """The reader that a subtask is, with what a spec names for its checkpoint or engine.

    Args:
        spec: the typed spec.
        subtask: None reads every field.
        must_be_given: whether a checkpoint or engine that is missing is reported anyway. Whether a network is
            wanted shows when it is given, so that until then nothing is wrong with the network.
    """
    if subtask == "quantize":
        path = getattr(getattr(spec, subtask, None), "model_path", None)
        return Reader(subtask, exported=bool(path and is_exported(path)))
    settings = getattr(spec, subtask, None) if subtask in PREDICT else None
    engine, checkpoint = getattr(settings, "trt_engine", None), getattr(settings, "checkpoint", None)
    if settings is not None and must_be_given and not engine and not checkpoint:
        return Reader(subtask, exported=True)
    return Reader(subtask, exported=bool(engine) or bool(checkpoint and is_exported(checkpoint)))


def _is_of_network(path: str) -> bool:
    """Whether a field describes a network, which an exported graph has within it."""
    if path in _OF_EXPORTED or any(name.startswith(f"{path}.") for name in _OF_EXPORTED):
        return False
    return any(one in _NOT_OF_EXPORTED for one in _enclosing(path))
