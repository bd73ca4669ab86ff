"""Training in bfloat16 on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper that runs the model under bfloat16 autocast; weights stay float32.

    mmengine's AmpOptimWrapper would scale the loss as float16 needs it (bfloat16 has float32's range), and
    refuses to run without a GPU. State dicts are those of OptimWrapper; one of AmpOptimWrapper loads, too.
    """

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The block in which the losses are computed."""
        device = next(model.parameters()).device
        with super().optim_context(model), torch.autocast(device.type, dtype=torch.bfloat16):
            yield

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the optimizer's state; a loss scale that AmpOptimWrapper left is passed over."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "loss_scaler"})
