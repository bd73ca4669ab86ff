"""A spec file and overrides to a checked, typed spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec.bind import Binder, dotted
from ddetr_mm.spec.bounds import check_values
from ddetr_mm.spec.effects import notes_of_doubt, notes_without_effect
from ddetr_mm.spec.gpus import agree_on_gpus, drop_overruled_gpus
from ddetr_mm.spec.interpolation import Steps, unbounded_interpolations, unresolved_interpolations
from ddetr_mm.spec.mandatory import incomplete_sources, missing_fields
from ddetr_mm.spec.overrides import apply_overrides
from ddetr_mm.spec.rules import violations
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.source import Branch, parse_yaml, read_text
from ddetr_mm.spec.suggest import nearest
from ddetr_mm.spec.walk import SUBTASKS, fields_of, root_of

MAX_PROBLEMS = 100

Spec = ExperimentSpec | ConvertSpec


@dataclass(frozen=True)
class LoadedSpec:
    """A spec that passed all checks.

    Attributes:
        spec: an :class:`ExperimentSpec`, or a :class:`ConvertSpec` for convert.
        path: the file it came from.
        subtask: the subtask it was checked for; None: checked by every rule, and nothing is mandatory.
        origin: dotted path of everything the user wrote (fields, their items, and sections) →
            ``"line 12"`` or ``"override"``; absent: the default.
        notes: one line each for what was accepted in another form, overruled, or has no effect.
    """

    spec: Spec
    path: Path
    subtask: str | None
    origin: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Collector:
    """Turns faults at dotted paths into problems that name file and line."""

    def __init__(self, file: Path, binder: Binder) -> None:
        self.file = file
        self.binder = binder
        self.problems: list[Problem] = []

    def place(self, path: str) -> str:
        """``"train.optim.lr, line 12"``; the line of the nearest enclosing key that has one."""
        where = self.binder.where
        if path in where:
            return f"{path}, {where[path]}"
        above = path
        while above:
            above = above[: max(above.rfind("."), above.rfind("["), 0)]
            if above in where:
                known = where[above]
                return f"{path} (default), {known}" if known.startswith("line") else f"{path} (default)"
        return f"{path} (default)"

    def has_fault_below(self, path: str) -> bool:
        """Whether something inside the value at ``path`` is at fault."""
        return any(name.startswith((path + ".", path + "[")) for name in self.binder.faulty)

    def report(self, path: str | Steps, what: str, **more: Any) -> None:
        """Record a fault unless the same value has one already."""
        name = path if isinstance(path, str) else dotted(path)
        if name in self.binder.faulty:
            return
        self.binder.faulty.add(name)
        if name == "encryption_key":
            more.pop("value", None)
        self.problems.append(Problem(what, file=self.file, where=self.place(name), **more))


def guess_root(tree: Branch) -> type[ExperimentSpec] | type[ConvertSpec]:
    """Which kind of spec a file holds, by its top-level keys."""
    experiment, convert = set(fields_of(ExperimentSpec)), set(fields_of(ConvertSpec))
    keys = set(tree.items)
    is_convert = keys & (convert - experiment) and not keys & (experiment - convert)
    return ConvertSpec if is_convert else ExperimentSpec


def load_spec(
    path: str | Path,
    overrides: Sequence[str] = (),
    subtask: str | None = None,
    require_mandatory: bool = True,
) -> LoadedSpec:
    """Load a spec, apply overrides, and check all of it.

    Args:
        path: the YAML file. An empty file means all defaults.
        overrides: ``key=value`` texts, applied in order; see :mod:`ddetr_mm.spec.overrides`.
        subtask: one of :data:`~ddetr_mm.spec.walk.SUBTASKS`: the rules of that subtask apply. None applies
            the rules of all, and tells a convert spec from an experiment by its keys.
        require_mandatory: check too that ``subtask`` finds everything it cannot do without.

    Returns:
        The typed spec with where each value came from, and notes.

    Raises:
        SpecError: with every problem found.
    """
    if subtask is not None and subtask not in SUBTASKS:
        close = nearest(subtask, SUBTASKS)
        hint = f"did you mean {close}?" if close else None
        raise SpecError(Problem("is not a subtask", value=subtask, allowed=SUBTASKS, hint=hint))
    file = Path(path)
    tree, problems = parse_yaml(read_text(file), file)
    if tree is None and problems:
        raise SpecError(*problems)
    if tree is None:
        tree = Branch({}, "line 1")
    root = root_of(subtask)
    notes: list[str] = []
    if isinstance(tree, Branch):
        if subtask is None:
            root = guess_root(tree)
        problems += apply_overrides(tree, root, overrides, file)
        if root is ExperimentSpec:
            notes += drop_overruled_gpus(tree)
    binder = Binder(root, file)
    values = binder.section(tree, root)
    collector = _Collector(file, binder)
    spec = _merge(root, values, binder.interpolations, collector)
    _check(spec, subtask, require_mandatory, collector)
    SpecError.collect(_shortened([*problems, *binder.problems, *collector.problems], file))
    notes = binder.notes + notes
    if isinstance(spec, ExperimentSpec):
        notes += agree_on_gpus(spec, set(binder.where))
    notes += notes_without_effect(spec, binder.where)
    notes += notes_of_doubt(spec, binder.where)
    return LoadedSpec(spec, file, subtask, dict(binder.where), notes)


def _shortened(problems: list[Problem], file: Path) -> list[Problem]:
    """The first problems, and how many more there are: a wrong file must not flood the screen."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], Problem(f"{more} more problems are not shown", file=file)]


