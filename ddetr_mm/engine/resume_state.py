"""Checks of a training state before any of it is restored, and what a resumed run keeps of the spec.

torch's optimizers trust the state that they are given: a tensor of another shape makes their fused and
multi-tensor steps read and write outside its memory.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from ddetr_mm.engine.resume_changes import (
    CHOICES,
    FROM_CHECKPOINT,
    FROM_SPEC,
    IMAGES_KEY,
    changed_settings,
    keep_checkpoints_settings,
    refuse_other_images,
    take_specs_settings,
    training_images,
)
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.entries import is_finite, is_odd
from ddetr_mm.weights.load import MOST_EPOCHS, MOST_STEPS, START_WITH, leave_out_unread, unwrapped
from ddetr_mm.weights.report import UNREAD

OPTIMIZER_KEY = "optimizer_layout"
"""Entry of a checkpoint's ``meta``: type of the optimizer, names of its parameters, which are trained, and
which have a state."""

_GROUP_FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""How a step is computed: this run's values hold."""
_ADAM = ("Adam", "AdamW")
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")


class _StateError(Exception):
    """A part of the state that is wrong: ``where`` in the file, and what it is."""

    def __init__(self, where: str, what: str, hint: str | None = None) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what
        self.hint = hint


def _refuse(where: str, what: str, hint: str | None = None) -> NoReturn:
    raise _StateError(where, what, hint)


# --- Numbers and tensors ---


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**63


def _require_int(value: Any, where: str, low: int, high: int) -> None:
    if not _is_int(value):
        _refuse(where, f"is {_kind(value)}, not a whole number")
    if not low <= value <= high:
        _refuse(where, f"is {value}, not within {low} and {high}")


def _require_number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> None:
    if not _is_number(value):
        _refuse(where, f"is {_kind(value)}, not a finite number")
    if not low <= value <= high:
        _refuse(where, f"is {value}, not within {low:g} and {high:g}")


def _require_mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        _refuse(where, f"is {_kind(value)}, not a dictionary")
    return value


def _require_list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        _refuse(where, f"is {_kind(value)}, not a list")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"a {type(value).__name__}"


def require_dense(value: Any, where: str) -> Tensor:
    """Return a tensor whose values are all in memory of their own, strided without gaps or overlaps.

    Raises:
        _StateError: it is no tensor, or another kind.
    """
    if not isinstance(value, Tensor):
        _refuse(where, f"is {_kind(value)}, not a tensor")
    if is_odd(value):
        _refuse(where, f"is no dense tensor covered by its storage ({_form(value)})")
    if not _has_own_places(value):
        _refuse(where, f"has strides {list(value.stride())} for shape {list(value.shape)}")
    last = (value.storage_offset() + value.numel()) * value.element_size()
    if value.numel() and last > value.untyped_storage().nbytes():
        _refuse(where, "is not covered by its storage")
    return value


def _form(value: Tensor) -> str:
    layout = str(value.layout).removeprefix("torch.")
    device = ", without values" if value.is_meta else ""
    return f"{str(value.dtype).removeprefix('torch.')}, {layout}{device}"


def _has_own_places(value: Tensor) -> bool:
    """Whether the elements lie densely, each at a place of its own, in any order of the axes."""
    expected = 1
    sizes = sorted(
        (stride, size) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1
    )
    for stride, size in sizes:
        if stride != expected:
            return False
        expected *= size
    return True


# --- Weights ---


def check_weights(state: Any, model: nn.Module, entry: str = "state_dict") -> None:
    """Check a checkpoint's weights against the network: names, shapes, types, form and finiteness.

    Args:
        state: what ``entry`` of the checkpoint holds.
        model: the run's network, possibly wrapped for parallel training.
        entry: its name; ``ema_state_dict`` has the number of averaged steps, too.
    """
    weights = dict(_require_mapping(state, entry))
    if entry != "state_dict" and "steps" in weights:
        steps = require_dense(weights.pop("steps"), f"{entry}, steps")
        if steps.numel() != 1 or not 0 <= steps.item() <= MOST_STEPS:
            _refuse(f"{entry}, steps", "is not the number of averaged steps")
    ours = unwrapped(model).state_dict()
    found = {key.removeprefix("module."): value for key, value in weights.items() if isinstance(key, str)}
    if len(found) != len(weights):
        _refuse(entry, "has keys that are no texts, or the same name twice")
    for name, value in ours.items():
        if not isinstance(value, Tensor):
            continue
        where = f"{entry}, {name}"
        if name not in found:
            _refuse(where, "is missing")
        theirs = require_dense(found[name], where)
        _require_same(theirs, value, where)
        if not is_finite(theirs):
            _refuse(where, "has values that are NaN or infinite", "resume from an earlier checkpoint")
    if unknown := sorted(found.keys() - ours.keys()):
        _refuse(f"{entry}, {unknown[0]}", "is not in the network")


