"""The nearest valid name for a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.walk import all_paths


def nearest(word: str, choices: Iterable[object]) -> str | None:
    """The choice most like ``word``, ignoring case; None when nothing is near."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    found = get_close_matches(word.lower()[:100], by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def suggest_key(root: type, prefix: str, key: str, siblings: Iterable[str]) -> str | None:
    """What the writer of an unknown key may have meant, as a hint for the message.

    A key that exists elsewhere in full beats a similar sibling, which beats a similar key elsewhere.

    Args:
        root: root dataclass of the spec.
        prefix: dotted path of the section the key stands in, with a trailing dot, or empty.
        key: the unknown key.
        siblings: the valid keys of that section.
    """
    paths = all_paths(root)
    same_name = [path for path in paths if path.rpartition(".")[2] == key]
    if same_name:
        return "did you mean " + " or ".join(same_name[:3]) + "?"
    close = nearest(key, siblings)
    if close:
        return f"did you mean {prefix}{close}?"
    other = ConvertSpec if root is ExperimentSpec else ExperimentSpec
    if not prefix and key in all_paths(other):
        kind = "convert" if other is ConvertSpec else "train, evaluate, inference or export"
        return f"this key belongs to the spec of {kind}"
    last = {path.rpartition(".")[2]: path for path in paths}
    close = nearest(key, last)
    return f"did you mean {last[close]}?" if close else None
