"""Columns of the class head: the class of each column, its category id, and moving columns by name.

Two conventions exist. mmdet and Hugging Face number classes by position, from 0 (label mode ``contiguous``).
Specs, TAO and the original release number them by category id, so that column 0 is the background (label mode
``category_id``). A head of the first kind is loaded into a model of the second by moving its columns; columns
without a class in the file are set so that they are never predicted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddetr_mm.classes import (
    BACKGROUND,
    UNKNOWN,
    Columns,
    compare_columns,
    filled_columns,
    is_filler,
    named_columns,
    some_of,
)
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.checkpoint import Checkpoint, CheckpointMeta, LabelMode

CLASS_KEY = re.compile(r"bbox_head\.cls_branches\.\d+\.(weight|bias)")
"""Canonical keys of the class head."""

HEAD_KEY = "bbox_head.cls_branches.0.weight"
"""The canonical key whose first axis is the class columns."""

# --- Names and category ids of the columns ---


def column_ids(class_names: Sequence[str] | None, label_mode: LabelMode) -> tuple[int | None, ...] | None:
    """Return the category id of every column, None for fillers; None where names or label mode do not say."""
    if class_names is None or label_mode != "category_id":
        return None
    return tuple(None if is_filler(name) else column for column, name in enumerate(class_names))


def with_label_convention(meta: CheckpointMeta, format_name: str, category_ids: Any) -> CheckpointMeta:
    """Return metadata with label mode, background and category ids as the format means them.

    Args:
        meta: what the file says, with its class names.
        format_name: the format of the file.
        category_ids: the list in mmdet's ``dataset_meta``, not trusted.
    """
    by_category: dict[str, Any] = {"label_mode": "category_id", "background_column": 0}
    if format_name in ("tao", "official"):
        return replace(meta, **by_category)
    if format_name == "hf":
        names = meta.class_names
        is_by_category = meta.num_classes == NUM_COLUMNS if names is None else is_filler(names[0])
        return replace(meta, **by_category) if is_by_category else meta
    ids = category_ids
    if isinstance(ids, (list, tuple)) and all(number is None or isinstance(number, int) for number in ids):
        equal = all(number is None or number == column for column, number in enumerate(ids))
        meta = replace(meta, category_ids=tuple(ids))
        # A class that the training data lack has no id either.
        first_is_class = meta.class_names is not None and not is_filler(meta.class_names[0])
        return (
            replace(meta, **by_category) if equal and ids and ids[0] is None and not first_is_class else meta
        )
    return meta


def full_class_names(class_names: Sequence[str] | None, num_columns: int) -> list[str]:
    """Return a name for each class column: the known ones (by default ``background``), then ``unknown``.

    Raises:
        WeightsError: there are more names than class columns.
    """
    names = list(class_names or [BACKGROUND])
    if len(names) > num_columns:
        raise WeightsError(
            Problem(
                "the class list and the checkpoint disagree",
                value=f"{len(names)} names",
                allowed=f"{num_columns}, the columns of the class head",
            )
        )
    return names + [UNKNOWN] * (num_columns - len(names))


# --- COCO's 91 columns ---

_BY_CATEGORY_ID = """
1 person 2 bicycle 3 car 4 motorcycle 5 airplane 6 bus 7 train 8 truck 9 boat 10 traffic_light
11 fire_hydrant 13 stop_sign 14 parking_meter 15 bench 16 bird 17 cat 18 dog 19 horse 20 sheep 21 cow
22 elephant 23 bear 24 zebra 25 giraffe 27 backpack 28 umbrella 31 handbag 32 tie 33 suitcase 34 frisbee
35 skis 36 snowboard 37 sports_ball 38 kite 39 baseball_bat 40 baseball_glove 41 skateboard 42 surfboard
43 tennis_racket 44 bottle 46 wine_glass 47 cup 48 fork 49 knife 50 spoon 51 bowl 52 banana 53 apple
54 sandwich 55 orange 56 broccoli 57 carrot 58 hot_dog 59 pizza 60 donut 61 cake 62 chair 63 couch
64 potted_plant 65 bed 67 dining_table 70 toilet 72 tv 73 laptop 74 mouse 75 remote 76 keyboard
77 cell_phone 78 microwave 79 oven 80 toaster 81 sink 82 refrigerator 84 book 85 clock 86 vase
87 scissors 88 teddy_bear 89 hair_drier 90 toothbrush
"""

NUM_COLUMNS = 91


def coco_column_names() -> tuple[str, ...]:
    """Return one name for each column: ``background`` for column 0, ``unknown`` for unused ids."""
    words = _BY_CATEGORY_ID.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    names = {int(number): name.replace("_", " ") for number, name in pairs}
    return filled_columns([names.get(column) for column in range(NUM_COLUMNS)])


# --- Matching columns by name ---


@dataclass(frozen=True)
class ColumnPlan:
    """Which column of the file's class head becomes which of the model's.

    Attributes:
        pairs: (column in the file, column in the model) for every class of both.
        carried: names of these classes as the model has them.
        fresh: names of the model's classes that the file does not have.
        unused: names of the file's classes that the model does not have.
    """

    pairs: tuple[tuple[int, int], ...]
    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """Return the plan in one sentence, for the report."""
        text = f"{len(self.carried)} classes by name"
        if self.carried:
            text += f" ({some_of(self.carried)})"
        if self.fresh:
            text += f", initial values for {len(self.fresh)} new ({some_of(self.fresh)})"
        if self.unused:
            text += f", {len(self.unused)} of the file not needed"
        return text


def plan_columns(theirs: Columns, ours: Columns) -> ColumnPlan:
    """Match the columns of two class heads by their names, see :func:`ddetr_mm.classes.find_names`.

    Columns without a class are matched only where both have none as column 0.

    Args:
        theirs: the class of each column of the file's class head, see :func:`ddetr_mm.classes.named_columns`.
        ours: likewise of the model's.
    """
    found = compare_columns(theirs, ours)
    pairs = list(found.shared)
    if theirs and ours and theirs[0] is None and ours[0] is None:
        pairs.insert(0, (0, 0))
    carried = tuple(str(ours[column]) for _source, column in found.shared)
    return ColumnPlan(tuple(pairs), carried, found.only_second, found.only_first)


def same_classes(theirs: Columns, ours: Columns) -> bool:
    """Return whether two lists name the same classes in the same columns."""
    found = compare_columns(theirs, ours)
    return len(theirs) == len(ours) and not (found.only_first or found.only_second or found.clashes)


def known_columns(meta: CheckpointMeta) -> tuple[str | None, ...] | None:
    """Return the class of every column of a checkpoint; None where it names no class."""
    if meta.class_names is None:
        return None
    columns = named_columns(meta.class_names, meta.category_ids)
    return columns if any(name is not None for name in columns) else None


def plan_head(
    checkpoint: Checkpoint, num_columns: int, class_names: Columns | None, *, by_category: bool
) -> tuple[ColumnPlan | None, list[str]]:
    """Decide how a checkpoint's class head is loaded into a model.

    Args:
        checkpoint: as read, or from :func:`to_category_ids`.
        num_columns: of the model's class head.
        class_names: the class of each of the model's columns, or None.
        by_category: whether the model's columns are category ids.

    Returns:
        The plan, or None to load the tensors unchanged; and notes for the report.

    Raises:
        WeightsError: the names are not as many as the model's columns.
    """
    meta, file_columns = checkpoint.meta, checkpoint.architecture.num_classes
    if class_names is not None and file_columns is not None and len(class_names) != num_columns:
        raise WeightsError(
            Problem(
                f"{len(class_names)} class names were given for a class head of {num_columns} columns",
                hint="give one name for each column, background included",
            )
        )
    names = known_columns(meta)
    ours = None if class_names is None else named_columns(class_names)
    if file_columns is not None and names is not None and ours is not None:
        if not same_classes(names, ours):
            return plan_columns(names, ours), []
    elif file_columns is not None and file_columns != num_columns:
        unknown = "the file's" if names is None else "the model's"
        note = (
            f"the class head has {file_columns} columns in the file and {num_columns} in the model, and"
            f" {unknown} classes are not known by name: it keeps its initial values"
        )
        if not (by_category and numbered_by_position(meta)):
            return None, [note]
        return plan_columns((), ours or ()), [note, _UNMATCHED]
    if by_category and numbered_by_position(meta):
        return plan_columns((), ours or ()), [_UNMATCHED]
    return None, []


_UNMATCHED = (
    "the file numbers its classes by position, the model by category id, and there are no names to match them"
    " by: the class head keeps its initial values"
)


def carried_rows(value: Tensor, place: Tensor, plan: ColumnPlan) -> Tensor:
    """Return the model's rows with those of the shared classes replaced by the file's."""
    result = place.detach().clone()
    for source, column in plan.pairs:
        result[column] = value[source].to(result)
    return result


# --- From positions to category ids ---

NEVER_LOGIT = -50.0
"""Bias of a column that is never predicted: a probability of 2e-22, finite in half precision."""


def numbered_by_position(meta: CheckpointMeta) -> bool:
    """Return whether a checkpoint is known to number its classes by position.

    A state dict without class names does not say; its columns are taken as the model's.
    """
    known = meta.class_names is not None or meta.source_format == "hf"
    return meta.label_mode == "contiguous" and known and meta.num_classes is not None


def names_by_category_id(
    meta: CheckpointMeta, num_columns: int, *, path: str | Path | None = None
) -> tuple[str, ...] | None:
    """Return a name for each column of a head whose columns are category ids.

    Positions become category ids by the file's own list of ids, for COCO's 80 classes by COCO's ids, else by
    counting from 1.

    Args:
        meta: of the checkpoint.
        num_columns: columns of the model's class head, background included.
        path: the checkpoint, for messages.

    Returns:
        ``background`` first, ``unknown`` for columns without a class; None where the names are not known.

    Raises:
        WeightsError: the head has too few columns for the file's classes.
    """
    if not numbered_by_position(meta):
        return None if known_columns(meta) is None else meta.class_names
    names = _known_names(meta)
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
    columns = [BACKGROUND, *[UNKNOWN] * (num_columns - 1)]
    for name, number in zip(names, ids, strict=True):
        columns[number] = name
    return tuple(columns)


def to_category_ids(
    checkpoint: Checkpoint, num_columns: int, class_names: Columns | None = None
) -> Checkpoint:
    """Return a checkpoint whose class columns are the category ids of the data that it will predict.

    Columns move where the file numbers its classes by position, and where a class of the data has another id
    in the file. Classes are known by name alone; those that one side lacks are noted.

    Args:
        checkpoint: as read; not changed.
        num_columns: columns of the model's class head.
        class_names: the data's classes by category id, see :func:`ddetr_mm.classes.named_columns`. None, or a
            file without names: see :func:`names_by_category_id`.

    Returns:
        The checkpoint itself where its columns fit or its classes are unknown, else one with the columns
        moved and a note.

    Raises:
        WeightsError: no class of the file is among ``class_names``, or the head is too small.
    """
    meta = checkpoint.meta
    data = None if class_names is None else named_columns(class_names)
    if data is not None and not any(name is not None for name in data):
        data = None
    known = known_columns(meta)
    if numbered_by_position(meta):
        theirs: Columns = known or _known_names(meta)
        if data is None or known is None:
            data = named_columns(names_by_category_id(meta, num_columns, path=checkpoint.path) or ())
        wanted = data
    elif data is None or known is None or checkpoint.architecture.num_classes is None:
        return checkpoint
    else:
        theirs, wanted = known, data
        if not compare_columns(known, data).clashes and num_columns == len(known):
            note = _unmatched_note(plan_columns(known, data), checkpoint)
            return replace(checkpoint, notes=[*checkpoint.notes, *note])
    return _moved_checkpoint(checkpoint, plan_columns(theirs, wanted), wanted)


def head_columns(theirs: Columns, data: Columns, *, path: str | Path) -> tuple[list[int | None] | None, str]:
    """Return which column of an exported graph each category id of the data is; None where they agree.

    Args:
        theirs: the classes of the graph's columns.
        data: those of the data, by category id.
        path: the graph, for messages.

    Returns:
        A column of the graph for each of ``data``, None for classes that the graph lacks; and a note.

    Raises:
        WeightsError: they have no class in common.
    """
    plan = plan_columns(theirs, data)
    _require_shared(plan, path)
    if not compare_columns(theirs, data).clashes:
        return None, _lacking(plan)
    columns: list[int | None] = [None] * len(data)
    for source, column in plan.pairs:
        columns[column] = source
    return columns, _moved_note(plan, by_position=False)


def _unmatched_note(plan: ColumnPlan, checkpoint: Checkpoint) -> list[str]:
    _require_shared(plan, checkpoint.path)
    text = _lacking(plan)
    return [text] if text else []


def _require_shared(plan: ColumnPlan, path: str | Path) -> None:
    """Refuse a file that has no class of the data."""
    if plan.carried:
        return
    raise WeightsError(
        Problem(
            "has none of the data's classes",
            file=path,
            value=some_of(plan.unused, 20),
            allowed=some_of(plan.fresh, 20),
            hint="use the data the weights were trained for, or give its classes the file's names",
        )
    )


def _lacking(plan: ColumnPlan) -> str:
    parts = []
    if plan.fresh:
        parts.append(f"{len(plan.fresh)} classes of the data are unknown to the file ({some_of(plan.fresh)})")
    if plan.unused:
        parts.append(f"{len(plan.unused)} classes of the file are not in the data ({some_of(plan.unused)})")
    return "; ".join(parts)


def _moved_checkpoint(checkpoint: Checkpoint, plan: ColumnPlan, wanted: Columns) -> Checkpoint:
    by_position = numbered_by_position(checkpoint.meta)
    _require_shared(plan, checkpoint.path)
    state_dict = {
        key: _moved(value, len(wanted), plan) if CLASS_KEY.fullmatch(key) else value
        for key, value in checkpoint.state_dict.items()
    }
    names = tuple(
        (UNKNOWN if column else BACKGROUND) if name is None else name for column, name in enumerate(wanted)
    )
    meta = replace(
        checkpoint.meta,
        label_mode="category_id",
        background_column=0,
        num_classes=len(wanted),
        class_names=names,
        category_ids=tuple(None if name is None else column for column, name in enumerate(wanted)),
    )
    return replace(
        checkpoint,
        state_dict=state_dict,
        meta=meta,
        architecture=replace(checkpoint.architecture, num_classes=len(wanted)),
        notes=[*checkpoint.notes, _moved_note(plan, by_position=by_position)],
    )


def _known_names(meta: CheckpointMeta) -> tuple[str, ...]:
    return meta.class_names or tuple(f"class_{number + 1}" for number in range(meta.num_classes or 0))


def _category_ids(meta: CheckpointMeta, names: Sequence[str], num_columns: int) -> list[int]:
    ids = [number for number in meta.category_ids or () if number is not None and number > 0]
    if len(ids) == len(names):
        return ids
    if num_columns >= NUM_COLUMNS and len(names) > 1:
        coco = plan_columns(named_columns(coco_column_names()), names)
        if not coco.fresh:
            return [column for column, _position in sorted(coco.pairs, key=lambda pair: pair[1])]
    return list(range(1, len(names) + 1))


def _moved(value: Tensor, num_columns: int, plan: ColumnPlan) -> Tensor:
    """Return the weight (N, width) or bias (N,) of a class branch with its rows moved."""
    moved = value.new_full((num_columns, *value.shape[1:]), NEVER_LOGIT if value.dim() == 1 else 0.0)
    for source, column in plan.pairs:
        moved[column] = value[source]
    return moved


def _moved_note(plan: ColumnPlan, *, by_position: bool) -> str:
    if by_position:
        text = "classes are numbered by position in the file and by category id here"
    else:
        text = "the file and the data number the same classes differently"
    text += f": {len(plan.carried)} are moved by name"
    moves = [f"{name} {source}->{column}" for name, (source, column) in _moves(plan)]
    if moves:
        text += f" ({some_of(moves)})"
    for names, what in ((plan.fresh, "unknown to the file and never predicted"), (plan.unused, "not needed")):
        if names:
            text += f", {len(names)} {what} ({some_of(names)})"
    return text


def _moves(plan: ColumnPlan) -> list[tuple[str, tuple[int, int]]]:
    pairs = plan.pairs[len(plan.pairs) - len(plan.carried) :]
    return [(name, pair) for name, pair in zip(plan.carried, pairs, strict=True) if pair[0] != pair[1]]
