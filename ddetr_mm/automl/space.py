"""The search space: fields of the schema that AutoML searches, as ``ddetr_mm.automl`` changes them.

A parameter is one field with its range or choices. :func:`search_space` checks what the spec asks for and
leaves out, with a note each, fields that make no difference under this spec. Imports neither torch nor
Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec import ExperimentSpec, LoadedSpec, get_field
from ddetr_mm.spec.fields import (
    Kind,
    SchemaField,
    Searched,
    Section,
    all_paths,
    canonical_option,
    fields_of,
    nearest,
)
from ddetr_mm.spec.notes import CONDITIONS, NO_EFFECT
from ddetr_mm.spec.own_schema import AutomlParameter
from ddetr_mm.spec.readers import TRAIN, Reader, readers_of
from ddetr_mm.spec.rules import Fault, violations

SECTION = "ddetr_mm.automl"
UNBOUNDED = 4
"""A field without an upper bound is searched up to so many times the spec's value."""
GRID_POINTS = 3
"""Values of a range on a grid, where it has more than :data:`MOST_WHOLE` whole numbers."""
MOST_WHOLE = 5

NEUTRAL = frozenset(
    {
        "dataset.pin_memory",
        "dataset.dataset_type",
        "train.activation_checkpoint",
        "train.checkpoint_interval",
        "train.checkpoint_interval_unit",
        "train.verbose",
        "ddetr_mm.data_timeout_s",
        "ddetr_mm.keep_best",
        "ddetr_mm.log_interval",
        "ddetr_mm.profile",
        "ddetr_mm.quick_check",
    }
)
"""Fields that train reads and that cannot change what a run learns, besides those the schema marks."""

SET_BY_THE_SEARCH = {
    "encryption_key": "it is the same for all trials",
    "results_dir": "every trial has a folder of its own",
    "train.results_dir": "every trial has a folder of its own",
    "train.num_epochs": f"set {SECTION}.max_epochs",
    "train.is_dry_run": "a trial has to train",
    "train.num_gpus": f"the GPUs are divided by {SECTION}.concurrent",
    "train.num_nodes": "a trial runs on one machine",
    "train.resume_training_checkpoint_path": "a trial resumes from its own checkpoints",
    "ddetr_mm.device": "it is the same for all trials",
    "ddetr_mm.max_hours": f"set {SECTION}.timeout_hours",
    "ddetr_mm.stop_after_epoch": f"set {SECTION}.max_epochs",
}
_SECTIONS_SET = ("wandb.", "train.checkpointer.", f"{SECTION}.")


@dataclass(frozen=True)
class Parameter:
    """One searched field.

    Attributes:
        path: dotted path of the field.
        is_whole: whether its values are whole numbers.
        own: its value in the spec.
        low: smallest value of a range.
        high: largest value of a range.
        log: whether a range is drawn from evenly over the orders of magnitude.
        choices: the only values, in place of a range.
        at_most: a field whose value this one must not exceed.
        more_than: a field whose value this one must exceed.
    """

    path: str
    is_whole: bool
    own: Any
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] | None = None
    at_most: str | None = None
    more_than: str | None = None

    def words(self) -> str:
        """What is tried, in words."""
        if self.choices is not None:
            return "one of " + ", ".join(map(shown, self.choices))
        return f"{self.low:g} to {self.high:g}" + (" in log space" if self.log else "")

    def distribution(self) -> Any:
        """The range or the choices as Optuna has them."""
        from optuna import distributions

        if self.choices is not None:
            return distributions.CategoricalDistribution(self.choices)
        if self.is_whole:
            return distributions.IntDistribution(int(self.low), int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)

    def grid(self) -> list[Any]:
        """The values on a grid: choices, a few whole numbers, else ends and middle of the range."""
        if self.choices is not None:
            return list(self.choices)
        if self.is_whole and self.high - self.low < MOST_WHOLE:
            return list(range(int(self.low), int(self.high) + 1))
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        points = (self.low, middle, self.high)
        return sorted({round(one) for one in points}) if self.is_whole else list(points)

    def nearest_own(self) -> Any:
        """The spec's own value, moved into the range; the first choice where it is none of them."""
        if self.choices is not None:
            return self.own if self.own in self.choices else self.choices[0]
        value = min(max(self.low if self.own is None else self.own, self.low), self.high)
        return int(value) if self.is_whole else float(value)


