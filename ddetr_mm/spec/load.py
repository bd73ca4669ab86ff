"""A spec file and overrides to a checked, typed spec.

The tree of the YAML file is matched against the schema (:class:`_Binder`), references to other values are
resolved (:mod:`~ddetr_mm.spec.interpolation`), and pydantic converts and checks the values. Every step adds
to one :class:`_Report`, so that all problems of a spec are reported at once. Problems of values that the
subtask does not read (:mod:`~ddetr_mm.spec.readers`) become notes. Blank text, null, ``[]`` and ``[""]``
count as not given.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec.fields import (
    PLACEHOLDER,
    Kind,
    SchemaField,
    Section,
    Steps,
    canonical_option,
    dotted,
    field_names,
    fields_of,
    nearest,
)
from ddetr_mm.spec.interpolation import (
    FORMS,
    MAX_COUNT,
    Keys,
    Resolver,
    Unresolvable,
    has_interpolation,
    is_reference,
    keys_of,
)
from ddetr_mm.spec.notes import agree_on_gpus, drop_overruled_gpus, notes_of_doubt, notes_without_effect
from ddetr_mm.spec.overrides import apply_overrides
from ddetr_mm.spec.readers import Reader, reader_of
from ddetr_mm.spec.releases import NOT_READ, OPTIONS_OF_TAO, newer_default, suggest_key
from ddetr_mm.spec.rules import drop_blank_sources, incomplete_sources, missing_fields, violations
from ddetr_mm.spec.schema import SUBTASKS, ConvertSpec, ExperimentSpec, Spec, root_of
from ddetr_mm.spec.yaml_source import Branch, Leaf, Listing, Tree, parse_yaml, read_text

SECRETS = (("encryption_key",), ("ddetr_mm", "automl", "storage"))
"""Values that are never shown."""

MAX_PROBLEMS = 100
MAX_HINTS = 50


@dataclass(frozen=True)
class LoadedSpec:
    """A spec that passed all checks.

    Attributes:
        spec: an :class:`ExperimentSpec`, or a :class:`ConvertSpec` for convert.
        path: the file it came from.
        subtask: the subtask it was checked for; None: every rule was checked, and nothing is mandatory.
        origin: dotted path of everything the user wrote (fields, their items, and sections) →
            ``"line 12"`` or ``"override"``; absent: the default.
        notes: one line each for what was read in another form, overruled, or has no effect.
    """

    spec: Spec
    path: Path
    subtask: str | None
    origin: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


TAO_RESULTS = Path("/results")
"""Default of ``results_dir``: a folder of TAO's container, which other machines seldom have."""

OWN_RESULTS = "results"
"""Folder of the results where ``results_dir`` is not given and :data:`TAO_RESULTS` cannot be written to."""


