"""A detector as an ONNX file that has been checked before it gets its name."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ddetr_mm.deploy.graph import ExportGraph
from ddetr_mm.deploy.lean import drop_dead, sort_nodes
from ddetr_mm.deploy.onnx_file import OUTPUT_NAMES, check_file, ort_forward, require, write_meta
from ddetr_mm.deploy.parity import Forward, ParityReport, compare_batches, generated_images
from ddetr_mm.deploy.plugin import (
    INPUT_RANKS,
    PLUGIN_DOMAIN,
    PLUGIN_NAME,
    plugin_graph_forward,
    plugin_nodes,
    require_plugin_contract,
)
from ddetr_mm.errors import ExportError, Problem
from ddetr_mm.files import written_whole

if TYPE_CHECKING:
    import onnx


# --- The same graph in half precision, for runtimes and hardware that compute float16 natively ---

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


# --- A detector as an ONNX file that has been checked before it gets its name ---

DEFAULT_OPSET = 17
MIN_OPSET = 16
"""GridSample came with opset 16; asking for less gives :data:`DEFAULT_OPSET`, as in the reference."""
MIN_PLUGIN_OPSET = 11
"""The oldest opset the graph around plugin nodes is written in (Clip with bounds as inputs)."""
MAX_OPSET = 20
"""The newest opset that torch's TorchScript exporter writes."""

DYNAMIC_TEST_BATCHES = (1, 2, 7)

ImageSource = Callable[[int], np.ndarray]
"""Number of images → normalised images (B, 3, H, W), float32."""


def usable_opset(requested: int, plugin: bool = False) -> int:
    """The opset to write for a requested one.

    Args:
        requested: what the user asked for.
        plugin: whether the graph samples with plugin nodes and so needs no GridSample.

    Raises:
        ExportError: above :data:`MAX_OPSET`, and with plugin nodes below :data:`MIN_PLUGIN_OPSET`.
    """
    lowest = MIN_PLUGIN_OPSET if plugin else 1
    if not lowest <= requested <= MAX_OPSET:
        raise ExportError(
            Problem(
                "cannot be written by the exporter",
                where="export.opset_version",
                value=requested,
                allowed=f"{MIN_PLUGIN_OPSET} to {MAX_OPSET}"
                if plugin
                else f"{MIN_OPSET} to {MAX_OPSET} (smaller ones become {DEFAULT_OPSET})",
            )
        )
    return requested if plugin or requested >= MIN_OPSET else DEFAULT_OPSET


@dataclass(frozen=True)
class ExportOptions:
    """How a detector is exported.

    Attributes:
        input_size_hw: height and width of the input in pixels, fixed in the graph.
        batch_size: a fixed batch; None or below 1 for a dynamic one.
        opset: see :func:`usable_opset`.
        plugin: sample with TensorRT's plugin nodes instead of GridSample.
        verbose: let the exporter print its graph and its warnings.
        meta: what the file shall say about itself (:func:`ddetr_mm.deploy.onnx_file.write_meta`).
        tolerance_logits: largest accepted difference of a logit.
        tolerance_boxes: largest accepted difference of a box coordinate (0..1).
    """

    input_size_hw: tuple[int, int]
    batch_size: int | None = None
    opset: int = DEFAULT_OPSET
    plugin: bool = False
    verbose: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)
    tolerance_logits: float = 1e-3
    tolerance_boxes: float = 1e-4

    @property
    def fixed_batch(self) -> int | None:
        """The batch written into the graph, or None."""
        return self.batch_size if self.batch_size and self.batch_size > 0 else None

    @property
    def test_batches(self) -> tuple[int, ...]:
        """The batch sizes that the graph is compared at."""
        return DYNAMIC_TEST_BATCHES if self.fixed_batch is None else (self.fixed_batch,)


