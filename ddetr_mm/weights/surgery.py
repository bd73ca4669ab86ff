"""Carrying a class head over to another list of classes, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ddetr_mm.weights.checkpoint import is_filler


@dataclass(frozen=True)
class ColumnPlan:
    """Which column of a class head goes where.

    Attributes:
        pairs: (column in the file, column in the model) for every class found in both.
        carried: names of these classes as the model has them.
        fresh: names of the model's classes that the file does not know.
        unused: names of the file's classes that the model does not have.
    """

    pairs: tuple[tuple[int, int], ...]
    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """The plan in one sentence, for the report."""
        text = f"{len(self.carried)} classes by name"
        if self.carried:
            text += f" ({_some(self.carried)})"
        if self.fresh:
            text += f", initial values for {len(self.fresh)} new ({_some(self.fresh)})"
        if self.unused:
            text += f", {len(self.unused)} of the file not needed"
        return text


def plan_columns(file_names: Sequence[str], model_names: Sequence[str]) -> ColumnPlan:
    """Match the columns of two class heads by their names.

    Case, blanks, hyphens and underscores do not count. Columns that stand for no class (``background``,
    ``N/A`` …) are matched only where both have one in the first place.

    Args:
        file_names: one name a column of the file's class head.
        model_names: one name a column of the model's.
    """
    where: dict[str, int] = {}
    for column, name in enumerate(file_names):
        if not is_filler(name):
            where.setdefault(_essence(name), column)
    pairs: list[tuple[int, int]] = []
    carried: list[str] = []
    fresh: list[str] = []
    if file_names and model_names and is_filler(file_names[0]) and is_filler(model_names[0]):
        pairs.append((0, 0))
    for column, name in enumerate(model_names):
        if is_filler(name):
            continue
        source = where.get(_essence(name))
        if source is None:
            fresh.append(name)
        else:
            pairs.append((source, column))
            carried.append(name)
    used = {_essence(name) for name in carried}
    unused = [name for name in file_names if not is_filler(name) and _essence(name) not in used]
    return ColumnPlan(tuple(pairs), tuple(carried), tuple(fresh), tuple(unused))


def same_classes(file_names: Sequence[str], model_names: Sequence[str]) -> bool:
    """Whether two lists name the same classes in the same columns (fillers of any name being equal)."""
    return [_column(name) for name in file_names] == [_column(name) for name in model_names]


def _column(name: str) -> str:
    return "" if is_filler(name) else _essence(name)


def _essence(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).lower()


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (" …" if len(names) > shown else "")