@dataclass(frozen=True)
class SearchSpace:
    """All searched fields.

    Attributes:
        parameters: by path, in the schema's order.
        notes: a line for every field that is left out although TAO or the spec marks it.
        limits: the spec's values of the fields that parameters depend on.
    """

    parameters: Mapping[str, Parameter]
    notes: tuple[str, ...]
    limits: Mapping[str, Any] = field(default_factory=dict)

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Drawn values as a spec takes them: those that depend on another field are moved to what it allows.

        Args:
            drawn: a value for each parameter.
        """
        values = {path: drawn[path] for path in self.parameters}
        for path, one in self.parameters.items():
            if one.at_most is not None:
                values[path] = min(values[path], values.get(one.at_most, self.limits.get(one.at_most)))
            if one.more_than is not None:
                values[path] = max(
                    values[path], values.get(one.more_than, self.limits.get(one.more_than)) + 1
                )
        return values

    def own(self) -> dict[str, Any]:
        """The spec's own values."""
        return {path: one.own for path, one in self.parameters.items()}

    def grid_size(self) -> int:
        """Number of points of the grid."""
        return math.prod(len(one.grid()) for one in self.parameters.values())


def shown(value: Any) -> str:
    """A value for a table: numbers with four digits, text as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- Specs with other values ---


def with_values(spec: ExperimentSpec, values: Mapping[str, Any]) -> ExperimentSpec:
    """A copy of a spec with other values.

    Args:
        spec: the spec.
        values: dotted path → value, of fields that are no part of a list.

    Raises:
        ValidationError: pydantic's, for a value of the wrong type or outside the field's bounds.
    """
    plain = spec.model_dump()
    for path, value in values.items():
        *above, name = path.split(".")
        part = plain
        for step in above:
            part = part[step]
        part[name] = value
    return ExperimentSpec.model_validate(plain)


def faults_with(spec: ExperimentSpec, values: Mapping[str, Any]) -> list[Fault]:
    """The rules between fields that a spec with these values breaks, where it breaks none without them."""
    reader = Reader("automl")
    known = {(one.path, one.what) for one in violations(spec, reader, ())}
    found = violations(with_values(spec, values), reader, ())
    return [one for one in found if (one.path, one.what) not in known]


# --- The space of a spec ---


def search_space(loaded: LoadedSpec) -> SearchSpace:
    """The fields that a spec has searched, with their ranges.

    Args:
        loaded: a spec that was checked for ``automl``.

    Raises:
        SpecError: with everything that is wrong with ``ddetr_mm.automl.parameters``, or nothing to search.
    """
    return _Builder(loaded).build()


class _Builder:
    """Collects parameters, notes and problems."""

    def __init__(self, loaded: LoadedSpec) -> None:
        assert isinstance(loaded.spec, ExperimentSpec)  # noqa: S101 - automl has no other kind of spec
        self.loaded = loaded
        self.spec = loaded.spec
        self.settings = loaded.spec.ddetr_mm.automl
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.fields = dict(_scalar_fields(ExperimentSpec, ""))

    def build(self) -> SearchSpace:
        entries = self._entries()
        found: dict[str, Parameter] = {}
        for path, one in self.fields.items():
            index = entries.get(path)
            entry = None if index is None else self.settings.parameters[index]
            default = one.searched is not None and self.settings.default_parameters
            if not (default if entry is None else entry.search):
                continue
            if entry is None and one.searched is not None and one.searched.is_neutral:
                self.notes.append(f"{path} is not searched: it cannot change the result")
                continue
            parameter = self._parameter(path, one, entry, index)
            if parameter is not None:
                found[path] = parameter
        found = self._bounded_by_dependents(found)
        found = {path: one for path, one in found.items() if self._matters(path, found)}
        for path, one in list(found.items()):
            if one.choices is None and not one.low < one.high:
                self.notes.append(f"{path} is not searched: {one.low:g} is its only value under this spec")
                del found[path]
        self._check_values(found, entries)
        SpecError.collect(self.problems)
        if not found:
            hint = f"add one to {SECTION}.parameters, or set {SECTION}.default_parameters=true"
            raise SpecError(Problem("leaves no field to search", where=SECTION, hint=hint))
        limits = {
            name: get_field(self.spec, name)
            for one in found.values()
            for name in (one.at_most, one.more_than)
            if name is not None
        }
        return SearchSpace(found, tuple(self.notes), limits)

    # entries of ddetr_mm.automl.parameters

    def _entries(self) -> dict[str, int]:
        """Path → position of its entry, for the entries that name a field that can be searched."""
        entries: dict[str, int] = {}
        for index, entry in enumerate(self.settings.parameters):
            path = entry.field.strip()
            if path in entries:
                self._add(index, "field", "is listed twice", path)
            elif self._can_be_searched(index, path):
                entries[path] = index
        return entries

    def _can_be_searched(self, index: int, path: str) -> bool:
        reason = SET_BY_THE_SEARCH.get(path)
        if path.startswith(_SECTIONS_SET):
            reason = "it is the same for all trials"
        if reason is not None:
            self._add(index, "field", "is set by the search itself", path, hint=reason)
        elif path not in self.fields and path in all_paths(ExperimentSpec):
            allowed = "a field with a single value: a number, true or false, or text"
            self._add(index, "field", "is a list, a mapping or a section", path, allowed)
        elif path not in self.fields:
            last = path.rpartition(".")[2]
            same = [one for one in self.fields if one.rpartition(".")[2] == last]
            close = same[0] if len(same) == 1 else nearest(path, self.fields)
            hint = f"did you mean {close}?" if close else "give its dotted path, as in train.optim.lr"
            self._add(index, "field", "is not a field of the spec", path, hint=hint)
        elif path not in _NOTED and TRAIN[0] not in readers_of(path):
            what = "is not read by train, so that it cannot change a trial"
            self._add(index, "field", what, path)
        else:
            return True
        return False

    def _add(
        self,
        index: int,
        key: str,
        what: str,
        value: Any,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        place = f"{SECTION}.parameters[{index}].{key}"
        origin = self.loaded.origin.get(place) or self.loaded.origin.get(place.rpartition(".")[0])
        where = f"{place}, {origin}" if origin else place
        self.problems.append(
            Problem(what, file=self.loaded.path, where=where, value=value, allowed=allowed, hint=hint)
        )

    # ranges and choices

    def _parameter(
        self, path: str, one: SchemaField, entry: AutomlParameter | None, index: int | None
    ) -> Parameter | None:
        """The parameter of a field; None where its entry is wrong."""
        base = Parameter(path, one.base is int, get_field(self.spec, path))
        if entry is None or index is None:
            return self._by_default(base, one.searched)
        if entry.range is not None and entry.choices is not None:
            self._add(index, "choices", "is given beside range", entry.choices, hint="keep one of them")
            return None
        is_number = one.base in (int, float) and one.options is None
        if entry.choices is None and (one.options is not None or one.base is bool):
            options = (True, False) if one.base is bool else one.options
            if entry.range is not None:
                self._add(index, "range", "is given for a field without numbers", entry.range)
                return None
            return replace(base, choices=options)
        if entry.choices is not None:
            return self._of_choices(base, one, entry.choices, index)
        if not is_number:
            self._add(index, "field", "is text, for which choices are needed", path)
            return None
        return self._of_range(base, one, entry, index)

    def _by_default(self, base: Parameter, searched: Searched | None) -> Parameter | None:
        if searched is None:
            return None
        low = searched.start if searched.open_low else searched.low
        high = searched.high
        if math.isinf(high):
            high = max(UNBOUNDED * (base.own or 1), low)
        return replace(
            base,
            low=low,
            high=high,
            log=searched.log,
            at_most=searched.at_most,
            more_than=searched.more_than,
        )

    def _of_choices(
        self, base: Parameter, one: SchemaField, texts: list[str], index: int
    ) -> Parameter | None:
        values = [_typed(one, text) for text in texts]
        if len({repr(value) for value in values}) < len(values):
            self._add(index, "choices", "has a value twice", texts)
            return None
        limit = one.searched
        for value, text in zip(values, texts, strict=True):
            try:
                self._require_valid(base.path, value)
            except ValueError as error:
                self._add(index, "choices", f"has {text}, which {error}", texts, _allowed(one))
                return None
            if limit is not None and not _is_within(limit, value):
                self._add(index, "choices", f"has {text}, which is out of range", texts, limit.words())
                return None
        return replace(base, choices=tuple(values))

    def _of_range(
        self, base: Parameter, one: SchemaField, entry: AutomlParameter, index: int
    ) -> Parameter | None:
        default = self._by_default(base, one.searched)
        found = entry.range
        if found is None and default is None:
            low = one.ge if one.ge is not None else one.gt
            high = one.le if one.le is not None else one.lt
            if low is None or high is None or one.gt is not None or one.lt is not None:
                self._add(index, "range", "is needed for a field without bounds of its own", None)
                return None
            default = replace(base, low=low, high=high)
        if found is None and default is not None:
            return self._in_log_space(default, entry, index)
        assert found is not None  # noqa: S101 - one of the two is given
        if len(found) != 2 or not found[0] < found[1]:
            self._add(index, "range", "is not two ascending numbers", found, "[smallest, largest]")
            return None
        if base.is_whole and any(value != int(value) for value in found):
            self._add(index, "range", "has a fraction for a field of whole numbers", found)
            return None
        for value in found:
            typed = int(value) if base.is_whole else float(value)
            if one.searched is not None and not _is_within(one.searched, typed):
                self._add(index, "range", "is outside the field's bounds", found, one.searched.words())
                return None
            try:
                self._require_valid(base.path, typed)
            except ValueError:
                self._add(index, "range", "is outside the field's bounds", found, _allowed(one))
                return None
        limit = one.searched
        narrowed = replace(
            default or base,
            low=found[0],
            high=found[1],
            at_most=limit.at_most if limit else None,
            more_than=limit.more_than if limit else None,
        )
        return self._in_log_space(narrowed, entry, index)

    def _in_log_space(self, parameter: Parameter, entry: AutomlParameter, index: int) -> Parameter | None:
        log = parameter.log if entry.log is None else entry.log
        if log and parameter.low <= 0:
            if entry.log is None:
                return replace(parameter, log=False)
            self._add(index, "log", "needs a range above 0", True, hint=f"it is {parameter.words()}")
            return None
        return replace(parameter, log=log)

    def _require_valid(self, path: str, value: Any) -> None:
        """Check one value against the field.

        Raises:
            ValueError: how it does not fit.
        """
        try:
            with_values(self.spec, {path: value})
        except ValidationError as error:
            kind = error.errors()[0]["type"]
            raise ValueError(
                "is out of range"
                if "than" in kind
                else "is not an option"
                if kind == "literal_error"
                else "is of the wrong type"
            ) from None

    # what matters under the spec

    def _bounded_by_dependents(self, found: dict[str, Parameter]) -> dict[str, Parameter]:
        """Ranges that leave room for the fields that must be larger."""
        bounded = dict(found)
        for path, one in self.fields.items():
            other = one.searched.more_than if one.searched is not None else None
            if other is None or other not in bounded or bounded[other].choices is not None:
                continue
            largest = found[path].high if path in found else get_field(self.spec, path)
            if path in found and found[path].choices is not None:
                largest = min(found[path].choices or ())
            limited = bounded[other]
            bounded[other] = replace(limited, high=min(limited.high, largest - 1))
        steps = "train.optim.lr_step_size"
        if steps in bounded and bounded[steps].choices is None:
            limited = bounded[steps]
            bounded[steps] = replace(limited, high=min(limited.high, self.settings.max_epochs))
        return bounded

    def _matters(self, path: str, found: Mapping[str, Parameter]) -> bool:
        """Whether a field can make a difference for some choice of the others; else a note is made."""
        reasons = []
        for spec in self._variants(found):
            reason = _reason_without_effect(spec, path, found, self.settings.max_epochs)
            if reason is None:
                return True
            reasons.append(reason)
        self.notes.append(f"{path} is not searched: {reasons[0]}")
        return False

    def _variants(self, found: Mapping[str, Parameter]) -> Iterator[ExperimentSpec]:
        """The spec with every combination of the searched choices, as far as they are few."""
        several = [one for one in found.values() if one.choices is not None]
        if math.prod(len(one.choices or ()) for one in several) > 64:
            several = several[:2]
        for values in product(*(one.choices or () for one in several)):
            chosen = dict(zip((one.path for one in several), values, strict=True))
            yield with_values(self.spec, chosen)

    def _check_values(self, found: Mapping[str, Parameter], entries: Mapping[str, int]) -> None:
        """Report values of the entries that a rule between fields refuses, whatever the other fields are."""
        for path, index in entries.items():
            one = found.get(path)
            if one is None or one.choices is None:
                continue
            for value in one.choices:
                for fault in faults_with(self.spec, {path: value}):
                    if not _depends_on_others(fault, path, found):
                        what = f"has {shown(value)}, with which {fault.path} {fault.what}"
                        self._add(index, "choices", what, list(map(shown, one.choices)))


_NOTED = frozenset(NO_EFFECT)


def _depends_on_others(fault: Fault, path: str, found: Mapping[str, Parameter]) -> bool:
    return fault.path != path and fault.path in found


def _scalar_fields(cls: type[Section], prefix: str) -> Iterator[tuple[str, SchemaField]]:
    for name, one in fields_of(cls).items():
        if one.is_plain_section:
            yield from _scalar_fields(one.base, f"{prefix}{name}.")
        elif one.kind is Kind.SCALAR:
            yield prefix + name, one


def _typed(one: SchemaField, text: str) -> Any:
    """A choice, which the spec has as text, as the field takes it; the text itself where it does not fit."""
    if one.optional and text.strip().lower() in ("null", "~"):
        return None
    if one.base is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if one.options is not None:
        return canonical_option(text, one.options)
    try:
        return one.base(text) if one.base in (int, float) else text
    except ValueError:
        return text


def _allowed(one: SchemaField) -> str:
    if one.options is not None:
        return ", ".join(map(str, one.options))
    return ", ".join(filter(None, (one.words(), one.bounds())))


def _is_within(limit: Searched, value: Any) -> bool:
    above = value > limit.low if limit.open_low else value >= limit.low
    return bool(above and value <= limit.high)


def _reason_without_effect(
    spec: ExperimentSpec, path: str, found: Mapping[str, Parameter], max_epochs: int
) -> str | None:
    """Why a field makes no difference under a spec; None where it may."""
    if path in NO_EFFECT:
        return NO_EFFECT[path]
    if path in NEUTRAL:
        return None if path in found and found[path].choices else "it cannot change the result"
    for one in CONDITIONS:
        if one.path == path and one.root is ExperimentSpec and one.applies(spec):
            return one.reason
    optim, settings = spec.train.optim, spec.ddetr_mm.automl
    if path == "train.optim.lr_decay":
        if optim.lr_scheduler == "MultiStep" and not any(step < max_epochs for step in optim.lr_steps):
            return f"no epoch of lr_steps comes within {max_epochs} epochs"
        step_size = found.get("train.optim.lr_step_size")
        if optim.lr_scheduler == "StepLR" and step_size is None and optim.lr_step_size >= max_epochs:
            return f"lr_step_size is not less than the {max_epochs} epochs"
    if path == "train.optim.lr_linear_proj_mult" and not spec.model.linear_proj_names:
        return "model.linear_proj_names is empty"
    if path == "train.optim.lr_backbone" and not spec.model.backbone_names:
        return "model.backbone_names is empty"
    if path == "model.num_select" and "loss" in settings.metric:
        return f"it does not change {settings.metric}"
    return None
