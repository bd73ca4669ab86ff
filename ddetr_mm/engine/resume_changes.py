"""What a resumed run takes from its checkpoint where the spec has changed since, and what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.registry import PARAM_SCHEDULERS

from ddetr_mm.engine.optimization import LEARNING_RATE_FACTOR, ScaledLearningRateHook
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.load import START_WITH

FROM_CHECKPOINT = "from_checkpoint"
FROM_SPEC = "from_spec"
CHOICES = (FROM_CHECKPOINT, FROM_SPEC)
CHOICE_KEY = "ddetr_mm.resume_optimizer"

IMAGES_KEY = "training_images"
"""Entry of a checkpoint's ``meta``: number of training images, and a digest of their ids and names."""

_BASE_FIELDS = {
    "weight_decay": "train.optim.weight_decay",
    "momentum": "train.optim.momentum",
    "betas": "betas of the optimizer",
    "eps": "eps of the optimizer",
}
_SCHEDULE_FIELDS = {
    "milestones": "train.optim.lr_steps",
    "step_size": "train.optim.lr_step_size",
    "gamma": "train.optim.lr_decay",
}
_SCHEDULES = {"milestones": "MultiStep", "step_size": "StepLR"}
_POSITIONS = ("last_step", "_global_step", "_last_value", "base_values", "verbose", "end")


@dataclass(frozen=True)
class Change:
    """A setting of the optimizer or its schedule that differs between checkpoint and spec.

    Attributes:
        field: the spec's field, or words where it has none.
        saved: the checkpoint's value.
        ours: the spec's value.
    """

    field: str
    saved: Any
    ours: Any

    def line(self, choice: str) -> str:
        """One line for the log, with what holds.

        Args:
            choice: one of :data:`CHOICES`.
        """
        holds = (
            f"the spec's holds ({CHOICE_KEY}: {FROM_SPEC})"
            if choice == FROM_SPEC
            else f"the checkpoint's holds; {CHOICE_KEY}: {FROM_SPEC} takes the spec's"
        )
        return (
            f"Resuming with another {self.field}: {_shown(self.saved)} in the checkpoint,"
            f" {_shown(self.ours)} in the spec; {holds}."
        )


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def changed_settings(checkpoint: Mapping[str, Any], runner: Any, names: list[str]) -> list[Change]:
    """Compare the optimizer's and schedules' settings of a checkpoint with the run's, one entry a field.

    Args:
        checkpoint: checked, see :func:`ddetr_mm.engine.resume_state.check_state`.
        runner: mmengine's, with its optimizer and schedules built.
        names: of the optimizer's parameters, in its order.
    """
    changes = list(_optimizer_changes(checkpoint, runner, names))
    states = checkpoint.get("param_schedulers") or []
    for state, scheduler in zip(states, runner.param_schedulers or (), strict=True):
        changes += _schedule_changes(state, scheduler.state_dict())
    return list({change.field: change for change in reversed(changes)}.values())[::-1]


def _optimizer_changes(checkpoint: Mapping[str, Any], runner: Any, names: list[str]) -> Iterator[Change]:
    state, wrapper = checkpoint["optimizer"], runner.optim_wrapper
    groups = state["param_groups"]
    base = state.get("base_param_settings") or groups[0]
    our_base = getattr(wrapper, "base_param_settings", None) or wrapper.optimizer.param_groups[0]
    factor, our_factor = checkpoint["meta"].get(LEARNING_RATE_FACTOR, 1.0), _factor(runner)
    rate, our_rate = _rate(base) / factor, _rate(our_base) / our_factor
    if not _same(rate, our_rate):
        yield Change("train.optim.lr", rate, our_rate)
    for key, field in _BASE_FIELDS.items():
        if key in base and key in our_base and not _same(base[key], our_base[key]):
            yield Change(field, base[key], our_base[key])
    for group, ours in zip(groups, wrapper.optimizer.param_groups, strict=True):
        name = names[group["params"][0]] if group["params"] else ""
        rates = _rate(group) / factor, _rate(ours) / our_factor
        shares = rates[0] / (rate or 1.0), rates[1] / (our_rate or 1.0)
        if _same(*rates) or _same(*shares):
            continue
        if name.startswith("backbone"):
            yield Change("train.optim.lr_backbone", *rates)
        else:
            yield Change("train.optim.lr_linear_proj_mult", *shares)