def _check(spec: Spec, subtask: str | None, require_mandatory: bool, collector: _Collector) -> None:
    """Check values, rules between fields, and what the subtask needs."""
    check_values(spec, collector.report)
    faults = list(violations(spec, subtask, set(collector.binder.faulty)))
    if isinstance(spec, ExperimentSpec):
        faults += incomplete_sources(spec)
    if subtask is not None and require_mandatory:
        faults += (one for one in missing_fields(spec, subtask) if not collector.has_fault_below(one.path))
    for fault in faults:
        collector.report(fault.path, fault.what, **fault.words())


@cache
def _defaults(root: Any) -> tuple[DictConfig, dict[Any, Any]]:
    """The defaults of a kind of spec, as OmegaConf's typed config and as plain values. Not to be changed."""
    config = OmegaConf.structured(root)
    plain = OmegaConf.to_container(config)
    if not isinstance(plain, dict):
        raise TypeError(f"OmegaConf made a {type(plain)} of the schema")
    return config, plain


def _merge(
    root: type[ExperimentSpec] | type[ConvertSpec],
    values: dict[str, Any],
    interpolations: list[Steps],
    collector: _Collector,
) -> Spec:
    """Merge values into the defaults and resolve interpolations; those that cannot be are left out."""
    kind: Any = root  # mypy takes the class for an instance, which cannot be hashed
    base, defaults = _defaults(kind)
    bad = unbounded_interpolations(_overlay(defaults, values), interpolations, collector.report)
    # With some taken out, those that refer to them would only repeat the complaint.
    report = _silent if bad else collector.report
    while True:
        for path in bad:
            removed = _remove(values, path)
            interpolations = [left for left in interpolations if left[: len(removed)] != removed]
        config = OmegaConf.merge(base, values)
        bad = unresolved_interpolations(config, interpolations, report)
        if not bad:
            break
    spec = OmegaConf.to_object(config)
    if not isinstance(spec, (ExperimentSpec, ConvertSpec)):
        raise TypeError(f"OmegaConf made a {type(spec)} of the schema")
    return spec


def _silent(*_: Any, **__: Any) -> None:
    """Report nothing."""


def _overlay(base: dict[Any, Any], values: dict[str, Any]) -> dict[Any, Any]:
    """``base`` with ``values`` on top, section by section."""
    result = dict(base)
    for name, value in values.items():
        below = base.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _overlay(below, value)
        result[name] = value
    return result


def _remove(values: Any, path: Steps) -> Steps:
    """Take one value out of nested dicts; an item of a list takes the whole list with it.

    Returns:
        The path of what was taken out.
    """
    for depth, step in enumerate(path):
        if depth + 1 == len(path) or isinstance(path[depth + 1], int):
            values.pop(step, None)
            return path[: depth + 1]
        values = values.get(step, {})
    return path
