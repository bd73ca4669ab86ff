"""Switches of cuDNN for a run."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook


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
