"""A training step and an inference on the CPU: ours, stock mmdet's and Hugging Face's Deformable DETR.

All three have the same weights (random, carried over by our checkpoint conversion) and get the same image and
boxes: ResNet-50, four levels, box refinement, 80 classes, 300 queries. Before the clock starts their
predictions are compared, and the losses of ours and mmdet's. A step is forward, loss, backward and AdamW; an
inference is the network and its post-processing. Then the three alternate in one process; peak memory is
that of a forked process each.

Run: ``python benchmarks/detectors_cpu.py`` (``--size 240x320 --rounds 2`` for a quick look; ``--record``
writes ``benchmarks/records/detectors_cpu.{json,md}``).
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORD = Path(__file__).parent / "records" / "detectors_cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from alternating import alternate, peak_growth_mb  # noqa: E402
from environment import describe, heading, load_average, report  # noqa: E402
from step_timing import region_times  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.profiler import record_function  # noqa: E402

import ddetr_mm.register  # noqa: E402, F401
from ddetr_mm.models.backbones import fuse_norms  # noqa: E402
from ddetr_mm.weights import convert_checkpoint  # noqa: E402

from mmdet.registry import MODELS  # isort: skip  # noqa: E402
from mmdet.structures import DetDataSample  # isort: skip  # noqa: E402
from mmdet.utils import register_all_modules  # isort: skip  # noqa: E402
from mmengine.config import Config  # isort: skip  # noqa: E402
from mmengine.hub import get_config  # isort: skip  # noqa: E402
from mmengine.logging import MMLogger  # isort: skip  # noqa: E402
from mmengine.structures import InstanceData  # isort: skip  # noqa: E402

STOCK_CONFIG = "mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"
STOCK, HUGGING_FACE, OURS = "mmdet", "Hugging Face", "ours"
TOLERANCE = 1e-3
Step = Callable[..., Any]


def stock_config() -> Config:
    """mmdet's refine model, its backbone not fetched, and without dropout, so that losses can be compared."""
    config = get_config(STOCK_CONFIG).model
    config.backbone.init_cfg = None
    for layer in (config.encoder.layer_cfg, config.decoder.layer_cfg):
        layer.ffn_cfg.ffn_drop = 0.0
        for attention in ("self_attn_cfg", "cross_attn_cfg"):
            if attention in layer:
                layer[attention].dropout = 0.0
    return config


def our_config(zero_padded_values: bool = True) -> Config:
    """Ours beside :func:`stock_config`: the same network; by default padding counts as zero, as in theirs."""
    config = stock_config()
    config.type, config.zero_padded_values = "TAODeformableDETR", zero_padded_values
    config.bbox_head.type = "TAODeformableDETRHead"
    return config


def stock_model(config: Config | None = None) -> nn.Module:
    """mmdet's with random weights that are the same each time, from which all others take theirs.

    Args:
        config: of the model; None for :func:`stock_config`.
    """
    torch.manual_seed(0)
    stock = MODELS.build(config or stock_config())
    MMLogger.get_instance("benchmark", log_level="ERROR")  # no line a parameter
    stock.init_weights()
    with torch.no_grad():  # class scores and boxes that differ from query to query
        for name, parameter in stock.named_parameters():
            if "bbox_head" in name and parameter.ndim == 2:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return stock


def hugging_face_model(stock: nn.Module, folder: Path) -> nn.Module:
    """Hugging Face's with mmdet's weights, by our conversion through files in a folder."""
    from transformers import DeformableDetrForObjectDetection

    text = f"model = dict(num_queries={stock.num_queries}, with_box_refine=True)"
    torch.save({"state_dict": stock.state_dict(), "meta": {"cfg": text}}, folder / "mmdet.pth")
    convert_checkpoint(folder / "mmdet.pth", folder / "hf", "hf")
    none = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    found: nn.Module = DeformableDetrForObjectDetection.from_pretrained(
        folder / "hf", auxiliary_loss=True, **none
    )
    return found


