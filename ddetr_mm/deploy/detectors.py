"""ONNX files and TensorRT engines as mmdet detectors, for mmengine's Runner, metrics and writers.

A graph gives logits and relative boxes; the head's own function chooses and scales the detections. The test
pipeline resizes images to the graph's input without keeping their ratio. The last, incomplete batch of a
graph of fixed batch is filled with zeros, whose results are dropped.
"""

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

from ddetr_mm.deploy.onnx_file import OUTPUT_NAMES, GraphSignature, ort_session, read_signature
from ddetr_mm.deploy.tensorrt import EngineRunner
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.models.head import detection_size_hw, top_detections
from ddetr_mm.weights.class_columns import NEVER_LOGIT


class ExportedDetector(BaseDetector):
    """Base of detectors that run an exported graph.

    Args:
        signature: the graph's inputs and outputs.
        num_classes: class columns that it must have; None for any.
        max_per_img: detections of an image.
        background_column: whether class column 0 is the background and never a label.
        data_preprocessor: normalisation, as in training, without padding.

    Attributes:
        class_columns: the graph's column for each label, None for labels that it never predicts; None where
            labels are columns.

    Raises:
        WeightsError: the graph has another number of class columns.
    """

    def __init__(
        self,
        *,
        signature: GraphSignature,
        num_classes: int | None = None,
        max_per_img: int = 100,
        background_column: bool = True,
        data_preprocessor: dict | None = None,
    ) -> None:
        if isinstance(data_preprocessor, dict):
            data_preprocessor = MODELS.build(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor)
        if None not in (num_classes, signature.num_classes) and num_classes != signature.num_classes:
            raise WeightsError(
                Problem(
                    "has another number of class columns than the spec",
                    file=signature.path,
                    where="dataset.num_classes",
                    value=num_classes,
                    allowed=str(signature.num_classes),
                )
            )
        self.path = signature.path
        self.num_classes = num_classes
        self.input_size_hw = tuple(signature.input_size_hw)
        self.batch_size = signature.batch_size
        self.max_batch_size = signature.batch_size or signature.max_batch_size
        self.max_per_img = max_per_img
        self.background_column = background_column
        self.class_columns: Sequence[int | None] | None = None

    @abstractmethod
    def run_graph(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalised images (B, 3, H, W), float32 → logits (B, Q, C) and boxes_cxcywh (B, Q, 4)."""

    def outputs(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run the graph on any number of images, see :meth:`run_graph`.

        Raises:
            WeightsError: the images have another size than the graph's input.
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
        self._check_outputs(logits, boxes, len(images))
        return logits, boxes

    def _check_outputs(self, logits: np.ndarray, boxes: np.ndarray, count: int) -> None:
        """Refuse outputs that are no detections.

        Raises:
            WeightsError: they have other shapes than a detector's, or hold NaN or infinity.
        """
        shapes = (logits.shape, boxes.shape)
        fits = logits.ndim == 3 and boxes.shape == (*logits.shape[:2], 4) and len(logits) == count
        columns = None if self.num_classes is None else logits.shape[-1]
        if not fits or (columns is not None and columns != self.num_classes):
            raise WeightsError(
                Problem(
                    "gives outputs of other shapes than it should",
                    file=self.path,
                    value=shapes,
                    allowed=f"logits ({count}, queries, {self.num_classes or 'classes'}), boxes (…, 4)",
                )
            )
        if not (np.isfinite(logits).all() and np.isfinite(boxes).all()):
            raise WeightsError(
                Problem(
                    "gives NaN or infinite outputs",
                    file=self.path,
                    hint="export it again; of a half-precision graph use the float32 one",
                )
            )

    def _filled(self, images: np.ndarray) -> np.ndarray:
        missing = (self.batch_size or len(images)) - len(images)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
        return np.ascontiguousarray(images, np.float32)

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Return the detections of a batch, in the original images' pixels with ``rescale``."""
        logits, boxes = (
            torch.from_numpy(np.asarray(part, np.float32))
            for part in self.outputs(batch_inputs.cpu().numpy())
        )
        if self.class_columns is not None:
            logits = columns_by_label(logits, self.class_columns)
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
        """Return the graph's outputs with a first axis of one decoder layer, as a detector does."""
        logits, boxes = self.outputs(batch_inputs.cpu().numpy())
        return torch.from_numpy(logits)[None], torch.from_numpy(boxes)[None]

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        """Not available."""
        raise NotImplementedError("an exported graph has no feature output")

    def loss(self, batch_inputs: Tensor, batch_data_samples: Sequence) -> dict:
        """Not available."""
        raise NotImplementedError("an exported graph cannot be trained")


def columns_by_label(logits: Tensor, columns: Sequence[int | None]) -> Tensor:
    """Return logits (B, Q, labels) of logits (B, Q, C); labels without a column are never predicted."""
    moved = logits.new_full((*logits.shape[:-1], len(columns)), NEVER_LOGIT)
    for label, column in enumerate(columns):
        if column is not None:
            moved[..., label] = logits[..., column]
    return moved


@MODELS.register_module()
class OnnxDetector(ExportedDetector):
    """An ONNX file run by onnxruntime.

    Args:
        onnx_file: exported by this package or by TAO, with standard operators.
        providers: onnxruntime's execution providers; by default CUDA where available, else CPU.
        **kwargs: see :class:`ExportedDetector`.

    Raises:
        WeightsError: the file is missing, is no such graph or has other class columns.
        StackError: onnxruntime is missing.
    """

    def __init__(self, onnx_file: str, providers: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(signature=read_signature(onnx_file), **kwargs)
        self.session = ort_session(onnx_file, providers)

    def run_graph(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`ExportedDetector`."""
        logits, boxes_cxcywh = self.session.run(list(OUTPUT_NAMES), {"inputs": images})
        return logits, boxes_cxcywh


@MODELS.register_module()
class TensorrtDetector(ExportedDetector):
    """A TensorRT engine.

    Args:
        engine_file: the engine.
        **kwargs: see :class:`ExportedDetector`.

    Raises:
        WeightsError: TensorRT cannot load the file, or it has other class columns.
        StackError: TensorRT or a GPU is missing.
    """

    def __init__(self, engine_file: str, **kwargs: Any) -> None:
        engine = EngineRunner(engine_file)
        super().__init__(signature=engine.signature, **kwargs)
        self.engine = engine

    def run_graph(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`ExportedDetector`."""
        return self.engine(images)
