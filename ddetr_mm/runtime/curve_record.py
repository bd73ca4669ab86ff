"""The record that training curves are drawn from: one JSON object a line, appended while training runs.

Two kinds of lines: ``train`` with ``step``, ``epoch``, ``losses`` (name → mean since the last line) and
``learning_rates`` (group → value), and ``val`` with ``step``, ``epoch`` and ``metrics``. ``step`` counts
optimizer steps done, ``epoch`` epochs done, both since the beginning of training, not of the process.
A number that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddetr_mm.files import write_text_whole

Point = dict[str, Any]


class CurveRecord:
    """The points of a training run, in memory and in a file.

    Args:
        path: the file.
        resumed_step: steps that are already done. Points after it are dropped: they belong to work that
            was lost. At 0 an old file is replaced.
    """

    def __init__(self, path: str | os.PathLike[str], resumed_step: int = 0) -> None:
        self.path = Path(path)
        known = read_points(self.path) if resumed_step > 0 else []
        self.points = [point for point in known if point["step"] <= resumed_step]
        write_text_whole(self.path, "".join(_line(point) for point in self.points))

    def add_train(
        self, step: int, epoch: float, losses: Mapping[str, float], learning_rates: Mapping[str, float]
    ) -> None:
        """Add a point of training."""
        self._add(
            {
                "kind": "train",
                "step": step,
                "epoch": epoch,
                "losses": losses,
                "learning_rates": learning_rates,
            }
        )

    def add_val(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Add a point of validation."""
        self._add({"kind": "val", "step": step, "epoch": epoch, "metrics": metrics})

    def _add(self, point: Mapping[str, Any]) -> None:
        plain = _plain(point)
        self.points.append(plain)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(plain))


def read_points(path: str | os.PathLike[str]) -> list[Point]:
    """The points of a file; none if it is missing. A last line that a kill has cut off is left out.

    Raises:
        ValueError: a line before the last one is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    # What follows the last line's end is empty, unless the process was killed while it wrote.
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole_lines]


def _line(point: Point) -> str:
    return json.dumps(point, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        # One string for the same name in all points: a long run has tens of thousands.
        return {sys.intern(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (str, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
