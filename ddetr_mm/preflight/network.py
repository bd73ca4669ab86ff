"""The part of a check that needs the network: built from the translated config, on real batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.runner import Runner, set_random_seed
from torch import nn

from ddetr_mm.preflight import real_step, round_trip
from ddetr_mm.preflight.contact_sheet import MOST_TILES, Tile, draw_contact_sheet, tiles_of_batch
from ddetr_mm.preflight.findings import Section, note
from ddetr_mm.preflight.fit import largest_padded_hw
from ddetr_mm.preflight.resources import (
    MemoryNeed,
    available_host_memory,
    check_disk,
    check_memory,
    num_checkpoints,
)
from ddetr_mm.preflight.split import Split
from ddetr_mm.spec import ExperimentSpec
from ddetr_mm.weights import load_backbone, load_for_model

ROUND_TRIP_SAMPLE = 64
"""Images of a split that the ground truth is sent through the pipeline for, where not all are."""

CPU_STEP_IMAGES = 2
"""Images of the real step on a CPU, where a whole batch of large images would take minutes."""


def build_network(config: Any, spec: ExperimentSpec, class_names: Sequence[str]) -> nn.Module:
    """The detector with its initial weights, as training starts with it.

    Args:
        config: the translated config for ``train``.
        spec: names the weights to start from.
        class_names: by label, for carrying over a class head.

    Raises:
        WeightsError: weights are missing or do not fit.
    """
    model = MODELS.build(config.model)
    model.init_weights()
    if spec.model.pretrained_backbone_path:
        load_backbone(model.backbone, spec.model.pretrained_backbone_path)
    if spec.train.pretrained_model_path:
        load_for_model(model, spec.train.pretrained_model_path, class_names=class_names)
    return model


def device_for(spec: ExperimentSpec) -> torch.device:
    """Where a run of this spec computes."""
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
    step = real_step.take_step(model, config.optim_wrapper, batches[0])
    yield real_step.judge(step, would_train(model, config, spec))
    yield memory_section(model, step, spec, train, device)
    size = real_step.model_size(model, spec.train.optim.optimizer)
    steps = -(-len(loader.dataset) // spec.dataset.batch_size)
    kept = num_checkpoints(
        spec.train.num_epochs, spec.train.checkpoint_interval, spec.train.checkpoint_interval_unit, steps
    )
    yield check_disk(folder, kept, size.checkpoint)


def sheet_section(path: Path, tiles: Sequence[Tile], name: str, class_names: Sequence[str]) -> Section:
    """Draw a contact sheet and tell where it is."""
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
    """Parameters that the spec freezes and that are trained all the same."""
    frozen = list(config.model.get("frozen_modules") or [])
    if not spec.model.train_backbone:
        frozen.append("backbone")
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(name == part or name.startswith(f"{part}.") for part in frozen)
    ]


def memory_section(
    model: Any, step: real_step.Step, spec: ExperimentSpec, train: Split, device: torch.device
) -> Section:
    """Memory of a step at the largest padded batch, from what the real step kept."""
    divisor = spec.dataset.augmentation.pad_size_divisor or 1
    largest_hw = largest_padded_hw(train.table.sizes_hw, spec.dataset.augmentation, divisor)
    pixels = step.batch_hw[0] * step.batch_hw[1] * step.num_images
    per_image = int(step.kept_bytes * largest_hw[0] * largest_hw[1] / pixels)
    size = real_step.model_size(model, spec.train.optim.optimizer)
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
        f"reckoned from a step that kept {step.kept_bytes / 2**20:.0f} MiB for {step.num_images} images at "
        f"{step.batch_hw[1]}x{step.batch_hw[0]}"
    )
    return section


def freeze_notes(model: Any, config: Any) -> Section:
    """Names in ``train.freeze`` that the network does not have."""
    section = Section("frozen modules")
    names = [name for name, _ in model.named_parameters()]
    for part in config.model.get("frozen_modules") or []:
        if not any(name == part or name.startswith(f"{part}.") for name in names):
            section.findings.append(
                note("freeze-unknown", "names no module of the network", where="train.freeze", value=part)
            )
    return section