def _may_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


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
        subtask: one of :data:`~ddetr_mm.spec.schema.SUBTASKS`, whose rules apply. With None the rules of all
            subtasks apply, and the keys decide whether it is a convert spec or an experiment.
        require_mandatory: whether fields that ``subtask`` needs must be given.

    Returns:
        The typed spec, where each value came from, and notes.

    Raises:
        SpecError: with every problem found.
    """
    if subtask is not None and subtask not in SUBTASKS:
        close = nearest(subtask, SUBTASKS)
        hint = f"did you mean {close}?" if close else None
        raise SpecError(Problem("is not a subtask", value=subtask, allowed=SUBTASKS, hint=hint))
    return load_spec_text(read_text(Path(path)), path, overrides, subtask, require_mandatory)


def load_spec_text(
    text: str,
    path: str | Path,
    overrides: Sequence[str] = (),
    subtask: str | None = None,
    require_mandatory: bool = True,
) -> LoadedSpec:
    """:func:`load_spec` of YAML text.

    Args:
        text: the YAML.
        path: where it is from, for messages.
        overrides: as there.
        subtask: as there.
        require_mandatory: as there.

    Raises:
        SpecError: with every problem found.
    """
    file = Path(path)
    tree, problems = parse_yaml(text, file)
    if tree is None and problems:
        raise SpecError(*problems)
    if tree is None:
        tree = Branch({}, "line 1")
    root = root_of(subtask)
    notes: list[str] = []
    if isinstance(tree, Branch):
        if subtask is None:
            root = _guess_root(tree)
        problems += apply_overrides(tree, root, overrides, file)
        if root is ExperimentSpec:
            notes += drop_overruled_gpus(tree)
            if subtask is not None and "results_dir" not in tree.items and not _may_write(TAO_RESULTS):
                apply_overrides(tree, root, [f"results_dir={OWN_RESULTS}"], file)
                own = tree.items.get(subtask)
                if not (isinstance(own, Branch) and "results_dir" in own.items):
                    notes.append(
                        f"results_dir is not given: results go to ./{OWN_RESULTS}, since there is no"
                        f" {TAO_RESULTS} to write to"
                    )
    report = _Report(file)
    binder = _Binder(root, report)
    values = binder.section(tree, root)
    references = _resolve(root, values, binder.interpolations, report)
    spec = _validate(root, values, references, report)
    reader = reader_of(spec, subtask, must_be_given=require_mandatory)
    if isinstance(spec, ExperimentSpec):
        drop_blank_sources(spec)
    _check_rules(spec, reader, require_mandatory, report)
    SpecError.collect(_shortened([*problems, *report.problems_of(reader)], file))
    notes = binder.notes + notes + report.notes_of(reader)
    if isinstance(spec, ExperimentSpec):
        notes += agree_on_gpus(spec, set(report.where))
    notes += notes_without_effect(spec, report.where)
    notes += notes_of_doubt(spec, report.where)
    return LoadedSpec(spec, file, subtask, report.where, notes)


def _guess_root(tree: Branch) -> type[ExperimentSpec] | type[ConvertSpec]:
    """The kind of spec a file holds, by its top-level keys."""
    experiment, convert = set(fields_of(ExperimentSpec)), set(fields_of(ConvertSpec))
    keys = set(tree.items)
    is_convert = keys & (convert - experiment) and not keys & (experiment - convert)
    return ConvertSpec if is_convert else ExperimentSpec


def _shortened(problems: list[Problem], file: Path) -> list[Problem]:
    """At most :data:`MAX_PROBLEMS` problems, and how many more there are."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], Problem(f"{more} more problems are not shown", file=file)]


def _check_rules(spec: Spec, reader: Reader, require_mandatory: bool, report: _Report) -> None:
    """Check the rules between fields, and that the subtask has what it needs."""
    faults = list(violations(spec, reader, report.faulty))
    if isinstance(spec, ExperimentSpec):
        faults += incomplete_sources(spec, reader)
    if reader.subtask is not None and require_mandatory:
        needed = missing_fields(spec, reader.subtask)
        faults += (one for one in needed if not report.has_problem_below(one.path))
    for fault in faults:
        report.add(fault.path, fault.what, **fault.words())