def export_onnx(
    detector: nn.Module,
    onnx_file: str | Path,
    options: ExportOptions,
    *,
    images: ImageSource | None = None,
    images_are: str = "given",
    say: Callable[[str], None] = print,
) -> ParityReport:
    """Write ``onnx_file`` and, beside it, ``<name>.parity.json``.

    The graph has the input ``inputs`` (N, 3, H, W) and the outputs ``pred_logits`` (N, Q, C) and
    ``pred_boxes`` (N, Q, 4; cxcywh in 0..1), all float32. Before the file gets its name it passes onnx's
    checker and is run against the detector's own forward: by onnxruntime, plugin nodes by numpy.

    Args:
        detector: one-stage Deformable DETR with its weights loaded.
        onnx_file: where to put it; a file there is replaced.
        options: what to write.
        images: gives images for the comparison; generated ones by default.
        images_are: a word on where ``images`` come from, for the report.
        say: receives one line per step.

    Raises:
        ExportError: when the graph is not valid or does not agree with PyTorch; nothing is left then.
        StackError: without onnx or onnxruntime.
    """
    onnx_file = Path(onnx_file)
    opset = usable_opset(options.opset, options.plugin)
    if opset != options.opset:
        say(f"opset {options.opset} has no GridSample: writing {opset}")
    detector = detector.eval().float().cpu()
    height, width = options.input_size_hw
    with written_whole(onnx_file) as temporary:
        say(f"tracing the model at {width}x{height} (width x height)")
        trace_to_file(detector, temporary, options, opset)
        report = ParityReport(
            onnx_file=str(onnx_file),
            runtime="onnxruntime, plugin nodes in numpy" if options.plugin else "onnxruntime",
            opset=opset,
            num_nodes=check_file(temporary),
            input_size_hw=options.input_size_hw,
            tolerance_logits=options.tolerance_logits,
            tolerance_boxes=options.tolerance_boxes,
            images=images_are if images else "generated",
        )
        say(f"{report.num_nodes} nodes; comparing with PyTorch on {report.images} images")
        make = images or (lambda count: generated_images(count, options.input_size_hw))
        batches = [make(size) for size in options.test_batches]
        compare_batches(report, batches, torch_forward(detector), graph_forward(temporary, options.plugin))
        say(report.summary())
        report.require()
        report.write(parity_file(onnx_file))
    return report


def parity_file(onnx_file: str | Path) -> Path:
    """Where the report of an export goes: ``<name>.parity.json`` beside it."""
    return Path(onnx_file).with_name(f"{Path(onnx_file).stem}.parity.json")


def graph_forward(path: Path, plugin: bool) -> Forward:
    """The file as a function, whichever of the two forms it has.

    Raises:
        ExportError: when a plugin node is not what TensorRT expects.
    """
    if not plugin:
        return ort_forward(path)
    model = require("onnx").load(str(path))
    require_plugin_contract(model)
    return plugin_graph_forward(model)


def trace_to_file(detector: nn.Module, path: Path, options: ExportOptions, opset: int) -> None:
    """Trace the lean graph with torch's TorchScript exporter and trim what it writes.

    That exporter is marked as deprecated, but the newer one needs a further package and does not export
    this model with a dynamic batch; its own warnings say nothing to a user.
    """
    onnx = require("onnx")
    from ddetr_mm.deploy.lean import lean

    graph = ExportGraph(detector, options.input_size_hw, "nvidia" if options.plugin else None).eval()
    example = torch.zeros(options.fixed_batch or 2, 3, *options.input_size_hw)
    dynamic = {name: {0: "batch"} for name in ("inputs", *OUTPUT_NAMES)}
    with _exporter_warnings(options.verbose), torch.no_grad():
        torch.onnx.export(
            graph,
            (example,),
            str(path),
            input_names=["inputs"],
            output_names=list(OUTPUT_NAMES),
            opset_version=opset,
            dynamic_axes=dynamic if options.fixed_batch is None else None,
            do_constant_folding=True,
            custom_opsets={PLUGIN_DOMAIN: opset} if options.plugin else None,
            verbose=options.verbose,
            dynamo=False,
        )
    model = lean(onnx.load(str(path)))
    state_output_sizes(model, graph.output_sizes)
    if options.meta:
        write_meta(model, options.meta)
    onnx.save(model, str(path))


@contextlib.contextmanager
def _exporter_warnings(verbose: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        if not verbose:
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", message=".*Constant folding.*")
            warnings.filterwarnings("ignore", message=".*type is missing, so it may result in wrong shape.*")
        yield


def state_output_sizes(model: Any, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Write the known sizes of the outputs into a model; the exporter loses them behind reshapes.

    Args:
        model: changed in place.
        sizes: output name → all sizes but the batch.
    """
    for output in model.graph.output:
        for dimension, size in zip(output.type.tensor_type.shape.dim[1:], sizes[output.name], strict=True):
            dimension.dim_value = size


def torch_forward(detector: nn.Module) -> Forward:
    """The detector's own forward on images that fill the batch: last layer's logits and boxes."""

    def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            logits, boxes_cxcywh = detector(torch.from_numpy(images), None, mode="tensor")
        return logits[-1].numpy(), boxes_cxcywh[-1].numpy()

    return forward
