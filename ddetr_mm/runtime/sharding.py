"""Sharding a network among ranks (torch's ``fully_shard``), and whole tensors in and out of it.

Every rank keeps an even part of each parameter, its gradient and its optimizer state; a block's parameters
are brought together while the block computes. Checkpoints hold whole tensors: what is sharded when, and on
how many ranks, shows nowhere in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmdet.models.backbones import ResNet
from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device | str) -> None:
    """Shard a detector in place over all ranks of the process group.

    Blocks are brought together one by one: each encoder and decoder layer, each stage of a ResNet, the
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
    """The parts of a detector that are brought together by themselves, inner ones first."""
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, ResNet):
        yield from (getattr(backbone, name) for name in backbone.res_layers)
    if isinstance(backbone, nn.Module):
        yield backbone
    for part in (getattr(model, "encoder", None), getattr(model, "decoder", None)):
        yield from getattr(part, "layers", ())


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has been here."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensors(state: Any, keep: bool = True) -> Any:
    """A state dict with whole tensors on the CPU in place of sharded ones; all ranks must call it.

    Args:
        state: of a model or an optimizer, with dicts and lists inside.
        keep: whether this rank wants the result; else it takes part, and has None for every tensor.
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
