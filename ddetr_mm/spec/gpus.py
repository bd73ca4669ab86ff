"""``num_gpus`` and ``gpu_ids``: which of the two decides where they disagree."""

from __future__ import annotations

from ddetr_mm.spec.overrides import OVERRIDE
from ddetr_mm.spec.schema import DistributedTask, ExperimentSpec
from ddetr_mm.spec.source import Branch

GPU_SECTIONS = ("train", "evaluate", "inference")
_PAIR = ("num_gpus", "gpu_ids")


def drop_overruled_gpus(tree: Branch) -> list[str]:
    """Forget the file's pair where the command line names either of it; say so.

    The command line comes before the spec, and the spec before the defaults: a file's ``gpu_ids: [0, 1]``
    must not enlarge a ``train.num_gpus=1`` that was asked for now.
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
    """Make ``num_gpus == len(gpu_ids)`` in every section, following the one with more GPUs.

    Args:
        spec: changed in place.
        given: dotted paths the user wrote; a disagreement between two of them is noted.

    Returns:
        One note per disagreement.
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
                f"{name}.num_gpus {count} and {name}.gpu_ids {ids} disagree; the larger number wins: "
                f"num_gpus {task.num_gpus}, gpu_ids {task.gpu_ids}"
            )
    return notes
