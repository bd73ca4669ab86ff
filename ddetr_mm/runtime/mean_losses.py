"""Losses as the whole job has them, not the first rank alone."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_reduce_dict, get_world_size
from mmengine.hooks import Hook


@HOOKS.register_module()
class MeanLossesHook(Hook):
    """Replaces a step's losses by their mean over all ranks, before any other hook reads them.

    The log, ``status.json`` and the curves then show what one process with the whole batch would show.
    On one rank nothing happens.
    """

    priority = "HIGHEST"

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | tuple | list | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Average the tensors of ``outputs`` in place."""
        if not outputs or get_world_size() == 1:
            return
        losses = {name: value.detach() for name, value in outputs.items() if torch.is_tensor(value)}
        all_reduce_dict(losses, op="mean")
        outputs.update(losses)
