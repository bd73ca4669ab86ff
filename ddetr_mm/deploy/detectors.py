"""ONNX files and TensorRT engines as mmdet detectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.structures import InstanceData
from torch import Tensor

from ddetr_mm.deploy.onnx_file import OUTPUT_NAMES, ort_session, read_signature
from ddetr_mm.deploy.tensorrt import EngineRunner
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.models.head import detection_size_hw, top_detections

# --- Exported graphs as mmdet detectors, so that the Runner, metrics and writers drive them like a model ---
# The graph gives logits and relative boxes; choosing and scaling the detections is the head's own function. The
# graph's input has one size, so the test pipeline stretches images to it; a graph of fixed batch gets its last,
# incomplete batch filled up, and the filling's results are thrown away.


class ExportedDetector(BaseDetector):
    """What graphs of all runtimes share.

    Args:
        input_size_hw: the graph's input.
        batch_size: its fixed batch, or None.
        max_batch_size: the largest batch it takes, or None.
        max_per_img: detections of an image.
        background_column: whether class column 0 is the background and never a label.
        data_preprocessor: normalisation, as in training, without padding.
    """

    def __init__(
        self,
        *,
        input_size_hw: tuple[int, int],
        batch_size: int | None,
        max_batch_size: int | None = None,
        max_per_img: int = 100,
        background_column: bool = True,
        data_preprocessor: dict | None = None,
    ) -> None:
        if isinstance(data_preprocessor, dict):
            data_preprocessor = MODELS.build(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor)
        self.input_size_hw = tuple(input_size_hw)
        self.batch_size = batch_size
        self.max_batch_size = batch_size or max_batch_size
        self.max_per_img = max_per_img
        self.background_column = background_column

    @abstractmethod
    def run_graph(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalised images (B, 3, H, W), float32 → logits (B, Q, C) and boxes_cxcywh (B, Q, 4)."""

    def outputs(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`run_graph`, for any number of images.

        Raises:
            WeightsError: for images of another size than the graph's.
        """
        if images.shape[2:] != self.input_size_hw:
            raise WeightsError(
                Problem(
                    "the exported graph has a fixed input size (height, width)",
                    value=tuple(images.shape[2:]),
                    allowed=str(self.input_size_hw),
                    hint="resize images to it without keeping their ratio",
                )
            )
        step = self.max_batch_size or len(images)
        parts = [self.run_graph(self._filled(images[at : at + step])) for at in range(0, len(images), step)]
        logits, boxes = (np.concatenate(part)[: len(images)] for part in zip(*parts, strict=True))
        return logits, boxes

    def _filled(self, images: np.ndarray) -> np.ndarray:
        missing = (self.batch_size or len(images)) - len(images)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
        return np.ascontiguousarray(images, np.float32)

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Detections of a batch, in the original images' pixels with ``rescale``."""
        logits, boxes = (
            torch.from_numpy(np.asarray(part, np.float32))
            for part in self.outputs(batch_inputs.cpu().numpy())
        )
        metas = [sample.metainfo for sample in batch_data_samples]
        sizes_hw = torch.tensor([detection_size_hw(meta, rescale) for meta in metas], dtype=torch.float32)
        scores, labels, boxes_xyxy = top_detections(
            logits, boxes, sizes_hw, self.max_per_img, self.background_column
        )
        results = [
            InstanceData(bboxes=boxes_xyxy[image], scores=scores[image], labels=labels[image])
            for image in range(len(metas))
        ]
        return self.add_pred_to_datasample(batch_data_samples, results)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> tuple[Tensor, Tensor]:
        """The graph's raw outputs, with a first axis of one layer as a detector's."""
        logits, boxes = self.outputs(batch_inputs.cpu().numpy())
        return torch.from_numpy(logits)[None], torch.from_numpy(boxes)[None]

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        """Not in a graph."""
        raise NotImplementedError("an exported graph shows no features")

    def loss(self, batch_inputs: Tensor, batch_data_samples: Sequence) -> dict:
        """Not in a graph."""
        raise NotImplementedError("an exported graph cannot be trained")


@MODELS.register_module()
class OnnxDetector(ExportedDetector):
    """An ONNX file run by onnxruntime.

    Args:
        onnx_file: exported by this package or by the reference, with standard operators.
        num_classes: class columns it must have; None for any.
        providers: onnxruntime's execution providers; by default CUDA where available, else CPU.
        **kwargs: see :class:`ExportedDetector`.

    Raises:
        WeightsError: when the file is missing, is no such graph or has other class columns.
        StackError: without onnxruntime.
    """

    def __init__(
        self,
        onnx_file: str,
        num_classes: int | None = None,
        providers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        signature = read_signature(onnx_file)
        super().__init__(input_size_hw=signature.input_size_hw, batch_size=signature.batch_size, **kwargs)
        if None not in (num_classes, signature.num_classes) and num_classes != signature.num_classes:
            raise WeightsError(
                Problem(
                    "has another number of class columns than the spec",
                    file=onnx_file,
                    where="dataset.num_classes",
                    value=num_classes,
                    allowed=str(signature.num_classes),
                )
            )
        self.session = ort_session(onnx_file, providers)

    def run_graph(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`ExportedDetector`."""
        logits, boxes = self.session.run(list(OUTPUT_NAMES), {"inputs": images})
        return logits, boxes


# --- A TensorRT engine as an mmdet detector ---


@MODELS.register_module()
class TensorrtDetector(ExportedDetector):
    """A TensorRT engine.

    Args:
        engine_file: the engine.
        num_classes: class columns it must have; None for any.
        **kwargs: see :class:`~ddetr_mm.deploy.detectors.ExportedDetector`.

    Raises:
        WeightsError: when TensorRT refuses the file, or it has other class columns.
        StackError: without TensorRT or GPU.
    """

    def __init__(self, engine_file: str, num_classes: int | None = None, **kwargs: Any) -> None:
        engine = EngineRunner(engine_file)
        signature = engine.signature
        super().__init__(
            input_size_hw=signature.input_size_hw,
            batch_size=signature.batch_size,
            max_batch_size=signature.max_batch_size,
            **kwargs,
        )
        if None not in (num_classes, signature.num_classes) and num_classes != signature.num_classes:
            raise WeightsError(
                Problem(
                    "has another number of class columns than the spec",
                    file=engine_file,
                    where="dataset.num_classes",
                    value=num_classes,
                    allowed=str(signature.num_classes),
                )
            )
        self.engine = engine

    def run_graph(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`~ddetr_mm.deploy.detectors.ExportedDetector`."""
        return self.engine(images)
