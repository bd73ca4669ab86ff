"""What validation decides: which checkpoints are the best, and when training stops early; averaged weights.

The hooks keep their state in every checkpoint and, since a validation comes after the checkpoint of its
epoch, also in :data:`STATE_NAME`: a resumed run goes the same way as one that was never interrupted.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS
from mmengine.dist import broadcast_object_list
from mmengine.hooks import EarlyStoppingHook, EMAHook, Hook

from ddetr_mm.engine.checkpoint import (
    CheckpointName,
    TAOCheckpointHook,
    is_updated,
    link_latest,
    plain_values,
)
from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.engine.hooks import tao_figures
from ddetr_mm.engine.status import StatusLog
from ddetr_mm.errors import InputError, Problem
from ddetr_mm.files import fill_name, parse_json, write_text_whole
from ddetr_mm.outputs import remove_ours, require_free

BEST_NAME = "dd_model_best.pth"
"""Link beside the best checkpoints that points at the best of them."""

STATE_NAME = "validation_state.json"
"""File in the runner's ``work_dir`` with the state of these hooks after the last validation."""

STATE_KEY = "validation_state"
"""Where a checkpoint has the same."""


# --- Metrics ---


def monitored_value(runner: Any, metrics: Mapping[str, float] | None, monitor: str) -> float:
    """A metric of the validation that has just ended.

    Args:
        runner: the runner.
        metrics: of the validation, by mmdet's names.
        monitor: a name of ``status.json`` (``val_mAP50``, ``val_loss``, ``train_loss`` …) or of mmdet.

    Raises:
        InputError: there is no such metric.
    """
    figures = {**(metrics or {}), **tao_figures("val", metrics or {})}
    losses = runner.message_hub.log_scalars.get("train/loss")
    if losses is not None and len(losses.data[0]):
        figures["train_loss"] = float(losses.mean(min(len(runner.train_dataloader), len(losses.data[0]))))
    if monitor not in figures:
        raise InputError(
            Problem("is no metric of validation", where="monitor", value=monitor, allowed=sorted(figures))
        )
    return float(figures[monitor])


def better_when(monitor: str, mode: str | None = None) -> str:
    """Return ``min`` or ``max``: as given, else ``min`` for losses and ``max`` for everything else."""
    return mode or ("min" if "loss" in monitor else "max")


def _status(runner: Any) -> StatusLog:
    return StatusLog.at(Path(runner.work_dir) / "status.json")


# --- State ---


class ValidationStateHook(Hook):
    """A hook whose state changes with each validation.

    Subclasses have :attr:`state_name`, :meth:`state` and :meth:`set_state`. They take a validation into
    account where :meth:`is_new`, after :meth:`count`, and then call :meth:`keep_state`.

    Attributes:
        state_name: the key of the state, one for each class.
    """

    state_name = ""

    def __init__(self) -> None:
        self._step = -1  # of the last validation that the state knows
        self._run_id = ""
        self._saved: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Plain values."""
        raise NotImplementedError

    def set_state(self, runner: Any, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        raise NotImplementedError

    def is_new(self, runner: Any) -> bool:
        """Whether a validation is not in the state yet; a resumed run may repeat its last one."""
        return runner.iter != self._step

    def keep_state(self, runner: Any) -> None:
        """Write the state after a validation."""
        if is_first_rank():
            path = Path(runner.work_dir) / STATE_NAME
            states = {**_read_states(path), self.state_name: self._whole_state()}
            write_text_whole(path, json.dumps(states, indent=1) + "\n")

    def count(self, runner: Any) -> None:
        """Note that the validation after the present step is in the state."""
        self._step = runner.iter

    def _whole_state(self) -> dict[str, Any]:
        return plain_values({"step": self._step, "run": self._run_id, **self.state()})

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the state."""
        checkpoint.setdefault(STATE_KEY, {})[self.state_name] = self._whole_state()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the state of a resumed run for :meth:`before_train`."""
        if getattr(runner, "_resume", False):
            self._saved = dict((checkpoint.get(STATE_KEY) or {}).get(self.state_name) or {})

    def before_train(self, runner: Any) -> None:
        """Restore the state: that of the checkpoint, or the file's where it knows one validation more."""
        state = self._saved
        known: list[Any] = [None]
        if state and is_first_rank():
            known = [_read_states(Path(runner.work_dir) / STATE_NAME).get(self.state_name)]
        broadcast_object_list(known)
        if isinstance(known[0], dict) and known[0].get("run") == state.get("run"):
            state = known[0] if known[0].get("step") == runner.iter else state
        run_id = [state.get("run") or secrets.token_hex(8)]
        broadcast_object_list(run_id)
        self._run_id, self._step = run_id[0], int(state.get("step", -1))
        if state:
            self.set_state(runner, state)


