"""Compare an exported graph with PyTorch, and report the differences.

:class:`ParityReport` is the content of ``<name>.parity.json``; :func:`compare_batches` fills it in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ddetr_mm.errors import ExportError, Problem
from ddetr_mm.files import write_text_whole

Outputs = tuple[np.ndarray, np.ndarray]
"""``pred_logits (B, Q, C)`` and ``pred_boxes_cxcywh (B, Q, 4)``."""

Forward = Callable[[np.ndarray], Outputs]
"""Normalised images (B, 3, H, W), float32 → :data:`Outputs`."""


@dataclass(frozen=True)
class BatchParity:
    """Agreement on one batch.

    Attributes:
        batch_size: images in the batch.
        max_abs_diff_logits: largest absolute difference of a logit.
        max_abs_diff_boxes: largest absolute difference of a box coordinate (0..1).
        top_agreement: share of the 100 best (query, class) pairs of PyTorch that the graph also has among
            its 100 best, mean over the images.
    """

    batch_size: int
    max_abs_diff_logits: float
    max_abs_diff_boxes: float
    top_agreement: float


@dataclass
class ParityReport:
    """The comparison of one export, as written to ``<name>.parity.json``.

    Attributes:
        onnx_file: the graph or engine that was compared.
        runtime: what ran it.
        opset: of the graph.
        num_nodes: of the graph.
        input_size_hw: of the graph.
        tolerance_logits: largest accepted difference of a logit.
        tolerance_boxes: largest accepted difference of a box coordinate (0..1).
        images: where the images come from.
        least_agreement: smallest accepted :attr:`top_agreement`.
        reference: what it was compared with.
        simplification: what was done to simplify the traced graph, in words.
        batches: one comparison for each batch size.
    """

    onnx_file: str
    runtime: str
    opset: int
    num_nodes: int
    input_size_hw: tuple[int, int]
    tolerance_logits: float
    tolerance_boxes: float
    images: str
    least_agreement: float = 0.0
    reference: str = "PyTorch"
    simplification: str = ""
    batches: list[BatchParity] = field(default_factory=list)

    @property
    def max_abs_diff_logits(self) -> float:
        """The largest difference of a logit over all batches."""
        return float(np.max([batch.max_abs_diff_logits for batch in self.batches]))  # keeps NaN

    @property
    def max_abs_diff_boxes(self) -> float:
        """The largest difference of a box coordinate over all batches."""
        return float(np.max([batch.max_abs_diff_boxes for batch in self.batches]))

    @property
    def top_agreement(self) -> float:
        """The smallest share of equal best detections of a batch."""
        return min(batch.top_agreement for batch in self.batches)

    @property
    def passed(self) -> bool:
        """Whether both differences are finite and within their tolerances, and enough detections agree."""
        return (
            self.max_abs_diff_logits <= self.tolerance_logits
            and self.max_abs_diff_boxes <= self.tolerance_boxes
            and self.top_agreement >= self.least_agreement
        )

    def summary(self) -> str:
        """Return the result in one line."""
        sizes = ", ".join(str(batch.batch_size) for batch in self.batches)
        return (
            f"{self.runtime} against {self.reference}, batches of {sizes}: "
            f"logits within {self.max_abs_diff_logits:.1e}, "
            f"boxes within {self.max_abs_diff_boxes:.1e}, best 100 agree to {self.top_agreement:.1%}"
        )

    def write(self, path: str | Path) -> Path:
        """Write the report as JSON."""
        content = asdict(self) | dict(
            max_abs_diff_logits=self.max_abs_diff_logits,
            max_abs_diff_boxes=self.max_abs_diff_boxes,
            passed=self.passed,
        )
        return write_text_whole(path, json.dumps(content, indent=2) + "\n")

    def require(self) -> None:
        """Raise when the graph disagrees with PyTorch.

        Raises:
            ExportError: with the differences and tolerances.
        """
        if not self.passed:
            raise ExportError(
                Problem(
                    f"does not compute what {self.reference} computes ({self.runtime})",
                    file=self.onnx_file,
                    value=f"logits differ by {self.max_abs_diff_logits:.3g}, "
                    f"boxes by {self.max_abs_diff_boxes:.3g}, best 100 agree to {self.top_agreement:.0%}",
                    allowed=f"{self.tolerance_logits:g}, {self.tolerance_boxes:g}, "
                    f"at least {self.least_agreement:.0%}",
                    hint="nothing was written; please report this with the spec",
                )
            )


def compare_outputs(expected: Outputs, actual: Outputs, top: int = 100) -> BatchParity:
    """Compare two results for the same images.

    Args:
        expected: PyTorch's.
        actual: the exported graph's.
        top: how many (query, class) pairs with the best logits to compare.

    Raises:
        ExportError: when the shapes differ.
    """
    for name, one, other in zip(("pred_logits", "pred_boxes"), expected, actual, strict=True):
        if one.shape != other.shape:
            raise ExportError(
                Problem(
                    "has the wrong shape", where=name, value=tuple(other.shape), allowed=str(tuple(one.shape))
                )
            )
    shares = []
    for one, other in zip(expected[0], actual[0], strict=True):
        count = min(top, one.size)
        best = set(np.argpartition(-one.ravel(), count - 1)[:count].tolist())
        found = set(np.argpartition(-other.ravel(), count - 1)[:count].tolist())
        shares.append(len(best & found) / count)
    return BatchParity(
        batch_size=len(expected[0]),
        max_abs_diff_logits=float(np.abs(expected[0] - actual[0]).max()),
        max_abs_diff_boxes=float(np.abs(expected[1] - actual[1]).max()),
        top_agreement=float(np.mean(shares)),
    )


def compare_batches(
    report: ParityReport, batches: Sequence[np.ndarray], expected: Forward, actual: Forward
) -> None:
    """Run both functions on every batch and append the comparisons to ``report``."""
    for batch in batches:
        report.batches.append(compare_outputs(expected(batch), actual(batch)))


def generated_images(batch_size: int, size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return normalised images (B, 3, H, W) of patches plus noise: mean 0, standard deviation near 1."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    coarse = rng.standard_normal((batch_size, 3, -(-height // 32), -(-width // 32)))
    patches = coarse.repeat(32, axis=2).repeat(32, axis=3)[:, :, :height, :width]
    return (patches + 0.3 * rng.standard_normal((batch_size, 3, height, width))).astype(np.float32)
