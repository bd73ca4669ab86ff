"""Checkpoints of TAO, the original authors' release, Hugging Face and mmdet: read, convert, load."""

from ddetr_mm.weights.checkpoint import (
    FORMATS,
    Architecture,
    Checkpoint,
    CheckpointMeta,
    infer_architecture,
)
from ddetr_mm.weights.class_columns import (
    full_class_names,
    names_by_category_id,
    numbered_by_position,
    to_category_ids,
)
from ddetr_mm.weights.convert import convert_checkpoint
from ddetr_mm.weights.entries import Selection
from ddetr_mm.weights.load import fill_model, load_backbone, load_for_model
from ddetr_mm.weights.read import inspect_checkpoint, read_checkpoint
from ddetr_mm.weights.report import LoadReport

__all__ = [
    "FORMATS",
    "Architecture",
    "Checkpoint",
    "CheckpointMeta",
    "LoadReport",
    "Selection",
    "convert_checkpoint",
    "fill_model",
    "full_class_names",
    "infer_architecture",
    "inspect_checkpoint",
    "load_backbone",
    "load_for_model",
    "names_by_category_id",
    "numbered_by_position",
    "read_checkpoint",
    "to_category_ids",
]
