"""Checks that need the network: ground truth through the pipeline, one training step, memory, disk.

Everything is built from the translated config, as a run builds it, and fed with real batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn

from ddetr_mm.engine.hooks import load_pretrained
from ddetr_mm.preflight import round_trip
from ddetr_mm.preflight.annotations import largest_padded_hw
from ddetr_mm.preflight.inputs import Split
from ddetr_mm.preflight.pictures import MOST_TILES, Tile, draw_contact_sheet, tiles_of_batch
from ddetr_mm.preflight.report import Section, fault
from ddetr_mm.preflight.resources import (
    MemoryNeed,
    ModelSize,
    available_host_memory,
    check_disk,
    check_memory,
    num_checkpoints,
)
from ddetr_mm.spec import ExperimentSpec
from ddetr_mm.weights import Selection

# --- One training step ---


@dataclass(frozen=True)
class Step:
    """Result of one step.

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
        known: addresses of storages not to count: the parameters.
    """

    def __init__(self, known: set[int]) -> None:
        self._seen = set(known)
        self._alive: list[Tensor] = []
        self.total = 0

    def counting(self) -> Any:
        """A context that counts."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unchanged)

    def forget(self) -> None:
        """Release the counted tensors."""
        self._alive.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            # A freed storage would give its address to the next one.
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
    """Findings of a step.

    Args:
        step: its result.
        should_be_frozen: parameters that the spec freezes and that would train.
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
        ("gradient-missing", step.without_gradient, "are trained and get no gradient"),
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


# --- Sections of the check ---

ROUND_TRIP_SAMPLE = 64
"""Images of a split whose ground truth goes through the pipeline, without ``full``."""

CPU_STEP_IMAGES = 2
"""Images of the step on a CPU, where a whole batch of large images would take minutes."""


def build_network(config: Any, spec: ExperimentSpec) -> nn.Module:
    """The detector with the weights that training starts from, loaded as training loads them.

    Args:
        config: the translated config; for ``train`` where ``spec`` names weights.
        spec: names those weights.

    Raises:
        WeightsError: weights are missing or do not fit.
    """
    model = MODELS.build(config.model)
    model.init_weights()
    backbone_path, model_path = spec.model.pretrained_backbone_path, spec.train.pretrained_model_path
    if "train_dataloader" in config and (backbone_path or model_path):
        metainfo = DATASETS.build(config.train_dataloader.dataset).metainfo if model_path else {}
        selection = Selection(spec.ddetr_mm.checkpoint_entry, spec.ddetr_mm.use_ema)
        load_pretrained(model, backbone_path, model_path, metainfo, selection)
    return model


def device_for(spec: ExperimentSpec) -> torch.device:
    """The device that a run of this spec uses."""
    return torch.device("cuda" if spec.ddetr_mm.device != "cpu" and torch.cuda.is_available() else "cpu")


def check_round_trip(
    model: Any,
    split: Split,
    dataloader_cfg: Mapping[str, Any],
    evaluator_cfg: Mapping[str, Any],
    folder: Path,
    *,
    full: bool,
) -> Iterator[Section]:
    """The ground truth of one split through the pipeline of evaluation.

    Args:
        model: the detector; only its data preprocessor and its head are used.
        split: the data.
        dataloader_cfg: that of evaluation; its sources are replaced by the split's.
        evaluator_cfg: likewise.
        folder: where the contact sheet goes.
        full: all images, not a sample.
    """
    rows = split.spread_rows(None if full else ROUND_TRIP_SAMPLE)
    objects = np.diff(split.table.box_starts)
    # The fullest image is the one that limits on detections show in.
    rows = np.unique(np.append(rows, int(objects.argmax())))
    sources = [dict(image_dir=source.image_dir, json_file=source.json_file) for source in split.sources]
    loader = copy.deepcopy(dict(dataloader_cfg))
    loader["dataset"]["sources"] = sources
    evaluator = dict(evaluator_cfg) | dict(sources=sources)
    trip = round_trip.send_ground_truth(model.cpu(), loader, evaluator, rows)
    head = model.bbox_head
    limit = min(model.num_queries, head.max_per_img, 100)
    yield round_trip.judge(split.name, trip, limit)
    path = folder / f"check_batches_{split.name}.png"
    yield sheet_section(path, trip.tiles, f"{split.name} as in evaluation", trip.class_names)


def check_training_step(
    model: Any, config: Any, spec: ExperimentSpec, train: Split, folder: Path, device: torch.device
) -> Iterator[Section]:
    """Contact sheet, one step, memory and disk.

    Args:
        model: the detector, as training starts with it.
        config: the translated config for ``train``.
        spec: for batch size, optimizer and checkpoints.
        train: the training split.
        folder: the results folder.
        device: where to take the step.
    """
    loader_cfg = copy.deepcopy(dict(config.train_dataloader))
    if device.type == "cpu":
        loader_cfg["batch_size"] = min(spec.dataset.batch_size, CPU_STEP_IMAGES)
    set_random_seed(max(spec.train.seed, 0))
    loader = Runner.build_dataloader(loader_cfg, seed=max(spec.train.seed, 0))
    names = loader.dataset.metainfo["classes"]
    model = model.to(device)
    batches = list(_first_batches(loader, most_images=MOST_TILES))
    tiles: list[Tile] = []
    for batch in batches:
        prepared = model.data_preprocessor(copy.deepcopy(batch), True)
        tiles += tiles_of_batch(prepared["inputs"], prepared["data_samples"], model.data_preprocessor, names)
    yield sheet_section(folder / "check_batches_training.png", tiles, "training", names)
    step = take_step(model, config.optim_wrapper, batches[0])
    yield judge(step, would_train(model, config, spec))
    yield memory_section(model, step, spec, train, device)
    size = model_size(model, spec.train.optim.optimizer)
    num_images, batch = len(loader.dataset), spec.dataset.batch_size
    steps = -(-num_images // batch) if spec.ddetr_mm.keep_last_batch else max(1, num_images // batch)
    kept = num_checkpoints(
        spec.train.num_epochs, spec.train.checkpoint_interval, spec.train.checkpoint_interval_unit, steps
    )
    yield check_disk(folder, kept, size.checkpoint)


def sheet_section(path: Path, tiles: Sequence[Tile], name: str, class_names: Sequence[str]) -> Section:
    """Draw a contact sheet; the section names its path."""
    heading = f"{name}: the first batches as the network sees them (hatched: padding)"
    draw_contact_sheet(path, tiles, heading, class_names)
    section = Section(f"first batches, {name}")
    section.lines.append(f"{min(len(tiles), MOST_TILES)} images drawn as the network sees them: {path}")
    section.data = dict(path=str(path))
    return section


def _first_batches(loader: Any, most_images: int) -> Iterator[Any]:
    seen = 0
    for batch in loader:
        yield batch
        seen += len(batch["inputs"])
        if seen >= most_images:
            return


def would_train(model: Any, config: Any, spec: ExperimentSpec) -> list[str]:
    """Parameters that the spec freezes and that train all the same."""
    frozen = list(config.model.get("frozen_modules") or [])
    if not spec.model.train_backbone:
        frozen.append("backbone")
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(name == part or name.startswith(f"{part}.") for part in frozen)
    ]


def memory_section(
    model: Any, step: Step, spec: ExperimentSpec, train: Split, device: torch.device
) -> Section:
    """Memory of a step at the largest padded batch, from what the real step kept."""
    largest_hw = largest_padded_hw(train.table.sizes_hw, spec.dataset.augmentation)
    pixels = step.batch_hw[0] * step.batch_hw[1] * step.num_images
    per_image = int(step.kept_bytes * largest_hw[0] * largest_hw[1] / pixels)
    size = model_size(model, spec.train.optim.optimizer)
    need = MemoryNeed(size, per_image, spec.dataset.batch_size, largest_hw)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        held = torch.cuda.memory_reserved(device)
        available = torch.cuda.mem_get_info(device)[0] + held
    else:
        name, available = "this machine", available_host_memory()
    options = {
        "train.activation_checkpoint": not spec.train.activation_checkpoint,
        "train.precision": spec.train.precision == "fp32" and device.type == "cuda",
        "model.train_backbone": spec.model.train_backbone,
    }
    section = check_memory(need, available, name, options)
    section.lines.append(
        f"estimated from a step that kept {step.kept_bytes / 2**20:.0f} MiB for {step.num_images} images at "
        f"{step.batch_hw[1]}x{step.batch_hw[0]}"
    )
    return section
