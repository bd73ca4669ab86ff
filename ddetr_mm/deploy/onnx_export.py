"""Export a detector to ONNX, and refuse a graph that does not compute what PyTorch computes.

:func:`export_onnx` traces :class:`~ddetr_mm.deploy.graph.ExportGraph`, simplifies the graph with onnxslim and
compares it with the detector's own forward. :func:`export_half` converts the result to float16 and compares
it likewise. A file gets its name only after onnx's checker and the comparison; ``<name>.parity.json`` is
written beside it.
"""

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

from ddetr_mm.compat.versions import require
from ddetr_mm.deploy.graph import ExportGraph
from ddetr_mm.deploy.onnx_file import (
    LINEAR_HINT,
    OUTPUT_NAMES,
    check_file,
    linear_sampling_note,
    ort_forward,
    write_meta,
)
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

ImageSource = Callable[[int], np.ndarray]
"""Number of images → normalised images (B, 3, H, W), float32."""

Log = Callable[[str], None]
"""Receives one line per step."""

# --- Options ---

DEFAULT_OPSET = 17
MIN_OPSET = 16
"""GridSample came with opset 16; a smaller request gives :data:`DEFAULT_OPSET`, as in TAO."""
MIN_PLUGIN_OPSET = 11
"""The smallest opset for a graph with plugin nodes (Clip with bounds as inputs)."""
MAX_OPSET = 20
"""The largest opset that torch's TorchScript exporter writes."""

DYNAMIC_TEST_BATCHES = (1, 2, 7)


def usable_opset(requested: int, plugin: bool = False) -> int:
    """Return the opset to write for a requested one.

    Args:
        requested: the user's value.
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
        verbose: print the exporter's graph and warnings.
        meta: metadata of the file (:func:`ddetr_mm.deploy.onnx_file.write_meta`).
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
        """The batch sizes at which the graph is compared with PyTorch."""
        return DYNAMIC_TEST_BATCHES if self.fixed_batch is None else (self.fixed_batch,)


# --- Export and comparison ---


def export_onnx(
    detector: nn.Module,
    onnx_file: str | Path,
    options: ExportOptions,
    *,
    images: ImageSource | None = None,
    images_from: str = "given",
    log: Log = print,
) -> ParityReport:
    """Write ``onnx_file`` and, beside it, ``<name>.parity.json``.

    The graph has the input ``inputs`` (N, 3, H, W) and the outputs ``pred_logits`` (N, Q, C) and
    ``pred_boxes`` (N, Q, 4; cxcywh in 0..1), all float32. It is compared with the detector's own forward:
    by onnxruntime, plugin nodes by numpy.

    Args:
        detector: one-stage Deformable DETR with its weights loaded.
        onnx_file: the file to write; an existing one is replaced.
        options: see the class.
        images: images for the comparison; generated ones by default.
        images_from: where ``images`` come from, for the report.
        log: receives one line per step.

    Raises:
        ExportError: the graph is not valid or does not agree with PyTorch; nothing is written then.
        StackError: onnx or onnxruntime is missing.
    """
    opset = usable_opset(options.opset, options.plugin)
    if opset != options.opset:
        log(f"opset {options.opset} has no GridSample: writing {opset}")
    if not options.plugin and (note := linear_sampling_note(opset)):
        log(f"warning: {note}; for an engine {LINEAR_HINT}")
    detector = detector.eval().float().cpu()
    height, width = options.input_size_hw
    with written_whole(Path(onnx_file)) as temporary:
        log(f"tracing the model at {width}x{height} (width x height)")
        simplification = trace_to_file(detector, temporary, options, opset)
        report = ParityReport(
            onnx_file=str(onnx_file),
            runtime="onnxruntime, plugin nodes in numpy" if options.plugin else "onnxruntime",
            opset=opset,
            num_nodes=check_file(temporary),
            input_size_hw=options.input_size_hw,
            tolerance_logits=options.tolerance_logits,
            tolerance_boxes=options.tolerance_boxes,
            images=images_from if images else "generated",
            simplification=simplification,
        )
        log(f"{report.num_nodes} nodes ({simplification}); comparing with PyTorch on {report.images} images")
        compare_with_detector(report, temporary, detector, options, images, log)
    return report


def compare_with_detector(
    report: ParityReport,
    temporary: Path,
    detector: nn.Module,
    options: ExportOptions,
    images: ImageSource | None,
    log: Log,
) -> None:
    """Compare a written graph with the detector and write the report beside the graph's final name.

    Args:
        report: filled in; its ``onnx_file`` is the final name.
        temporary: where the graph is now.
        detector: in eval mode, float32, on the CPU.
        options: see the class; ``test_batches`` are compared.
        images: see :func:`export_onnx`.
        log: receives the summary.

    Raises:
        ExportError: a difference is beyond the report's tolerances.
    """
    make = images or (lambda count: generated_images(count, options.input_size_hw))
    batches = [make(size) for size in options.test_batches]
    compare_batches(report, batches, torch_forward(detector), graph_forward(temporary, options.plugin))
    log(report.summary())
    report.require()
    report.write(parity_file(report.onnx_file))


def parity_file(onnx_file: str | Path) -> Path:
    """Return the path of a graph's parity report: ``<name>.parity.json`` beside it."""
    return Path(onnx_file).with_name(f"{Path(onnx_file).stem}.parity.json")


def torch_forward(detector: nn.Module) -> Forward:
    """Return the detector's forward on unpadded images: logits and boxes of the last decoder layer."""

    def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            logits, boxes_cxcywh = detector(torch.from_numpy(images), None, mode="tensor")
        return logits[-1].numpy(), boxes_cxcywh[-1].numpy()

    return forward


