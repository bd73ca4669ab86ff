"""Class heads of the two conventions: column = position in a list of classes, or column = category id.

mmdet and Hugging Face number classes by position, from 0. Specs, TAO and the original release number them by
category id, so that column 0 is the background. A head of the first kind is brought into a model of the
second by moving its columns; columns that no class of the file belongs to are set so that they never win.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.checkpoint import Checkpoint, CheckpointMeta, column_ids
from ddetr_mm.weights.coco_names import NUM_COLUMNS, coco_column_names
from ddetr_mm.weights.surgery import ColumnPlan, plan_columns

NEVER_LOGIT = -50.0
"""Bias of a column that must not be predicted: a probability of 2e-22, finite in half precision."""

_CLASS_KEY = re.compile(r"bbox_head\.cls_branches\.\d+\.(weight|bias)")


def numbered_by_position(meta: CheckpointMeta) -> bool:
    """Whether a checkpoint is known to number its classes by position.

    A bare state dict without class names says nothing; its columns are taken for what the model has.
    """
    known = meta.class_names is not None or meta.source_format == "hf"
    return meta.label_mode == "contiguous" and known and meta.num_classes is not None


def names_by_category_id(
    meta: CheckpointMeta, num_columns: int, *, path: str | Path | None = None
) -> tuple[str, ...] | None:
    """A name for each column of a head of ``num_columns`` whose columns are category ids.

    Positions become category ids by the file's own list of ids, for COCO's 80 classes by COCO's ids, else by
    counting from 1.

    Args:
        meta: of the checkpoint.
        num_columns: columns of the model's class head, the background's included.
        path: the checkpoint, for messages.

    Returns:
        ``background`` first, ``unknown`` for columns without a class; None where the names are not known.

    Raises:
        WeightsError: the head has too few columns for the file's classes.
    """
    if not numbered_by_position(meta):
        return meta.class_names
    names = _names(meta)
    ids = _category_ids(meta, names, num_columns)
    if max(ids) >= num_columns:
        raise WeightsError(
            Problem(
                f"has {len(names)} classes, numbered by position; a spec counts the background too",
                file=path,
                where="dataset.num_classes",
                value=num_columns,
                allowed=f"{max(ids) + 1} or more",
            )
        )
    columns = ["background", *["unknown"] * (num_columns - 1)]
    for name, number in zip(names, ids, strict=True):
        columns[number] = name
    return tuple(columns)


def to_category_ids(
    checkpoint: Checkpoint, num_columns: int, class_names: Sequence[str] | None = None
) -> Checkpoint:
    """A checkpoint whose class columns are category ids.

    Args:
        checkpoint: as read; not changed.
        num_columns: columns of the model's class head.
        class_names: the data's class names by category id, fillers where there is none; a class of the file
            goes to the column of its name. None, or a file without names: see :func:`names_by_category_id`.

    Returns:
        The checkpoint itself where its columns are category ids (or nothing is known of them), else one with
        the columns moved, and a note that says so.

    Raises:
        WeightsError: no class of the file is among ``class_names``, or the head is too small.
    """
    if not numbered_by_position(checkpoint.meta):
        return checkpoint
    names = _names(checkpoint.meta)
    by_name = class_names if checkpoint.meta.class_names else None
    wanted = by_name or names_by_category_id(checkpoint.meta, num_columns, path=checkpoint.path) or ()
    plan = plan_columns(names, wanted)
    if not plan.carried:
        raise WeightsError(
            Problem(
                "knows none of the data's classes",
                file=checkpoint.path,
                value=", ".join(names[:20]),
                allowed=", ".join(plan.fresh[:20]),
                mend="use the data the weights were trained for, or give its classes the file's names",
            )
        )
    state_dict = {
        key: _moved(value, len(wanted), plan) if _CLASS_KEY.fullmatch(key) else value
        for key, value in checkpoint.state_dict.items()
    }
    meta = replace(
        checkpoint.meta,
        label_mode="category_id",
        background_column=0,
        num_classes=len(wanted),
        class_names=tuple(wanted),
        category_ids=column_ids(wanted, "category_id"),
    )
    return replace(
        checkpoint,
        state_dict=state_dict,
        meta=meta,
        architecture=replace(checkpoint.architecture, num_classes=len(wanted)),
        notes=[*checkpoint.notes, _told(plan)],
    )


def _names(meta: CheckpointMeta) -> tuple[str, ...]:
    return meta.class_names or tuple(f"class_{number + 1}" for number in range(meta.num_classes or 0))


def _category_ids(meta: CheckpointMeta, names: Sequence[str], num_columns: int) -> list[int]:
    ids = [number for number in meta.category_ids or () if number is not None and number > 0]
    if len(ids) == len(names):
        return ids
    if num_columns >= NUM_COLUMNS and len(names) > 1:
        coco = plan_columns(coco_column_names(), names)
        if not coco.fresh:
            return [column for column, _position in sorted(coco.pairs, key=lambda pair: pair[1])]
    return list(range(1, len(names) + 1))


def _moved(value: Tensor, num_columns: int, plan: ColumnPlan) -> Tensor:
    """Weight (N, width) or bias (N,) of a class branch with its rows at their new places."""
    moved = value.new_full((num_columns, *value.shape[1:]), NEVER_LOGIT if value.dim() == 1 else 0.0)
    for source, column in plan.pairs:
        moved[column] = value[source]
    return moved


def _told(plan: ColumnPlan) -> str:
    text = (
        f"classes are numbered by position in the file and by category id here: {len(plan.carried)} are moved"
    )
    for names, what in ((plan.fresh, "unknown to the file and never predicted"), (plan.unused, "not needed")):
        if names:
            text += f", {len(names)} {what} ({', '.join(names[:5])}{' …' if len(names) > 5 else ''})"
    return text
