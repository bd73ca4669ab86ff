"""How many unreadable images a training had to replace."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine import dist
from mmengine.hooks import Hook


@HOOKS.register_module()
class ReplacedImagesHook(Hook):
    """Tells after every epoch how many images could not be read and were replaced, over all ranks.

    The training set must be a :class:`~ddetr_mm.data.dataset.SerializedCocoDataset` with
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