def _require_same(theirs: Tensor, ours: Tensor, where: str) -> None:
    if theirs.shape != ours.shape:
        _refuse(where, f"has shape {list(theirs.shape)}, not {list(ours.shape)}")
    if theirs.dtype != ours.dtype:
        kinds = [str(one.dtype).removeprefix("torch.") for one in (theirs, ours)]
        _refuse(where, f"is {kinds[0]}, not {kinds[1]}")


# --- Optimizer ---


def optimizer_layout(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """What :data:`OPTIMIZER_KEY` holds: plain values."""
    names = parameter_names(optimizer, model)
    parameters = _parameters(optimizer)
    return {
        "type": type(optimizer).__name__,
        "parameters": names,
        "trained": [name for name, one in zip(names, parameters, strict=True) if one.requires_grad],
        "with_state": [name for name, one in zip(names, parameters, strict=True) if optimizer.state.get(one)],
    }


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in unwrapped(model).named_parameters()}
    return [names.get(id(one), f"parameter {index}") for index, one in enumerate(_parameters(optimizer))]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_optimizer(
    state: Any, optimizer: torch.optim.Optimizer, model: nn.Module, meta: Mapping[str, Any]
) -> None:
    """Check an optimizer's saved state against the run's optimizer.

    Args:
        state: ``checkpoint["optimizer"]``.
        optimizer: the run's, for the same network.
        model: names the parameters.
        meta: the checkpoint's, whose counters are checked.
    """
    state = _require_mapping(state, "optimizer")
    names = parameter_names(optimizer, model)
    layout = _check_layout(meta.get(OPTIMIZER_KEY), optimizer, names, model)
    _check_groups(state.get("param_groups"), optimizer, state.get("base_param_settings"))
    entries = _require_mapping(state.get("state"), "optimizer.state")
    parameters = _parameters(optimizer)
    used: list[tuple[int, int, int, str]] = []
    for index, values in entries.items():
        if not _is_int(index) or not 0 <= index < len(parameters):
            _refuse("optimizer.state", f"has an entry {index!r}, which is no parameter's number")
        name, parameter = names[index], parameters[index]
        where = f"optimizer.state, {name}"
        if not parameter.requires_grad:
            _refuse(where, "is trained in the checkpoint and frozen in this run", _FREEZE_HINT)
        for entry, tensor in _check_entries(values, optimizer, parameter, where, meta["iter"]):
            begin = tensor.data_ptr()
            end = begin + tensor.numel() * tensor.element_size()
            used.append((tensor.get_device(), begin, end, f"{where}, {entry}"))
    missing = [name for name in layout["with_state"] if names.index(name) not in entries] if layout else []
    if missing:
        _refuse(f"optimizer.state, {missing[0]}", "is missing")
    used.sort()
    for first, second in itertools.pairwise(used):
        if first[0] == second[0] and second[1] < first[2]:
            _refuse(second[3], f"shares its memory with {first[3]}")


_FREEZE_HINT = f"resume with the train.freeze of the checkpoint, or {START_WITH}"


