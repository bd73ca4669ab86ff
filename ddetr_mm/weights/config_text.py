"""Settings of a model read out of the config text inside an mmdet checkpoint, without running it."""

from __future__ import annotations

import ast
from typing import Any

_MAX_CHARACTERS = 4_000_000


def model_settings(text: Any) -> dict[str, Any]:
    """The assignment ``model = dict(...)`` of a config text, as plain data.

    Only literals, ``dict(...)`` calls, lists and tuples are understood; anything else in the text is left
    out. Nothing is executed.

    Args:
        text: Python source of a flattened mmengine config; other types give an empty answer.
    """
    if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
        return {}
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # An unreadable config costs only the hints it would have given.
        return {}
    for statement in module.body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "model" for target in statement.targets
        ):
            value = _plain(statement.value)
            return value if isinstance(value, dict) else {}
    return {}


def _plain(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _plain(node.operand)
        return -value if isinstance(value, (int, float)) else None
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_plain(key): _plain(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _plain(keyword.value) for keyword in node.keywords if keyword.arg}
    return None