def _rate(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _factor(runner: Any) -> float:
    scaling = [hook for hook in runner.hooks if isinstance(hook, ScaledLearningRateHook)]
    return scaling[0].factor if scaling else 1.0


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _schedule_changes(state: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Change]:
    kinds = [next((name for key, name in _SCHEDULES.items() if key in one), None) for one in (state, ours)]
    if kinds[0] != kinds[1]:
        yield Change("train.optim.lr_scheduler", *kinds)
    for key in ours:
        if key in state and key not in _POSITIONS and not _same(state[key], ours[key]):
            values = [_milestones(one[key]) if key == "milestones" else one[key] for one in (state, ours)]
            yield Change(_SCHEDULE_FIELDS.get(key, f"{key} of the schedule"), *values)


def _milestones(counts: Mapping[int, int]) -> list[int]:
    return [step for step in sorted(counts) for _ in range(counts[step])]


# --- What holds ---


def keep_checkpoints_settings(checkpoint: Mapping[str, Any], runner: Any) -> None:
    """Give a run the kind of schedule that its checkpoint has; all else mmengine loads from the file.

    A schedule ends with the run, which may be longer now: mmengine would leave out later decays.

    Args:
        checkpoint: changed in place.
        runner: mmengine's; gets the schedules.
    """
    states = checkpoint.get("param_schedulers") or ()
    for index, (state, scheduler) in enumerate(zip(states, runner.param_schedulers or (), strict=True)):
        if "end" in state and hasattr(scheduler, "end"):
            state["end"] = scheduler.end
            _catch_up(state, checkpoint["optimizer"])
        kind = next((key for key in _SCHEDULES if key in state), None)
        if kind is None or kind in scheduler.state_dict():
            continue
        name = {"milestones": "MultiStepParamScheduler", "step_size": "StepParamScheduler"}[kind]
        value = _milestones(state[kind]) if kind == "milestones" else state[kind]
        options = {key: state[key] for key in ("param_name", "gamma", "begin", "end", "by_epoch")}
        runner.param_schedulers[index] = PARAM_SCHEDULERS.build(
            {"type": name, kind: value, **options}, default_args={"optimizer": runner.optim_wrapper}
        )


def _catch_up(state: dict[str, Any], optimizer: Mapping[str, Any]) -> None:
    """Do the steps that a schedule left out because its run had ended."""
    if not any(kind in state for kind in _SCHEDULES):
        return
    last = min(state["_global_step"], state["end"] - 1) - state["begin"]
    factor = 1.0
    for step in range(state["last_step"] + 1, last + 1):
        times = state["milestones"].get(step, 0) if "milestones" in state else step % state["step_size"] == 0
        factor *= state["gamma"] ** int(times)
        state["last_step"] = step
    groups = [*optimizer["param_groups"], optimizer.get("base_param_settings") or {}]
    for group in groups:
        if state["param_name"] in group:
            group[state["param_name"]] *= factor
    state["_last_value"] = [value * factor for value in state["_last_value"]]


def take_specs_settings(checkpoint: dict[str, Any], runner: Any) -> None:
    """Replace a checkpoint's settings of optimizer and schedules by the run's, at the checkpoint's position.

    The averages of gradients stay the checkpoint's.

    Args:
        checkpoint: changed in place.
        runner: mmengine's; its schedules move to the position.
    """
    meta, state, wrapper = checkpoint["meta"], checkpoint["optimizer"], runner.optim_wrapper
    for scheduler in runner.param_schedulers or ():
        scheduler.optimizer._global_step = max(scheduler.optimizer._global_step, 0)  # or its step() warns
        done = meta["epoch"] if scheduler.by_epoch else meta["iter"]
        while scheduler._global_step < done:
            scheduler.step()
    state["param_groups"] = [
        {**{key: value for key, value in ours.items() if key != "params"}, "params": group["params"]}
        for group, ours in zip(state["param_groups"], wrapper.optimizer.param_groups, strict=True)
    ]
    state.pop("base_param_settings", None)
    if getattr(wrapper, "base_param_settings", None) is not None:
        state["base_param_settings"] = wrapper.base_param_settings
    if runner.param_schedulers:
        states = [one.state_dict() for one in runner.param_schedulers]
        checkpoint["param_schedulers"] = copy.deepcopy(states)
    meta[LEARNING_RATE_FACTOR] = _factor(runner)


# --- Images ---


def training_images(dataset: Any) -> dict[str, Any] | None:
    """What :data:`IMAGES_KEY` holds of a data set, inside any wrappers; None where images have no names."""
    while not hasattr(dataset, "image_digest") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if not hasattr(dataset, "image_digest"):
        return None
    return {"number": len(dataset), "digest": dataset.image_digest()}


def refuse_other_images(meta: Mapping[str, Any], ours: Mapping[str, Any] | None, file: Any) -> None:
    """Check that a run resumes with the images of its checkpoint: its position in the epoch counts them.

    Args:
        meta: the checkpoint's; earlier versions did not save the images.
        ours: see :func:`training_images`.
        file: the checkpoint, for the message.

    Raises:
        WeightsError: there are more, fewer or other images, or the same in another order.
    """
    saved = meta.get(IMAGES_KEY)
    if ours is None or not isinstance(saved, Mapping) or saved == ours:
        return
    numbers = saved.get("number"), ours["number"]
    if numbers[0] == numbers[1]:
        what = f"the {numbers[1]} training images are others than the checkpoint's, or in another order"
    else:
        what = f"there are {numbers[1]} training images, at the checkpoint there were {numbers[0]}"
    raise WeightsError(
        Problem(
            f"cannot be resumed: {what}",
            file=file,
            where="dataset.train_data_sources",
            hint=f"resume with the data of the checkpoint, or {START_WITH}",
        )
    )
