"""TF32, mixed precision, gradient accumulation and learning-rate scaling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

# --- TF32 ---


def has_tf32() -> bool:
    """Return whether the current GPU multiplies in TF32: NVIDIA's from Ampere (8.0) on."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@HOOKS.register_module()
class TF32Hook(Hook):
    """Chooses how a GPU multiplies float32 numbers in a run, from Ampere on; afterwards it is as before.

    TF32 rounds the factors of matrix products and convolutions to 10 bits of mantissa and sums in float32,
    several times as fast. torch's default, which TAO leaves as it is: convolutions alone.

    Args:
        tf32: use it for both; False for neither.
    """

    priority = "VERY_HIGH"

    def __init__(self, tf32: bool = True) -> None:
        self.tf32 = tf32
        self._before: tuple[bool, bool] | None = None

    def before_run(self, runner: Any) -> None:
        """Set both switches, where the GPU has TF32."""
        if not has_tf32():
            return
        self._before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        if self.tf32:
            runner.logger.info("float32 is multiplied in TF32 on this GPU; in full: ddetr_mm.tf32=false")

    def after_run(self, runner: Any) -> None:
        """Set both switches back."""
        if self._before is not None:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before
            self._before = None


# --- Mixed precision: ``train.precision`` fp16 and bf16 ---
# mmengine's ``AmpOptimWrapper`` refuses to run without a GPU and scales losses for every number format.

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@OPTIM_WRAPPERS.register_module()
class MixedPrecisionOptimWrapper(AmpOptimWrapper):
    """mmengine's mixed precision, also without a GPU, with loss scaling only where it is needed.

    Matrix products and convolutions of the forward pass run in ``dtype``; weights, gradients and optimizer
    state stay in float32. float16 needs its losses scaled, because small gradients would vanish; bfloat16 has
    float32's range and does not.

    Args:
        dtype: ``"float16"`` or ``"bfloat16"``.
        loss_scale: ``"dynamic"``, a fixed scale, or arguments of ``torch.amp.GradScaler``; float16 only.
        use_fsdp: use the scaler for sharded gradients.
        **kwargs: those of ``OptimWrapper``: ``optimizer``, ``clip_grad``, ``accumulative_counts``.

    Raises:
        ValueError: for another ``dtype``.
    """

    def __init__(
        self,
        dtype: str = "float16",
        loss_scale: str | float | dict[str, Any] = "dynamic",
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        OptimWrapper.__init__(self, **kwargs)  # not AmpOptimWrapper's, which asks for a GPU
        self.cast_dtype = DTYPES[dtype]
        self._scale_update_param = loss_scale if isinstance(loss_scale, float) else None
        settings: dict[str, Any] = dict(enabled=dtype == "float16")
        if isinstance(loss_scale, dict):
            settings |= loss_scale
        elif isinstance(loss_scale, float):
            settings["init_scale"] = loss_scale
        self.loss_scaler = _scaler_class(use_fsdp)(device=self._device_type(), **settings)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The block in which a loss is computed: autocast, and no exchange of gradients while they add up."""
        with (
            OptimWrapper.optim_context(self, model),
            torch.autocast(self._device_type(), dtype=self.cast_dtype),
        ):
            yield

    def _device_type(self) -> str:
        """Device type of the trained parameters: ``cuda``, ``cpu`` …"""
        device: torch.device = self.optimizer.param_groups[0]["params"][0].device
        return device.type


def _scaler_class(use_fsdp: bool) -> Any:
    if not use_fsdp:
        return torch.amp.GradScaler
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler


# --- Effective batch: accumulated gradients, and learning rates that follow its size ---
# effective batch = samples a step and rank x ranks x accumulated steps

RULES = ("linear", "sqrt")
LEARNING_RATE_FACTOR = "learning_rate_factor"
"""Entry of a checkpoint's ``meta``: the factor that its rates contain."""


@HOOKS.register_module()
class AccumulationHook(Hook):
    """Restarts the count of accumulated steps in every epoch, so that no epoch ends with unused gradients.

    mmengine counts through the whole training: an accumulation may then reach over the end of an epoch,
    and a checkpoint written there lacks the gradients gathered so far. Here the last steps of an epoch
    make a smaller accumulation of their own, weighted by its size.
    """

    def before_train_epoch(self, runner: Any) -> None:
        """Start counting; a resumed epoch counts from the batches it has done."""
        wrapper, batches = runner.optim_wrapper, len(runner.train_dataloader)
        # What OptimWrapper.initialize_count_status does, without its warning about batch norms.
        elastic = getattr(runner.train_loop, "elastic", None)
        left = batches if elastic is None else elastic.steps_left(runner.train_loop.samples_done)
        wrapper._inner_count = batches - left
        wrapper._max_counts = batches
        wrapper._remainder_counts = batches % wrapper._accumulative_counts


@HOOKS.register_module()
class ScaledLearningRateHook(Hook):
    """Multiplies all learning rates by a factor that follows the effective batch.

    The factor is kept in checkpoints. A run that is resumed with another effective batch, as on another
    number of ranks, uses the rates of the new one.

    Args:
        batch_size: samples a step and rank.
        base_batch_size: the effective batch that the configured rates are meant for.
        rule: ``"linear"`` (Goyal et al., arXiv 1706.02677) or ``"sqrt"`` (usual with Adam).

    Raises:
        ValueError: an unknown rule.
    """

    priority = "VERY_HIGH"

    def __init__(self, batch_size: int, base_batch_size: int, rule: str = "linear") -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
        self.batch_size = batch_size
        self.base_batch_size = base_batch_size
        self.rule = rule
        self.factor = 1.0

    def before_run(self, runner: Any) -> None:
        """Scale the rates of the optimizer and the schedulers' base values."""
        if not hasattr(runner.optim_wrapper, "param_groups"):
            return  # nothing is trained
        effective = self.batch_size * get_world_size() * runner.optim_wrapper._accumulative_counts
        self.factor = learning_rate_factor(effective, self.base_batch_size, self.rule)
        scale_groups(runner.optim_wrapper.param_groups, self.factor)
        for scheduler in runner.param_schedulers or ():
            scheduler.base_values = [value * self.factor for value in scheduler.base_values]
        runner.logger.info(
            f"The effective batch is {effective}; learning rates are multiplied by {self.factor:g} "
            f"({self.rule}, from {self.base_batch_size})."
        )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Save the factor that the saved rates contain."""
        checkpoint["meta"][LEARNING_RATE_FACTOR] = self.factor

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Rescale saved rates to this run's effective batch."""
        change = self.factor / checkpoint["meta"].get(LEARNING_RATE_FACTOR, 1.0)
        if change == 1.0:
            return
        scale_groups(checkpoint.get("optimizer", {}).get("param_groups", ()), change)
        for scheduler in checkpoint.get("param_schedulers", ()):
            for name in ("base_values", "_last_value"):
                scheduler[name] = [value * change for value in scheduler[name]]


def learning_rate_factor(effective_batch: int, base_batch_size: int, rule: str) -> float:
    """The factor on all learning rates.

    Args:
        effective_batch: samples between two updates of the weights.
        base_batch_size: the effective batch that the rates are meant for.
        rule: one of :data:`RULES`.
    """
    ratio = effective_batch / base_batch_size
    return math.sqrt(ratio) if rule == "sqrt" else ratio


def scale_groups(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Multiply the current and the initial learning rate of an optimizer's groups, in place."""
    for group in groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] *= factor