def _read_states(path: Path) -> dict[str, Any]:
    """The content of :data:`STATE_NAME`; empty where there is none, or it is not ours to understand."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# --- Best checkpoints ---


@HOOKS.register_module()
class BestCheckpointHook(ValidationStateHook):
    """Keeps the checkpoints with the best values of a metric, beside those of every interval.

    After a validation that is among the best, the whole training state is saved under a name of its own, with
    the value in ``meta['ddetr_mm']['best']`` and in ``status.json``; ``dd_model_best.pth`` points at the best
    file, and the file that is no longer among the best is deleted. A value that is NaN or infinite, or equal
    to the last of the best, is not among them.

    Needs a :class:`~ddetr_mm.engine.checkpoint.TAOCheckpointHook`, which writes the files.

    Args:
        monitor: the metric: see :func:`monitored_value`.
        mode: ``min`` or ``max``; None: ``min`` for losses, else ``max``.
        save_top_k: how many files are kept.
        filename: name of a file; ``{epoch}`` (0-based, as in ``model_epoch_NNN.pth``), ``{step}`` and
            metrics are filled in, each with a number's format.
        dirpath: folder of the files; the runner's ``work_dir`` when None.
        auto_insert_metric_name: write ``epoch=003`` for ``{epoch:03d}``.
    """

    priority = "VERY_LOW"  # after EMAHook, which has put the weights of the last step back by then
    state_name = "best_checkpoints"

    def __init__(
        self,
        monitor: str = "val_mAP50",
        mode: str | None = None,
        save_top_k: int = 1,
        filename: str = "model_best_{epoch:03d}",
        dirpath: str | os.PathLike[str] | None = None,
        auto_insert_metric_name: bool = False,
    ) -> None:
        super().__init__()
        if save_top_k < 1:
            raise ValueError(f"save_top_k must be at least 1, not {save_top_k}")
        self.monitor = monitor
        self.mode = better_when(monitor, mode)
        self.save_top_k = save_top_k
        self.filename = filename
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.named = auto_insert_metric_name
        self.best: list[dict[str, Any]] = []
        """``file``, ``epoch``, ``step`` and ``value`` of each kept file, the best first."""

    def state(self) -> dict[str, Any]:
        """The list of the files."""
        return {"monitor": self.monitor, "mode": self.mode, "best": self.best}

    def set_state(self, runner: Any, state: Mapping[str, Any]) -> None:
        """Take over the files that are still there; with another metric the list begins anew."""
        if (state.get("monitor"), state.get("mode")) != (self.monitor, self.mode):
            runner.logger.info(f"The best checkpoints so far were not chosen by {self.monitor}: they stay.")
            self._step = -1
            return
        there = [[one for one in state["best"] if (self._folder(runner) / one["file"]).is_file()]]
        broadcast_object_list(there)
        self.best = there[0]
        gone = [one["file"] for one in state["best"] if one not in self.best]
        if gone:
            runner.logger.warning(f"No longer there, and not counted as best: {', '.join(gone)}.")

    def before_train(self, runner: Any) -> None:
        """Make the folder, restore the list, and check that the names to come are free.

        Raises:
            ValueError: the runner has no ``TAOCheckpointHook``, or the name cannot be used.
            DataError: a file of the same name is there, and is not ours.
        """
        _writer(runner)
        if is_first_rank():
            self._folder(runner).mkdir(parents=True, exist_ok=True)
        super().before_train(runner)
        if not is_first_rank():
            return
        coming = []
        for epoch in range(runner.epoch, runner.max_epochs):
            try:
                coming.append(self._folder(runner) / self._name({"epoch": epoch}))
            except ValueError:  # has other fields, whose values are not known yet
                break
        require_free([*coming, self._folder(runner) / BEST_NAME])

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Save where the value is among the best.

        Raises:
            InputError: there is no such metric, or the disk is full.
        """
        value = monitored_value(runner, metrics, self.monitor)
        if not self.is_new(runner):
            return
        self.count(runner)
        if self._is_among_best(value):
            self._save(runner, value, metrics or {})
        self.keep_state(runner)

    def _is_among_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if len(self.best) < self.save_top_k:
            return True
        worst = self.best[self.save_top_k - 1]["value"]
        return value < worst if self.mode == "min" else value > worst

    def _save(self, runner: Any, value: float, metrics: Mapping[str, float]) -> None:
        epoch = max(runner.epoch - 1, 0)
        figures = {name: float(one) for name, one in {**metrics, **tao_figures("val", metrics)}.items()}
        figures[self.monitor] = value
        name = self._name({**figures, "epoch": epoch, "step": runner.iter})
        entry = {"file": name, "epoch": epoch, "step": runner.iter, "value": value}
        others = [one for one in self.best if one["file"] != name]
        ordered = sorted([*others, entry], key=lambda one: one["value"], reverse=self.mode == "max")
        self.best, dropped = ordered[: self.save_top_k], ordered[self.save_top_k :]
        folder = self._folder(runner)
        remark = {"monitor": self.monitor, "mode": self.mode, "value": value}
        _writer(runner).save_best(runner, folder / name, remark)
        if not is_first_rank():
            return
        link_latest(folder / self.best[0]["file"], BEST_NAME)
        for one in dropped:
            remove_ours(folder / one["file"])
        place = self.best.index(entry) + 1
        which = "the best" if place == 1 else f"number {place} of the best"
        text = f"Saved {folder / name}: {which} so far by {self.monitor}, {value:.4g}."
        runner.logger.info(text)
        best = {"file": str(folder / name), "monitor": self.monitor, "value": value, "place": place}
        _status(runner).write(text, data={"best_checkpoint": best})

    def _name(self, values: Mapping[str, int | float]) -> str:
        name = fill_name(self.filename, values, named=self.named).removesuffix(".pth") + ".pth"
        if CheckpointName.parse(name) or name.startswith("dd_model_"):
            raise ValueError(f"filename {self.filename!r} gives the name of another checkpoint, {name}")
        return name

    def _folder(self, runner: Any) -> Path:
        return self.dirpath or Path(runner.work_dir)


