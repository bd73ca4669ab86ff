"""Resolves ``${path.to.key}`` and ``${oc.env:NAME}`` in the values of a spec.

Every value is resolved once and kept, and its expanded length, the number of interpolations and the depth of
references are limited: a dozen values that each name the one before twice end with a message.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ddetr_mm.spec.fields import Steps
from ddetr_mm.spec.yaml_source import plain_leaf

MAX_LENGTH = 4096
MAX_COUNT = 200
MAX_CHAIN = 50

FORMS = "${path.to.key} or ${oc.env:NAME}"
_OPENING = re.compile(r"(?<!\\)(\\*)\$\{")
_REFERENCE = re.compile(r"\$\{(\.*)([A-Za-z_][\w.\[\]-]*)\}")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)(?:,([^${}]*))?\}")

Keys = tuple[str, ...]
"""The path of a value; positions in lists as text."""


def has_interpolation(text: str) -> bool:
    """Whether a text holds an interpolation that is not escaped."""
    return any(len(opening.group(1)) % 2 == 0 for opening in _OPENING.finditer(text))


def is_reference(text: str) -> bool:
    """Whether a text is one reference to another value and nothing else."""
    return _REFERENCE.fullmatch(text) is not None


def keys_of(path: Steps) -> Keys:
    """The path of a value as :class:`Resolver` has it: positions in lists as text."""
    return tuple(map(str, path))


class Unresolvable(Exception):
    """The reason why an interpolation is refused."""


class Resolver:
    """Values with their interpolations replaced; each is resolved once.

    Attributes:
        uses: path of a value → paths of all values that it refers to, directly or not.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.known: dict[Keys, Any] = {}
        self.active: set[Keys] = set()
        self.chain = 0
        self.uses: dict[Keys, set[Keys]] = {}

    def raw_value(self, keys: Keys) -> Any:
        """The value at ``keys`` with interpolations in place."""
        value: Any = self.raw
        for step in keys:
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (KeyError, IndexError, ValueError, TypeError):
                raise Unresolvable(f"names {'.'.join(keys)}, which the spec does not have") from None
        return value

    def value(self, keys: Keys) -> Any:
        """The resolved value at ``keys``.

        Raises:
            Unresolvable: it has a malformed or circular interpolation, or it expands without bound.
        """
        if keys not in self.known:
            if keys in self.active:
                raise Unresolvable("refers to itself in a circle")
            self.active.add(keys)
            self.uses[keys] = set()
            try:
                result = self._expanded(self.raw_value(keys), keys)
                if _length(result) > MAX_LENGTH:
                    raise Unresolvable(f"expands to more than {MAX_LENGTH} characters")
            except Unresolvable as error:
                result = error
            finally:
                self.active.discard(keys)
            self.known[keys] = result
        result = self.known[keys]
        if isinstance(result, Unresolvable):
            raise Unresolvable(*result.args)
        return result

    def _used(self, keys: Keys, by: Keys) -> Any:
        """The resolved value at ``keys``, which the value at ``by`` refers to."""
        result = self.value(keys)
        self.uses[by] |= {keys} | self.uses[keys]
        return result

    def _expanded(self, value: Any, keys: Keys) -> Any:
        if isinstance(value, dict):
            return {key: self._used((*keys, str(key)), keys) for key in value}
        if isinstance(value, list):
            return [self._used((*keys, str(index)), keys) for index in range(len(value))]
        if not isinstance(value, str) or "${" not in value:
            return value
        if len(value) > MAX_LENGTH:
            raise Unresolvable(f"is longer than {MAX_LENGTH} characters")
        if self.chain >= MAX_CHAIN:
            raise Unresolvable(f"refers to other values over more than {MAX_CHAIN} steps")
        self.chain += 1
        try:
            return self._text(value, keys)
        finally:
            self.chain -= 1

    def _text(self, text: str, keys: Keys) -> Any:
        """A text with its interpolations replaced; one interpolation alone keeps its type."""
        parts: list[str] = []
        position = 0
        for opening in _OPENING.finditer(text):
            slashes = opening.group(1)
            parts += [text[position : opening.start()], slashes[: len(slashes) // 2]]
            if len(slashes) % 2:  # an odd number of backslashes makes it plain text
                parts.append("${")
                position = opening.end()
                continue
            value, end = self._interpolation(text, opening.end() - 2, keys)
            if not slashes and opening.start() == 0 and end == len(text):
                return value
            if value is None or isinstance(value, (dict, list)):
                shown = text[opening.end() - 2 : end]
                kind = "null" if value is None else "no single value"
                raise Unresolvable(f"cannot be resolved: {shown} is {kind}")
            parts.append(str(value))
            position = end
        return "".join([*parts, text[position:]])

    def _interpolation(self, text: str, start: int, keys: Keys) -> tuple[Any, int]:
        """The value of the interpolation at ``start``, and where it ends."""
        match = _REFERENCE.match(text, start)
        if match:
            dots, reference = match.groups()
            base = keys[: len(keys) - len(dots)] if dots else ()
            steps = tuple(part for part in re.split(r"[.\[\]]+", reference) if part)
            return self._used((*base, *steps), keys), match.end()
        match = _ENVIRONMENT.match(text, start)
        if match is None:
            raise Unresolvable("is not an interpolation that a spec may hold")
        name, default = match.groups()
        if name in os.environ:
            return os.environ[name], match.end()
        if default is None:
            raise Unresolvable(f"cannot be resolved: the environment variable {name} is not set")
        leaf = plain_leaf(default.strip(), "default")
        return (None if leaf.value is None else leaf.text.strip("'\"")), match.end()


def _length(value: Any) -> int:
    """The number of characters of all texts in a value, plus the number of its values."""
    if isinstance(value, (dict, list)):
        return sum(map(_length, value.values() if isinstance(value, dict) else value))
    return 1 + (len(value) if isinstance(value, str) else 0)
