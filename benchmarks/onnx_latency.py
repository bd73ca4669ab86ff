"""Our ONNX export beside a straightforward export of stock mmdet's detector: nodes and CPU latency.

Both graphs hold the same random weights of mmdet's R50 Deformable DETR with box refinement; the stock one is
what ``torch.onnx.export`` makes of the detector's own forward. Runs alternate, so that a busy machine slows
both; the ratios are what counts. One more run of each is profiled: where the time goes, operator by operator.

    python benchmarks/onnx_latency.py --record
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import warnings
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
from alternating import alternate
from environment import describe, heading, load_average, report
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

import ddetr_mm.register  # noqa: F401 - before mmdet's registries are used
from ddetr_mm.deploy.onnx_export import ExportOptions, trace_to_file
from ddetr_mm.deploy.parity import compare_outputs, generated_images

STOCK_CONFIG = "deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"
OUTPUTS = ["pred_logits", "pred_boxes"]
RECORD = Path(__file__).resolve().parent / "records" / "onnx_latency"
WORK = ("Conv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "GridSample")
"""Operators that no rewriting of the graph can spare: the rest moves numbers about."""


def stock_detector() -> torch.nn.Module:
    """mmdet's R50 refine model with lively random weights."""
    import mmdet
    from mmdet.registry import MODELS

    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / STOCK_CONFIG)
    init_default_scope("mmdet")
    config.model.backbone.init_cfg = None
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    model.init_weights()  # the level embedding is not set before
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


def session_of(path: Path, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU; with ``profile``, it notes every node's time there."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def milliseconds_by_operator(path: Path, threads: int, feeds: dict) -> dict[str, float]:
    """One profiled run after one to warm up: operator → milliseconds, largest first."""
    session = session_of(path, threads, path.with_suffix(""))
    for _ in range(2):
        session.run(OUTPUTS, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event["name"].endswith("_kernel_time")]
    totals: collections.Counter[str] = collections.Counter()
    for event in nodes[len(nodes) // 2 :]:
        totals[event["args"]["op_name"]] += event["dur"]
    return {name: round(micros / 1000, 1) for name, micros in totals.most_common()}


def measure(arguments: argparse.Namespace) -> dict:
    """Export both, compare them, time them in turn and profile them."""
    size_hw = (arguments.height, arguments.width)
    detector = stock_detector()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("ours", "stock")}
        trace_to_file(detector, paths["ours"], ExportOptions(input_size_hw=size_hw), opset=17)
        export_stock(detector, paths["stock"], size_hw, None)
        nodes = {name: len(onnx.load(str(path)).graph.node) for name, path in paths.items()}
        differences = {}
        sessions = {name: session_of(path, max(arguments.threads)) for name, path in paths.items()}
        for batch in (1, 2):
            images = generated_images(batch, size_hw)
            outputs = {name: session.run(OUTPUTS, {"inputs": images}) for name, session in sessions.items()}
            parity = compare_outputs(tuple(outputs["stock"]), tuple(outputs["ours"]))
            differences[batch] = dict(logits=parity.max_abs_diff_logits, boxes=parity.max_abs_diff_boxes)
        feeds = {"inputs": generated_images(arguments.batch, size_hw)}
        times = {}
        for threads in arguments.threads:
            sessions = {name: session_of(path, threads) for name, path in paths.items()}
            steps = {name: partial(session.run, OUTPUTS, feeds) for name, session in sessions.items()}
            times[threads] = alternate(steps, arguments.rounds, "stock")
        del sessions, steps
        profiles = {
            name: milliseconds_by_operator(path, max(arguments.threads), feeds)
            for name, path in paths.items()
        }
    return dict(
        size_hw=size_hw,
        batch=arguments.batch,
        rounds=arguments.rounds,
        nodes=nodes,
        share_of_nodes=round(nodes["ours"] / nodes["stock"], 3),
        times_by_threads=times,
        differences_by_batch=differences,
        profiled_threads=max(arguments.threads),
        profiles_ms=profiles,
    )


def markdown(result: dict) -> str:
    """The record for people."""
    height, width = result["size_hw"]
    profiles = result["profiles_ms"]
    stock, ours = profiles["stock"], profiles["ours"]
    needed = sum(stock.get(name, 0.0) for name in WORK)
    title = "ONNX Runtime on a CPU: our export beside a straightforward one of mmdet's detector"
    lines = heading(title, result["environment"])
    lines += [
        "",
        f"R50, refined boxes, 300 queries, 4 levels, equal weights, {width} x {height} (width x height), "
        f"batch {result['batch']}, {result['rounds']} rounds in turn; seconds.",
        "",
        f"Nodes: {result['nodes']['stock']} in the stock graph, {result['nodes']['ours']} in ours.",
        "",
        "| threads | | median | smallest | largest | processor time, median |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for threads, rows in result["times_by_threads"].items():
        for name in ("stock", "ours"):
            cells = (rows[name][key] / 1e3 for key in ("median_ms", "min_ms", "max_ms", "cpu_median_ms"))
            lines.append(f"| {threads} | {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
        stock_times, our_times = rows["stock"], rows["ours"]
        lines.append(
            f"| {threads} | stock / ours | {our_times['speedup']:.2f} "
            f"| {stock_times['min_ms'] / our_times['min_ms']:.2f} | | {our_times['cpu_speedup']:.2f} |"
        )
    lines += [
        "",
        *(
            f"Batch {batch}: logits differ by {differ['logits']:.1e} at most, boxes by {differ['boxes']:.1e}."
            for batch, differ in result["differences_by_batch"].items()
        ),
        "",
        f"Milliseconds of one profiled run with {result['profiled_threads']} threads, by operator:",
        "",
        "| operator | stock | ours |",
        "| --- | --- | --- |",
    ]
    names = sorted(set(stock) | set(ours), key=lambda name: -max(stock.get(name, 0), ours.get(name, 0)))
    for name in names:
        if max(stock.get(name, 0), ours.get(name, 0)) >= 2:
            lines.append(f"| {name} | {stock.get(name, 0):.0f} | {ours.get(name, 0):.0f} |")
    lines += [
        f"| all | {sum(stock.values()):.0f} | {sum(ours.values()):.0f} |",
        "",
        f"Convolutions, matrix products and GridSample take {needed:.0f} ms of the stock graph; if nothing "
        f"else took time, a graph could be {sum(stock.values()) / needed:.2f} times as fast.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; ``--record`` writes the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--height", type=int, default=544)
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--record", action="store_true", help="write the record")
    arguments = parser.parse_args()
    environment = describe("torch", "mmdet", "onnxruntime")
    result = {"environment": environment, **measure(arguments)}
    environment["load_after"] = load_average()
    report(result, markdown(result), RECORD if arguments.record else None)


if __name__ == "__main__":
    main()