def _check_layout(layout: Any, optimizer: Any, names: list[str], model: nn.Module) -> Mapping[str, Any]:
    """Check the optimizer's type and which parameters are trained; earlier versions did not save them."""
    if layout is None:
        return {}
    where = f"meta.{OPTIMIZER_KEY}"
    layout = _require_mapping(layout, where)
    for key in ("parameters", "trained", "with_state"):
        listed = _require_list(layout.get(key), f"{where}.{key}")
        if not all(isinstance(name, str) for name in listed):
            _refuse(f"{where}.{key}", "is not a list of names")
    kind = type(optimizer).__name__
    if layout.get("type") != kind:
        _refuse_other_optimizer(str(layout.get("type")), kind)
    network = dict(unwrapped(model).named_parameters())
    trained = {name for name in names if name not in network or network[name].requires_grad}
    saved = {name for name in layout["trained"] if name in network}  # others: stages no longer built
    for changed, what in (
        (sorted(saved - trained), "trained in the checkpoint and frozen in this run"),
        (sorted(trained - saved), "frozen in the checkpoint and trained in this run"),
    ):
        if changed:
            more = f" and {len(changed) - 1} other parameters" if len(changed) > 1 else ""
            _refuse("train.freeze", f"{changed[0]}{more}: {what}", _FREEZE_HINT)
    if [name for name in layout["parameters"] if name in network] != names:
        _refuse(f"{where}.parameters", "are not the network's parameters in the optimizer's order")
    if not set(layout["with_state"]) <= set(layout["parameters"]):
        _refuse(f"{where}.with_state", "names no parameter")
    return {**layout, "with_state": [name for name in layout["with_state"] if name in network]}


def _refuse_other_optimizer(theirs: str, ours: str) -> NoReturn:
    _refuse(
        "train.optim.optimizer",
        f"the checkpoint was trained with {theirs}, this run has {ours}",
        f"resume with the optimizer of the checkpoint, or {START_WITH}",
    )


def _check_groups(groups: Any, optimizer: torch.optim.Optimizer, base: Any) -> None:
    groups = _require_list(groups, "optimizer.param_groups")
    ours = optimizer.state_dict()["param_groups"]
    if groups and isinstance(groups[0], Mapping):
        for key, kinds in {"betas": "Adam or AdamW", "momentum": "SGD"}.items():
            if key in groups[0] and key not in ours[0]:
                _refuse_other_optimizer(kinds, type(optimizer).__name__)
    if len(groups) != len(ours):
        what = f"has {len(groups)} groups, this run's optimizer {len(ours)}"
        _refuse("optimizer.param_groups", what, _FREEZE_HINT)
    for index, (theirs, mine) in enumerate(zip(groups, ours, strict=True)):
        where = f"optimizer.param_groups[{index}]"
        theirs = _require_mapping(theirs, where)
        if not isinstance(theirs.get("params"), (list, tuple)) or not all(map(_is_int, theirs["params"])):
            _refuse(f"{where}.params", "is not a list of parameters' numbers")
        if list(theirs["params"]) != list(mine["params"]):
            _refuse(f"{where}.params", "names other parameters than this run's optimizer")
        _check_settings(theirs, mine, where)
    if base is not None:
        _check_settings(
            _require_mapping(base, "optimizer.base_param_settings"), ours[0], "optimizer.base_param_settings"
        )


def _check_settings(theirs: Mapping[Any, Any], ours: Mapping[str, Any], where: str) -> None:
    """Check the hyperparameters of a group."""
    for key in ("lr", "initial_lr", "weight_decay", "eps", "momentum", "dampening", "betas"):
        if key in ours and key not in theirs:
            _refuse(f"{where}.{key}", "is missing")
    for key, value in theirs.items():
        place = f"{where}.{key}"
        if key == "params" or key in _GROUP_FLAGS:
            continue
        if not isinstance(key, str):
            _refuse(where, f"has a key {key!r} that is no text")
        if key == "betas":
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                _refuse(place, "is not a pair of numbers")
            for beta in value:
                _require_number(beta, place, 0.0, 1.0)
                if beta == 1.0:
                    _refuse(place, "is 1")
        elif key in ("lr", "initial_lr", "weight_decay", "eps"):
            _require_number(value, place, 0.0)
        elif key in ("momentum", "dampening"):
            _require_number(value, place, 0.0, 1.0)
        elif isinstance(ours.get(key), bool) or (key in ours and ours[key] is None):
            if value is not None and value != ours[key]:
                _refuse(place, f"is {value!r}, in this run {ours[key]!r}")
        elif value is not None and not isinstance(value, (bool, str)):
            _require_number(value, place)


