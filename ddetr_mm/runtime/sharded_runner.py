"""Training with the network sharded among ranks: ``train.distributed_strategy: fsdp``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.device import get_device
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from torch import nn

from ddetr_mm.runtime.quiet import QuietRunner
from ddetr_mm.runtime.sharding import is_sharded, shard, shard_optimizer_state, whole_tensors


@RUNNERS.register_module()
class ShardedRunner(QuietRunner):
    """A Runner that shards the network with torch's ``fully_shard``; on one rank an ordinary one.

    The optimizer, made afterwards, is sharded with it. Checkpoints are whole: see
    :class:`WholeCheckpointHook`, which this runner needs.

    In a config: ``runner_type = 'ShardedRunner'``.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Initialise the weights, equally on all ranks, and shard the model."""
        if not self.distributed or self._train_loop is None:
            return super().wrap_model(model_wrapper_cfg, model)
        model = model.to(get_device())
        if hasattr(model, "init_weights"):
            model.init_weights()
        for value in model.state_dict().values():
            broadcast(value)
        shard(model, get_device())
        self._whole_states: dict[str, Any] = {}
        return model

    def _init_model_weights(self) -> None:
        """Nothing where the model is sharded: it was initialised before."""
        if not is_sharded(self.model):
            super()._init_model_weights()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save as mmengine does, with whole tensors; all ranks must call it."""
        if is_sharded(self.model):
            keep = is_main_process()
            self._whole_states = {
                "state_dict": whole_tensors(self.model.state_dict(), keep),
                "optimizer": whole_tensors(self.optim_wrapper.state_dict(), keep),
            }
        try:
            super().save_checkpoint(*args, **kwargs)
        finally:
            self._whole_states = {}


@HOOKS.register_module()
class WholeCheckpointHook(Hook):
    """Puts whole tensors into the checkpoints of a :class:`ShardedRunner`, and cuts what is resumed from."""

    priority = "HIGHEST"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace the first rank's shards by what all ranks have together."""
        for name, state in getattr(runner, "_whole_states", {}).items():
            if name in checkpoint:
                checkpoint[name] = state

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Cut the optimizer's state as the parameters are; the model cuts its own."""
        wrapper = getattr(runner, "optim_wrapper", None)
        if is_sharded(runner.model) and "optimizer" in checkpoint and hasattr(wrapper, "optimizer"):
            checkpoint["optimizer"] = shard_optimizer_state(checkpoint["optimizer"], wrapper.optimizer)


@contextmanager
def whole_model(runner: Any) -> Iterator[nn.Module]:
    """The network with whole weights, to be looked at and changed inside the block.

    That is the network itself, or, where it is sharded, a copy on the CPU whose weights are cut and taken
    over after the block.

    Args:
        runner: an mmengine Runner.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not is_sharded(model):
        yield model
        return
    with torch.random.fork_rng():
        copy = MODELS.build(runner.cfg.model)
    copy.load_state_dict(whole_tensors(model.state_dict()))
    yield copy
    model.load_state_dict(copy.state_dict())
