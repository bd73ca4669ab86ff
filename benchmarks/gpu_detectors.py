"""Contestants and options of the GPU benchmarks: mmdet, Hugging Face and ours, on equal weights."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectors_cpu import (
    HUGGING_FACE,
    OURS,
    STOCK,
    hugging_face_model,
    losses,
    our_config,
    stock_config,
    stock_model,
)
from gpu_alternating import describe_device, device_of
from gpu_process import add_process_arguments
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.profiler import record_function

from ddetr_mm.models.backbones import fuse_norms

import mmcv.ops.multi_scale_deform_attn as mmcv_attention  # isort: skip  # after ours, which gives it its ops

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
    add_process_arguments(parser)
    return parser


def chosen_contestants(args: argparse.Namespace, known: Sequence[Contestant]) -> list[Contestant]:
    """Those that ``--only`` names, else those of ``--precisions``.

    Raises:
        SystemExit: a name is unknown.
    """
    if args.only:
        unknown = sorted(set(args.only) - {one.name for one in known})
        if unknown:
            raise SystemExit(f"no such contestant: {', '.join(unknown)}")
        return [one for one in known if one.name in args.only]
    return [
        one for one in known if one.precision in args.precisions and not (args.no_compile and one.is_compiled)
    ]


def groups_of(chosen: Sequence[Contestant]) -> list[list[str]]:
    """Names of the contestants that share a process: all eager ones, and each compiled one alone.

    torch.compile limits how often one piece of code is compiled in a process; beyond it the contestant
    would run eagerly without a message.
    """
    eager = [one.name for one in chosen if not one.is_compiled]
    return [*([eager] if eager else []), *([one.name] for one in chosen if one.is_compiled)]


def set_up(args: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device, with mmdet's classes registered and its op made usable, and the head of the record.

    Raises:
        SystemExit: CUDA is asked for and not there.
    """
    device = device_of(args.device)
    environment = {**describe_device(device), "image": "x".join(map(str, args.size))}
    register_all_modules(init_default_scope=True)
    return device, {**environment, "mmdet's sampling": prepare_stock_ops(device)}


# --- mmdet's sampling ---


class Float32Sampling:
    """mmcv's sampling, which gets float32 where autocast hands it bfloat16: it has no such kernel."""

    base: Any = None

    @classmethod
    def apply(
        cls, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, step: Any
    ) -> Tensor:
        """As mmcv's autograd function; the result has the dtype of ``value``."""
        if value.dtype != torch.bfloat16:
            return cls.base.apply(value, shapes, starts, locations, weights, step)
        given = (value.float(), shapes, starts, locations.float(), weights.float(), step)
        return cls.base.apply(*given).to(value.dtype)


class PyTorchSampling:
    """mmcv's PyTorch form in place of its op."""

    @staticmethod
    def apply(
        value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, step: Any
    ) -> Tensor:
        """As mmcv's autograd function; the result has the dtype of ``value``."""
        given = (value.float(), shapes, locations.float(), weights.float())
        return mmcv_attention.multi_scale_deformable_attn_pytorch(*given).to(value.dtype)