def graph_forward(path: Path, plugin: bool) -> Forward:
    """Return an ONNX file as a function.

    Args:
        path: the file.
        plugin: whether it has plugin nodes, which numpy computes.

    Raises:
        ExportError: a plugin node is not what TensorRT expects.
    """
    if not plugin:
        return ort_forward(path)
    model = require("onnx").load(str(path))
    require_plugin_contract(model)
    return plugin_graph_forward(model)


# --- Tracing and simplification ---


def trace_to_file(detector: nn.Module, path: Path, options: ExportOptions, opset: int) -> str:
    """Trace the detector with torch's TorchScript exporter and simplify the graph.

    That exporter is deprecated, but the newer one needs a further package and does not export this model with
    a dynamic batch; its own warnings say nothing to a user.

    Returns:
        What :func:`simplify` did, in words.
    """
    onnx_package = require("onnx")
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
    model = onnx_package.load(str(path))
    # The exporter loses the sizes of the outputs behind reshapes.
    for output in model.graph.output:
        axes = output.type.tensor_type.shape.dim[1:]
        for axis, size in zip(axes, graph.output_sizes[output.name], strict=True):
            axis.dim_value = size
    model, simplification = simplify(model)
    if options.meta:
        write_meta(model, options.meta)
    onnx_package.save(model, str(path))
    return simplification


@contextlib.contextmanager
def _exporter_warnings(verbose: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        if not verbose:
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", message=".*Constant folding.*")
            warnings.filterwarnings("ignore", message=".*type is missing, so it may result in wrong shape.*")
        yield


def simplify(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """Simplify a graph with onnxslim: constants folded, equal and unused nodes removed.

    Args:
        model: its recorded sizes of inner values are deleted.

    Returns:
        The simplified model and what was done, in words; the given model and the reason where onnxslim
        fails.
    """
    # The exporter records the traced example's batch size in them, which onnxslim would fold in.
    del model.graph.value_info[:]
    before = len(model.graph.node)
    plain = type(model).FromString(model.SerializeToString())
    try:
        simplified = require("onnxslim").slim(model)
        # onnxslim's records lack a plugin node's output type, which onnx's checker demands.
        del simplified.graph.value_info[:]
        require("onnx").checker.check_model(simplified)
    except Exception as error:  # whatever onnxslim's passes raise on a graph: the plain one is as good
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return plain, f"not simplified, onnxslim failed: {reason}"
    finally:
        require("onnxruntime").set_default_logger_severity(2)  # onnxslim silences its warnings
    return simplified, f"simplified from {before}"


# --- float16 ---

HALF_TOLERANCE_LOGITS = 0.2
HALF_TOLERANCE_BOXES = 0.02
"""float16 keeps 11 bits: sampling locations move by up to a pixel of a large level."""

KEPT_IN_FLOAT32 = ("GridSample", "Resize", "Range", "Min", "Max", "TopK", "RoiAlign", "InstanceNormalization")
"""Operators without a float16 kernel in onnxruntime, or that overflow in it."""


def half_file(onnx_file: str | Path) -> Path:
    """Return ``<name>.fp16.onnx`` beside the float32 file."""
    path = Path(onnx_file)
    return path.with_name(f"{path.stem}.fp16{path.suffix}")


def export_half(
    detector: nn.Module,
    onnx_file: str | Path,
    options: ExportOptions,
    *,
    images: ImageSource | None = None,
    images_from: str = "given",
    log: Log = print,
) -> ParityReport:
    """Convert an exported graph to float16 weights and arithmetic; inputs and outputs stay float32.

    Args:
        detector: the detector that the graph was exported from.
        onnx_file: the float32 graph; the result is written to :func:`half_file`, with its parity report.
        options: those of the float32 export.
        images: see :func:`export_onnx`.
        images_from: likewise.
        log: likewise.

    Raises:
        ExportError: the result is beyond the tolerance of float16.
        StackError: onnxruntime's converter is missing.
    """
    target = half_file(onnx_file)
    model = half_model(require("onnx").load(str(onnx_file)))
    with written_whole(target) as temporary:
        require("onnx").save(model, str(temporary))
        report = ParityReport(
            onnx_file=str(target),
            runtime="onnxruntime, float16",
            opset=next(entry.version for entry in model.opset_import if not entry.domain),
            num_nodes=check_file(temporary),
            input_size_hw=options.input_size_hw,
            tolerance_logits=HALF_TOLERANCE_LOGITS,
            tolerance_boxes=HALF_TOLERANCE_BOXES,
            images=images_from if images else "generated",
            simplification="as the float32 graph",
        )
        compare_with_detector(report, temporary, detector, options, images, log)
    return report


def half_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with float16 weights and arithmetic, by onnxruntime's converter."""
    onnx_package = require("onnx")
    converter = require("onnxruntime.transformers.float16")
    onnx_model = require("onnxruntime.transformers.onnx_model")
    for node in plugin_nodes(model):
        # The converter needs the type of every value, and shape inference does not know a plugin's.
        output = onnx_package.helper.make_tensor_value_info(
            node.output[0], onnx_package.TensorProto.FLOAT, [None] * INPUT_RANKS[0]
        )
        model.graph.value_info.append(output)
    blocked = [*KEPT_IN_FLOAT32, PLUGIN_NAME]
    model = converter.convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
    del model.graph.value_info[:]
    drop_repeated_casts(model)
    editor = onnx_model.OnnxModel(model)
    editor.topological_sort()  # the converter appends its casts at the end
    editor.prune_graph(allow_remove_graph_inputs=False)
    return editor.model


def drop_repeated_casts(model: onnx.ModelProto) -> None:
    """Drop the copies of a cast that the converter writes under one name for every reader of a weight."""
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
