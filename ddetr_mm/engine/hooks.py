"""Hooks of a run: cuDNN, learning rates, status, progress, pretrained weights, replaced images, profiling.

Hooks with more behind them have modules of their own: checkpoint, curves, alarms, non_finite, optimization,
fsdp.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine import dist
from mmengine.hooks import Hook, ProfilerHook
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from ddetr_mm.classes import named_columns
from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.engine.fsdp import whole_model
from ddetr_mm.engine.progress import Progress
from ddetr_mm.engine.runner import AlgorithmSettings, progress_replaces_lines
from ddetr_mm.engine.status import (
    EVAL_METRICS,
    LOOP_STARTED,
    RESUMING,
    RUNNING,
    STARTED,
    TEST_METRICS,
    TRAIN_METRICS,
    StatusLog,
)
from ddetr_mm.files import size_text
from ddetr_mm.weights import Selection, load_backbone, load_for_model
from ddetr_mm.weights.entries import DEFAULT, UseEma
from ddetr_mm.weights.load import unwrapped

# --- Deterministic algorithms ---


@HOOKS.register_module()
class CudnnHook(Hook):
    """Chooses the algorithms of cuDNN and PyTorch for a training run; afterwards they are as before.

    mmengine's own ``deterministic`` ends a run at an operation that has no deterministic algorithm; here such
    an operation only warns, as in TAO.

    Args:
        benchmark: time cuDNN's algorithms and take the fastest.
        deterministic: use deterministic algorithms of cuDNN and PyTorch where there are any, and the plain
            form of attention, whose gradients are deterministic.
    """

    priority = "VERY_HIGH"

    def __init__(self, benchmark: bool = False, deterministic: bool = True) -> None:
        self.benchmark = benchmark
        self.deterministic = deterministic
        self._before: AlgorithmSettings | None = None

    def before_run(self, runner: Any) -> None:
        """Set the switches; a runner in deterministic mode stays deterministic."""
        self._before = AlgorithmSettings.current()
        deterministic = self.deterministic or runner.deterministic
        AlgorithmSettings(
            cudnn_benchmark=self.benchmark and not runner.deterministic,
            cudnn_deterministic=deterministic,
            algorithms=deterministic,
            only_warn=not runner.deterministic,
            # Memory that is written anyway need not be filled first.
            fill_memory=False,
            fast_attention=not deterministic,
        ).apply()
        if deterministic:  # read when cuBLAS is used first
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def after_run(self, runner: Any) -> None:
        """Set the switches back."""
        if self._before is not None:
            self._before.apply()


# --- Learning rates ---


def learning_rates(runner: Any) -> dict[str, float]:
    """The current rate of every group of parameters, the largest base rate first.

    Parameters of one base rate make one group. It is named after that rate and, where the config separates
    groups by parts of parameter names (``paramwise_cfg.custom_keys``), after those parts.

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


