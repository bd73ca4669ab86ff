"""One real forward and backward step: losses, gradients, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.optim import build_optim_wrapper
from torch import Tensor

from ddetr_mm.preflight.findings import Section, fault
from ddetr_mm.preflight.resources import ModelSize


@dataclass(frozen=True)
class Step:
    """What one step gave.

    Attributes:
        losses: name → value, the total under ``"loss"``.
        without_gradient: trained parameters that got none.
        bad_gradient: trained parameters with a gradient that is not finite.
        moved_though_frozen: frozen parameters that got a gradient.
        num_trained, num_frozen: how many parameters of each kind there are.
        kept_bytes: what the forward pass kept for the backward pass.
        batch_hw: padded height and width of the batch.
        num_images: images in it.
    """

    losses: dict[str, float]
    without_gradient: list[str]
    bad_gradient: list[str]
    moved_though_frozen: list[str]
    num_trained: int
    num_frozen: int
    kept_bytes: int
    batch_hw: tuple[int, int]
    num_images: int


def take_step(model: Any, optim_wrapper_cfg: Mapping[str, Any], batch: Mapping[str, Any]) -> Step:
    """Forward and backward on one batch in training mode; the optimizer does not step.

    Args:
        model: a detector of mmdet, on the device that it is to run on.
        optim_wrapper_cfg: of the config; decides about mixed precision.
        batch: as the training dataloader gives it.
    """
    model.train()
    wrapper = build_optim_wrapper(model, dict(optim_wrapper_cfg))
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    kept = KeptBytes({parameter.data_ptr() for parameter in model.parameters()})
    with kept.counting(), wrapper.optim_context(model):
        prepared = model.data_preprocessor(batch, True)
        losses = model(**prepared, mode="loss")
        total, logged = model.parse_losses(losses)
    kept_bytes = kept.total
    kept.forget()
    # Not through the wrapper: the first scaled losses of fp16 overflow by design.
    total.backward()
    if on_gpu:
        torch.cuda.synchronize()
        kept_bytes = max(kept_bytes, torch.cuda.max_memory_allocated() - before)
    step = _read(
        model, {name: float(value.detach()) for name, value in logged.items()}, kept_bytes, prepared["inputs"]
    )
    model.zero_grad(set_to_none=True)
    return step


class KeptBytes:
    """Counts the bytes that autograd keeps between forward and backward, each storage once.

    Args:
        known: addresses of storages that are there anyway: the parameters.
    """

    def __init__(self, known: set[int]) -> None:
        self._seen = set(known)
        self._alive: list[Tensor] = []
        self.total = 0

    def counting(self) -> Any:
        """A context in which what is kept gets counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unchanged)

    def forget(self) -> None:
        """Let go of what was counted."""
        self._alive.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            # Freed storages would give their address to the next one.
            self._alive.append(tensor.detach())
            self.total += storage.nbytes()
        return tensor


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _read(model: Any, losses: dict[str, float], kept_bytes: int, inputs: Tensor) -> Step:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return Step(
        losses=losses,
        without_gradient=[name for name, p in trained.items() if p.grad is None],
        bad_gradient=[
            name
            for name, p in trained.items()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ],
        moved_though_frozen=[name for name, p in frozen.items() if p.grad is not None],
        num_trained=len(trained),
        num_frozen=len(frozen),
        kept_bytes=kept_bytes,
        batch_hw=(int(inputs.shape[-2]), int(inputs.shape[-1])),
        num_images=len(inputs),
    )


def model_size(model: Any, optimizer: str) -> ModelSize:
    """Bytes of a network's weights, trained parameters and optimizer state.

    Args:
        model: the network.
        optimizer: ``AdamW`` or ``SGD``.
    """

    def total(tensors: Any, wanted: Callable[[Tensor], bool]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if wanted(tensor))

    weights = total(model.parameters(), lambda _: True) + total(model.buffers(), lambda _: True)
    trained = total(model.parameters(), lambda parameter: parameter.requires_grad)
    return ModelSize(weights, trained, optimizer_copies=1 if optimizer == "SGD" else 2)


def judge(step: Step, should_be_frozen: list[str]) -> Section:
    """The step in words.

    Args:
        step: what it gave.
        should_be_frozen: parameters that the spec freezes and that would move all the same.
    """
    section = Section("one training step")
    height, width = step.batch_hw
    # Those of the inner decoder layers (d0.loss_cls …) are in the file.
    shown = {name: value for name, value in step.losses.items() if "." not in name}
    parts = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
    section.lines += [
        f"{step.num_images} images at {width}x{height} (width x height): {parts}",
        f"{step.num_trained} parameters train, {step.num_frozen} are frozen",
    ]
    section.data = dict(losses=step.losses, num_trained=step.num_trained, num_frozen=step.num_frozen)
    broken = [name for name, value in step.losses.items() if value != value or abs(value) == float("inf")]
    if broken:
        section.findings.append(
            fault("loss-not-finite", f"not finite in the first step: {', '.join(broken)}", where="train")
        )
    for kind, names, text in (
        ("gradient-not-finite", step.bad_gradient, "get a gradient that is not finite"),
        ("gradient-missing", step.without_gradient, "should move and get no gradient"),
        ("frozen-moves", step.moved_though_frozen, "are frozen and get a gradient"),
        ("freeze-without-effect", should_be_frozen, "should be frozen by the spec and would train"),
    ):
        if names:
            shown_names = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
            section.findings.append(
                fault(kind, f"{len(names)} parameters {text}: {shown_names}", where=_KEYS.get(kind, "train"))
            )
    return section


_KEYS = {"frozen-moves": "train.freeze", "freeze-without-effect": "train.freeze, model.train_backbone"}
