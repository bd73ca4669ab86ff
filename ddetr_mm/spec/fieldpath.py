"""Reading a field of a spec by its dotted path."""

from __future__ import annotations

import re
from typing import Any

_STEP = re.compile(r"[^.\[\]]+")


def get_field(spec: object, path: str) -> Any:
    """The value at ``a.b[0].c``.

    Args:
        spec: an experiment or convert spec.
        path: dotted path; list items by ``[index]``, entries of free mappings by name.

    Returns:
        The value. Below a section that is null everything is None.

    Raises:
        KeyError: there is no such field or entry.
    """
    value: Any = spec
    for step in _STEP.findall(path):
        if value is None:
            return None
        try:
            if isinstance(value, list):
                value = value[int(step)]
            elif isinstance(value, dict):
                value = value[step]
            else:
                value = getattr(value, step)
        except (AttributeError, LookupError, ValueError):
            raise KeyError(path) from None
    return value