@HOOKS.register_module()
class LearningRateHook(Hook):
    """Logs the learning rates before the first step and after every step or epoch that changed them.

    One line names all groups with base rate and current rate: ``backbone (2e-05) = 2e-06``. mmengine's
    schedulers would print one line for every parameter.
    """

    # After ParamSchedulerHook (LOW), which changes the rates.
    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._known: list[float] = []

    def before_train(self, runner: Any) -> None:
        """Log the rates of the first step."""
        self._log_changes(runner, "Learning rates")

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Log changes by a schedule counted in steps."""
        self._log_changes(runner, f"Learning rates after step {runner.iter + 1}")

    def after_train_epoch(self, runner: Any) -> None:
        """Log changes by a schedule counted in epochs."""
        self._log_changes(runner, f"Learning rates after epoch {runner.epoch + 1}")

    def _log_changes(self, runner: Any, when: str) -> None:
        now = [float(group["lr"]) for group in runner.optim_wrapper.param_groups]
        if now != self._known:
            self._known = now
            rates = [f"{group} = {rate:.3g}" for group, rate in learning_rates(runner).items()]
            runner.logger.info(f"{when}: {', '.join(rates)}")


# --- Status and progress ---


@HOOKS.register_module()
class StatusHook(Hook):
    """One status line at the start and the end of training, after every epoch and every evaluation.

    The first and last lines of the subtask are written by the command:
    see :meth:`ddetr_mm.engine.status.StatusLog.task`.

    Progress lines carry ``epoch`` (0-based, the one just worked on), ``step`` (optimizer steps done),
    ``max_epoch`` (the last epoch's number), ``max_step``, ``time_per_epoch``, ``time_per_step`` and
    ``eta`` as ``H:MM:SS[.ffffff]``.

    Args:
        path: the file; ``status.json`` in the runner's ``work_dir`` when None.
        step_interval: also write a progress line every so many steps; 0 writes one an epoch only, as the
            TAO does.
    """

    # After the hooks that compute losses' means and times, before the one that saves checkpoints.
    priority = "LOW"

    def __init__(self, path: str | os.PathLike[str] | None = None, step_interval: int = 0) -> None:
        self.path = path
        self.step_interval = step_interval
        self._epoch_started = 0.0
        self._steps_in_epoch = 0

    def before_train(self, runner: Any) -> None:
        """Write the checkpoint that the run resumes from, if any, and that the loop starts."""
        if getattr(runner, "_resume", False) and getattr(runner, "_load_from", None):
            self._log(runner).write(f"{RESUMING}: {runner._load_from}", RUNNING)
        self._log(runner).write(LOOP_STARTED, STARTED)

    def before_train_epoch(self, runner: Any) -> None:
        """Start the epoch's clock."""
        self._epoch_started = time.monotonic()
        self._steps_in_epoch = 0

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | tuple | list | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Write a progress line within an epoch, if asked for."""
        self._steps_in_epoch += 1
        if self.step_interval > 0 and (runner.iter + 1) % self.step_interval == 0:
            self._write_progress(runner, steps_done=runner.iter + 1)

    def after_train_epoch(self, runner: Any) -> None:
        """Write progress and the mean training loss of the epoch."""
        self._write_progress(runner, steps_done=runner.iter)
        losses = runner.message_hub.log_scalars.get("train/loss")
        if losses is not None and self._steps_in_epoch:
            mean = float(losses.mean(self._steps_in_epoch))
            self._log(runner).write(TRAIN_METRICS, kpi={"train_loss": mean})

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Write the validation metrics."""
        self._write_metrics(runner, EVAL_METRICS, "val", metrics, class_precisions(runner))

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Write the test metrics."""
        self._write_metrics(runner, TEST_METRICS, "test", metrics)

    def after_train(self, runner: Any) -> None:
        """Write that the loop has ended, or why it ended before its last epoch."""
        self._log(runner).write(getattr(runner.train_loop, "out_of_time", None) or "Training loop complete.")

    def _log(self, runner: Any) -> StatusLog:
        return StatusLog.at(self.path or Path(runner.work_dir) / "status.json")

    def _write_progress(self, runner: Any, steps_done: int) -> None:
        elapsed = time.monotonic() - self._epoch_started
        per_step = elapsed / max(self._steps_in_epoch, 1)
        steps_an_epoch = len(runner.train_dataloader)
        remaining = max(runner.max_iters - steps_done, 0) * per_step
        data = {
            "epoch": runner.epoch,
            "step": steps_done,
            "max_epoch": max(runner.max_epochs - 1, 0),
            "max_step": runner.max_iters,
            "time_per_epoch": str(timedelta(seconds=per_step * steps_an_epoch)),
            "time_per_step": str(timedelta(seconds=per_step)),
            "eta": str(timedelta(seconds=remaining)),
        }
        self._log(runner).write("Training loop in progress", data=data)

    def _write_metrics(
        self,
        runner: Any,
        message: str,
        prefix: str,
        metrics: Mapping[str, float] | None,
        precisions: Mapping[str, float] | None = None,
    ) -> None:
        kpi: dict[str, Any] = {}
        for name, value in tao_figures(prefix, metrics or {}).items():
            kpi[name] = value if "loss" in name else str(value)
        if kpi:
            self._log(runner).write(message, kpi=kpi, categorical={"AP": precisions} if precisions else None)


def class_precisions(runner: Any) -> dict[str, float]:
    """AP of every class with ground truth at the last validation, where the metric knows it."""
    for metric in getattr(getattr(runner, "val_evaluator", None), "metrics", ()):
        result = getattr(metric, "result", None)
        if result is not None:
            return {entry.name: round(entry.AP, 6) for entry in result.per_class if entry.AP >= 0}
    return {}


def tao_figures(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of an evaluation under TAO's names, unrounded: ``val_mAP``, ``val_mAP50``, ``val_loss`` …

    Args:
        prefix: ``val`` or ``test``.
        metrics: of mmdet, and those of :class:`ValidationLossHook`.
    """
    figures = {}
    for ending, name in (("bbox_mAP", "mAP"), ("bbox_mAP_50", "mAP50"), ("loss", "loss")):
        value = _find(metrics, ending)
        if value is not None:
            figures[f"{prefix}_{name}"] = float(value)
    losses = {key: float(value) for key, value in metrics.items() if key.startswith(f"{prefix}_loss")}
    return {**figures, **losses}


def _find(metrics: Mapping[str, float], ending: str) -> float | None:
    """The value of ``ending`` or of ``<prefix>/<ending>``."""
    return next((value for key, value in metrics.items() if key.rsplit("/", 1)[-1] == ending), None)


@HOOKS.register_module()
class ValidationLossHook(Hook):
    """Adds the losses of validation to its metrics, and the metrics under TAO's names to TensorBoard.

    The losses are computed from what the network has predicted anyway: ``val_loss`` is the sum that training
    minimises, ``val_loss_cls``, ``val_loss_bbox`` and ``val_loss_iou`` are those of the last decoder layer.
    Of each batch they are what the head's ``loss`` gives for it; the batches are averaged, weighted by their
    images. They are as any other metric in the log, TensorBoard, ``scalars.json`` and ``status.json``.

    Needs a :class:`~ddetr_mm.models.head.TAODeformableDETRHead`, and a test pipeline that loads annotations
    after resizing, as mmdet's do.
    """

    # Before RuntimeInfoHook (VERY_HIGH), which hands the metrics to the log.
    priority = "HIGHEST"

    def __init__(self) -> None:
        self._batches: dict[Any, tuple[int, dict[str, float]]] = {}

    def before_val_epoch(self, runner: Any) -> None:
        """Have the head compute losses."""
        self._batches = {}
        head = _head_of(runner)
        if hasattr(head, "validates"):
            head.validates = True

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Keep the losses of a batch."""
        head = _head_of(runner)
        losses = getattr(head, "validation_losses", None)
        if losses is None or not outputs:
            return
        head.validation_losses = None
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        # Ranks may have a batch twice: its first image names it.
        name = getattr(outputs[0], "img_id", (dist.get_rank(), batch_idx))
        self._batches[name] = (len(outputs), dict(zip(losses, values, strict=True)))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Add the means over all ranks' batches to the metrics."""
        head = _head_of(runner)
        if hasattr(head, "validates"):
            head.validates = False
        batches: dict[Any, tuple[int, dict[str, float]]] = {}
        for part in dist.all_gather_object(self._batches):
            batches.update(part)
        if metrics is None:
            return
        losses = mean_losses(list(batches.values()))
        metrics.update(losses)
        for name in losses:
            # mmengine logs the mean of a loss's last values, which are those of earlier validations here.
            runner.message_hub.log_scalars.pop(f"val/{name}", None)
        tensorboard = runner.visualizer.get_backend("TensorboardVisBackend")
        if tensorboard is not None and is_first_rank():
            figures = {
                name: value for name, value in tao_figures("val", metrics).items() if name not in metrics
            }
            tensorboard.add_scalars(figures, step=runner.epoch)


def mean_losses(batches: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The losses of validation by TAO's names.

    Args:
        batches: of each its images and its losses by the names that the head gives them.

    Returns:
        ``val_loss``, the sum of all, and those of the last decoder layer; empty without batches.
    """
    images = sum(count for count, _ in batches)
    if not images:
        return {}
    means = {name: sum(count * losses[name] for count, losses in batches) / images for name in batches[0][1]}
    of_last_layer = {f"val_{name}": mean for name, mean in means.items() if name.startswith("loss_")}
    return {"val_loss": sum(means.values()), **of_last_layer}


def _head_of(runner: Any) -> Any:
    return getattr(unwrapped(runner.model), "bbox_head", None)


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows how far training, validation and testing are, with the time left.

    mmengine's log lines come every so many steps, which on a slow machine is minutes; this shows by time,
    of training from the first step on: the loss, AP of the last validation, the learning rate and the memory.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._train: Progress | None = None
        self._eval: Progress | None = None
        self._last_ap: float | None = None

    def before_train(self, runner: Any) -> None:
        """Start counting steps, from the one that a resumed run begins with."""
        self._train = self._start(runner, "training", runner.max_iters, "steps", done=runner.iter)
        self._train.facts = lambda: training_facts(runner, self._last_ap)
        self._train.show_next()
        progress_replaces_lines(runner.logger)
        if runner.val_loop is not None:
            self._train.pauses_left = validations_left(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """One more step."""
        if self._train is not None:
            self._train.update(runner.iter + 1)

    def after_train(self, runner: Any) -> None:
        """Stop."""
        self._train = self._stop(self._train)

    def before_val_epoch(self, runner: Any) -> None:
        """Start counting batches; during training, pause its bar instead."""
        if self._train is None:
            self._eval = self._start(runner, "validating", len(runner.val_dataloader), "batches")
        else:
            self._train.pause()

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One more batch."""
        if self._eval is not None:
            self._eval.update(batch_idx + 1)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Stop."""
        self._eval = self._stop(self._eval)
        if self._train is not None:
            self._last_ap = next(
                (value for key, value in (metrics or {}).items() if key.endswith("bbox_mAP")), self._last_ap
            )
            self._train.resume()

    def before_test_epoch(self, runner: Any) -> None:
        """Start counting batches."""
        self._eval = self._start(runner, "testing", len(runner.test_dataloader), "batches")

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One more batch."""
        if self._eval is not None:
            self._eval.update(batch_idx + 1)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Stop."""
        self._eval = self._stop(self._eval)

    def _start(self, runner: Any, description: str, total: int, unit: str, done: int = 0) -> Progress:
        progress = Progress(description, total, unit, done=done)
        progress.__enter__()
        progress.show_above(runner.logger)
        return progress

    def _stop(self, progress: Progress | None) -> None:
        if progress is not None:
            progress.__exit__(None, None, None)


def training_facts(runner: Any, last_ap: float | None = None) -> str:
    """Return what a progress line says of the training: ``loss 3.21, AP 0.412, lr 2e-04, 3.1 GiB``.

    The memory is the most that this process had on the GPU, or of the machine's where it trains on a CPU.
    """
    scalars = runner.message_hub.log_scalars
    facts = []
    if "train/loss" in scalars:
        facts.append(f"loss {scalars['train/loss'].current():.4g}")
    if last_ap is not None and last_ap >= 0:  # -1: there was nothing to find
        facts.append(f"AP {last_ap:.3f}")
    groups = runner.optim_wrapper.optimizer.param_groups
    facts.append(f"lr {max(group['lr'] for group in groups):.3g}")
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else most_memory_of_process()
    if memory is not None:
        facts.append(size_text(memory))
    return ", ".join(facts)


def most_memory_of_process() -> int | None:
    """Return the most bytes of memory that this process had; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def validations_left(runner: Any) -> int:
    """Number of validations that a training run still has ahead when it begins now."""
    loop = runner.train_loop
    interval, begin = getattr(loop, "val_interval", 0), getattr(loop, "val_begin", 1)
    if not interval:
        return 0
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    now, last = (runner.epoch, runner.max_epochs) if by_epoch else (runner.iter, runner.max_iters)
    due = [step for step in range(now + 1, last + 1) if step >= begin and step % interval == 0]
    return len(due) + int(by_epoch and last > now and last % interval != 0)


# --- Pretrained weights ---


@HOOKS.register_module()
class PretrainedWeightsHook(Hook):
    """Loads weights by name before the first step, and reports every key that did not fit.

    A resumed run keeps the weights it was resumed with.

    Args:
        backbone_path: checkpoint for the backbone alone (torchvision, timm, or any full checkpoint); not read
            where ``model_path`` is given.
        model_path: checkpoint for the whole model.
        entry, use_ema: which set of weights to read, see :class:`ddetr_mm.weights.Selection`.
    """

    priority = "VERY_HIGH"

    def __init__(
        self,
        backbone_path: str | None = None,
        model_path: str | None = None,
        entry: str | None = None,
        use_ema: UseEma = "auto",
    ) -> None:
        self.backbone_path = backbone_path
        self.model_path = model_path
        self.selection = Selection(entry, use_ema)

    def before_train(self, runner: Any) -> None:
        """Load, unless the run was resumed.

        Raises:
            WeightsError: when a file is missing, is no checkpoint or does not fit the model.
        """
        if runner.iter > 0:
            runner.logger.info("The run resumes from a checkpoint: pretrained weights are not loaded.")
            return
        metainfo = runner.train_dataloader.dataset.metainfo
        with whole_model(runner) as model:
            texts = load_pretrained(model, self.backbone_path, self.model_path, metainfo, self.selection)
            for text in texts:
                runner.logger.info(text)


def load_pretrained(
    model: nn.Module,
    backbone_path: str | None,
    model_path: str | None,
    metainfo: Mapping[str, Any],
    selection: Selection = DEFAULT,
) -> list[str]:
    """Load the weights that a training run starts from; ``check`` calls it too.

    Args:
        model: the detector.
        backbone_path: see :class:`PretrainedWeightsHook`.
        model_path: likewise.
        metainfo: of the training set: ``classes`` and ``category_ids`` of the class columns.
        selection: which of several sets of weights to read.

    Returns:
        A report of each file.

    Raises:
        WeightsError: a file is missing, is no checkpoint or does not fit the model.
    """
    texts = []
    if backbone_path and not model_path:
        report = load_backbone(model.backbone, backbone_path, selection=selection)
        texts.append(f"Backbone from {backbone_path}:\n{report.summary()}")
    if model_path:
        classes = named_columns(metainfo.get("classes") or (), metainfo.get("category_ids")) or None
        report = load_for_model(model, model_path, class_names=classes, selection=selection)
        texts.append(f"Model from {model_path}:\n{report.summary()}")
    return texts


# --- Replaced images ---


@HOOKS.register_module()
class ReplacedImagesHook(Hook):
    """Logs after every epoch how many images could not be read and were replaced, over all ranks.

    The training set must be a :class:`~ddetr_mm.datasets.coco.SerializedCocoDataset` with
    ``missing_images='replace'``; its workers name each image in the log as they read it.
    """

    def after_train_epoch(self, runner: Any) -> None:
        """Log the number since the start of the run, where there is any."""
        number = torch.tensor(runner.train_dataloader.dataset.num_replaced)
        dist.all_reduce(number)
        if number > 0:
            runner.logger.warning(
                f"{int(number)} times so far an image could not be read and another one took its place"
            )


# --- Profiling ---

TRACE_NAME = "profile.json"


@HOOKS.register_module()
class StepProfilerHook(ProfilerHook):
    """mmengine's ``ProfilerHook`` over the first steps of every start, resumed or not.

    Writes :data:`TRACE_NAME`, a trace in Chrome's format, into the runner's ``work_dir`` and logs a table of
    the most expensive operations and of the model's regions (backbone, encoder, decoder, matching, loss).
    Profiles the first rank, and ends with the first epoch.

    Args:
        steps: how many steps are profiled.
    """

    def __init__(self, steps: int = 10) -> None:
        super().__init__(by_epoch=False, profile_times=steps, activity_with_cuda=torch.cuda.is_available())
        self.steps = steps
        self._closed = True

    def before_run(self, runner: Any) -> None:
        """Wait for :meth:`before_train`, when the first step of a resumed run is known."""

    def before_train(self, runner: Any) -> None:
        """Start the profiler."""
        self.profile_times = min(runner.iter + self.steps, runner.max_iters)
        if self.profile_times > runner.iter and is_first_rank():
            self._closed = False
            self.json_trace_path = str(Path(runner.work_dir) / TRACE_NAME)
            super().before_run(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Count the step; after the last one write the trace."""
        if not self._closed:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def _export_chrome_trace(self, runner: Any) -> None:
        super()._export_chrome_trace(runner)
        table = self.profiler.key_averages().table(sort_by="cpu_time_total", row_limit=40)
        runner.logger.info(f"Profile of the first steps, see also {self.json_trace_path}:\n{table}")
