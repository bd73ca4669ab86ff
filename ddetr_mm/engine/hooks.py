"""Small hooks: pretrained weights, learning rates, replaced images, cuDNN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine import dist
from mmengine.hooks import Hook

from ddetr_mm.engine.fsdp import whole_model
from ddetr_mm.weights import load_backbone, load_for_model

# --- Switches of cuDNN for a run ---


@HOOKS.register_module()
class CudnnHook(Hook):
    """Sets how cuDNN chooses its algorithms, before the first step; without a GPU it changes nothing.

    mmengine can switch ``benchmark`` on, and deterministic algorithms only together with torch's own, which
    some operations do not have.

    Args:
        benchmark: time cuDNN's algorithms and take the fastest.
        deterministic: use cuDNN's deterministic algorithms only.
    """

    priority = "VERY_HIGH"

    def __init__(self, benchmark: bool = False, deterministic: bool = True) -> None:
        self.benchmark = benchmark
        self.deterministic = deterministic

    def before_run(self, runner: Any) -> None:
        """Set the switches; a runner in deterministic mode keeps them on the safe side."""
        torch.backends.cudnn.deterministic = self.deterministic or runner.deterministic
        torch.backends.cudnn.benchmark = self.benchmark and not runner.deterministic


# --- The learning rates of a run's groups of parameters, under names that a reader knows ---


def learning_rates(runner: Any) -> dict[str, float]:
    """The present rate of every group, the largest base rate first.

    Parameters of one rate make one group. It is named after the rate it began with and, where the config
    tells groups apart by parts of parameter names (``paramwise_cfg.custom_keys``), after those parts.

    Args:
        runner: with ``optim_wrapper``, ``model`` and ``cfg``.
    """
    config = (runner.cfg or {}).get("optim_wrapper") or {}
    keys = list((config.get("paramwise_cfg") or {}).get("custom_keys") or {})
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    now: dict[float, float] = {}
    parts: dict[float, list[str]] = {}
    for group in runner.optim_wrapper.param_groups:
        base = float(group.get("initial_lr", group["lr"]))
        now[base] = float(group["lr"])
        for parameter in group["params"] if keys else ():
            part = matching_key(names.get(id(parameter), ""), keys)
            if part not in parts.setdefault(base, []):
                parts[base].append(part)
    return {_label(base, parts.get(base, [])): now[base] for base in sorted(now, reverse=True)}


def matching_key(name: str, keys: Iterable[str]) -> str:
    """The part of a parameter's name that decides its rate, as mmengine chooses it; ``"rest"`` for none."""
    ordered = sorted(sorted(keys), key=len, reverse=True)
    return next((key for key in ordered if key in name), "rest")


def _label(base: float, parts: list[str]) -> str:
    return f"{', '.join(sorted(parts))} ({base:.3g})" if parts else f"{base:.3g}"


# --- Tells every change of the learning rates ---


@HOOKS.register_module()
class LearningRateHook(Hook):
    """Logs the learning rates before the first step and after every step or epoch that changed them.

    One line tells all groups, each by its name and the rate it began with: ``backbone (2e-05) = 2e-06``.
    mmengine's schedulers would print one line for every single parameter.
    """

    # After ParamSchedulerHook (LOW), which changes the rates.
    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._known: list[float] = []

    def before_train(self, runner: Any) -> None:
        """Tell the rates that training begins or goes on with."""
        self._tell(runner, "Learning rates")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Tell what a schedule counted in steps has changed."""
        self._tell(runner, f"Learning rates after step {runner.iter + 1}")

    def after_train_epoch(self, runner: Any) -> None:
        """Tell what a schedule counted in epochs has changed."""
        self._tell(runner, f"Learning rates after epoch {runner.epoch + 1}")

    def _tell(self, runner: Any, when: str) -> None:
        now = [float(group["lr"]) for group in runner.optim_wrapper.param_groups]
        if now != self._known:
            self._known = now
            rates = [f"{group} = {rate:.3g}" for group, rate in learning_rates(runner).items()]
            runner.logger.info(f"{when}: {', '.join(rates)}")


# --- Weights that a training starts from: a backbone, or a whole model of any known format ---


@HOOKS.register_module()
class PretrainedWeightsHook(Hook):
    """Loads weights by name before the first step, and reports every key that did not fit.

    A resumed run keeps the weights it was resumed with.

    Args:
        backbone_path: checkpoint for the backbone alone (torchvision, timm, or any full checkpoint).
        model_path: checkpoint for the whole model; loaded after the backbone, so it wins.
    """

    priority = "VERY_HIGH"

    def __init__(self, backbone_path: str | None = None, model_path: str | None = None) -> None:
        self.backbone_path = backbone_path
        self.model_path = model_path

    def before_train(self, runner: Any) -> None:
        """Load, unless the run goes on from a checkpoint.

        Raises:
            WeightsError: when a file is missing, is no checkpoint or does not fit the model.
        """
        if runner.iter > 0:
            runner.logger.info("The run goes on from a checkpoint: pretrained weights are not loaded.")
            return
        with whole_model(runner) as model:
            if self.backbone_path:
                report = load_backbone(model.backbone, self.backbone_path)
                runner.logger.info(f"Backbone from {self.backbone_path}:\n{report.summary()}")
            if self.model_path:
                classes = runner.train_dataloader.dataset.metainfo.get("classes")
                report = load_for_model(model, self.model_path, class_names=classes)
                runner.logger.info(f"Model from {self.model_path}:\n{report.summary()}")


# --- How many unreadable images a training had to replace ---


@HOOKS.register_module()
class ReplacedImagesHook(Hook):
    """Tells after every epoch how many images could not be read and were replaced, over all ranks.

    The training set must be a :class:`~ddetr_mm.datasets.coco.SerializedCocoDataset` with
    ``missing_images='replace'``; its workers name each image in the log as they meet it.
    """

    def after_train_epoch(self, runner: Any) -> None:
        """Log the number since the start of the run, where there is any."""
        number = torch.tensor(runner.train_dataloader.dataset.num_replaced)
        dist.all_reduce(number)
        if number > 0:
            runner.logger.warning(
                f"{int(number)} times so far an image could not be read and another one took its place"
            )
