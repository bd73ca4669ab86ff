"""The one engine that applies the tables of :mod:`ddetr_mm.weights.key_maps`, in either direction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ddetr_mm.weights.key_maps import MMDET, FormatTable

_PATTERNS = {
    "i": r"\d+",
    "j": r"\d+",
    "level": r"\d+",
    "extra": r"\d+",
    "leaf": r"[^.]+",
    "rest": r".+",
    "side": r"encoder|decoder",
    "part": r"[^.]+",
}


@dataclass
class KeyTrace:
    """Which key became which while one table was applied.

    Attributes:
        mapped: source key → the target keys that hold its values.
        unexpected: source keys that no rule knows.
        aliases: source key → the key it repeats.
        dropped: source key → why it was left out.
        differing_aliases: repeated keys whose values are not those of the key they repeat.
        used_alias: whether some alias of the given kind (``refine``, ``two_stage``) was seen.
    """

    mapped: dict[str, list[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    differing_aliases: list[str] = field(default_factory=list)
    used_alias: set[str] = field(default_factory=set)


def is_counter(key: str) -> bool:
    """Whether a key is one of batch norm's step counters, which evaluation never reads."""
    return key.endswith(".num_batches_tracked")


def num_stage_levels(state_dict: Mapping[str, Tensor], table: FormatTable) -> int:
    """How many feature levels come straight from a backbone stage: those with a 1x1 projection."""
    pattern = _compiled(_foreign_projection(table))
    found = 0
    for key, value in state_dict.items():
        if pattern.fullmatch(key) and value.dim() == 4 and value.shape[-1] == 1:
            found += 1
    return found


def _foreign_projection(table: FormatTable) -> str:
    for rule in table.rules:
        if rule.ours == "neck.convs.{level}.conv.{leaf}" and isinstance(rule.theirs, str):
            return rule.theirs.replace("{leaf}", "weight")
    return "neck.convs.{level}.conv.weight"


def to_canonical(state_dict: Mapping[str, Tensor], table: FormatTable) -> tuple[dict[str, Tensor], KeyTrace]:
    """Rename a foreign state dict into canonical names.

    Tensors are not copied, except where several are joined into one.

    Args:
        state_dict: foreign key → tensor.
        table: the format's table.

    Returns:
        The canonical state dict and the trace of every key.
    """
    trace = KeyTrace()
    num_levels = num_stage_levels(state_dict, table)
    spelled = {_usual_spelling(key, table): key for key in state_dict}
    canonical: dict[str, Tensor] = {}
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for usual, key in spelled.items():
        value = state_dict[key]
        name = _resolve_alias(usual, value, spelled, state_dict, table, trace)
        if name is None:
            continue
        match = _first_match(name, table, num_levels)
        if match is None:
            trace.unexpected.append(key)
            continue
        ours, position = match
        if position is None:
            canonical[ours] = value
            trace.mapped[key] = [ours]
        else:
            parts.setdefault(ours, {})[position] = (key, value)
    for ours, pieces in parts.items():
        _join(ours, pieces, canonical, trace)
    return canonical, trace


def _resolve_alias(
    usual: str,
    value: Tensor,
    spelled: Mapping[str, str],
    state_dict: Mapping[str, Tensor],
    table: FormatTable,
    trace: KeyTrace,
) -> str | None:
    """The name under which a key counts, or None when the key only repeats one that is there."""
    for rule in table.aliases:
        match = _compiled(rule.alias).fullmatch(usual)
        if match is None:
            continue
        trace.used_alias.add(rule.when)
        original = rule.canonical.format(**match.groupdict())
        if original not in spelled:
            return original
        key = spelled[usual]
        trace.aliases[key] = spelled[original]
        if not same_values(value, state_dict[spelled[original]]):
            trace.differing_aliases.append(key)
        return None
    return usual


