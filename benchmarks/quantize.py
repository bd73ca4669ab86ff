"""Float against INT8 on a CPU: latency of both graphs in turn, and what quantization costs.

Two models: a trained checkpoint with its validation data (AP by ``ddetr-mm quantize`` itself), and a
ResNet-50 Deformable DETR at 544x960 with random weights, of which only latency and the difference of the
outputs mean anything. Backend onnxruntime with its defaults: per-channel int8 weights, uint8 inputs, min-max
ranges.

    python benchmarks/quantize.py --spec SPEC --checkpoint model.pth --record
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from alternating import alternate
from environment import describe, heading, load_average, report
from onnx_latency import stock_detector

from ddetr_mm.deploy.onnx_export import ExportOptions, trace_to_file
from ddetr_mm.deploy.parity import compare_outputs, generated_images
from ddetr_mm.deploy.quantize_graph import StaticOptions, StaticQuantizer, graph_layers

OUTPUTS = ["pred_logits", "pred_boxes"]
RECORD = Path(__file__).resolve().parent / "records" / "quantize"
SIZE_HW = (544, 960)


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def latency(paths: dict[str, Path], images: np.ndarray, rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds of one batch, the graphs in turn: median, smallest and largest."""
    calls = {}
    for name, path in paths.items():
        runner = session(path, threads)
        calls[name] = partial(runner.run, OUTPUTS, {"inputs": images})
        calls[name]()
    return alternate(calls, rounds, "float32")


def large_model(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """ResNet-50 at 544x960 with random weights: latency and differences of outputs."""
    detector = stock_detector()
    source, target = folder / "r50.onnx", folder / "r50.quant.onnx"
    trace_to_file(detector, source, ExportOptions(SIZE_HW, batch_size=1), 17)
    model = onnx.load(str(source))
    layers = graph_layers(model)
    nodes = [name for name in layers.names if name not in layers.sensitive]
    quantizer = StaticQuantizer(model, StaticOptions())
    quantizer.calibrate(generated_images(1, SIZE_HW, seed) for seed in range(1, 5))
    quantizer.write(nodes, target)
    images = generated_images(1, SIZE_HW, 0)
    outputs = [session(path, threads).run(OUTPUTS, {"inputs": images}) for path in (source, target)]
    parity = compare_outputs(tuple(outputs[0]), tuple(outputs[1]))
    return dict(
        layers=len(nodes),
        float_layers=len(layers.sensitive),
        bytes={"float32": source.stat().st_size, "int8": target.stat().st_size},
        latency_ms=latency({"float32": source, "int8": target}, images, rounds, threads),
        max_abs_diff_logits=parity.max_abs_diff_logits,
        max_abs_diff_boxes=parity.max_abs_diff_boxes,
        top_agreement=parity.top_agreement,
        std_logits=float(outputs[0][0].std()),
    )


def trained_model(spec: str, checkpoint: str, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """A trained checkpoint: the certificate of ``ddetr-mm quantize``, and latency of both graphs."""
    results = folder / "trained"
    words = ["quantize.backend=onnxruntime", "quantize.mode=static_ptq", f"quantize.model_path={checkpoint}"]
    words += [f"quantize.results_dir={results}", "ddetr_mm.quantize_max_ap_drop=100"]
    words += ["export.input_width=160", "export.input_height=120"]
    source = "{image_dir: results/shapes/data, json_file: results/shapes/coco/train}"
    words += [f"dataset.quant_calibration_data_sources={source}"]
    subprocess.run([sys.executable, "-m", "ddetr_mm", "quantize", "-e", spec, *words], check=True)
    parity = json.loads((results / "parity.json").read_text())
    one, other = (Path(parity[name]["file"]) for name in ("float_model", "quantized_model"))
    images = generated_images(1, (120, 160))
    return dict(
        checkpoint=Path(checkpoint).name,
        layers=len(parity["layers"]),
        calibration_images=parity["calibration_images"],
        ap={"float32": parity["float_model"]["ap"], "int8": parity["quantized_model"]["ap"]},
        ap50={"float32": parity["float_model"]["ap50"], "int8": parity["quantized_model"]["ap50"]},
        bytes={"float32": one.stat().st_size, "int8": other.stat().st_size},
        latency_ms=latency({"float32": one, "int8": other}, images, rounds * 5, threads),
    )


def table(found: dict[str, Any]) -> list[str]:
    """Rows of a model for the record."""
    lines = ["| | median ms | smallest | largest | MiB |", "| --- | --- | --- | --- | --- |"]
    for name in ("float32", "int8"):
        times, size = found["latency_ms"][name], found["bytes"][name] / 2**20
        lines.append(
            f"| {name} | {times['median_ms']:.1f} | {times['min_ms']:.1f} | {times['max_ms']:.1f}"
            f" | {size:.1f} |"
        )
    ratio = found["latency_ms"]["int8"]["speedup"]
    return [*lines, f"| float32 / int8, median of the rounds | {ratio:.2f} | | | |", ""]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--spec", help="spec of the trained checkpoint; without it only ResNet-50 is measured"
    )
    parser.add_argument("--checkpoint", help="the trained checkpoint")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}.md and .json")
    given = parser.parse_args()
    environment = describe("torch", "onnx", "onnxruntime", "mmdet")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    environment |= {"vnni": "yes" if "vnni" in flags else "no", "threads": given.threads}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.spec and given.checkpoint:
            result["trained"] = trained_model(
                given.spec, given.checkpoint, Path(folder), given.rounds, given.threads
            )
        result["r50_544x960"] = large_model(Path(folder), given.rounds, given.threads)
    environment["load_after"] = load_average()
    lines = heading("Quantization on a CPU: float32 against INT8 (backend onnxruntime)", environment)
    lines += ["", f"Graphs in turn, batch 1, {given.rounds} rounds (trained model: five times as many).", ""]
    if "trained" in result:
        found = result["trained"]
        lines += [
            f"Trained model, {found['layers']} layers quantized, {found['calibration_images']} images: "
            f"AP {found['ap']['float32']:.3f} in float32, {found['ap']['int8']:.3f} in INT8; AP50 "
            f"{found['ap50']['float32']:.3f} and {found['ap50']['int8']:.3f}.",
            "",
            *table(found),
        ]
    found = result["r50_544x960"]
    lines += [
        f"ResNet-50, 960 x 544 (width x height), random weights, so no AP: {found['layers']} layers "
        f"quantized, {found['float_layers']} kept in float32. Largest difference of a logit "
        f"{found['max_abs_diff_logits']:.3f} (standard deviation of the logits {found['std_logits']:.3f}), "
        f"of a box {found['max_abs_diff_boxes']:.4f}; best 100 agree to {found['top_agreement']:.0%}.",
        "",
        *table(found),
    ]
    report(dict(environment=environment, **result), "\n".join(lines), RECORD if given.record else None)


if __name__ == "__main__":
    main()
