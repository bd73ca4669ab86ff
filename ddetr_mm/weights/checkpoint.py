"""A checkpoint in memory: canonical weights and all that its file says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ddetr_mm.weights.architecture import Architecture
from ddetr_mm.weights.key_engine import KeyTrace
from ddetr_mm.weights.key_maps import CheckpointFormat

LabelMode = Literal["category_id", "contiguous"]
FORMATS: tuple[CheckpointFormat, ...] = ("mmdet", "tao", "official", "hf")

ZERO_PADDED_VALUES: dict[str, bool] = {"mmdet": True, "tao": False, "official": True, "hf": True}
"""Whether a format's own implementation zeroes attention values at padded positions."""

META_KEY = "ddetr_mm"
"""Under this key files of ours carry :meth:`CheckpointMeta.to_dict` (mmdet: inside ``meta``)."""

FILLER_NAMES = frozenset({"", "n/a", "na", "background", "unknown", "__background__", "none"})
"""Names of columns that stand for no class, lower case."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What weights mean beyond their values.

    Attributes:
        source_format: the format the weights were first read from; conversions keep it.
        zero_padded_values: whether attention values at padded positions must be zeroed for the
            predictions the weights were trained for.
        label_mode: ``category_id``: column = category id of the annotations; ``contiguous``: column =
            position in the list of classes.
        background_column: the column that is never a label, or None.
        num_classes: columns of the class head, or None without a head.
        class_names: a name for every column, or None when unknown.
        category_ids: category id of every column (None for background and gaps), or None when unknown.
        with_box_refine, two_stage: the decoder's scheme.
        neck_bias: False when the weights come from a neck without bias; conversions that need one fill in
            zeros, and writing mmdet's names takes the zeros out again.
        num_heads: attention heads where the file says so.
        dilation: whether the backbone's last stage is dilated, which no shape shows; None where the file
            does not say.
        num_queries: object queries (two-stage: proposals) where the file says so.
        epoch: epoch the file was written after, where it says so.
        spec: the experiment spec the weights belong to, as plain data, or None.
    """

    source_format: str
    zero_padded_values: bool
    label_mode: LabelMode
    background_column: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    category_ids: tuple[int | None, ...] | None = None
    with_box_refine: bool = False
    two_stage: bool = False
    neck_bias: bool = True
    num_heads: int | None = None
    dilation: bool | None = None
    num_queries: int | None = None
    epoch: int | None = None
    spec: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data (lists, strings, numbers) for a file's metadata; unknown values are left out."""
        values: dict[str, Any] = {
            "source_format": self.source_format,
            "zero_padded_values": self.zero_padded_values,
            "label_mode": self.label_mode,
            "background_column": self.background_column,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names) if self.class_names else None,
            "category_ids": list(self.category_ids) if self.category_ids else None,
            "with_box_refine": self.with_box_refine,
            "two_stage": self.two_stage,
            "neck_bias": self.neck_bias,
            "num_heads": self.num_heads,
            "dilation": self.dilation,
            "num_queries": self.num_queries,
            "epoch": self.epoch,
            "spec": self.spec,
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass
class Checkpoint:
    """Weights under canonical names.

    Attributes:
        state_dict: canonical key → tensor. Tensors may be backed by the file they were read from.
        format: the format of the file.
        meta: what the weights mean.
        architecture: what the network looks like.
        path: the file or folder.
        trace: which key of the file became which canonical key.
        notes: what a reader should know, one sentence each.
    """

    state_dict: dict[str, Tensor]
    format: CheckpointFormat
    meta: CheckpointMeta
    architecture: Architecture
    path: Path
    trace: KeyTrace
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without using its weights; see :func:`inspect_checkpoint`."""

    path: Path
    format: CheckpointFormat
    class_names: tuple[str, ...] | None
    category_ids: tuple[int | None, ...] | None
    num_classes: int | None
    zero_padded_values: bool
    label_mode: LabelMode
    background_column: int | None
    architecture: Architecture
    meta: CheckpointMeta
    notes: tuple[str, ...] = ()


def is_filler(name: str) -> bool:
    """Whether a column's name says that it is no class (``background``, ``N/A`` …)."""
    return name.strip().lower() in FILLER_NAMES


def column_ids(class_names: Sequence[str] | None, label_mode: LabelMode) -> tuple[int | None, ...] | None:
    """Category id of every column, as far as the names and the label mode tell it."""
    if class_names is None or label_mode != "category_id":
        return None
    return tuple(None if is_filler(name) else column for column, name in enumerate(class_names))


def meta_from_dict(values: Mapping[str, Any], default: CheckpointMeta) -> CheckpointMeta:
    """Metadata as :meth:`CheckpointMeta.to_dict` wrote it, ``default`` for whatever it leaves out.

    Values of the wrong type are ignored: a file is not trusted to hold what it should.
    """
    changes: dict[str, Any] = {}
    for key in ("zero_padded_values", "with_box_refine", "two_stage", "neck_bias", "dilation"):
        if isinstance(values.get(key), bool):
            changes[key] = values[key]
    for key in ("background_column", "num_heads", "num_queries", "epoch"):
        if isinstance(values.get(key), int) and not isinstance(values[key], bool):
            changes[key] = values[key]
    if isinstance(values.get("source_format"), str):
        changes["source_format"] = values["source_format"]
    if values.get("label_mode") in ("category_id", "contiguous"):
        changes["label_mode"] = values["label_mode"]
        changes.setdefault("background_column", None)
    names = values.get("class_names")
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        changes["class_names"] = tuple(names) or None
    ids = values.get("category_ids")
    if isinstance(ids, (list, tuple)) and all(number is None or isinstance(number, int) for number in ids):
        changes["category_ids"] = tuple(ids) or None
    if isinstance(values.get("spec"), Mapping):
        changes["spec"] = dict(values["spec"])
    return replace(default, **changes)
