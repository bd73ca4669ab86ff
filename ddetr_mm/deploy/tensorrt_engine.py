"""TensorRT engines at run time: what they take and give, and running them through the current API.

Execution is ``execute_async_v3`` with named tensors; the binding calls of older releases are not used.
Buffers are torch's. ``tensorrt`` is imported when it is needed, for it is installed on few machines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ddetr_mm.deploy.onnx_file import OUTPUT_NAMES
from ddetr_mm.errors import Problem, StackError, WeightsError

INSTALL = "pip install tensorrt (with the libraries for your CUDA version), on a machine with an NVIDIA GPU"


def require_tensorrt() -> ModuleType:
    """The ``tensorrt`` package.

    Raises:
        StackError: where it cannot be imported, or there is no GPU.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise StackError(Problem("TensorRT is not installed here", mend=INSTALL)) from error
    import torch

    if not torch.cuda.is_available():
        raise StackError(Problem("TensorRT needs a CUDA GPU, and torch sees none", mend="check `nvidia-smi`"))
    return tensorrt


@dataclass(frozen=True)
class EngineSignature:
    """What an engine takes and gives; see :class:`ddetr_mm.deploy.onnx_file.OnnxSignature`."""

    path: Path
    input_size_hw: tuple[int, int]
    batch_size: int | None
    max_batch_size: int
    num_classes: int | None
    meta: Mapping[str, Any]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """A name for every class column, where a report beside the engine has them."""
        names = self.meta.get("class_names")
        return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def meta_file(engine_file: str | Path) -> Path:
    """What an engine says about itself stands beside it: an engine has no place for it."""
    path = Path(engine_file)
    return path.with_name(f"{path.name}.json")


def read_engine_meta(engine_file: str | Path) -> dict[str, Any]:
    """The content of :func:`meta_file`; empty where there is none.

    Raises:
        WeightsError: when the file is there and cannot be read.
    """
    path = meta_file(engine_file)
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(Problem(f"cannot be read: {error}", file=path)) from error
    return meta if isinstance(meta, dict) else {}


class EngineRunner:
    """An engine in memory.

    Args:
        engine_file: built by :mod:`ddetr_mm.deploy.tensorrt_build`, by the reference or by ``trtexec``.
        where: the spec key that named it, for messages.

    Raises:
        StackError: without TensorRT or GPU.
        WeightsError: when TensorRT refuses the file, or it has other inputs and outputs.
    """

    def __init__(self, engine_file: str | Path, *, where: str | None = None) -> None:
        import torch

        trt = require_tensorrt()
        logger = trt.Logger(trt.Logger.WARNING)
        trt.init_libnvinfer_plugins(logger, "")
        path = Path(engine_file)
        self.engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise WeightsError(
                Problem(
                    "TensorRT refuses the engine: it was built by another version or for another GPU",
                    file=path,
                    where=where,
                    mend="build it here with `ddetr-mm gen_trt_engine`",
                )
            )
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        if sorted(names) != sorted(("inputs", *OUTPUT_NAMES)):
            raise WeightsError(
                Problem("is not an engine of a Deformable DETR", file=path, where=where, value=sorted(names))
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        shape = tuple(self.engine.get_tensor_shape("inputs"))
        largest = tuple(self.engine.get_tensor_profile_shape("inputs", 0)[2])
        classes = tuple(self.engine.get_tensor_shape("pred_logits"))[2]
        self.signature = EngineSignature(
            path=path,
            input_size_hw=(shape[2], shape[3]),
            batch_size=shape[0] if shape[0] > 0 else None,
            max_batch_size=int(largest[0]),
            num_classes=classes if classes > 0 else None,
            meta=read_engine_meta(path),
        )

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalised images (B, 3, H, W), float32 → logits (B, Q, C), boxes_cxcywh (B, Q, 4).

        Raises:
            WeightsError: when the engine does not take this batch, or fails.
        """
        import torch

        with torch.cuda.stream(self.stream):
            tensors = {"inputs": torch.from_numpy(np.ascontiguousarray(images)).cuda()}
            if not self.context.set_input_shape("inputs", tuple(images.shape)):
                raise WeightsError(
                    Problem(
                        "the engine does not take this batch", file=self.signature.path, value=images.shape
                    )
                )
            for name in OUTPUT_NAMES:
                shape = tuple(self.context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=torch.float32, device="cuda")
            for name, tensor in tensors.items():
                self.context.set_tensor_address(name, tensor.data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise WeightsError(Problem("TensorRT failed to run the engine", file=self.signature.path))
        self.stream.synchronize()
        logits, boxes_cxcywh = (tensors[name].cpu().numpy() for name in OUTPUT_NAMES)
        return logits, boxes_cxcywh


def read_engine_signature(engine_file: str | Path, *, where: str | None = None) -> EngineSignature:
    """What an engine takes and gives; raises as :class:`EngineRunner` does."""
    return EngineRunner(engine_file, where=where).signature
