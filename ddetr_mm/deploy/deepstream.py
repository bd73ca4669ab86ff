"""Files for DeepStream, and a replay of what its parser makes of the network's outputs.

DeepStream's nvinfer prepares images as ``net-scale-factor * (x - offsets)`` and hands the outputs to
``NvDsInferParseCustomDDETRTAO``. The rules of that parser, as replayed here:

- outputs are float32 and found by name; ``num-detected-classes`` must equal their class columns;
- a query has one class: the largest of all columns, the background's (0) included;
- queries whose score is below ``pre-cluster-threshold`` are dropped;
- boxes are scaled to the network's input and clipped to [0, W-1] and [0, H-1];
- of equal scores the last query stays; the best 200 are walked and class 0 is left out.

nvinfer's own ``topk`` (boxes of a class) comes after the parser and is not replayed.

Check a config on an image: ``python -m ddetr_mm.deploy.deepstream nvdsinfer_config.yaml image.jpg``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddetr_mm.deploy.onnx_file import Normalisation, read_rgb, stretched
from ddetr_mm.errors import ExportError, InputError, Problem
from ddetr_mm.files import write_text_whole

LABELS_NAME = "labels.txt"
CONFIG_NAME = "nvdsinfer_config.yaml"
PARSER_LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser_tao.so"
MOST_WALKED = 200


def labels_text(class_names: Sequence[str]) -> str:
    """``labels.txt``: line n (from 0) names category n."""
    return "".join(f"{name.strip() or 'unknown'}\n" for name in class_names)


def full_class_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """A name for each class column: the known ones, ``background`` for 0 and ``unknown`` where none is known.

    Raises:
        ExportError: when there are more names than class columns.
    """
    names = list(class_names or ["background"])
    if len(names) > num_classes:
        raise ExportError(
            Problem(
                "the class list and the checkpoint disagree",
                value=f"{len(names)} names",
                allowed=f"{num_classes}, the columns of the class head",
            )
        )
    return names + ["unknown"] * (num_classes - len(names))


def config_text(
    onnx_name: str, input_size_hw: tuple[int, int], num_classes: int, normalisation: Normalisation
) -> str:
    """``nvdsinfer_config.yaml`` with the reason for every value above it.

    Args:
        onnx_name: file name of the graph, in the same folder.
        input_size_hw: its input.
        num_classes: class columns of ``pred_logits``.
        normalisation: that of the training.
    """
    height, width = input_size_hw
    mean_std = sum(normalisation.std_rgb) / 3
    spread = max(abs(std / mean_std - 1) for std in normalisation.std_rgb)
    stds = ", ".join(f"{std / 255:g}" for std in normalisation.std_rgb)
    offsets = ";".join(f"{value:g}" for value in normalisation.mean_rgb)
    return f"""\
# For DeepStream's nvinfer (config-file-path). Paths are relative to this file.
class-attrs-all:
  # Scores (sigmoid, 0..1) below this are dropped by the parser.
  pre-cluster-threshold: 0.5
  # Most boxes of one class in a frame.
  topk: 20
property:
  # 4: no clustering. The detector gives one box per object, there is nothing to suppress.
  cluster-mode: 4
  # The parser of NVIDIA's deepstream_tao_apps; build or install it there.
  custom-lib-path: {PARSER_LIBRARY}
  # Id of this element in the pipeline's metadata.
  gie-unique-id: 1
  # Channels, height, width of the graph's input.
  infer-dims: 3;{height};{width}
  # Line n (from 0) names category n.
  labelfile-path: {LABELS_NAME}
  # 1: the frame keeps its aspect ratio and is padded with black at the right and the bottom. 0 stretches it,
  # as `ddetr-mm evaluate` does with this graph.
  maintain-aspect-ratio: 1
  # 0: RGB.
  model-color-format: 0
  # 1 / (255 * mean of the standard deviations). nvinfer has one factor for all colours; the spec's are
  # {stds}, so a colour is off by {spread:.1%} of its contrast at most.
  net-scale-factor: {1 / mean_std:.12g}
  # 2: FP16. 0 is FP32, 1 is INT8.
  network-mode: 2
  # 0: a detector.
  network-type: 0
  # Class columns of the graph, the background's included; the parser insists on it.
  num-detected-classes: {num_classes}
  # The spec's mean colour, red;green;blue, in 0..255.
  offsets: {offsets}
  # The graph; the engine that nvinfer builds from it is kept beside it.
  onnx-file: {onnx_name}
  # The parser looks its two inputs up by these names.
  output-blob-names: pred_logits;pred_boxes
  # 1: raw outputs are attached to the frames too.
  output-tensor-meta: 1
  # The function of custom-lib-path that knows this detector's outputs.
  parse-bbox-func-name: NvDsInferParseCustomDDETRTAO
  # Memory for building the engine, in MiB.
  workspace-size: 1048576
