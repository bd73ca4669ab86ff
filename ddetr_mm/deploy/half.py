"""The same graph in half precision, for runtimes and hardware that compute float16 natively."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ddetr_mm.deploy.lean import drop_dead, sort_nodes
from ddetr_mm.deploy.onnx_export import (
    ExportOptions,
    ImageSource,
    graph_forward,
    parity_file,
    torch_forward,
)
from ddetr_mm.deploy.onnx_file import check_file, require
from ddetr_mm.deploy.parity import ParityReport, compare_batches, generated_images
from ddetr_mm.deploy.plugin import INPUT_RANKS, PLUGIN_NAME, plugin_nodes
from ddetr_mm.files import written_whole

if TYPE_CHECKING:
    import onnx

TOLERANCE_LOGITS = 0.2
TOLERANCE_BOXES = 0.02
"""float16 keeps 11 bits: sampling places move by up to a pixel of a large level."""

KEPT_IN_FLOAT32 = ("GridSample", "Resize", "Range", "Min", "Max", "TopK", "RoiAlign", "InstanceNormalization")
"""Operators without a float16 kernel in onnxruntime, or that overflow in it."""


def half_file(onnx_file: str | Path) -> Path:
    """``<name>.fp16.onnx`` beside the float32 file."""
    path = Path(onnx_file)
    return path.with_name(f"{path.stem}.fp16{path.suffix}")


def export_half(
    detector: nn.Module,
    onnx_file: str | Path,
    options: ExportOptions,
    *,
    images: ImageSource | None = None,
    images_are: str = "given",
    say: Callable[[str], None] = print,
) -> ParityReport:
    """Convert an exported graph to float16 weights and arithmetic; inputs and outputs stay float32.

    Args:
        detector: the detector the graph was exported from.
        onnx_file: the float32 graph; the result goes to :func:`half_file`, with its parity report.
        options: what it was exported with.
        images: as in :func:`ddetr_mm.deploy.onnx_export.export_onnx`.
        images_are: likewise.
        say: receives one line per step.

    Raises:
        ExportError: when the result is beyond the tolerance of half precision.
        StackError: without onnxruntime's converter.
    """
    onnx_package = require("onnx")
    converter = require("onnxruntime.transformers.float16")
    target = half_file(onnx_file)
    blocked = [*KEPT_IN_FLOAT32, PLUGIN_NAME]
    model = onnx_package.load(str(onnx_file))
    for node in plugin_nodes(model):
        # The converter asks for types, and nobody tells it what a plugin gives.
        output = onnx_package.helper.make_tensor_value_info(
            node.output[0], onnx_package.TensorProto.FLOAT, [None] * INPUT_RANKS[0]
        )
        model.graph.value_info.append(output)
    model = converter.convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
    del model.graph.value_info[:]
    drop_repeated_casts(model)
    sort_nodes(model)  # the converter puts its casts at the end
    drop_dead(model)
    with written_whole(target) as temporary:
        onnx_package.save(model, str(temporary))
        report = ParityReport(
            onnx_file=str(target),
            runtime="onnxruntime, float16",
            opset=next(entry.version for entry in model.opset_import if not entry.domain),
            num_nodes=check_file(temporary),
            input_size_hw=options.input_size_hw,
            tolerance_logits=TOLERANCE_LOGITS,
            tolerance_boxes=TOLERANCE_BOXES,
            images=images_are if images else "generated",
        )
        make = images or (lambda count: generated_images(count, options.input_size_hw))
        batches = [make(size) for size in options.test_batches]
        compare_batches(report, batches, torch_forward(detector), graph_forward(temporary, options.plugin))
        say(report.summary())
        report.require()
        report.write(parity_file(target))
    return report


def drop_repeated_casts(model: onnx.ModelProto) -> None:
    """Keep one of the casts that the converter writes anew, under one name, for every reader of a weight."""
    made: set[str] = set()
    kept = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.output[0] in made:
            continue
        made.update(node.output)
        kept.append(node)
    if len(kept) != len(model.graph.node):
        copies = [type(node).FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(copies)
