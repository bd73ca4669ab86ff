"""Whether a file is a checkpoint that a training can go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.safe_read import read_raw

NEEDED = ("state_dict", "optimizer", "meta")
COUNTS = ("epoch", "iter")


def require_resumable(path: str | Path, *, where: str) -> None:
    """Check, before anything is built, that mmengine can resume from a file.

    Args:
        path: the checkpoint.
        where: the spec key that named it, for messages.

    Raises:
        WeightsError: when it cannot be read, asks for code to be run, or holds weights alone.
    """
    content = read_raw(path).payload
    found = content if isinstance(content, Mapping) else {}
    missing = [name for name in NEEDED if not isinstance(found.get(name), Mapping)]
    if not missing:
        missing = [f"meta.{name}" for name in COUNTS if not isinstance(found["meta"].get(name), int)]
    if missing:
        raise WeightsError(
            Problem(
                f"holds no training to go on with: {', '.join(missing)} is missing",
                file=path,
                where=where,
                allowed="a checkpoint written by `ddetr-mm train`",
                mend="to start anew from its weights, name it as train.pretrained_model_path",
            )
        )