def _writer(runner: Any) -> TAOCheckpointHook:
    hook = next((hook for hook in runner.hooks if isinstance(hook, TAOCheckpointHook)), None)
    if hook is None:
        raise ValueError("BestCheckpointHook needs a TAOCheckpointHook, which writes its files")
    return hook


# --- Early stopping ---


@HOOKS.register_module()
class ResumableEarlyStoppingHook(ValidationStateHook, EarlyStoppingHook):
    """mmengine's ``EarlyStoppingHook`` on the metrics of ``status.json``, which a resumed run continues.

    A run that has stopped so stops at once when it is resumed with the same patience.

    Args:
        monitor: the metric: see :func:`monitored_value`.
        mode: ``min`` or ``max``; None: ``min`` for losses, else ``max``.
        patience: validations without improvement after which training stops.
        min_delta: an improvement is at least so large.
    """

    priority = "LOW"  # before the best checkpoint is written, which has this state
    state_name = "early_stopping"

    def __init__(
        self, monitor: str = "val_mAP50", mode: str | None = None, patience: int = 5, min_delta: float = 0.001
    ) -> None:
        ValidationStateHook.__init__(self)
        rule = {"min": "less", "max": "greater"}[better_when(monitor, mode)]
        EarlyStoppingHook.__init__(self, monitor, rule=rule, min_delta=min_delta, patience=patience)

    def state(self) -> dict[str, Any]:
        """What was best, and since how many validations nothing was better."""
        best = self.best_score if math.isfinite(self.best_score) else None
        return {"monitor": self.monitor, "rule": self.rule, "best": best, "waited": self.wait_count}

    def set_state(self, runner: Any, state: Mapping[str, Any]) -> None:
        """Continue counting; with another metric it begins anew."""
        if (state.get("monitor"), state.get("rule")) != (self.monitor, self.rule):
            self._step = -1
            return
        if state["best"] is not None:
            self.best_score = float(state["best"])
        self.wait_count = int(state["waited"])

    def before_train(self, runner: Any) -> None:
        """Restore the state; a run that has ended early ends."""
        super().before_train(runner)
        if self.wait_count >= self.patience:
            runner.train_loop.stop_training = True
            text = (
                f"Nothing to do: training had stopped early, after {self.wait_count} validations without a "
                f"better {self.monitor}; to train on, set ddetr_mm.early_stopping.patience to more."
            )
            runner.logger.info(text)
            _status(runner).write(text)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Stop after the last validation that patience allows.

        Raises:
            InputError: there is no such metric.
        """
        value = monitored_value(runner, metrics, self.monitor)
        if not self.is_new(runner):
            return
        self.count(runner)
        stops, reason = self._check_stop_condition(value)
        self.keep_state(runner)
        if stops:
            runner.train_loop.stop_training = True
            text = f"Training stops early ({self.monitor}): {reason.strip()}"
            runner.logger.info(text)
            _status(runner).write(text)


# --- Averaged weights ---


@HOOKS.register_module()
class AveragedWeightsHook(EMAHook):
    """mmengine's ``EMAHook``, which averages once for every update of the weights.

    Validation is of the averaged weights. A checkpoint has them as ``state_dict`` and the weights of the last
    step as ``ema_state_dict``, as mmengine writes it; a resumed run continues both.

    Args:
        momentum: share of the new weights in the average, which is larger in the first steps.
    """

    def __init__(self, momentum: float = 0.0002) -> None:
        super().__init__(ema_type="ExpMomentumEMA", momentum=momentum)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Average, where the step has changed the weights."""
        if is_updated(runner.optim_wrapper):
            super().after_train_iter(runner, batch_idx, data_batch, outputs)
