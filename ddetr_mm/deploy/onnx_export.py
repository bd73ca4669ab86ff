"""A detector as an ONNX file that has been checked before it gets its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddetr_mm.deploy.graph import ExportGraph
from ddetr_mm.deploy.parity import ParityReport, compare_batches, generated_images
from ddetr_mm.errors import ExportError, Problem, StackError
from ddetr_mm.files import written_whole

DEFAULT_OPSET = 17
MIN_OPSET = 16
"""GridSample came with opset 16; asking for less gives :data:`DEFAULT_OPSET`, as in the reference."""
MAX_OPSET = 20
"""The newest opset that torch's TorchScript exporter writes."""

OUTPUT_NAMES = ("pred_logits", "pred_boxes")
DYNAMIC_TEST_BATCHES = (1, 2, 7)


def usable_opset(requested: int) -> int:
    """The opset to write for a requested one.

    Raises:
        ExportError: above :data:`MAX_OPSET`.
    """
    if requested > MAX_OPSET:
        raise ExportError(
            Problem(
                "is newer than the exporter can write",
                where="export.opset_version",
                value=requested,
                allowed=f"{MIN_OPSET} to {MAX_OPSET} (smaller ones become {DEFAULT_OPSET})",
            )
        )
    return requested if requested >= MIN_OPSET else DEFAULT_OPSET


def export_onnx(
    detector: nn.Module,
    onnx_file: str | Path,
    *,
    input_size_hw: tuple[int, int],
    batch_size: int = -1,
    opset: int = DEFAULT_OPSET,
    images: Callable[[int], np.ndarray] | None = None,
    tolerance_logits: float = 1e-3,
    tolerance_boxes: float = 1e-4,
    say: Callable[[str], None] = print,
) -> ParityReport:
    """Write ``onnx_file`` and, beside it, ``<name>.parity.json``.

    The graph has the input ``inputs`` (N, 3, H, W) and the outputs ``pred_logits`` (N, Q, C) and
    ``pred_boxes`` (N, Q, 4; cxcywh in 0..1), all float32, with standard operators only. Before the file
    gets its name it passes onnx's checker and is run by onnxruntime against the detector's own forward.

    Args:
        detector: one-stage Deformable DETR with its weights loaded.
        onnx_file: where to put it.
        input_size_hw: height and width of the input in pixels.
        batch_size: a fixed batch, or -1 for a dynamic one.
        opset: see :func:`usable_opset`.
        images: gives normalised images (B, 3, H, W) of a batch size for the comparison; generated ones by
            default.
        tolerance_logits: largest accepted difference of a logit.
        tolerance_boxes: largest accepted difference of a box coordinate.
        say: receives one line per step.

    Raises:
        ExportError: when the graph is not valid or does not agree with PyTorch; nothing is left then.
        StackError: without onnx or onnxruntime.
    """
    onnx_file = Path(onnx_file)
    opset = usable_opset(opset)
    detector = detector.eval().float().cpu()
    with written_whole(onnx_file) as temporary:
        say(f"tracing the model at {input_size_hw[1]}x{input_size_hw[0]} (width x height)")
        trace_to_file(detector, temporary, input_size_hw, batch_size, opset)
        report = ParityReport(
            onnx_file=str(onnx_file),
            runtime="onnxruntime",
            opset=opset,
            num_nodes=check_file(temporary),
            input_size_hw=input_size_hw,
            tolerance_logits=tolerance_logits,
            tolerance_boxes=tolerance_boxes,
            images="given" if images else "generated",
        )
        say(f"{report.num_nodes} nodes; comparing with PyTorch")
        sizes = DYNAMIC_TEST_BATCHES if batch_size < 1 else (batch_size,)
        make = images or (lambda count: generated_images(count, input_size_hw))
        compare_batches(report, [make(size) for size in sizes], torch_forward(detector), ort_forward(temporary))
        say(report.summary())
        report.require()
        report.write(onnx_file.with_name(f"{onnx_file.stem}.parity.json"))
    return report


def trace_to_file(
    detector: nn.Module, path: Path, input_size_hw: tuple[int, int], batch_size: int, opset: int
) -> None:
    """Trace the lean graph with torch's TorchScript exporter.

    That exporter is marked as deprecated, but the newer one needs a further package and does not export
    this model with a dynamic batch; its own warnings say nothing to a user.
    """
    graph = ExportGraph(detector, input_size_hw).eval()
    example = torch.zeros(max(batch_size, 2), 3, *input_size_hw)
    names = ("inputs", *OUTPUT_NAMES)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*Constant folding.*")
        torch.onnx.export(
            graph,
            (example,),
            str(path),
            input_names=["inputs"],
            output_names=list(OUTPUT_NAMES),
            opset_version=opset,
            dynamic_axes={name: {0: "batch"} for name in names} if batch_size < 1 else None,
            do_constant_folding=True,
            dynamo=False,
        )
    state_output_sizes(path, graph.output_sizes)


def state_output_sizes(path: Path, sizes: dict[str, tuple[int, ...]]) -> None:
    """Write the known sizes of the outputs into the file; the exporter loses them behind reshapes.

    Args:
        path: the ONNX file, changed in place.
        sizes: output name → all sizes but the batch.
    """
    onnx = _require("onnx")
    model = onnx.load(str(path))
    for output in model.graph.output:
        for dimension, size in zip(output.type.tensor_type.shape.dim[1:], sizes[output.name], strict=True):
            dimension.dim_value = size
    onnx.save(model, str(path))


def check_file(path: Path) -> int:
    """Run onnx's checker; returns the number of nodes.

    Raises:
        ExportError: when the checker refuses the file.
    """
    onnx = _require("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(Problem(f"onnx refuses the exported graph: {error}", file=path)) from error
    return len(onnx.load(str(path), load_external_data=False).graph.node)


def torch_forward(detector: nn.Module) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The detector's own forward on images that fill the batch: last layer's logits and boxes."""

    def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            logits, boxes_cxcywh = detector(torch.from_numpy(images), None, mode="tensor")
        return logits[-1].numpy(), boxes_cxcywh[-1].numpy()

    return forward


def ort_forward(path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Callable[[np.ndarray], tuple]:
    """An onnxruntime session of the file as a function."""
    onnxruntime = _require("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=list(providers))

    def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, boxes_cxcywh = session.run(list(OUTPUT_NAMES), {"inputs": images})
        return logits, boxes_cxcywh

    return forward


def _require(package: str):  # noqa: ANN202 - a module
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise StackError(
            Problem(f"exporting needs the package {package}", mend=f"pip install {package}")
        ) from error