def _check_entries(
    values: Any, optimizer: torch.optim.Optimizer, parameter: Tensor, where: str, steps: int
) -> Iterator[tuple[str, Tensor]]:
    """Check the state of one parameter, and give its tensors."""
    values = _require_mapping(values, where)
    kind = type(optimizer).__name__
    if kind in _ADAM and values:
        needed = _ADAM_STATE + (("max_exp_avg_sq",) if optimizer.defaults.get("amsgrad") else ())
        for entry in needed:
            if entry not in values:
                _refuse(f"{where}, {entry}", "is missing")
        if unknown := [str(entry) for entry in values if entry not in needed]:
            _refuse(f"{where}, {unknown[0]}", f"is no entry of {kind}")
    elif kind == "SGD" and (unknown := [str(entry) for entry in values if entry != "momentum_buffer"]):
        _refuse(f"{where}, {unknown[0]}", "is no entry of SGD")
    for entry, value in values.items():
        place = f"{where}, {entry}"
        if entry == "step":
            yield from _check_step(value, place, steps)
        elif value is None and entry == "momentum_buffer":
            continue
        elif kind in (*_ADAM, "SGD") or isinstance(value, Tensor):
            tensor = require_dense(value, place)
            if kind in (*_ADAM, "SGD"):
                _require_same(tensor, parameter, place)
            if not is_finite(tensor):
                _refuse(place, "has values that are NaN or infinite", "resume from an earlier checkpoint")
            if entry in _SQUARES and bool((tensor < 0).any()):
                _refuse(place, "has values below 0, which averages of squares cannot have")
            yield str(entry), tensor


