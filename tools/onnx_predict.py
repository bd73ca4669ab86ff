"""Detect objects in an image with an exported ONNX file: ``onnx_predict.py MODEL.onnx IMAGE [--conf 0.5]``.

Needs numpy, onnxruntime and Pillow only, so that it can be copied into an application. The detections are
those of ``ddetr-mm inference`` with the same file. One line each, best first: name, score, x1, y1, x2, y2
in pixels of the image, separated by tabs.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

IMAGENET = {"input_mean": [0.485, 0.456, 0.406], "input_std": [0.229, 0.224, 0.225]}
DEFAULT_NUM_SELECT = 100


def read_settings(session: onnxruntime.InferenceSession, model: Path) -> dict:
    """Return ``class_names``, ``input_mean``, ``input_std`` (parts of 0..1) and ``num_select`` of a file.

    They are in the file's metadata. For a file without them class names are the lines of ``labels.txt``
    beside it, where there is one, and mean and standard deviation are ImageNet's.
    """
    meta = session.get_modelmeta().custom_metadata_map
    settings = IMAGENET | {"num_select": DEFAULT_NUM_SELECT} | json.loads(meta.get("ddetr_mm", "{}"))
    labels = model.with_name("labels.txt")
    if not settings.get("class_names"):
        settings["class_names"] = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
    return settings


def read_image(path: Path) -> np.ndarray:
    """Return an image, upright as its EXIF data says, as RGB (H, W, 3) uint8.

    Raises:
        ValueError: it has more than 8 bits a channel, which Pillow would clip.
    """
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def sampling(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each of ``new`` pixels of an axis, its two neighbours and their weights in 1/2048."""
    centers = np.clip(((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32), 0, old - 1)
    first = np.floor(centers).astype(int)
    weight = np.rint((centers - first) * 2048).astype(int)
    return first, np.minimum(first + 1, old - 1), 2048 - weight, weight


def resize(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 with plain bilinear interpolation in OpenCV's integers (INTER_LINEAR).

    Equal to OpenCV but for single pixels, which differ by one grey level. Pillow's bilinear filter averages
    over the area where it shrinks and gives other pixels.
    """
    left, right, left_weight, right_weight = sampling(image.shape[1], size_hw[1])
    top, bottom, top_weight, bottom_weight = sampling(image.shape[0], size_hw[0])
    image = image.astype(int)
    rows = (image[:, left] * left_weight[:, None] + image[:, right] * right_weight[:, None]) >> 4
    above = (rows[top] * top_weight[:, None, None]) >> 16
    below = (rows[bottom] * bottom_weight[:, None, None]) >> 16
    return ((above + below + 2) >> 2).astype(np.uint8)


def graph_input(image: np.ndarray, shape: list, settings: dict) -> np.ndarray:
    """Return the graph's input (N, 3, H, W) float32: the image first, zeros in the rest of a fixed batch."""
    batch, _, height, width = shape
    mean, std = (np.float32(settings[name]) * 255 for name in ("input_mean", "input_std"))
    pixels = (resize(image, (height, width)).astype(np.float32) - mean) / std
    inputs = np.zeros((batch if isinstance(batch, int) else 1, 3, height, width), np.float32)
    inputs[0] = pixels.transpose(2, 0, 1)
    return inputs


def best_detections(
    logits: np.ndarray, boxes_cxcywh: np.ndarray, size_hw: tuple[int, int], num_select: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the most probable (query, class) pairs of an image; one query may appear with several classes.

    Args:
        logits: (Q, C); column 0 is the background, which is never detected.
        boxes_cxcywh: (Q, 4), parts of 0..1.
        size_hw: of the image, pixels.
        num_select: the most detections.

    Returns:
        scores (K,), descending, class columns (K,), boxes_xyxy (K, 4) in pixels, not clipped to the image.
    """
    probabilities = 1 / (1 + np.exp(-logits[:, 1:].astype(np.float64)))
    flat = probabilities.ravel()
    picked = np.argsort(-flat, kind="stable")[:num_select]
    query, column = np.divmod(picked, probabilities.shape[1])
    center, size = boxes_cxcywh[query, :2], boxes_cxcywh[query, 2:]
    corners = np.concatenate([center - size / 2, center + size / 2], axis=1)
    boxes_xyxy = corners * [size_hw[1], size_hw[0], size_hw[1], size_hw[0]]
    return flat[picked], column + 1, boxes_xyxy


def predict(model: Path, image_file: Path, conf: float) -> list[tuple[str, float, list[float]]]:
    """Return name, score and box (x1, y1, x2, y2 in pixels) of detections that score at least ``conf``."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    settings = read_settings(session, model)
    image = read_image(image_file)
    inputs = graph_input(image, session.get_inputs()[0].shape, settings)
    logits, boxes_cxcywh = session.run(["pred_logits", "pred_boxes"], {"inputs": inputs})
    found = best_detections(logits[0], boxes_cxcywh[0], image.shape[:2], settings["num_select"])
    names = dict(enumerate(settings["class_names"]))
    return [
        (names.get(int(column), f"class {column}"), float(score), box.tolist())
        for score, column, box in zip(*found, strict=True)
        if score >= conf
    ]


def main() -> None:
    """Read the command line and print the detections."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="ONNX file with standard operators (export.on_cpu: true)")
    parser.add_argument("image", type=Path, help="image file that Pillow reads")
    parser.add_argument("--conf", type=float, default=0.5, help="least score (default: %(default)s)")
    options = parser.parse_args()
    found = predict(options.model, options.image, options.conf)
    if not found:
        print(f"nothing has a score of {options.conf:g} or more; try a lower --conf", file=sys.stderr)
    for name, score, box in found:
        print(name, f"{score:.3f}", *(f"{value:.2f}" for value in box), sep="\t")


if __name__ == "__main__":
    main()
