"""Our ONNX export beside a straightforward export of stock mmdet's detector: nodes and CPU latency.

Both graphs hold the same random weights of mmdet's R50 Deformable DETR with box refinement; the stock one is
what ``torch.onnx.export`` makes of the detector's own forward. Runs alternate, so that a busy machine slows
both; the ratio of the medians is what counts.

    python benchmarks/onnx_latency.py --height 544 --width 960 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from environment import describe
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

import ddetr_mm.register  # noqa: F401 - before mmdet's registries are used
from ddetr_mm.deploy.onnx_export import ExportOptions, trace_to_file
from ddetr_mm.deploy.parity import compare_outputs, generated_images

STOCK_CONFIG = "deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"
OUTPUTS = ["pred_logits", "pred_boxes"]


def stock_detector() -> torch.nn.Module:
    """mmdet's R50 refine model with lively random weights."""
    import mmdet
    from mmdet.registry import MODELS

    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / STOCK_CONFIG)
    init_default_scope("mmdet")
    config.model.backbone.init_cfg = None
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("reg_branches" in name or "sampling_offsets" in name):
                parameter.normal_(std=0.3 * parameter.shape[1] ** -0.5)
    return model


class StockForward(torch.nn.Module):
    """The detector's own forward on images that fill the batch."""

    def __init__(self, detector: torch.nn.Module, size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.detector = detector
        self.size_hw = size_hw

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and boxes of the last layer."""
        meta = dict(img_shape=self.size_hw, batch_input_shape=self.size_hw)
        samples = [DetDataSample(metainfo=meta) for _ in range(inputs.shape[0])]
        logits, boxes = self.detector(inputs, samples, mode="tensor")
        return logits[-1], boxes[-1]


def export_stock(detector: torch.nn.Module, path: Path, size_hw: tuple[int, int], batch: int | None) -> None:
    """The straightforward export: legacy exporter, opset 17."""
    axes = None if batch else {name: {0: "batch"} for name in ("inputs", *OUTPUTS)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            StockForward(detector, size_hw),
            (torch.zeros(batch or 2, 3, *size_hw),),
            str(path),
            input_names=["inputs"],
            output_names=OUTPUTS,
            opset_version=17,
            dynamic_axes=axes,
            dynamo=False,
        )


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(arguments: argparse.Namespace) -> dict:
    """Export both, compare them and time them in turn."""
    size_hw = (arguments.height, arguments.width)
    detector = stock_detector()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("ours", "stock")}
        trace_to_file(detector, paths["ours"], ExportOptions(input_size_hw=size_hw), opset=17)
        export_stock(detector, paths["stock"], size_hw, None)
        nodes = {name: len(onnx.load(str(path)).graph.node) for name, path in paths.items()}
        print(f"nodes: {nodes}", flush=True)
        sessions = {name: session_of(path, arguments.threads) for name, path in paths.items()}
        images = generated_images(arguments.batch, size_hw)
        outputs = {name: session.run(OUTPUTS, {"inputs": images}) for name, session in sessions.items()}
        parity = compare_outputs(tuple(outputs["stock"]), tuple(outputs["ours"]))
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(arguments.rounds):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(OUTPUTS, {"inputs": images})
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = {name: min(times) for name, times in seconds.items()}
    return dict(
        size_hw=size_hw,
        batch=arguments.batch,
        rounds=arguments.rounds,
        threads=arguments.threads,
        nodes=nodes,
        share_of_nodes=round(nodes["ours"] / nodes["stock"], 3),
        seconds_median=medians,
        seconds_best=best,
        times_faster=round(medians["stock"] / medians["ours"], 2),
        times_faster_best=round(best["stock"] / best["ours"], 2),
        max_abs_diff_logits=parity.max_abs_diff_logits,
        max_abs_diff_boxes=parity.max_abs_diff_boxes,
    )


def main() -> None:
    """Measure and print JSON; ``--record`` writes it to a file too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=544)
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    environment = describe("torch", "mmdet", "onnxruntime")
    text = json.dumps({**measure(arguments), "environment": environment}, indent=2)
    print(text)
    if arguments.record:
        arguments.record.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
