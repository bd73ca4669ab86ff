"""A typed spec back to YAML text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ddetr_mm.spec.bind import MISSING
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.source import SpecDumper
from ddetr_mm.spec.walk import Kind, fields_of

_DOLLAR = re.compile(r"(?<!\\)(\\*)\$\{")


def _escape(text: str) -> str:
    """Text that stands for itself when it is loaded: no interpolation is left in it."""
    return _DOLLAR.sub(lambda match: match.group(1) * 2 + r"\${", text)


def _plain(value: Any) -> Any:
    """A free value for YAML."""
    if isinstance(value, str):
        return _escape(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def to_plain(part: Any) -> dict[str, Any]:
    """A section as nested dicts and lists: secrets null, what has to be given and is not ``???``."""
    values: dict[str, Any] = {}
    for name, one in fields_of(part.__class__).items():
        value = getattr(part, name)
        if one.meta.secret:
            values[name] = None
        elif one.meta.placeholder and value == one.default:
            values[name] = MISSING
        elif one.type.kind is Kind.SECTION and value is not None:
            values[name] = to_plain(value)
        elif one.type.kind is Kind.SECTIONS and value is not None:
            values[name] = [to_plain(item) for item in value]
        else:
            values[name] = _plain(value)
    return values


def dump(value: Any) -> str:
    """YAML text that loads back as ``value``; lists of single values on one line."""
    return yaml.dump(value, Dumper=SpecDumper, sort_keys=False, allow_unicode=True, width=100)


def spec_to_yaml(spec: ExperimentSpec | ConvertSpec) -> str:
    """The complete spec as YAML that loads back to the same spec, but for the encryption key.

    ``encryption_key`` is written as null, whatever it holds.
    """
    return dump(to_plain(spec))
