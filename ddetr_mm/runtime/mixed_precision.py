"""Mixed precision on any device: what ``train.precision`` fp16 and bf16 become.

mmengine's ``AmpOptimWrapper`` refuses to run without a GPU and scales losses for every number format.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import OPTIM_WRAPPERS
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

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
        """Where the trained parameters lie: ``cuda``, ``cpu`` …"""
        device: torch.device = self.optimizer.param_groups[0]["params"][0].device
        return device.type


def _scaler_class(use_fsdp: bool) -> Any:
    if not use_fsdp:
        return torch.amp.GradScaler
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler
