"""Where a subtask's results go."""

from __future__ import annotations

from pathlib import Path

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec


def results_dir_setting(spec: ExperimentSpec | ConvertSpec, subtask: str) -> str | None:
    """The folder as the spec gives it: ``<subtask>.results_dir``, else ``results_dir/<subtask>``."""
    if isinstance(spec, ConvertSpec):
        return spec.results_dir or None
    own = getattr(getattr(spec, subtask, None), "results_dir", None)
    if own:
        return str(own)
    return str(Path(spec.results_dir) / subtask) if spec.results_dir else None


def task_results_dir(spec: ExperimentSpec | ConvertSpec, subtask: str) -> Path:
    """The folder a subtask writes its results to.

    Args:
        spec: a typed spec.
        subtask: its section's own ``results_dir`` wins over the spec's.

    Raises:
        SpecError: neither is given.
    """
    setting = results_dir_setting(spec, subtask)
    if not setting:
        where = "results_dir" if isinstance(spec, ConvertSpec) else f"{subtask}.results_dir and results_dir"
        hint = "name a folder for the results: results_dir=/path/to/results"
        raise SpecError(Problem("is empty: there is no place for the results", where=where, hint=hint))
    return Path(setting)
