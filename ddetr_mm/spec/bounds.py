"""Single values against their declared range, options and pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from ddetr_mm.spec.suggest import nearest
from ddetr_mm.spec.walk import Kind, SchemaField, fields_of

Report = Callable[..., None]


def canonical_option(value: Any, options: tuple[Any, ...]) -> Any:
    """The option that equals ``value`` but for upper and lower case; ``value`` itself otherwise."""
    if value in options or not isinstance(value, str):
        return value
    matches = [option for option in options if str(option).lower() == value.lower()]
    return matches[0] if len(matches) == 1 else value


def _check_value(value: Any, one: SchemaField, path: str, report: Report) -> None:
    meta = one.meta
    if isinstance(value, float) and not math.isfinite(value):
        report(path, "is not a finite number", value=value, allowed=meta.bounds() or "finite numbers")
    elif meta.options is not None and value not in meta.options:
        close = nearest(str(value), meta.options)
        hint = f"did you mean {close}?" if close else None
        report(path, "is not an option", value=value, allowed=meta.options, hint=hint)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not meta.in_bounds(value):
        report(path, "is out of range", value=value, allowed=meta.bounds())
    elif meta.pattern is not None and re.fullmatch(meta.pattern, str(value)) is None:
        report(path, "does not have the right form", value=value, allowed=meta.pattern_words)


def check_values(part: Any, report: Report, prefix: str = "") -> None:
    """Check every value below a section object; put options into their declared spelling.

    Args:
        part: an instance of a dataclass of the schema; its option fields may be changed.
        report: called as ``report(path, what, value=…, allowed=…, mend=…)`` for every fault.
        prefix: dotted path of ``part`` with a trailing dot, or empty.
    """
    for name, one in fields_of(part.__class__).items():
        value, path, kind = getattr(part, name), prefix + name, one.type.kind
        if value is None:
            continue
        if kind is Kind.SECTION:
            check_values(value, report, path + ".")
        elif kind is Kind.SECTIONS:
            for index, item in enumerate(value):
                check_values(item, report, f"{path}[{index}].")
        elif kind is Kind.SCALAR:
            if one.meta.options is not None:
                value = canonical_option(value, one.meta.options)
                setattr(part, name, value)
            _check_value(value, one, path, report)
        elif kind is Kind.SCALARS:
            if one.meta.options is not None:
                value[:] = [canonical_option(item, one.meta.options) for item in value]
            for index, item in enumerate(value):
                _check_value(item, one, f"{path}[{index}]", report)
        else:
            for inner, item in walk_free(value, path):
                if isinstance(item, float) and not math.isfinite(item):
                    report(inner, "is not a finite number", value=item)


def walk_free(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The single values of a free mapping, with their paths."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk_free(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk_free(item, f"{path}[{index}]")
    else:
        yield path, value
