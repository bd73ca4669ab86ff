"""``${path.to.key}`` in values: bounded before OmegaConf resolves them.

OmegaConf resolves an interpolation anew at every use, so a dozen values that each name the one before
twice would take exponential time and memory. Here each value's expanded length is reckoned once, and
cycles are found, before anything is resolved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from omegaconf import ListConfig
from omegaconf.errors import OmegaConfBaseException

MAX_LENGTH = 4096

_OPENING = re.compile(r"(?<!\\)(\\*)\$\{")
_REFERENCE = re.compile(r"\$\{(\.*)([A-Za-z_][\w.\[\]-]*)\}")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)(?:,[^${}]*)?\}")
FORMS = "${path.to.key} or ${oc.env:NAME}"

MAX_COUNT = 200

Steps = tuple[str | int, ...]
Report = Callable[..., None]
Path_ = tuple[str, ...]


def has_interpolation(text: str) -> bool:
    """Whether a text holds an interpolation that is not escaped."""
    return any(len(opening.group(1)) % 2 == 0 for opening in _OPENING.finditer(text))


def is_reference(text: str) -> bool:
    """Whether a text is one reference to another value and nothing else."""
    return _REFERENCE.fullmatch(text) is not None


class _Unresolvable(Exception):
    """Why an interpolation is refused."""


def _steps(reference: str) -> Path_:
    return tuple(part for part in re.split(r"[.\[\]]+", reference) if part)


def _plain(path: Steps) -> Path_:
    return tuple(str(part) for part in path)


class _Reckoner:
    """Expanded lengths of raw values, memoised; raises :class:`_Unresolvable` for what has none."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.known: dict[Path_, int] = {}
        self.active: set[Path_] = set()

    def value(self, path: Path_) -> Any:
        value = self.raw
        for step in path:
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _Unresolvable(f"names {'.'.join(path)}, which the spec does not have") from None
        return value

    def length(self, path: Path_) -> int:
        if path in self.known:
            return self.known[path]
        if path in self.active:
            raise _Unresolvable("refers to itself in a circle")
        self.active.add(path)
        try:
            total = self._length(self.value(path), path)
        finally:
            self.active.discard(path)
        if total > MAX_LENGTH:
            raise _Unresolvable(f"expands to more than {MAX_LENGTH} characters")
        self.known[path] = total
        return total

    def _length(self, value: Any, path: Path_) -> int:
        if isinstance(value, dict):
            return sum(self.length((*path, str(key))) for key in value)
        if isinstance(value, list):
            return sum(self.length((*path, str(index))) for index in range(len(value)))
        if not isinstance(value, str):
            return 1
        total = len(value) + 1
        if total > MAX_LENGTH and "${" in value:
            raise _Unresolvable(f"is longer than {MAX_LENGTH} characters")
        for opening in _OPENING.finditer(value):
            if len(opening.group(1)) % 2 == 0:  # an odd number of backslashes makes it plain text
                total += self._length_at(value, opening.end() - 2, path)
        return total

    def _length_at(self, text: str, start: int, path: Path_) -> int:
        """The length of what the interpolation at ``start`` expands to."""
        match = _REFERENCE.match(text, start)
        if match:
            dots, reference = match.groups()
            base = path[: len(path) - len(dots)] if dots else ()
            return self.length((*base, *_steps(reference)))
        match = _ENVIRONMENT.match(text, start)
        if match:
            return len(os.environ.get(match.group(1), ""))
        raise _Unresolvable("is not an interpolation that a spec may hold")


def unbounded_interpolations(raw: Any, paths: list[Steps], report: Report) -> list[Steps]:
    """The interpolations that are malformed, name nothing, go in circles, or expand without bound.

    Args:
        raw: the spec with its defaults as nested dicts and lists, interpolations in place.
        paths: where they are; list positions as numbers.
        report: called as ``report(path, what, value=…, allowed=…)`` for every one found.
    """
    reckoner = _Reckoner(raw)
    count = 0
    for path in paths:
        count += str(reckoner.value(_plain(path))).count("${")
        if count > MAX_COUNT:
            report(path, f"holds one interpolation too many: a spec may have {MAX_COUNT}")
            return list(paths)
    bad = []
    for path in paths:
        try:
            reckoner.length(_plain(path))
        except _Unresolvable as error:
            bad.append(path)
            report(path, str(error), value=reckoner.value(_plain(path)), allowed=FORMS)
    return bad


def unresolved_interpolations(config: Any, paths: list[Steps], report: Report) -> list[Steps]:
    """The interpolations that OmegaConf cannot resolve to a value of the field's type.

    Args:
        config: the merged OmegaConf spec.
        paths: where its interpolations are; all of them bounded.
        report: called as ``report(path, what)`` for every one found.
    """
    bad = []
    for path in paths:
        node = config
        try:
            for step in _plain(path):
                node = node[int(step)] if isinstance(node, ListConfig) else node[step]
        except (OmegaConfBaseException, RecursionError) as error:
            bad.append(path)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            report(path, f"cannot be resolved: {reason}")
    return bad