"""


def write_deepstream_files(
    onnx_file: str | Path,
    input_size_hw: tuple[int, int],
    class_names: Sequence[str],
    normalisation: Normalisation,
) -> tuple[Path, Path]:
    """Write ``labels.txt`` and ``nvdsinfer_config.yaml`` beside the graph.

    Args:
        onnx_file: the exported graph.
        input_size_hw: its input.
        class_names: one for each class column.
        normalisation: that of the training.

    Returns:
        The two paths.
    """
    folder = Path(onnx_file).parent
    config = config_text(Path(onnx_file).name, input_size_hw, len(class_names), normalisation)
    return (
        write_text_whole(folder / LABELS_NAME, labels_text(class_names)),
        write_text_whole(folder / CONFIG_NAME, config),
    )


@dataclass(frozen=True)
class NvinferConfig:
    """The values of an ``nvdsinfer_config.yaml`` that decide what is detected."""

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
            ExportError: when it or its labels cannot be read, or a value is missing.
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
            raise ExportError(Problem(f"is no config for nvinfer: {error!r}", file=path)) from error

    def canvas(self, image_rgb: np.ndarray) -> np.ndarray:
        """The image on the network's input as nvinfer lays it: (H, W, 3), uint8."""
        height, width = self.input_size_hw
        if not self.maintain_aspect_ratio:
            return stretched(image_rgb, self.input_size_hw)
        ratio = min(height / image_rgb.shape[0], width / image_rgb.shape[1])
        size_hw = (round(image_rgb.shape[0] * ratio), round(image_rgb.shape[1] * ratio))
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[: size_hw[0], : size_hw[1]] = stretched(image_rgb, size_hw)
        return canvas

    def network_input(self, canvas_rgb: np.ndarray) -> np.ndarray:
        """nvinfer's normalisation: (1, 3, H, W), float32."""
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
    """What DeepStream's parser makes of one image; see the module for its rules.

    Args:
        logits: (Q, C).
        boxes_cxcywh: (Q, 4), 0..1.
        config: the parsed config.

    Raises:
        ExportError: when the parser would refuse: another number of classes.
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
    walked = [by_score[score] for score in sorted(by_score, reverse=True)[:MOST_WALKED]]
    queries = np.array([query for query in walked if labels[query] != 0], dtype=np.int64)
    boxes = clipped_pixels(boxes_cxcywh[queries], config.input_size_hw)
    return Detections(boxes, scores[queries], labels[queries], queries)


def clipped_pixels(boxes_cxcywh: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Relative boxes (n, 4) as x1, y1, x2, y2 in pixels, within [0, W-1] and [0, H-1]."""
    height, width = size_hw
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    boxes = np.concatenate([centre - half, centre + half], 1) * np.float32([width, height, width, height])
    return boxes.clip(0, np.float32([width - 1, height - 1, width - 1, height - 1]))


def our_detections(logits: np.ndarray, boxes_cxcywh: np.ndarray, config: NvinferConfig) -> Detections:
    """What ``ddetr-mm inference`` makes of one image, brought to the parser's form.

    Ours are (query, class) pairs without column 0; of these, the pairs at or above the threshold whose
    class is the query's best stay, which is the only choice the parser has.
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
    """How far the parser's detections are ours.

    Attributes:
        parsed: detections of the parser.
        ours: ours, brought to the parser's form.
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
        """One line for the screen."""
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
    """Run the config's graph on an image as DeepStream would and as we do, on the same canvas.

    Args:
        config_file: ``nvdsinfer_config.yaml`` beside its graph.
        image_file: any image.
        normalisation: that of the training; by default what the graph says about itself, else the config's.

    Raises:
        ExportError: for a config that DeepStream would refuse.
        WeightsError: for a graph that onnxruntime cannot run (one with plugin nodes).
    """
    from ddetr_mm.deploy.onnx_file import ort_forward, read_signature

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
    canvas = config.canvas(read_rgb(image_file))
    theirs = config.network_input(canvas)
    exact = theirs if normalisation is None else normalisation.apply(canvas)[None]
    batch = signature.batch_size or 1
    parsed, ours = (forward(image.repeat(batch, 0)) for image in (theirs, exact))
    return compare_detections(
        replay_parser(parsed[0][0], parsed[1][0], config), our_detections(ours[0][0], ours[1][0], config)
    )


def main(arguments: Sequence[str]) -> int:
    """``CONFIG IMAGE`` → the agreement on screen; status 2 for wrong input."""
    if len(arguments) != 2:
        print("usage: python -m ddetr_mm.deploy.deepstream NVDSINFER_CONFIG IMAGE", file=sys.stderr)
        return 2
    try:
        print(check_deepstream(*arguments).summary())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
