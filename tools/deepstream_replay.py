"""Replay DeepStream's parser on an image: ``tools/deepstream_replay.py NVDSINFER_CONFIG IMAGE``.

The config's graph is run as DeepStream runs it and as ``ddetr-mm inference`` does, on the same frame, and the
detections are compared. DeepStream is not needed; the graph must have standard operators.

DeepStream's nvinfer prepares images as ``net-scale-factor * (x - offsets)`` and hands the outputs to
``NvDsInferParseCustomDDETRTAO``. The rules of that parser, as replayed here:

- outputs are float32 and found by name; ``num-detected-classes`` must equal their class columns;
- a query has one class: the largest of all columns, background (0) included;
- queries whose score is below ``pre-cluster-threshold`` are dropped;
- boxes are scaled to the network's input and clipped to [0, W-1] and [0, H-1];
- of equal scores the last query is kept; of the best 200, those of class 0 are dropped.

nvinfer's own ``topk`` (boxes of a class) comes after the parser and is not replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddetr_mm.datasets.images import read_image, resize_plain
from ddetr_mm.deploy.onnx_file import Normalisation, ort_forward, read_signature
from ddetr_mm.errors import ExportError, InputError, Problem
from ddetr_mm.files import allow_any_text

MAX_PARSED = 200
"""Detections that the parser takes of an image."""


@dataclass(frozen=True)
class NvinferConfig:
    """The values of an ``nvdsinfer_config.yaml`` that affect the detections."""

    path: Path
    onnx_file: Path
    labels: tuple[str, ...]
    input_size_hw: tuple[int, int]
    scale: float
    offsets_rgb: tuple[float, ...]
    maintain_aspect_ratio: bool
    num_detected_classes: int
    threshold: float
    outputs: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> NvinferConfig:
        """Parse a config file.

        Raises:
            ExportError: the file or its labels cannot be read, or a value is missing.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            values: dict[str, Any] = content["property"]
            _, height, width = (int(size) for size in str(values["infer-dims"]).split(";"))
            labels = (path.parent / values["labelfile-path"]).read_text(encoding="utf-8").splitlines()
            return cls(
                path=path,
                onnx_file=path.parent / values["onnx-file"],
                labels=tuple(labels),
                input_size_hw=(height, width),
                scale=float(values["net-scale-factor"]),
                offsets_rgb=tuple(float(value) for value in str(values["offsets"]).split(";")),
                maintain_aspect_ratio=bool(values.get("maintain-aspect-ratio", 0)),
                num_detected_classes=int(values["num-detected-classes"]),
                threshold=float(content["class-attrs-all"]["pre-cluster-threshold"]),
                outputs=tuple(str(values["output-blob-names"]).split(";")),
            )
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise ExportError(Problem(f"is not a config for nvinfer: {error!r}", file=path)) from error

    def canvas(self, image_rgb: np.ndarray) -> np.ndarray:
        """Place an image on the network's input as nvinfer does: (H, W, 3), uint8."""
        height, width = self.input_size_hw
        if not self.maintain_aspect_ratio:
            return resize_plain(image_rgb, self.input_size_hw)
        ratio = min(height / image_rgb.shape[0], width / image_rgb.shape[1])
        size_hw = (round(image_rgb.shape[0] * ratio), round(image_rgb.shape[1] * ratio))
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[: size_hw[0], : size_hw[1]] = resize_plain(image_rgb, size_hw)
        return canvas

    def network_input(self, canvas_rgb: np.ndarray) -> np.ndarray:
        """Normalise as nvinfer does: (1, 3, H, W), float32."""
        scaled = (canvas_rgb.astype(np.float32) - np.float32(self.offsets_rgb)) * np.float32(self.scale)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


@dataclass(frozen=True)
class Detections:
    """Boxes in pixels of the network's input, best first: (n, 4), (n,), (n,), and the query of each (n,)."""

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    queries: np.ndarray


def replay_parser(logits: np.ndarray, boxes_cxcywh: np.ndarray, config: NvinferConfig) -> Detections:
    """Return the parser's detections of one image; the rules are in the module's docstring.

    Args:
        logits: (Q, C).
        boxes_cxcywh: (Q, 4), 0..1.
        config: the parsed config.

    Raises:
        ExportError: the parser would refuse the number of class columns.
    """
    if logits.shape[-1] != config.num_detected_classes:
        raise ExportError(
            Problem(
                "the parser refuses: the graph has another number of class columns",
                file=config.path,
                where="num-detected-classes",
                value=config.num_detected_classes,
                allowed=str(logits.shape[-1]),
            )
        )
    labels = logits.argmax(-1)
    scores = (1 / (1 + np.exp(-logits.max(-1).astype(np.float32)))).astype(np.float32)
    by_score = {
        float(scores[query]): query for query in range(len(scores)) if scores[query] >= config.threshold
    }
    best = [by_score[score] for score in sorted(by_score, reverse=True)[:MAX_PARSED]]
    queries = np.array([query for query in best if labels[query] != 0], dtype=np.int64)
    boxes = clipped_pixels(boxes_cxcywh[queries], config.input_size_hw)
    return Detections(boxes, scores[queries], labels[queries], queries)


