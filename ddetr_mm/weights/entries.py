"""Which of a file's dictionaries of tensors is read: found at any depth, one chosen by a rule that is said.

A file may hold several sets of weights: a model and its running average, a student and a teacher.
:func:`tensor_entries` lists the dictionaries by what they hold, never by their names. :func:`choose` takes
one of the sets that a reader found in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.layouts import Found, without_wrappers
from ddetr_mm.weights.pickle_names import InertArray, InertObject
from ddetr_mm.weights.safe_read import RawFile, refuse_encrypted, short_names

UseEma: TypeAlias = Literal["auto"] | bool

EMA_OPTION: dict[str, UseEma] = {"auto": "auto", "true": True, "false": False}
"""What the choices of the option ``--ema`` mean."""


@dataclass(frozen=True)
class Selection:
    """Which set of weights to read where a file has several.

    Attributes:
        entry: dotted path of the dictionary, with the prefix of the keys in it where needed; None leaves the
            choice to :func:`choose`.
        use_ema: averaged weights: ``"auto"`` takes them where the file has any, True wants them, False takes
            the weights of the last step.
    """

    entry: str | None = None
    use_ema: UseEma = "auto"


DEFAULT = Selection()

# --- Dictionaries of tensors ---

_MAX_DEPTH = 16
_MAX_LIST = 64
_OPTIMIZER = {"optimizer", "optimizers", "optim", "optims"}


@dataclass
class Entry:
    """A dictionary of tensors in a file.

    Attributes:
        path: the keys that lead to it.
        tensors: its keys → tensors; for a dictionary of dictionaries the keys are dotted.
        keys: its keys → the same without wrappers.
        joined: whether it was put together of several dictionaries.
    """

    path: tuple[str, ...]
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    joined: bool = False

    @property
    def name(self) -> str:
        """The path with dots; empty for the file itself."""
        return ".".join(self.path)


def tensor_entries(raw: RawFile) -> list[Entry]:
    """Return every dictionary of tensors in a file, outer ones first, optimizers' left out.

    Values that are no tensors (``None``, numbers, texts) are ignored. The last entry joins all dictionaries
    below the outermost one, for files that keep the parts of one network apart.

    Raises:
        WeightsError: there is none, or the file is encrypted.
    """
    content = raw.payload
    if isinstance(content, Mapping) and content.get("state_dict_encrypted"):
        refuse_encrypted(raw.path)
    found: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    _collect(content, (), found, set())
    if not found:
        _refuse_empty(raw)
    if all(_fault(value) for _path, tensors in found for value in tensors.values()):
        check_storage(raw.path, found[0][1])
    entries = [Entry(path, tensors, without_wrappers(tensors)) for path, tensors in found]
    if len(found) > 1:
        joined = {".".join((*path, key)): value for path, tensors in found for key, value in tensors.items()}
        entries.append(Entry((), joined, without_wrappers(joined), joined=True))
    return entries


def _collect(
    value: Any, path: tuple[str, ...], found: list[tuple[tuple[str, ...], dict[str, Tensor]]], seen: set[int]
) -> None:
    if isinstance(value, InertObject) and not isinstance(value, InertArray):
        value = value.state
    if len(path) > _MAX_DEPTH or id(value) in seen:
        return
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)) and len(value) <= _MAX_LIST:
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return
    seen.add(id(value))
    if path and _words(path[-1]) & _OPTIMIZER:
        return
    tensors = {key: item for key, item in items if isinstance(item, Tensor)}
    tensors |= {
        key: tensor
        for key, item in items
        if isinstance(item, InertArray) and (tensor := item.tensor()) is not None
    }
    if tensors and isinstance(value, Mapping):
        found.append((path, tensors))
    for key, item in items:
        if isinstance(item, (Mapping, list, tuple, InertObject)):
            _collect(item, (*path, key), found, seen)


_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""Types of values that a file of weights may hold; those of the network are looked at again when read."""


