"""A TensorRT engine as an mmdet detector."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmdet.registry import MODELS

from ddetr_mm.deploy.exported_detector import ExportedDetector
from ddetr_mm.deploy.tensorrt_engine import EngineRunner
from ddetr_mm.errors import Problem, WeightsError


@MODELS.register_module()
class TensorrtDetector(ExportedDetector):
    """A TensorRT engine.

    Args:
        engine_file: the engine.
        num_classes: class columns it must have; None for any.
        **kwargs: see :class:`~ddetr_mm.deploy.exported_detector.ExportedDetector`.

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
        """See :class:`~ddetr_mm.deploy.exported_detector.ExportedDetector`."""
        return self.engine(images)