def _first_match(key: str, table: FormatTable, num_levels: int) -> tuple[str, int | None] | None:
    """The canonical name of a foreign key, and its position when it is a part of a joined tensor."""
    for rule in table.rules:
        options = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        for position, template in enumerate(options):
            match = _compiled(template).fullmatch(key)
            if match is None:
                continue
            values = match.groupdict()
            if "level" in values and int(values["level"]) >= num_levels:
                continue
            if "extra" in values:
                if int(values["extra"]) < num_levels:
                    continue
                values["extra"] = str(int(values["extra"]) - num_levels)
            return rule.ours.format(**values), None if isinstance(rule.theirs, str) else position
    return None


def _join(
    ours: str, pieces: dict[int, tuple[str, Tensor]], canonical: dict[str, Tensor], trace: KeyTrace
) -> None:
    """Concatenate q, k and v; without all three of equal width none can be used."""
    tensors = [pieces[position][1] for position in sorted(pieces)]
    if len(tensors) == 3 and len({tuple(tensor.shape[1:]) for tensor in tensors}) == 1:
        canonical[ours] = torch.cat(tensors)
        for _, (key, _value) in sorted(pieces.items()):
            trace.mapped[key] = [ours]
    else:
        trace.unexpected += [key for key, _value in pieces.values()]


def from_canonical(
    state_dict: Mapping[str, Tensor],
    table: FormatTable,
    *,
    with_box_refine: bool,
    two_stage: bool,
) -> tuple[dict[str, Tensor], KeyTrace]:
    """Rename a canonical state dict into a foreign format, its repeated keys restored.

    Repeated keys share one tensor, as they do in the format's own files.

    Args:
        state_dict: canonical key → tensor.
        table: the target format's table.
        with_box_refine: whether the model refines boxes from layer to layer.
        two_stage: whether its encoder makes the proposals.

    Returns:
        The foreign state dict and the trace of every canonical key.
    """
    trace = KeyTrace()
    num_levels = num_stage_levels(state_dict, MMDET)
    foreign: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if table.without_counters and is_counter(key):
            trace.dropped[key] = "batch norm's step counter, which the target does not have"
            continue
        targets = _foreign_names(key, table, num_levels)
        if targets is None:
            trace.unexpected.append(key)
        else:
            rows = [value] if len(targets) == 1 else list(value.chunk(len(targets)))
            foreign.update(zip(targets, rows, strict=True))
            trace.mapped[key] = targets
    wanted = {"refine": with_box_refine, "two_stage": two_stage}
    sources = {target: key for key, targets in trace.mapped.items() for target in targets}
    for rule in table.aliases:
        if not wanted[rule.when]:
            continue
        for name in [*foreign]:
            match = _compiled(rule.canonical).fullmatch(name)
            if match is not None:
                alias = rule.alias.format(**match.groupdict())
                foreign[alias] = foreign[name]
                trace.mapped[sources[name]].append(alias)
    return foreign, trace


def _foreign_names(key: str, table: FormatTable, num_levels: int) -> list[str] | None:
    for rule in table.rules:
        match = _compiled(rule.ours).fullmatch(key)
        if match is None:
            continue
        values = match.groupdict()
        if "extra" in values:
            values["extra"] = str(int(values["extra"]) + num_levels)
        options = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        return [template.format(**values) for template in options]
    return None


def _usual_spelling(key: str, table: FormatTable) -> str:
    """A foreign key in the spelling the table's rules use."""
    for spelling, usual in table.alternatives:
        match = _compiled(spelling).fullmatch(key)
        if match is not None:
            key = usual.format(**match.groupdict())
    return key


def same_values(left: Tensor, right: Tensor) -> bool:
    """Bit-for-bit equality of two tensors (equal NaNs count as equal)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
        return True
    return bool(torch.equal(left, right)) or (
        left.is_floating_point() and bool(torch.allclose(left, right, rtol=0.0, atol=0.0, equal_nan=True))
    )


@cache
def _compiled(template: str) -> re.Pattern[str]:
    """The regular expression of a template; names of placeholders become group names."""
    pieces = re.split(r"\{(\w+)\}", template)
    text = "".join(
        re.escape(piece) if index % 2 == 0 else f"(?P<{piece}>{_PATTERNS[piece]})"
        for index, piece in enumerate(pieces)
    )
    return re.compile(text)