def check_storage(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not dense, real and covered by the bytes of the file.

    Raises:
        WeightsError: names the key and what it is.
    """
    for key, value in tensors.items():
        fault = _fault(value)
        if fault == _CLAIMS:
            held = value.untyped_storage().nbytes()
            what = f"claims {value.numel()} values for {key} but holds {held} bytes"
            _refuse(path, what, "do not trust this file")
        if fault is not None:
            _refuse(
                path,
                f"holds weights of a kind that is not supported: {key} ({fault})",
                "save them dense, as float32 or half precision",
            )


def is_odd(value: Tensor) -> bool:
    """Return whether :func:`check_storage` refuses a tensor."""
    return _fault(value) is not None


def is_finite(value: Tensor) -> bool:
    """Return whether no value of a dense tensor is NaN or infinite; whole numbers never are."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    # Minimum and maximum are NaN if any value is; unlike isfinite() this allocates nothing of the tensor's
    # size.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value))


_CLAIMS = "claims more than it holds"


def _fault(value: Tensor) -> str | None:
    """Return why a tensor cannot be used, None for a dense tensor of plain numbers."""
    kind = _unusual_kind(value)
    if kind is None and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return _CLAIMS
    return kind


def _unusual_kind(value: Tensor) -> str | None:
    """Return what is unusual about a tensor's form, None for a dense tensor of plain numbers."""
    if value.is_nested:
        return "nested"
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return str(value.layout) if value.layout is not torch.strided else "quantized or without values"
    if value.dtype not in _DTYPES:
        return str(value.dtype).removeprefix("torch.")
    if value.is_neg():
        return "negated when read"
    return None


def _refuse_empty(raw: RawFile) -> NoReturn:
    content = raw.payload
    if isinstance(content, Mapping):
        values = [item for item in content.values() if isinstance(item, (bytes, bytearray, InertObject))]
        named = [item for key, item in content.items() if _words(str(key)) & {"state", "model", "weights"}]
        if any(item is value for item in named for value in values):
            refuse_encrypted(raw.path)
        shown = short_names([str(key) for key in content]) or "nothing"
        _refuse(raw.path, f"holds no weights (its entries: {shown})", "give a file of a model's weights")
    kind = "a single tensor" if isinstance(content, (Tensor, InertArray)) else f"a {type(content).__name__}"
    _refuse(raw.path, f"holds {kind}, not named weights", "save a state_dict")


def _refuse(path: Path, what: str, hint: str) -> NoReturn:
    raise WeightsError(Problem(what, file=path, hint=hint))


# --- Several sets of weights ---

_AVERAGED = {"ema", "averaged", "average", "averages", "avg", "swa", "polyak", "shadow"}
_COPIES = {"teacher", "momentum", "target", "k", "key", "initial", "backup", "old", "previous"}
_SMALLEST_SHARE = 0.5  # of the largest set's names, for a set to be another one of the same network


def _words(name: str) -> set[str]:
    """Return the words of an identifier in lower case: ``ema`` and ``callback`` of ``EMACallback``."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


@dataclass
class Candidate:
    """One set of weights of a network: a dictionary, and the network found in it.

    Attributes:
        entry: the dictionary.
        found: layout, prefix and names.
        averaged: whether it is a running average of another set.
    """

    entry: Entry
    found: Found
    averaged: bool = False

    @property
    def name(self) -> str:
        """Dotted path and prefix, as ``ddetr_mm.checkpoint_entry`` takes it."""
        return ".".join([*self.entry.path, *self.found.prefix.split(".")]).strip(".")

    def members(self) -> dict[str, tuple[Entry, str]]:
        """Return the keys below the prefix: name without prefix and wrappers → (dictionary, key in it)."""
        start = self.found.prefix
        return {
            bare[len(start) :]: (self.entry, key)
            for key, bare in self.entry.keys.items()
            if bare.startswith(start)
        }

    @property
    def shown(self) -> str:
        """For messages: the name, and whether it is an average."""
        return f"'{self.name}'" + (" (averaged)" if self.averaged else "")


@dataclass
class Choice:
    """The set that is read.

    Attributes:
        candidate: it.
        members: name below the candidate's prefix, without wrappers → (dictionary, key in it). Names that an
            average leaves out lead to the weights of the last step.
        others: the sets that are not read.
        notes: what a user must know of the choice.
    """

    candidate: Candidate
    members: dict[str, tuple[Entry, str]]
    others: list[Candidate]
    notes: list[str]

    @property
    def unused(self) -> list[str]:
        """The keys of the chosen dictionary that are not below the prefix."""
        used = {key for _entry, key in self.members.values()}
        return [key for key in self.candidate.entry.tensors if key not in used]


def choose(
    raw: RawFile,
    entries: Sequence[Entry],
    find: Callable[[Entry], list[Found]],
    selection: Selection = DEFAULT,
) -> Choice | None:
    """Find a network in a file's dictionaries and choose one set of its weights.

    All sets of the layout and size of the largest one are candidates. Averaged weights come first unless
    ``selection.use_ema`` says otherwise, then copies that another set is compared with (a teacher, a momentum
    encoder) last, then the set with most names, the one nearest to the top of the file, the first.

    Args:
        raw: the file.
        entries: its dictionaries, see :func:`tensor_entries`.
        find: the networks in a dictionary, the largest first.
        selection: what the user asks for.

    Returns:
        The choice, or None where no dictionary holds such a network.

    Raises:
        WeightsError: nothing is as the user asks for; the message names the sets.
    """
    candidates = [Candidate(entry, one) for entry in entries for one in find(entry) if not entry.joined]
    most = max((len(one.found.names) for one in candidates), default=0)
    # The parts of one network, each in a dictionary of its own.
    candidates += [
        Candidate(entry, one)
        for entry in entries
        if entry.joined
        for one in find(entry)
        if len(one.names) > most
    ]
    if not candidates:
        return None
    most = max(len(one.found.names) for one in candidates)
    candidates = [one for one in candidates if len(one.found.names) >= most * _SMALLEST_SHARE]
    candidates = _without_inner(candidates)
    averaged = _averages(raw.payload, candidates)
    for one in candidates:
        one.averaged = any(one is other for other in averaged)
    allowed = _allowed(raw.path, candidates, selection)
    chosen = min(allowed, key=lambda one: _rank(one, candidates, selection))
    others = [one for one in candidates if one is not chosen]
    members = chosen.members()
    filled = _filled(chosen, others, members)
    return Choice(chosen, members | filled, others, _notes(chosen, others, filled, selection))


def _without_inner(candidates: list[Candidate]) -> list[Candidate]:
    """Leave out those whose keys another layout of the same dictionary explains better."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: -len(one.found.names)):
        keys = set(one.found.names.values())
        explained = any(other.entry is one.entry and keys & set(other.found.names.values()) for other in kept)
        if not explained:
            kept.append(one)
    return [one for one in candidates if any(one is other for other in kept)]


def _averages(content: Any, candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates that are running averages.

    mmengine and Lightning exchange the two sets when they save: ``state_dict`` is the average, the other one
    the weights of the last step.
    """
    plain_name = _exchanged(content)
    if plain_name is not None:
        return [one for one in candidates if one.entry.path[:1] == ("state_dict",)]
    return [
        one
        for one in candidates
        if any(_words(part) & _AVERAGED for part in (*one.entry.path, *one.found.prefix.split(".")))
        or "n_averaged" in one.entry.tensors
    ]


def _exchanged(content: Any) -> str | None:
    """Return the name of the last step's weights where ``state_dict`` is the average."""
    if not isinstance(content, Mapping) or "state_dict" not in content:
        return None
    if "current_model_state" in content and "averaging_state" in content:
        return "current_model_state"
    copy = content.get("ema_state_dict")
    if isinstance(copy, Mapping) and "steps" in copy:
        keys = [str(key) for key in copy if key != "steps"]
        if keys and all(key.startswith("module.") for key in keys):
            return "ema_state_dict"
    return None


def _allowed(path: Path, candidates: list[Candidate], selection: Selection) -> list[Candidate]:
    """Return the candidates that the user's selection allows."""
    names = [one.shown for one in candidates]
    allowed = candidates
    if selection.entry is not None:
        asked = _plain(selection.entry)
        allowed = [one for one in candidates if asked in (_plain(one.name), _plain(one.entry.name))]
        allowed = allowed or [one for one in candidates if f"{_plain(one.name)}.".startswith(f"{asked}.")]
        if not allowed:
            raise WeightsError(
                Problem(
                    "the file has no such set of weights",
                    file=path,
                    where="ddetr_mm.checkpoint_entry",
                    value=selection.entry,
                    allowed=names,
                )
            )
        if selection.use_ema == "auto":
            return allowed
    if selection.use_ema != "auto":
        wanted = selection.use_ema
        allowed = [one for one in allowed if one.averaged == wanted]
        if not allowed:
            raise WeightsError(
                Problem(
                    "the file has no averaged weights" if wanted else "the file has averaged weights only",
                    file=path,
                    where="ddetr_mm.use_ema",
                    value=str(selection.use_ema).lower(),
                    hint=f"its sets of weights: {', '.join(names)}; auto takes what there is",
                )
            )
    return allowed


def _plain(name: str) -> str:
    """Return a dotted path without wrappers, whichever way it was written."""
    (bare,) = without_wrappers([f"{name}.x"]).values()
    return bare.removesuffix("x").strip(".")


def _rank(one: Candidate, candidates: list[Candidate], selection: Selection) -> tuple[Any, ...]:
    parts = (*one.entry.path, *one.found.prefix.split("."))
    is_copy = not one.averaged and any(_words(part) & _COPIES for part in parts)
    wanted = selection.use_ema is not False
    position = next(index for index, other in enumerate(candidates) if other is one)
    return (one.averaged != wanted, is_copy, -len(one.found.names), len(one.name.split(".")), position)


def _filled(
    chosen: Candidate, others: list[Candidate], members: Mapping[str, tuple[Entry, str]]
) -> dict[str, tuple[Entry, str]]:
    """Return what an average leaves out (buffers, frozen weights) from the weights of the last step."""
    plain = [one for one in others if not one.averaged and one.found.layout.name == chosen.found.layout.name]
    if not chosen.averaged or not plain:
        return {}
    source = max(plain, key=lambda one: len(one.found.names)).members()
    return {name: place for name, place in source.items() if name not in members}


def _notes(
    chosen: Candidate,
    others: list[Candidate],
    filled: Mapping[str, tuple[Entry, str]],
    selection: Selection,
) -> list[str]:
    notes: list[str] = []
    if others:
        if selection.entry is not None:
            reason = "ddetr_mm.checkpoint_entry"
        elif chosen.averaged:
            reason = "averaged weights come first"
        elif any(one.averaged for one in others):
            reason = "ddetr_mm.use_ema: false"
        else:
            reason = "the first that is no copy of another"
        listed = ", ".join(one.shown for one in others[:6]) + (" …" if len(others) > 6 else "")
        notes.append(
            f"the file holds {len(others) + 1} sets of weights: {chosen.shown} is read ({reason}), not"
            f" {listed}; ddetr_mm.use_ema and ddetr_mm.checkpoint_entry choose another"
        )
    elif chosen.averaged:
        notes.append(f"averaged weights are read: '{chosen.name}'; the file has no others")
    if filled:
        notes.append(
            f"{len(filled)} tensors that the average leaves out ({short_names(list(filled), 2)}) come from"
            " the weights of the last step"
        )
    return notes
