"""Training with the network sharded among ranks: ``train.distributed_strategy: fsdp``.

Every rank keeps an even part of each parameter, its gradient and its optimizer state (torch's
``fully_shard``); a block's parameters are gathered while the block computes. Checkpoints hold whole
tensors, so files do not depend on the strategy or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.backbones import ResNet
from mmdet.registry import HOOKS, MODELS
from mmengine.device import get_device
from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ddetr_mm.engine.distributed import is_first_rank
from ddetr_mm.engine.runner import QuietRunner

# --- Sharding, and whole tensors in and out of it ---


def shard(model: nn.Module, device: torch.device | str) -> None:
    """Shard a detector in place over all ranks of the process group.

    Blocks are gathered one by one: each encoder and decoder layer, each stage of a ResNet, the
    backbone as a whole otherwise; what is left (embeddings, neck, heads) as one more. Afterwards
    ``load_state_dict`` takes whole tensors as before.

    Args:
        model: initialised alike on all ranks, on ``device``.
        device: where it is.
    """
    mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            module.register_load_state_dict_pre_hook(_shard_before_loading)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a detector that are gathered by themselves, inner ones first."""
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, ResNet):
        yield from (getattr(backbone, name) for name in backbone.res_layers)
    if isinstance(backbone, nn.Module):
        yield backbone
    for part in (getattr(model, "encoder", None), getattr(model, "decoder", None)):
        yield from getattr(part, "layers", ())


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied to the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensors(state: Any, keep: bool = True) -> Any:
    """A state dict with whole tensors on the CPU in place of sharded ones; all ranks must call it.

    Args:
        state: of a model or an optimizer, with dicts and lists inside.
        keep: whether this rank needs the result; else it takes part, and gets None for every tensor.
    """
    if isinstance(state, Tensor):
        whole = state.full_tensor() if isinstance(state, DTensor) else state
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole_tensors(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_tensors(value, keep) for value in state)
    return state


def shard_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict of whole tensors, cut as the optimizer's parameters are.

    Args:
        state: ``state`` and ``param_groups`` as torch's optimizers save them.
        optimizer: made for the sharded parameters, in the same order.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owner = dict(zip(numbers, parameters, strict=True))
    sharded = {
        number: {name: like_parameter(value, owner[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": sharded}


def like_parameter(value: Any, parameter: Tensor) -> Any:
    """A whole tensor cut as a sharded parameter of the same shape; anything else as it is."""
    same = isinstance(parameter, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not same or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _shard_before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of ``load_state_dict``: cut the module's own tensors as its parameters are."""
    for name, parameter in module.named_parameters(recurse=False):
        key = prefix + name
        if key in state_dict:
            state_dict[key] = like_parameter(state_dict[key], parameter)


# --- Runner and hook ---


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
            keep = is_first_rank()
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
    """Puts whole tensors into checkpoints of a :class:`ShardedRunner`, and shards them on resume."""

    priority = "HIGHEST"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace the first rank's shards by the whole tensors."""
        for name, state in getattr(runner, "_whole_states", {}).items():
            if name in checkpoint:
                checkpoint[name] = state

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Shard the optimizer's state as the parameters are; the model shards its own."""
        wrapper = getattr(runner, "optim_wrapper", None)
        if is_sharded(runner.model) and "optimizer" in checkpoint and hasattr(wrapper, "optimizer"):
            checkpoint["optimizer"] = shard_optimizer_state(checkpoint["optimizer"], wrapper.optimizer)


@contextmanager
def whole_model(runner: Any) -> Iterator[nn.Module]:
    """The network with whole weights, to be read and changed inside the block.

    That is the network itself, or, where it is sharded, a copy on the CPU whose weights are sharded and
    copied back after the block.

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