class _Report:
    """The problems of one spec, each with its dotted path and the line it was written on.

    Attributes:
        where: dotted path → ``"line 12"`` or ``"override"``, for everything the user wrote.
        problems: in the order they were found, each with its dotted path; None for a problem of the spec
            itself, such as an unknown key.
        faulty: dotted paths that have a problem.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.where: dict[str, str] = {}
        self.problems: list[tuple[str | None, Problem]] = []
        self.faulty: set[str] = set()

    def problems_of(self, reader: Reader) -> list[Problem]:
        """The problems that matter to a subtask."""
        return [problem for path, problem in self.problems if path is None or reader.reads(path)]

    def notes_of(self, reader: Reader) -> list[str]:
        """One line for every problem that does not."""
        return [
            f"{path} ({self.where.get(path, 'default')}) {problem.what}: "
            f"no matter, as {reader.subtask} does not read it"
            for path, problem in self.problems
            if path is not None and not reader.reads(path)
        ]

    def add(
        self, path: str | Steps, what: str, where: str | None = None, *, of_spec: bool = False, **more: Any
    ) -> None:
        """Record a problem, unless the value or a section around it has one already.

        Args:
            path: of the value.
            what: what is wrong.
            where: its line, where :attr:`where` does not have it.
            of_spec: whether it matters whichever subtask reads the spec.
            more: ``value``, ``allowed`` and ``hint`` of the problem.
        """
        name = path if isinstance(path, str) else dotted(path)
        if self.has_problem(name):
            return
        self.faulty.add(name)
        if tuple(name.split(".")) in SECRETS:
            more.pop("value", None)
        place = f"{name}, {where}" if where else self._place(name)
        problem = Problem(what, file=self.file, where=place, **more)
        self.problems.append((None if of_spec else name, problem))

    def has_problem(self, name: str) -> bool:
        """Whether a value, or a list or section around it, has a problem."""
        return name in self.faulty or any(above in self.faulty for above in _enclosing(name))

    def has_problem_below(self, name: str) -> bool:
        """Whether something inside a value has a problem."""
        return any(one.startswith((name + ".", name + "[")) for one in self.faulty)

    def _place(self, name: str) -> str:
        """``"train.optim.lr, line 12"``; for a default, the line of the nearest enclosing key."""
        if name in self.where:
            return f"{name}, {self.where[name]}"
        line = next((self.where[above] for above in _enclosing(name) if above in self.where), "")
        return f"{name} (default), {line}" if line.startswith("line") else f"{name} (default)"


def _enclosing(name: str) -> list[str]:
    """``a.b[0].c`` → ``a.b[0]``, ``a.b``, ``a``."""
    return [name[: one.start()] for one in reversed(list(re.finditer(r"[.\[]", name))) if one.start()]


class _Binder:
    """Matches one tree against the schema: known keys only, and values of the right shape.

    What it returns is input for pydantic, with ``${...}`` still in place.

    Attributes:
        interpolations: path of every value that holds ``${`` → its field; None inside a free mapping.
        notes: what was read in another form than the documented one.
    """

    def __init__(self, root: type[Section], report: _Report) -> None:
        self.root = root
        self.report = report
        self.interpolations: dict[Steps, SchemaField | None] = {}
        self.notes: list[str] = []

    def note(self, path: Steps, tree: Tree, what: str) -> None:
        """Record that a value was read in another form."""
        self.notes.append(f"{dotted(path)} ({tree.where}) {what}")

    def section(self, tree: Tree | None, cls: type[Section], path: Steps = ()) -> dict[str, Any]:
        """The values of a section, by field name; unknown and wrong ones are left out."""
        if tree is None or (isinstance(tree, Leaf) and tree.value is None) or (path and _is_blank(tree)):
            return {}
        known = fields_of(cls)
        if not isinstance(tree, Branch):
            what = "is not a section" if path else "the spec is not a mapping of keys to values"
            allowed = "lines of key: value below it, of " + ", ".join(known)
            self.report.add(path or ("the file",), what, tree.where, of_spec=not path, allowed=allowed)
            return {}
        values: dict[str, Any] = {}
        for key, item in tree.items.items():
            name = field_names(cls).get(key)
            if name is None and cls is ExperimentSpec and key in NOT_READ:
                self.note((*path, key), item, NOT_READ[key])
            elif name is None and newer_default(self.root, dotted((*path, key)), item):
                self.note((*path, key), item, "is a key of a newer TAO at its default: no effect")
            elif name is None:
                hint = None
                if len(self.report.problems) < MAX_HINTS:
                    prefix = dotted(path) + "." if path else ""
                    hint = suggest_key(self.root, prefix, key, known)
                self.report.add((*path, key), "is not a key of the spec", item.where, of_spec=True, hint=hint)
            elif name == key or self.accept_alias((*path, key), name, item, tree):
                self.field(values, known[name], item, (*path, name))
        return values

    def accept_alias(self, path: Steps, name: str, item: Tree, parent: Branch) -> bool:
        """Note the use of a field's second name; refuse it beside the first."""
        other = dotted((*path[:-1], name))
        if name in parent.items:
            what = f"is another name of {other}, which is given too"
            self.report.add(path, what, item.where, of_spec=True, hint="keep one")
            return False
        self.note(path, item, f"is read as {other}")
        return True

    def field(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """Put the value of one field into ``values``, unless it is wrong."""
        self.report.where[dotted(path)] = tree.where
        if _is_blank(tree):
            self.blank(values, one, tree, path)
            return
        if isinstance(tree, Leaf):
            if tree.value == PLACEHOLDER:
                self.report.add(path, "still holds the placeholder ???", hint="give a value")
                return
            wrapped = one.kind is Kind.SCALARS and one.single
            if not one.is_plain_section and not wrapped and self.is_interpolation(tree, path, one):
                values[one.name] = tree.value
                return
        if one.kind is Kind.SECTION:
            values[one.name] = self.section(self.single_section(one, tree, path), one.base, path)
        elif one.kind is Kind.MAPPING:
            self.mapping(values, one, tree, path)
        elif one.kind is Kind.SCALAR:
            if isinstance(tree, Leaf):
                self.scalar(values, one.name, one, tree, path)
            else:
                shown = "a mapping" if isinstance(tree, Branch) else "a list"
                self.report.add(path, f"is {shown}", allowed=one.words())
        else:
            self.listing(values, one, tree, path)

    def blank(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """A field that is there and not given: null where that is a value, else the default, with a note.

        ``???`` counts only where a spec may hold it, as TAO's templates do: in fields without a default.
        """
        is_null = isinstance(tree, Leaf) and tree.value is None
        if _has_placeholder(tree) and not (one.placeholder or one.optional):
            self.report.add(path, "still holds the placeholder ???", hint="give a value")
        elif one.optional and (is_null or one.default is None or (one.base is str and one.default)):
            keeps_list = one.kind is Kind.SCALARS and isinstance(tree, Listing) and one.default is not None
            values[one.name] = [] if keeps_list else None
        elif one.kind is Kind.SCALARS and isinstance(tree, Listing) and not one.filled:
            values[one.name] = []
        elif one.kind in (Kind.SCALAR, Kind.SCALARS) and one.default not in (None, "", []):
            self.note(path, tree, f"is blank: its default, {_shown(one.default)}, is used")

    def is_interpolation(self, leaf: Leaf, path: Steps, one: SchemaField | None, item: bool = False) -> bool:
        """Whether a value has ``${...}`` that is to be resolved; if so, remember its path.

        Text may hold interpolations, plain or escaped; a number needs one; a list, mapping or section must
        be one reference and nothing else.

        Args:
            leaf: the value.
            path: its path.
            one: the field; None for a value inside a free mapping.
            item: whether the value is one item of the field's list or mapping.
        """
        text = leaf.value
        if not isinstance(text, str) or "${" not in text:
            return False
        if one is not None and (one.kind in _SECTION_KINDS or (one.kind is not Kind.SCALAR and not item)):
            fits = is_reference(text)
        else:
            fits = one is None or one.base is str or has_interpolation(text)
        if fits:
            self.interpolations[path] = one
        return fits

    def single_section(self, one: SchemaField, tree: Tree, path: Steps) -> Tree:
        """A list of one section where one section is expected: that section, with a note."""
        if isinstance(tree, Listing) and one.optional and len(tree.items) == 1:
            self.note(path, tree, "takes one source; its list of one is read as that")
            return tree.items[0]
        return tree

    def scalar(self, values: Any, key: Any, one: SchemaField, leaf: Leaf, path: Steps) -> None:
        """Put a single value, or one item of a list, into ``values[key]`` as pydantic is to read it."""
        values[key] = _as_input(leaf.value, leaf.text, one)
        if one.base is str and "\0" in leaf.text:
            self.report.add(path, "holds a null character", value=leaf.text, hint="leave it out")

    def listing(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """A list of scalars or of sections; a wrong item is left empty, so that others keep their index."""
        sections = one.kind is Kind.SECTIONS
        if one.single and isinstance(tree, Branch if sections else Leaf):
            if sections:
                self.note(path, tree, "takes a list; its one entry is read as that")
            tree = Listing([tree], tree.where)
        if not isinstance(tree, Listing):
            is_leaf = isinstance(tree, Leaf)
            shown = tree.text if is_leaf else "a mapping"  # type: ignore[union-attr]
            hint = f"write [{shown}]" if is_leaf else None
            self.report.add(path, "is not a list", value=shown, allowed=one.words(), hint=hint)
            return
        items: list[Any] = []
        for index, item in enumerate(tree.items):
            here = (*path, index)
            self.report.where[dotted(here)] = item.where
            items.append({} if sections else None)
            if isinstance(item, Leaf) and self.is_interpolation(item, here, one, item=True):
                items[index] = item.value
            elif sections:
                if isinstance(item, Branch):
                    items[index] = self.section(item, one.base, here)
                else:
                    self.report.add(here, "is not a section", allowed=one.value_words())
            elif not isinstance(item, Leaf) or item.value is None or item.value == PLACEHOLDER:
                shown = item.text if isinstance(item, Leaf) else "a list or mapping"
                self.report.add(here, "is of the wrong type", value=shown, allowed=one.value_words())
            else:
                self.scalar(items, index, one, item, here)
        values[one.name] = items

    def mapping(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """A free mapping: of names to text, or of names to anything."""
        if not isinstance(tree, Branch):
            self.report.add(path, "is not a mapping", allowed=one.words())
            return
        if one.base is not str:
            values[one.name] = self.anything(tree, path)
            return
        entries: dict[str, Any] = {}
        for key, item in tree.items.items():
            here = (*path, key)
            self.report.where[dotted(here)] = item.where
            if not isinstance(item, Leaf) or item.value is None or item.value == PLACEHOLDER:
                self.report.add(here, "is of the wrong type", allowed="text")
            elif self.is_interpolation(item, here, one, item=True):
                entries[key] = item.value
            else:
                self.scalar(entries, key, one, item, here)
        values[one.name] = entries

    def anything(self, tree: Tree, path: Steps) -> Any:
        """The plain value of a tree in a free mapping."""
        self.report.where[dotted(path)] = tree.where
        if isinstance(tree, Branch):
            return {key: self.anything(item, (*path, key)) for key, item in tree.items.items()}
        if isinstance(tree, Listing):
            return [self.anything(item, (*path, index)) for index, item in enumerate(tree.items)]
        if tree.value == PLACEHOLDER:
            self.report.add(path, "still holds the placeholder ???", hint="give a value")
            return None
        if isinstance(tree.value, float) and not math.isfinite(tree.value):
            self.report.add(path, "is not a finite number", value=tree.value)
        self.is_interpolation(tree, path, None)
        return tree.value


def _is_blank(tree: Tree) -> bool:
    """Whether a value is not given: null, blank text, ``???``, ``[]``, or a list of these."""
    if isinstance(tree, Leaf):
        return tree.value is None or (
            isinstance(tree.value, str) and tree.value.strip(" ") in ("", PLACEHOLDER)
        )
    return isinstance(tree, Listing) and all(isinstance(one, Leaf) and _is_blank(one) for one in tree.items)


def _has_placeholder(tree: Tree) -> bool:
    items = tree.items if isinstance(tree, Listing) else [tree]
    return any(isinstance(one, Leaf) and one.value == PLACEHOLDER for one in items)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_SECTION_KINDS = (Kind.SECTION, Kind.SECTIONS)
_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
_BOOLEANS = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)


def _as_input(value: Any, text: str, one: SchemaField) -> Any:
    """A single value as pydantic is to read it.

    A text field gets the text as written (no, 1_000 and 007 are names like any other). Pydantic would read
    true as the number 1 and t as true: a number gets the text of a boolean, and booleans are converted here.
    """
    if one.base is bool:
        value = _BOOLEANS.get(str(value).lower(), value)
    elif one.base is str or isinstance(value, bool):
        value = text
    return value if one.options is None else canonical_option(value, one.options)


@cache
def _defaults(root: Any) -> dict[str, Any]:
    """The defaults of a kind of spec as nested dicts. Not to be changed."""
    plain: dict[str, Any] = root().model_dump()
    return plain


def _overlay(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``values`` on top, section by section."""
    result = dict(base)
    for name, value in values.items():
        below = base.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            value = _overlay(below, value)
        result[name] = value
    return result


References = dict[Steps, set[Keys]]
"""Path of a value that was an interpolation → the values it refers to."""


def _resolve(
    root: type[Section],
    values: dict[str, Any],
    interpolations: dict[Steps, SchemaField | None],
    report: _Report,
) -> References:
    """Replace the interpolations in ``values``; those that cannot be resolved are reported and removed."""
    if not interpolations:
        return {}
    resolver = Resolver(_overlay(_defaults(root), copy.deepcopy(values)))
    count = 0
    for path in interpolations:
        count += str(resolver.raw_value(keys_of(path))).count("${")
        if count > MAX_COUNT:
            report.add(path, f"holds one interpolation too many: a spec may have {MAX_COUNT}")
            for each in interpolations:
                _remove(values, each, root)
            return {}
    references: References = {}
    for path, one in interpolations.items():
        keys = keys_of(path)
        try:
            result = resolver.value(keys)
            for secret in SECRETS:
                if secret in resolver.uses[keys] - {keys}:
                    raise Unresolvable(f"refers to {'.'.join(secret)}, which would show it")
        except Unresolvable as error:
            is_secret = keys in SECRETS  # its text may be part of the secret
            what = "holds ${…} that cannot be resolved" if is_secret else str(error)
            report.add(path, what, value=resolver.raw_value(keys), allowed=FORMS)
            _remove(values, path, root)
            continue
        if one is not None and isinstance(path[-1], str) and _is_blank_result(result, one):
            _remove(values, path, root)
            continue
        if one is not None and not isinstance(result, (dict, list)) and result is not None:
            result = _as_input(result, str(result), one)
        references[path] = resolver.uses[keys]
        _replace(values, path, copy.deepcopy(result))
    return references


def _is_blank_result(result: Any, one: SchemaField) -> bool:
    """Whether what a reference leads to is not given, for a field to which that is no value."""
    if isinstance(result, str) and not result.strip(" "):
        return one.base is not str or one.options is not None or one.pattern is not None
    return result == [] and one.filled


def _parent(values: Any, path: Steps) -> Any:
    """The dict or list that holds the value at ``path``; None where it was removed."""
    for step in path[:-1]:
        try:
            values = values[step]
        except (LookupError, TypeError):
            return None
    return values


def _replace(values: dict[str, Any], path: Steps, value: Any) -> None:
    """Set the value at ``path`` of nested dicts and lists, where it is still there."""
    parent = _parent(values, path)
    if parent is not None:
        parent[path[-1]] = value


def _remove(values: dict[str, Any], path: Steps, root: type[Section]) -> None:
    """Take a wrong value out, so that the default is used.

    A wrong item of a list takes the whole list out; in a list of sections it becomes an empty section.
    """
    parent = _parent(values, path)
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
    elif isinstance(parent, list):
        one = _field_at(root, path)
        if one is not None and one.kind is Kind.SCALARS:
            _remove(values, path[:-1], root)
        else:
            parent[int(path[-1])] = None if one is None else {}


def _field_at(root: type[Section], path: Steps) -> SchemaField | None:
    """The field that the value at ``path`` is, or is an item of; None inside a free mapping."""
    cls, one = root, None
    for depth, step in enumerate(path):
        if isinstance(step, int):
            continue
        one = fields_of(cls)[step]
        if one.kind is Kind.MAPPING:
            return one if one.base is str or depth + 1 == len(path) else None
        cls = one.base
    return one


# Values


def _validate(root: type[Section], values: dict[str, Any], references: References, report: _Report) -> Spec:
    """Let pydantic convert and check the values; wrong ones are reported and replaced by the default."""
    while True:  # until the wrong values are gone: two rounds, as pydantic finds all of them at once
        try:
            spec = root.model_validate(values)
        except ValidationError as error:
            errors = [(_source_path(one["loc"], references), one) for one in error.errors(include_url=False)]
        else:
            if not isinstance(spec, (ExperimentSpec, ConvertSpec)):
                raise TypeError(f"{root} is not a kind of spec")
            return spec
        for path, one in errors:
            if path not in references:
                _report_value(root, path, one, report)
        found = {tuple(_NAME.findall(name)) for name in report.faulty}
        for path, one in errors:
            if path in references and not _refers_to(references[path], found):
                _report_value(root, path, one, report, referred=True)
        for path, _ in errors:
            _remove(values, path, root)


_NAME = re.compile(r"[^.\[\]]+")


def _source_path(location: Steps, references: References) -> Steps:
    """The path of a value that pydantic refuses, or of the reference that brought it in."""
    parts = (location[:end] for end in range(1, len(location)))
    return next((part for part in parts if part in references), location)


def _refers_to(uses: set[Keys], faulty: set[Keys]) -> bool:
    """Whether a reference leads to a value that has a problem of its own."""
    return any(use[:end] in faulty for use in uses for end in range(1, len(use) + 1))


def _report_value(
    root: type[Section], path: Steps, error: Mapping[str, Any], report: _Report, referred: bool = False
) -> None:
    """Report one of pydantic's errors in our words."""
    one, kind, value = _field_at(root, path), error["type"], error["input"]
    if one is None:
        report.add(path, error["msg"], value=value)
    elif kind in ("value_error", "int_parsing_size"):
        report.add(path, "is too large a number", allowed="integers of 64 bits")
    elif kind == "finite_number":
        report.add(path, "is not a finite number", value=value, allowed=one.bounds() or "finite numbers")
    elif kind.startswith(("greater_than", "less_than")):
        report.add(path, "is out of range", value=value, allowed=one.bounds())
    elif kind == "string_pattern_mismatch":
        report.add(path, "does not have the right form", value=value, allowed=one.form)
    elif kind == "literal_error" and isinstance(value, (str, int, float)):
        close = nearest(str(value), one.options or ()) if len(report.problems) < MAX_HINTS else None
        hint = f"did you mean {close}?" if close else None
        hint = OPTIONS_OF_TAO.get(dotted(path), {}).get(str(value).lower(), hint)
        report.add(path, "is not an option", value=value, allowed=one.options, hint=hint)
    elif referred:
        allowed = one.value_words() if isinstance(path[-1], int) else one.words()
        report.add(path, "cannot be resolved: it refers to a value of another type", allowed=allowed)
    else:
        report.add(path, "is of the wrong type", value=value, allowed=one.value_words())
