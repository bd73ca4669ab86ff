"""An ONNX file: its signature, and the images that go into it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from ddetr_mm.compat.patches import MAX_IMAGE_PIXELS
from ddetr_mm.errors import DataError, ExportError, Problem, StackError, WeightsError

# --- Image files as the normalised arrays that an exported graph takes ---


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the colours red, green, blue, counted in 0..255."""

    mean_rgb: tuple[float, float, float]
    std_rgb: tuple[float, float, float]

    def apply(self, image_rgb: np.ndarray) -> np.ndarray:
        """An image (H, W, 3) of 0..255 as (3, H, W) float32."""
        mean, std = np.float32(self.mean_rgb), np.float32(self.std_rgb)
        return np.ascontiguousarray(((image_rgb.astype(np.float32) - mean) / std).transpose(2, 0, 1))


def read_rgb(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) RGB, uint8, turned as its EXIF tag says.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error:  # an image of absurd size
        image = None
    if image is None:
        allowed = f"images of at most {MAX_IMAGE_PIXELS:,} pixels"
        hint = "copy the file again, or leave it out"
        raise DataError(Problem("cannot be read as an image", path, allowed=allowed, hint=hint))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def stretched(image_rgb: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize to exactly this height and width, as the reference's deployment does (OpenCV, bilinear)."""
    return cv2.resize(image_rgb, size_hw[::-1], interpolation=cv2.INTER_LINEAR)


def load_batch(
    paths: Sequence[str | Path], size_hw: tuple[int, int], normalisation: Normalisation
) -> np.ndarray:
    """Image files as one array (B, 3, H, W), float32.

    Raises:
        DataError: when a file cannot be read.
    """
    return np.stack([normalisation.apply(stretched(read_rgb(path), size_hw)) for path in paths])


def cycling_source(
    paths: Sequence[str | Path], size_hw: tuple[int, int], normalisation: Normalisation
) -> Callable[[int], np.ndarray]:
    """A source of batches of any size: the files in order, again from the start when they run out."""

    def take(count: int) -> np.ndarray:
        return load_batch([paths[index % len(paths)] for index in range(count)], size_hw, normalisation)

    return take


def batches_of(paths: Sequence[Path], batch_size: int, batches: int) -> Iterator[list[Path]]:
    """The first ``batches`` groups of ``batch_size`` files."""
    for start in range(0, batches * batch_size, batch_size):
        yield list(paths[start : start + batch_size])


# --- An exported ONNX file from outside: what it takes and gives, what it says of itself, how to run it ---

OUTPUT_NAMES = ("pred_logits", "pred_boxes")
META_KEY = "ddetr_mm"
"""Our files carry a JSON object of class names, mean and standard deviation under this metadata key."""


@dataclass(frozen=True)
class OnnxSignature:
    """What an exported detector takes and gives.

    Attributes:
        path: the file.
        input_size_hw: height and width in pixels.
        batch_size: the fixed batch, or None for any.
        num_queries: Q.
        num_classes: class columns C.
        meta: what the file says about itself; empty for files of other exporters.
    """

    path: Path
    input_size_hw: tuple[int, int]
    batch_size: int | None
    num_queries: int | None
    num_classes: int | None
    meta: Mapping[str, Any]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """A name for every class column, where the file has them."""
        names = self.meta.get("class_names")
        return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def require(package: str) -> ModuleType:
    """Import a package that exporting needs.

    Raises:
        StackError: when it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise StackError(
            Problem(f"this needs the package {package}", hint=f"pip install {package}")
        ) from error


def read_signature(path: str | Path, *, where: str | None = None) -> OnnxSignature:
    """Read what an ONNX file of a Deformable DETR takes and gives.

    Args:
        path: a file of ours or of the reference's export.
        where: the spec key that named it, for messages.

    Raises:
        WeightsError: when the file is missing, is no ONNX file or is not such a detector.
    """
    onnx = require("onnx")
    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no graph")
    except Exception as error:  # protobuf's own errors share no base class
        raise WeightsError(Problem(f"cannot be read as ONNX: {error}", file=path, where=where)) from error
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: _sizes(value) for value in model.graph.input if value.name not in constants}
    outputs = {value.name: _sizes(value) for value in model.graph.output}
    image = inputs.get("inputs", ())
    if list(inputs) != ["inputs"] or not set(OUTPUT_NAMES) <= set(outputs) or len(image) != 4:
        raise WeightsError(
            Problem(
                "is not a Deformable DETR exported with this contract",
                file=path,
                where=where,
                value=f"inputs {sorted(map(str, inputs))}, outputs {sorted(map(str, outputs))}",
                allowed=f"input 'inputs' of 4 axes, outputs {', '.join(OUTPUT_NAMES)}",
            )
        )
    if image[2] is None or image[3] is None:
        raise WeightsError(Problem("has no fixed input height and width", file=path, where=where))
    logits = (*outputs["pred_logits"], None, None, None)
    return OnnxSignature(path, (image[2], image[3]), image[0], logits[1], logits[2], read_meta(model))


def _sizes(value: Any) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims)


def write_meta(model: Any, meta: Mapping[str, Any]) -> None:
    """Put what the file says about itself into the model's metadata."""
    entry = model.metadata_props.add()
    entry.key, entry.value = META_KEY, json.dumps(dict(meta))


def read_meta(model: Any) -> dict[str, Any]:
    """What :func:`write_meta` wrote; empty where there is nothing of ours."""
    for entry in model.metadata_props:
        if entry.key == META_KEY:
            try:
                meta = json.loads(entry.value)
            except ValueError:
                return {}
            return meta if isinstance(meta, dict) else {}
    return {}


def ort_session(path: str | Path, providers: Sequence[str] | None = None) -> Any:
    """An onnxruntime session.

    Args:
        path: the file.
        providers: execution providers; by default CUDA's where onnxruntime has it, and the CPU's.

    Raises:
        StackError: without onnxruntime.
        WeightsError: when onnxruntime refuses the file.
    """
    onnxruntime = require("onnxruntime")
    if providers is None:
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=list(providers))
    except Exception as error:  # onnxruntime's errors share no public base class
        reason = str(error)
        hint = "export it with export.on_cpu=true" if "Plugin_TRT" in reason else None
        raise WeightsError(Problem(f"onnxruntime refuses it: {reason}", file=path, hint=hint)) from error


def ort_forward(
    path: str | Path, providers: Sequence[str] | None = ("CPUExecutionProvider",)
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """An onnxruntime session of the file as a function: images (B, 3, H, W) → logits and boxes."""
    session = ort_session(path, providers)

    def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, boxes_cxcywh = session.run(list(OUTPUT_NAMES), {"inputs": images})
        return logits, boxes_cxcywh

    return forward


def check_file(path: Path) -> int:
    """Run onnx's checker; returns the number of nodes.

    Raises:
        ExportError: when the checker refuses the file.
    """
    onnx = require("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(Problem(f"onnx refuses the exported graph: {error}", file=path)) from error
    return len(onnx.load(str(path), load_external_data=False).graph.node)