def clipped_pixels(boxes_cxcywh: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Convert relative boxes (n, 4) to x1, y1, x2, y2 in pixels, clipped to [0, W-1] and [0, H-1]."""
    height, width = size_hw
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    boxes = np.concatenate([centre - half, centre + half], 1) * np.float32([width, height, width, height])
    return boxes.clip(0, np.float32([width - 1, height - 1, width - 1, height - 1]))


def our_detections(logits: np.ndarray, boxes_cxcywh: np.ndarray, config: NvinferConfig) -> Detections:
    """Return this package's detections of one image, reduced to those that the parser can give.

    Ours are (query, class) pairs without column 0. Kept are the pairs at or above the threshold whose class
    is the query's best.
    """
    scores = 1 / (1 + np.exp(-logits[:, 1:].astype(np.float32)))
    order = np.argsort(-scores, axis=None, kind="stable")[:100]
    queries, labels = order // scores.shape[1], order % scores.shape[1] + 1
    picked = scores.ravel()[order]
    keep = (picked >= config.threshold) & (labels == logits[queries].argmax(-1))
    queries, labels, picked = queries[keep], labels[keep], picked[keep]
    return Detections(clipped_pixels(boxes_cxcywh[queries], config.input_size_hw), picked, labels, queries)


@dataclass(frozen=True)
class DeepstreamAgreement:
    """Agreement of the parser's detections with ours.

    Attributes:
        parsed: detections of the parser.
        ours: ours, reduced to those that the parser can give.
        matched: the same query and class in both.
        max_box_difference: largest difference of a matched coordinate, in pixels of the input.
        max_score_difference: largest difference of a matched score.
    """

    parsed: int
    ours: int
    matched: int
    max_box_difference: float
    max_score_difference: float

    def summary(self) -> str:
        """Return the result in one line."""
        return (
            f"DeepStream's parser: {self.parsed} objects, ours {self.ours}, {self.matched} the same; "
            f"boxes within {self.max_box_difference:.2f} px, scores within {self.max_score_difference:.3f}"
        )


def compare_detections(parsed: Detections, ours: Detections) -> DeepstreamAgreement:
    """Pair detections by query and class and compare them."""
    mine = {
        (int(query), int(label)): row
        for row, (query, label) in enumerate(zip(ours.queries, ours.labels, strict=True))
    }
    pairs = [
        (row, mine[int(query), int(label)])
        for row, (query, label) in enumerate(zip(parsed.queries, parsed.labels, strict=True))
        if (int(query), int(label)) in mine
    ]
    rows, others = [list(side) for side in zip(*pairs, strict=True)] if pairs else ([], [])
    boxes = np.abs(parsed.boxes_xyxy[rows] - ours.boxes_xyxy[others])
    scores = np.abs(parsed.scores[rows] - ours.scores[others])
    return DeepstreamAgreement(
        len(parsed.queries),
        len(ours.queries),
        len(pairs),
        float(boxes.max(initial=0.0)),
        float(scores.max(initial=0.0)),
    )


def check_deepstream(
    config_file: str | Path, image_file: str | Path, normalisation: Normalisation | None = None
) -> DeepstreamAgreement:
    """Run the config's graph on an image as DeepStream does and as this package does, and compare.

    Args:
        config_file: ``nvdsinfer_config.yaml`` beside its graph.
        image_file: any image.
        normalisation: that of training; by default the graph's metadata, else the config's.

    Raises:
        ExportError: DeepStream would refuse the config.
        WeightsError: onnxruntime cannot run the graph (one with plugin nodes).
    """
    config = NvinferConfig.read(config_file)
    signature = read_signature(config.onnx_file)
    if signature.input_size_hw != config.input_size_hw:
        raise ExportError(
            Problem("infer-dims is not the graph's input", file=config_file, value=config.input_size_hw)
        )
    if normalisation is None and {"input_mean", "input_std"} <= set(signature.meta):
        colours = [tuple(255 * value for value in signature.meta[key]) for key in ("input_mean", "input_std")]
        normalisation = Normalisation(*colours)
    forward = ort_forward(config.onnx_file)
    canvas = config.canvas(read_image(image_file))
    theirs = config.network_input(canvas)
    exact = theirs if normalisation is None else normalisation.apply(canvas)[None]
    batch = signature.batch_size or 1
    parsed, ours = (forward(image.repeat(batch, 0)) for image in (theirs, exact))
    return compare_detections(
        replay_parser(parsed[0][0], parsed[1][0], config), our_detections(ours[0][0], ours[1][0], config)
    )


def main(arguments: Sequence[str]) -> int:
    """Print the agreement for ``CONFIG IMAGE``; returns 0, or 2 for wrong input."""
    allow_any_text()
    if len(arguments) != 2:
        print("usage: deepstream_replay.py NVDSINFER_CONFIG IMAGE", file=sys.stderr)
        return 2
    try:
        print(check_deepstream(*arguments).summary())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