def _check_step(value: Any, where: str, steps: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        tensor = require_dense(value, where)
        if tensor.dim() or tensor.is_complex() or tensor.dtype is torch.bool:
            _refuse(where, f"is a {_form(tensor)} tensor of shape {list(tensor.shape)}, not a number")
        yield "step", tensor
        value = tensor.item()
    _require_number(value, where, 0, steps)
    if value != int(value):
        _refuse(where, f"is {value}, not a whole number")


def check_scaler(state: Any) -> None:
    """Check a ``GradScaler``'s state; an empty one is of a scaler that is off."""
    scaler = _require_mapping(state, "optimizer.loss_scaler")
    if not scaler:
        return
    for key in ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"):
        if key not in scaler:
            _refuse(f"optimizer.loss_scaler.{key}", "is missing")
    _require_number(scaler["scale"], "optimizer.loss_scaler.scale", 2.0**-126, 2.0**127)
    _require_number(scaler["growth_factor"], "optimizer.loss_scaler.growth_factor", 1.0, 2.0**32)
    _require_number(scaler["backoff_factor"], "optimizer.loss_scaler.backoff_factor", 2.0**-32, 1.0)
    _require_int(scaler["growth_interval"], "optimizer.loss_scaler.growth_interval", 1, MOST_STEPS)
    _require_int(scaler["_growth_tracker"], "optimizer.loss_scaler._growth_tracker", 0, MOST_STEPS)


# --- Schedules ---


def check_schedulers(states: Any, schedulers: Sequence[Any], steps: int) -> None:
    """Check the schedules' states against the run's own.

    Args:
        states: ``checkpoint["param_schedulers"]``.
        schedulers: the run's.
        steps: training steps that are done.
    """
    if states is None and not schedulers:
        return
    states = _require_list(states, "param_schedulers")
    if len(states) != len(schedulers):
        _refuse("param_schedulers", f"has {len(states)} schedules, this run {len(schedulers)}")
    for index, (state, scheduler) in enumerate(zip(states, schedulers, strict=True)):
        where = f"param_schedulers[{index}]"
        theirs, ours = _require_mapping(state, where), scheduler.state_dict()
        shapes = {"milestones", "step_size"}  # MultiStepLR has the one, StepLR the other
        for key, mine in ours.items():
            if key in theirs:
                _check_scheduled(theirs[key], mine, f"{where}.{key}", steps)
            elif key not in shapes or not shapes & theirs.keys():
                _refuse(f"{where}.{key}", "is missing")
        for key in theirs.keys() - ours.keys():
            if key not in shapes or not shapes & ours.keys():
                _refuse(f"{where}.{key}", "is no entry of the schedule")
            example = {1: 1} if key == "milestones" else 1
            _check_scheduled(theirs[key], example, f"{where}.{key}", steps)


def _check_scheduled(value: Any, ours: Any, where: str, steps: int) -> None:
    name = where.rpartition(".")[2]
    if name in ("last_step", "_global_step"):
        _require_int(value, where, 0, steps)
    elif name == "milestones":
        for step, times in _require_mapping(value, where).items():
            _require_int(step, where, 0, MOST_STEPS)
            _require_int(times, where, 1, MOST_EPOCHS)
    elif name == "step_size":
        _require_int(value, where, 1, MOST_STEPS)
    elif isinstance(ours, bool) or ours is None or isinstance(ours, str):
        if type(value) is not type(ours):
            _refuse(where, f"is {_kind(value)}, not {_kind(ours)}")
        if isinstance(ours, str) and value != ours:
            _refuse(where, f"is {value!r}, in this run {ours!r}")
    elif isinstance(ours, (list, tuple)):
        values = _require_list(value, where)
        if len(values) != len(ours):
            _refuse(where, f"has {len(values)} values, this run's schedule {len(ours)}")
        for number in values:
            _require_number(number, where, 0.0)
    elif isinstance(ours, int):
        _require_int(value, where, -MOST_STEPS, MOST_STEPS)
    elif isinstance(ours, float):
        _require_number(value, where, 0.0)


# --- Counters, message hub and random states ---


def check_counters(meta: Any) -> None:
    """Check the counters of a checkpoint's ``meta``, and what mmengine reads of it on resuming."""
    meta = _require_mapping(meta, "meta")
    _require_int(meta.get("epoch"), "meta.epoch", 0, MOST_EPOCHS)
    _require_int(meta.get("iter"), "meta.iter", 0, MOST_STEPS)
    if meta["epoch"] > meta["iter"]:
        _refuse("meta.epoch", f"is {meta['epoch']}, more than the steps done (meta.iter {meta['iter']})")
    for name in ("batches_done", "samples_done"):
        _require_int(meta.get(name, 0), f"meta.{name}", 0, MOST_STEPS)
    if meta.get("seed") is not None:
        _require_int(meta["seed"], "meta.seed", 0, 2**32 - 1)
    if "learning_rate_factor" in meta:
        _require_number(meta["learning_rate_factor"], "meta.learning_rate_factor", 1e-12, 1e12)
    if meta.get("dataset_meta") is not None:
        data = _require_mapping(meta["dataset_meta"], "meta.dataset_meta")
        for name, kind in (("classes", str), ("category_ids", int)):
            if data.get(name) is not None:
                values = _require_list(data[name], f"meta.dataset_meta.{name}")
                if not all(value is None or isinstance(value, kind) for value in values):
                    _refuse(f"meta.dataset_meta.{name}", f"has entries that are no {kind.__name__}")


def check_message_hub(state: Any) -> None:
    """Check a message hub's state, in the plain form or mmengine's own."""
    hub = _require_mapping(state, "message_hub")
    for part in ("log_scalars", "runtime_info", "resumed_keys"):
        for key in _require_mapping(hub.get(part), f"message_hub.{part}"):
            if not isinstance(key, str):
                _refuse(f"message_hub.{part}", f"has a key {key!r} that is no text")
    for key, value in hub["resumed_keys"].items():
        if not isinstance(value, bool):
            _refuse(f"message_hub.resumed_keys.{key}", f"is {_kind(value)}, not true or false")
    for name, buffer in hub["log_scalars"].items():
        if isinstance(buffer, HistoryBuffer):
            continue
        where = f"message_hub.log_scalars.{name}"
        buffer = _require_mapping(buffer, where)
        values = require_dense(buffer.get("values"), f"{where}.values")
        counts = require_dense(buffer.get("counts"), f"{where}.counts")
        if values.dim() != 1 or not values.is_floating_point():
            _refuse(f"{where}.values", f"is {_form(values)} of shape {list(values.shape)}")
        if counts.shape != values.shape or counts.is_floating_point() or counts.dtype is torch.bool:
            _refuse(f"{where}.counts", f"is {_form(counts)} of shape {list(counts.shape)}")
        _require_int(buffer.get("max_length"), f"{where}.max_length", 1, MOST_STEPS)


def check_rng_states(states: Any) -> None:
    """Check the random states of all ranks; a checkpoint of another tool has none."""
    for rank, state in enumerate(_require_list(states if states is not None else [], "rng_states")):
        where = f"rng_states[{rank}]"
        state = _require_mapping(state, where)
        _check_python_rng(_require_mapping(state.get("python"), f"{where}.python"), f"{where}.python")
        _check_numpy_rng(_require_mapping(state.get("numpy"), f"{where}.numpy"), f"{where}.numpy")
        _check_torch_rng(state.get("torch"), f"{where}.torch", torch.get_rng_state().numel())
        for index, saved in enumerate(_require_list(state.get("cuda"), f"{where}.cuda")):
            _check_torch_rng(saved, f"{where}.cuda[{index}]", 16)
        try:
            torch.Generator().set_state(state["torch"].cpu())
        except RuntimeError as error:
            raise _StateError(f"{where}.torch", f"is no state of torch's generator ({error})") from error


def _check_python_rng(state: Mapping[Any, Any], where: str) -> None:
    version, internal, _ = random.getstate()
    if state.get("version") != version or not _is_int(state["version"]):
        _refuse(f"{where}.version", f"is {state.get('version')!r}, not {version}")
    words = _require_list(state.get("internal"), f"{where}.internal")
    if len(words) != len(internal):
        _refuse(f"{where}.internal", f"has {len(words)} numbers, not {len(internal)}")
    for word in words[:-1]:
        _require_int(word, f"{where}.internal", 0, 2**32 - 1)
    _require_int(words[-1], f"{where}.internal", 0, len(internal) - 1)
    if state.get("gauss_next") is not None:
        _require_number(state["gauss_next"], f"{where}.gauss_next")


def _check_numpy_rng(state: Mapping[Any, Any], where: str) -> None:
    name, words, *_ = np.random.RandomState(0).get_state(legacy=True)
    if state.get("name") != name:
        _refuse(f"{where}.name", f"is {state.get('name')!r}, not {name}")
    keys = require_dense(state.get("keys"), f"{where}.keys")
    if keys.dtype is not torch.int64 or tuple(keys.shape) != np.shape(words):
        _refuse(f"{where}.keys", f"is {_form(keys)} of shape {list(keys.shape)}, not {len(words)} of int64")
    if bool(((keys < 0) | (keys >= 2**32)).any()):
        _refuse(f"{where}.keys", "has numbers that are not within 0 and 2^32 - 1")
    _require_int(state.get("position"), f"{where}.position", 0, len(words))
    _require_int(state.get("has_gauss"), f"{where}.has_gauss", 0, 1)
    _require_number(state.get("cached_gaussian"), f"{where}.cached_gaussian")


def _check_torch_rng(state: Any, where: str, size: int) -> None:
    state = require_dense(state, where)
    if state.dtype is not torch.uint8 or tuple(state.shape) != (size,):
        _refuse(where, f"is {_form(state)} of shape {list(state.shape)}, not {size} bytes (uint8)")


# --- The hook ---


def check_state(checkpoint: Mapping[str, Any], runner: Any) -> None:
    """Check a whole training state against a run, before any of it is restored.

    Args:
        checkpoint: as it is read from the file.
        runner: mmengine's, with its network, optimizer and schedules built.

    Raises:
        WeightsError: names the file, the entry and what is wrong with it.
    """
    try:
        check_counters(checkpoint.get("meta"))
        meta = checkpoint["meta"]
        check_message_hub(checkpoint.get("message_hub"))
        check_rng_states(checkpoint.get("rng_states"))
        check_weights(checkpoint.get("state_dict"), runner.model)
        if checkpoint.get("ema_state_dict") is not None:
            check_weights(checkpoint["ema_state_dict"], runner.model, "ema_state_dict")
        optimizer = getattr(runner.optim_wrapper, "optimizer", None)
        if optimizer is not None:
            check_optimizer(checkpoint.get("optimizer"), optimizer, runner.model, meta)
            if "loss_scaler" in checkpoint["optimizer"]:
                check_scaler(checkpoint["optimizer"]["loss_scaler"])
        if not isinstance(runner.param_schedulers, Mapping):
            check_schedulers(checkpoint.get("param_schedulers"), runner.param_schedulers or (), meta["iter"])
    except _StateError as error:
        raise WeightsError(
            Problem(
                f"cannot be resumed: {error.where} {error.what}"
                if not error.where.startswith("train.")
                else f"cannot be resumed: {error.what}",
                file=getattr(runner, "_load_from", None),
                where=error.where if error.where.startswith("train.") else None,
                hint=error.hint or f"resume from another checkpoint, or {START_WITH}",
            )
        ) from None


@HOOKS.register_module()
class ResumeHook(Hook):
    """Checks a checkpoint before a run resumes from it, see :func:`check_state`; first of all hooks.

    Where optimizer or schedule have other settings than in the checkpoint, the log has a line for each. It
    saves what it compares, as ``meta["optimizer_layout"]`` and ``meta["training_images"]``.

    Args:
        optimizer: whose settings hold, ``"from_checkpoint"`` or ``"from_spec"``.

    Raises:
        ValueError: another value.
    """

    priority = "HIGHEST"

    def __init__(self, optimizer: str = FROM_CHECKPOINT) -> None:
        if optimizer not in CHOICES:
            raise ValueError(f"optimizer must be one of {', '.join(CHOICES)}, not {optimizer!r}")
        self.optimizer = optimizer
        self._images: dict[str, Any] | None = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the optimizer's type and parameters, and which images were trained on."""
        optimizer = getattr(runner.optim_wrapper, "optimizer", None)
        if optimizer is not None and "optimizer" in checkpoint:
            checkpoint["meta"][OPTIMIZER_KEY] = optimizer_layout(optimizer, runner.model)
        if (images := self._training_images(runner)) is not None:
            checkpoint["meta"][IMAGES_KEY] = images

    def _training_images(self, runner: Any) -> dict[str, Any] | None:
        if self._images is None:
            self._images = training_images(runner.train_dataloader.dataset)
        return self._images

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a state that is broken or of another run.

        Raises:
            WeightsError: see :func:`check_state`, or the training images are others.
        """
        if not getattr(runner, "_resume", False):
            return
        if isinstance(checkpoint.get("meta"), dict):
            # mmengine runs it as Python code, to compare numbers of GPUs.
            checkpoint["meta"].pop("config", None)
        if all(isinstance(checkpoint.get(name), dict) for name in ("state_dict", "optimizer")):
            self._leave_out_unread(runner, checkpoint)
        check_state(checkpoint, runner)
        file = getattr(runner, "_load_from", None)
        refuse_other_images(checkpoint["meta"], self._training_images(runner), file)
        self._take_over(runner, checkpoint)

    def _leave_out_unread(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        try:
            left_out = leave_out_unread(checkpoint, runner.model)
        except (AttributeError, KeyError, TypeError, IndexError):
            return  # broken in a way that the check names
        if left_out:
            runner.logger.info(f"{left_out} tensors of the checkpoint are left out: {UNREAD}")

    def _take_over(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Let the choice decide about settings, and this run how steps are computed and losses scaled."""
        optimizer = getattr(runner.optim_wrapper, "optimizer", None)
        if optimizer is None:
            return
        if not isinstance(runner.param_schedulers, Mapping):
            for change in changed_settings(checkpoint, runner, parameter_names(optimizer, runner.model)):
                runner.logger.warning(change.line(self.optimizer))
            if self.optimizer == FROM_SPEC:
                take_specs_settings(checkpoint, runner)
            else:
                keep_checkpoints_settings(checkpoint, runner)
        state = checkpoint["optimizer"]
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
            theirs.update({flag: ours[flag] for flag in _GROUP_FLAGS if flag in ours})
        if not state.get("loss_scaler", True):
            del state["loss_scaler"]
