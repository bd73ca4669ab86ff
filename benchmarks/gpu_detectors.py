"""Contestants and options of the GPU benchmarks: mmdet, Hugging Face and ours, on equal weights."""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectors_cpu import HUGGING_FACE, OURS, STOCK, build, losses, our_config
from gpu_alternating import describe_device, device_of
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.profiler import record_function

Step = Callable[[], Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
YARDSTICK = "mmdet, fp32"


def arguments(title: str, precisions: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The options that the benchmarks of detectors on a GPU have in common.

    Args:
        title: what the script measures, for its help.
        precisions: those that take part by default.
        rounds: how many count by default.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--boxes", type=int, default=7, help="of an image")
    parser.add_argument("--precisions", nargs="+", default=list(precisions))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="tiny images and few rounds, not compiled")
    parser.add_argument("--record", action="store_true", help="write the record")
    return parser


def set_up(args: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device, with mmdet's classes registered, and the head of the record.

    Raises:
        SystemExit: CUDA is asked for and not there.
    """
    device = device_of(args.device)
    register_all_modules(init_default_scope=True)
    return device, {**describe_device(device), "image": "x".join(map(str, args.size))}


@dataclass(frozen=True)
class Contestant:
    """One way to run Deformable DETR.

    Attributes:
        name: as the record calls it.
        kind: whose code: stock mmdet, Hugging Face or ours.
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.
        options: arguments of our detector.
    """

    name: str
    kind: str
    precision: str
    options: dict[str, Any] = field(default_factory=dict)


def compiled(mode: str = "default") -> dict[str, Any]:
    """Options of our detector for ``torch.compile`` of all parts."""
    return {"compiled": "all", "compile_options": {"mode": mode}}


class Weights:
    """Equal weights for all, and models with them on a device.

    Args:
        device: where the models go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with tempfile.TemporaryDirectory() as folder:
            self._models = build(Path(folder))
        self._state = copy.deepcopy(self._models[OURS].state_dict())

    def model(self, contestant: Contestant) -> nn.Module:
        """A fresh copy of the contestant's model, on the device."""
        if contestant.kind != OURS:
            return copy.deepcopy(self._models[contestant.kind]).to(self.device)
        config = our_config()
        config.update(contestant.options)
        model = MODELS.build(config)
        model.load_state_dict(self._state)
        return model.to(self.device)


@contextlib.contextmanager
def precision_of(contestant: Contestant, device: torch.device) -> Iterator[None]:
    """A block in the contestant's precision: TF32 matrix products, or autocast."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tf32 = contestant.precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    dtype = DTYPES.get(contestant.precision)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def padded_batch(
    size_hw: tuple[int, int], batch: int, num_boxes: int, device: torch.device, seed: int = 0
) -> dict[str, Any]:
    """Images of different sizes, normalised and padded to one size, and their boxes in both vocabularies.

    Args:
        size_hw: the padded size; every third image fills it, the others are narrower or lower.
        batch: number of images.
        num_boxes: of every image.
        device: where the tensors go.
        seed: of images and boxes.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size_hw
    valid = [(height, width), (height, 3 * width // 4), (7 * height // 8, width)]
    images = torch.zeros(batch, 3, height, width)
    masks = torch.zeros(batch, height, width, dtype=torch.long)
    samples, labels = [], []
    for number in range(batch):
        rows, columns = valid[number % 3]
        images[number, :, :rows, :columns] = torch.randn(3, rows, columns, generator=generator)
        masks[number, :rows, :columns] = 1
        centers, sides = torch.rand(2, num_boxes, 2, generator=generator)
        centers, sides = 0.1 + 0.8 * centers, 0.05 + 0.15 * sides
        classes = torch.randint(80, (num_boxes,), generator=generator).to(device)
        corners_xyxy = torch.cat((centers - sides / 2, centers + sides / 2), dim=-1)
        sample = DetDataSample(
            metainfo={
                "img_shape": (rows, columns),
                "ori_shape": (rows, columns),
                "batch_input_shape": size_hw,
                "scale_factor": (1.0, 1.0),
                "img_path": f"generated {number}",
                "img_id": number,
            }
        )
        whwh = torch.tensor([columns, rows, columns, rows])
        sample.gt_instances = InstanceData(bboxes=(corners_xyxy * whwh).to(device), labels=classes)
        samples.append(sample)
        labels.append({"class_labels": classes, "boxes": torch.cat((centers, sides), dim=-1).to(device)})
    return {
        "image": images.to(device),
        "samples": samples,
        "labels": labels,
        "pixel_mask": masks.to(device),
    }


def outputs(contestant: Contestant, model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (B, Q, C) and boxes (B, Q, 4) cxcywh of the last layer, float32."""
    with torch.no_grad(), precision_of(contestant, given["image"].device):
        if contestant.kind == HUGGING_FACE:
            found = model(given["image"], pixel_mask=given["pixel_mask"])
            return found.logits.float(), found.pred_boxes.float()
        logits, boxes = model._forward(given["image"], given["samples"])
        return logits[-1].float(), boxes[-1].float()


def inference_step(contestant: Contestant, model: nn.Module, given: dict[str, Any]) -> Step:
    """The network and its post-processing."""
    from transformers import DeformableDetrImageProcessor

    processor = DeformableDetrImageProcessor() if contestant.kind == HUGGING_FACE else None
    sizes_hw = [sample.ori_shape for sample in given["samples"]]

    def run() -> Any:
        with torch.no_grad(), precision_of(contestant, given["image"].device):
            if processor is None:
                return model.predict(given["image"], given["samples"], rescale=True)
            found = model(given["image"], pixel_mask=given["pixel_mask"])
            return processor.post_process_object_detection(found, 0.0, target_sizes=sizes_hw, top_k=100)

    return run


def training_step(
    contestant: Contestant, model: nn.Module, batches: list[dict[str, Any]], lr: float
) -> Callable[[], Tensor]:
    """Forward, loss, backward, clipping and AdamW over the batches in turn; gives the loss on the device.

    Ours has the optimizer of a translated spec (fused), the others what their own configs give them.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, fused=True if contestant.kind == OURS else None)
    scaler = torch.amp.GradScaler(enabled=contestant.precision == "fp16")
    number = 0

    def run() -> Tensor:
        nonlocal number
        given = batches[number % len(batches)]
        number += 1
        with precision_of(contestant, given["image"].device):
            loss = losses(contestant.kind, model, given)
        with record_function("backward"):
            scaler.scale(loss).backward()
        with record_function("optimizer"):
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(weights, 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def apart(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Differences of scores and boxes (both 0..1): the largest, and the mean."""
    scores = (found[0].sigmoid() - expected[0].sigmoid()).abs()
    boxes = (found[1] - expected[1]).abs()
    return {
        "largest score difference": scores.max().item(),
        "largest box difference": boxes.max().item(),
        "mean score difference": scores.mean().item(),
        "mean box difference": boxes.mean().item(),
    }


__all__ = [
    "HUGGING_FACE",
    "OURS",
    "STOCK",
    "YARDSTICK",
    "Contestant",
    "Weights",
    "apart",
    "arguments",
    "compiled",
    "inference_step",
    "outputs",
    "padded_batch",
    "set_up",
    "training_step",
]