def build(folder: Path) -> dict[str, nn.Module]:
    """The three with the same weights."""
    stock = stock_model()
    ours = MODELS.build(our_config())
    ours.load_state_dict(stock.state_dict())
    return {STOCK: stock, HUGGING_FACE: hugging_face_model(stock, folder), OURS: ours}


def predicting(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The three as they predict: ours with its norms folded away, as ``evaluate`` and ``inference`` do."""
    ours = copy.deepcopy(models[OURS])
    fuse_norms(ours.eval())
    return {**models, OURS: ours}


def batch(size_hw: tuple[int, int], num_boxes: int) -> dict[str, Any]:
    """One image, normalised, and its boxes in both vocabularies."""
    generator = torch.Generator().manual_seed(0)
    height, width = size_hw
    image = torch.randn(1, 3, height, width, generator=generator)
    centers, sides = torch.rand(2, num_boxes, 2, generator=generator)
    boxes_cxcywh = torch.cat((0.1 + 0.8 * centers, 0.05 + 0.15 * sides), dim=-1)
    labels = torch.randint(80, (num_boxes,), generator=generator)
    corners = torch.cat(
        (boxes_cxcywh[:, :2] - boxes_cxcywh[:, 2:] / 2, boxes_cxcywh[:, :2] + boxes_cxcywh[:, 2:] / 2), dim=-1
    )
    sample = DetDataSample(
        metainfo={
            "img_shape": size_hw,
            "ori_shape": size_hw,
            "batch_input_shape": size_hw,
            "scale_factor": (1.0, 1.0),
            "img_path": "generated",
            "img_id": 0,
        }
    )
    sample.gt_instances = InstanceData(
        bboxes=corners * torch.tensor([width, height, width, height]), labels=labels
    )
    return {
        "image": image,
        "samples": [sample],
        "labels": [{"class_labels": labels, "boxes": boxes_cxcywh}],
        "pixel_mask": torch.ones(1, height, width, dtype=torch.long),
    }


def losses(name: str, model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The total loss."""
    if name == HUGGING_FACE:
        output = model(given["image"], pixel_mask=given["pixel_mask"], labels=given["labels"])
        total: Tensor = output.loss
        return total
    parts = model.loss(given["image"], copy.deepcopy(given["samples"]))
    total, _ = model.parse_losses(parts)
    return total


def predictions(name: str, model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (Q, C) and boxes (Q, 4) cxcywh of the last layer."""
    with torch.no_grad():
        if name == HUGGING_FACE:
            output = model(given["image"], pixel_mask=given["pixel_mask"])
            return output.logits[0], output.pred_boxes[0]
        logits, boxes = model._forward(given["image"], given["samples"])
        return logits[-1, 0], boxes[-1, 0]


def infer(name: str, model: nn.Module, given: dict[str, Any]) -> Step:
    """The network and its post-processing."""
    from transformers import DeformableDetrImageProcessor

    processor = DeformableDetrImageProcessor() if name == HUGGING_FACE else None
    size_hw = given["samples"][0].ori_shape

    def run() -> Any:
        with torch.no_grad():
            if processor is None:
                return model.predict(given["image"], given["samples"], rescale=True)
            output = model(given["image"], pixel_mask=given["pixel_mask"])
            return processor.post_process_object_detection(output, 0.0, target_sizes=[size_hw], top_k=100)

    return run


def train(name: str, model: nn.Module, given: dict[str, Any]) -> Step:
    """Forward, loss, backward, AdamW: for ours as a translated spec has it."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True if name == OURS else None)

    def run() -> None:
        optimizer.zero_grad()
        total = losses(name, model, given)
        with record_function("backward"):
            total.backward()
        with record_function("optimizer"):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    return run


def compare_results(models: dict[str, nn.Module], given: dict[str, Any]) -> dict[str, float]:
    """Largest differences from mmdet's predictions, and the losses of all.

    Raises:
        SystemExit: they differ, so times say nothing.
    """
    for model in models.values():
        model.eval()
    found = {name: predictions(name, model, given) for name, model in predicting(models).items()}
    apart = {
        f"{name}, predictions": max(
            (one - other).abs().max().item()
            for one, other in zip(found[name], found[STOCK], strict=True)
        )
        for name in models
        if name != STOCK
    }  # fmt: skip
    total = {name: losses(name, model.train(), given).item() for name, model in models.items()}
    apart["ours, loss"] = abs(total[OURS] - total[STOCK]) / total[STOCK]
    if max(apart.values()) > TOLERANCE:
        raise SystemExit(f"results differ: {apart}")
    return {**apart, **{f"loss of {name}": value for name, value in total.items()}}


def memory(models: dict[str, nn.Module], given: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Peak growth of one step and of one inference, each in a process of its own."""

    def alone(make: Callable[[str, nn.Module, dict[str, Any]], Step], name: str, model: nn.Module) -> Step:
        def run() -> None:
            torch.set_num_threads(1)
            make(name, model, given)()

        return run

    ready = predicting(models)
    return {
        name: {
            "train": peak_growth_mb(alone(train, name, models[name].train())),
            "inference": peak_growth_mb(alone(infer, name, ready[name].eval())),
        }
        for name in models
    }


def markdown(result: dict[str, Any]) -> str:
    """The record for people."""
    lines = heading("Detectors on the CPU", result["environment"])
    lines += [
        "",
        "ResNet-50, 4 levels, refinement, batch 1. Seconds: median (smallest to largest); how many times",
        "mmdet's speed, by wall and by processor time; peak memory beyond the weights, MB.",
        "",
        "| | | s | times mmdet's | by processor | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode, rows in result["times"].items():
        for name, times in rows.items():
            seconds = [times[key] / 1e3 for key in ("median_ms", "min_ms", "max_ms")]
            peak = result["memory_mb"][name][mode]
            lines.append(
                f"| {mode} | {name} | {seconds[0]:.2f} ({seconds[1]:.2f} to {seconds[2]:.2f}) "
                f"| {times['speedup']:.2f} | {times['cpu_speedup']:.2f} "
                f"| {'' if peak is None else f'{peak:.0f}'} |"
            )
    regions = result["region_ms"]
    lines += ["", "Our training step by stages, milliseconds:", ""]
    lines += ["| " + " | ".join(regions) + " |", "| --- " * len(regions) + "|"]
    lines += ["| " + " | ".join(f"{value:,.0f}" for value in regions.values()) + " |"]
    lines += ["", "Agreement:", ""]
    lines += [f"- {what}: {value:.3g}" for what, value in result["agreement"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="480x640", help="height x width")
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help="write the record")
    args = parser.parse_args()
    register_all_modules(init_default_scope=True)
    environment = describe("torch", "mmdet", "mmcv-lite", "transformers", "ddetr_mm")
    environment |= {"threads": args.threads, "image": args.size}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = build(Path(folder))
    height, width = map(int, args.size.split("x"))
    given = batch((height, width), args.boxes)
    peaks = memory(models, given)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"environment": environment, "agreement": compare_results(models, given)}
    print(result["agreement"], flush=True)
    result |= {"memory_mb": peaks, "times": {}}
    for mode, make in (("inference", infer), ("train", train)):
        training = mode == "train"
        chosen = models if training else predicting(models)
        steps = {name: make(name, model.train(training), given) for name, model in chosen.items()}
        result["times"][mode] = alternate(steps, args.rounds, STOCK)
    result["region_ms"] = region_times(steps[OURS], args.rounds, torch.device("cpu"))["host_ms"]
    environment["load_after"] = load_average()
    report(result, markdown(result), RECORD if args.record else None)


if __name__ == "__main__":
    main()