def focal_loss_in_float32(base: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """mmcv's focal loss, which gets float32 where autocast hands it bfloat16: it has no such kernel."""

    def run(pred: Tensor, *rest: Any) -> Tensor:
        return base(pred.float() if pred.dtype == torch.bfloat16 else pred, *rest)

    return run


def prepare_stock_ops(device: torch.device) -> str:
    """Make mmcv's ops usable for mmdet on this device; returns what its sampling is, for the record.

    An op that was built for another GPU prints an error and returns zeros: mmdet gets mmcv's PyTorch form
    then.
    """
    if device.type != "cuda":
        return "mmcv's PyTorch form"
    focal_loss = importlib.import_module("mmdet.models.losses.focal_loss")
    focal_loss._sigmoid_focal_loss = focal_loss_in_float32(focal_loss._sigmoid_focal_loss)
    base = mmcv_attention.MultiScaleDeformableAttnFunction
    problem = sampling_problem(base, device)
    if problem:
        mmcv_attention.MultiScaleDeformableAttnFunction = PyTorchSampling
        return f"mmcv's PyTorch form, since its op {problem}"
    Float32Sampling.base = base
    mmcv_attention.MultiScaleDeformableAttnFunction = Float32Sampling
    return "mmcv's op, in float32 where autocast gives bfloat16"


def sampling_problem(function: Any, device: torch.device) -> str | None:
    """What is wrong with an op, judged by mmcv's PyTorch form on a few values; None where nothing is.

    Args:
        function: mmcv's autograd function, or another with its ``apply``.
        device: where it is tried.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]], device=device)
    starts = torch.tensor([0, 20], device=device)
    tensors = [
        torch.rand(*shape, generator=generator).to(device).requires_grad_()
        for shape in ((1, 26, 2, 8), (1, 3, 2, 2, 4, 2), (1, 3, 2, 2, 4))
    ]
    upstream = torch.rand(1, 3, 16, generator=generator).to(device)

    def both(sampled: Tensor) -> list[Tensor]:
        return [sampled.detach(), *torch.autograd.grad(sampled, tensors, upstream)]

    value, locations, weights = tensors
    expected = both(mmcv_attention.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights))
    try:
        found = both(function.apply(value, shapes, starts, locations, weights, 64))
    except Exception as error:
        return f"fails: {' '.join(str(error).split())[:120]}"
    if not any(one.any() for one in found):
        return "returns zeros"
    apart = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    return None if apart < 1e-3 else f"is off by {apart:.1e}"


# --- Contestants ---


@dataclass(frozen=True)
class Contestant:
    """One way to run Deformable DETR.

    Attributes:
        name: as the record calls it.
        kind: whose code: stock mmdet, Hugging Face or ours.
        precision: ``fp32``, ``tf32``, ``fp16``, ``bf16``, or ``defaults``: PyTorch's own settings.
        options: arguments of our detector; of Hugging Face's only those of :func:`compiled`.
    """

    name: str
    kind: str
    precision: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` is part of it."""
        return "compiled" in self.options


def compiled(mode: str = "default") -> dict[str, Any]:
    """Options of our detector for ``torch.compile`` of all parts."""
    return {"compiled": "all", "compile_options": {"mode": mode}}


def smaller(config: Config) -> Config:
    """The config with few queries and layers."""
    config.num_queries, config.encoder.num_layers, config.decoder.num_layers = 20, 1, 2
    return config


class Weights:
    """Equal weights for all, and models with them on a device.

    Args:
        device: where the models go.
        quick: a network that is small enough to try a script out.
    """

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self._quick = device, quick
        self._models = {STOCK: stock_model(smaller(stock_config()) if quick else None)}
        self._state = copy.deepcopy(self._models[STOCK].state_dict())

    def model(self, contestant: Contestant) -> nn.Module:
        """A fresh copy of the contestant's model for training, on the device."""
        if contestant.kind == OURS:
            config = smaller(our_config()) if self._quick else our_config()
            config.update(contestant.options)
            model = MODELS.build(config)
            model.load_state_dict(self._state)
            return model.to(self.device)
        if contestant.kind == HUGGING_FACE and HUGGING_FACE not in self._models:
            with tempfile.TemporaryDirectory() as folder:  # converted only where it takes part
                self._models[HUGGING_FACE] = hugging_face_model(self._models[STOCK], Path(folder))
        model = copy.deepcopy(self._models[contestant.kind]).to(self.device)
        if contestant.is_compiled:
            model.model.compile(**contestant.options["compile_options"])
        return model

    def predicting_model(self, contestant: Contestant) -> nn.Module:
        """The same as it predicts: ours with its norms folded away, as ``evaluate`` and ``inference`` do."""
        model = self.model(contestant).eval()
        if contestant.kind == OURS:
            fuse_norms(model)
        return model


@contextlib.contextmanager
def precision_of(contestant: Contestant, device: torch.device) -> Iterator[None]:
    """A block in the contestant's precision: TF32, autocast, or what PyTorch does by itself."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if contestant.precision != "defaults":
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
    processor = None
    if contestant.kind == HUGGING_FACE:
        from transformers import DeformableDetrImageProcessor

        processor = DeformableDetrImageProcessor()
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
    "chosen_contestants",
    "compiled",
    "groups_of",
    "inference_step",
    "outputs",
    "padded_batch",
    "set_up",
    "training_step",
]
