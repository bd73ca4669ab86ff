"""Checks of colours against the normalisation, and contact sheets of batches as the network sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

from ddetr_mm.datasets.images import read_image
from ddetr_mm.engine.detections import Color, draw_detections, palette
from ddetr_mm.errors import DataError
from ddetr_mm.files import written_whole
from ddetr_mm.fonts import label_font
from ddetr_mm.preflight.inputs import Split
from ddetr_mm.preflight.report import Finding, Section, fault

# --- Colours ---

MEASURED_IMAGES, MEASURED_IMAGES_FULL = 64, 500
"""Images of a split whose colours are measured."""

_MEASURED_SIDE_PX = 192


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> list[Finding]:
    """Whether ``input_mean`` and ``input_std`` are on the scale 0 to 1.

    Args:
        mean: ``input_mean``: 1 or 3 numbers, RGB, on the scale 0..1.
        std: ``input_std``, likewise.
    """
    findings = []
    for name, values in (("input_mean", mean), ("input_std", std)):
        if max(values) > 1:
            findings.append(
                _wrong_scale(name, values, [value / 255 for value in values], "on the scale 0 to 255")
            )
    if max(std) < 0.02:
        findings.append(_wrong_scale("input_std", std, [value * 255 for value in std], "255 times too small"))
    return findings


def _wrong_scale(name: str, values: Sequence[float], better: Sequence[float], how: str) -> Finding:
    return fault(
        "normalisation-scale",
        f"is {how}",
        where=f"dataset.augmentation.{name}",
        value=list(values),
        allowed="numbers on the scale 0 to 1",
        hint=f"write {[round(value, 4) for value in better]}",
    )


def check_colors(
    splits: Sequence[Split], mean: Sequence[float], std: Sequence[float], *, full: bool = False
) -> Section:
    """Colours of the images, and whether they are normalised to about zero mean and unit spread.

    Args:
        splits: the data.
        mean: ``input_mean``, RGB, on the scale 0..1.
        std: ``input_std``, likewise.
        full: measure :data:`MEASURED_IMAGES_FULL` images of each split.
    """
    section = Section("colours")
    for split in splits:
        measured = mean_and_spread(split, MEASURED_IMAGES_FULL if full else MEASURED_IMAGES)
        if measured is None:
            continue
        overall, spread = measured
        section.lines.append(
            f"{split.name}: mean RGB {_three(overall)}, standard deviation within an image {_three(spread)} "
            "(0 to 1)"
        )
        section.data[split.name] = dict(mean_rgb=overall.round(4).tolist(), std_rgb=spread.round(4).tolist())
        section.findings += _far_off(split.name, overall, spread, np.asarray(mean), np.asarray(std))
    return section


def mean_and_spread(split: Split, most: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Colours of at most so many images, evenly spread over a split.

    Returns:
        (3,) mean RGB and (3,) standard deviation within an image, 0..1; None where no image can be read.
    """
    means, spreads = [], []
    for row in split.spread_rows(most).tolist():
        if split.is_url(row):
            continue
        try:
            image_rgb = read_image(split.path(row))
        except DataError:
            continue  # reported by the check of the images
        step = max(1, max(image_rgb.shape[:2]) // _MEASURED_SIDE_PX)
        pixels = image_rgb[::step, ::step].reshape(-1, 3) / 255
        means.append(pixels.mean(axis=0))
        spreads.append(pixels.std(axis=0))
    return (np.mean(means, axis=0), np.mean(spreads, axis=0)) if means else None


def _far_off(
    name: str, overall: np.ndarray, spread: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> Iterator[Finding]:
    """Whether the network's input is far from zero mean and unit spread."""
    offset = np.abs((overall - mean) / std).max()
    scale = spread / std
    if offset > 10 or scale.max() > 30 or (spread.max() > 0.01 and scale.max() < 1 / 30):
        yield fault(
            "normalisation-scale",
            f"the images of {name} reach the network with values around {offset:.3g} and a spread of "
            f"{scale.max():.3g}, where both should be about 1",
            where="dataset.augmentation.input_mean, input_std",
            value=[mean.tolist(), std.tolist()],
            hint=f"the images have mean {_three(overall)} on the scale 0 to 1",
        )


def _three(values: np.ndarray) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


# --- Contact sheets ---

TILE_PX = 360
MOST_TILES = 12
_PADDING_COLOR = (70, 70, 70)


@dataclass(frozen=True)
class Tile:
    """One image of a batch.

    Attributes:
        picture: RGB, the padded input as it reaches the network, denormalised.
        size_hw: the part of it that is image; the rest is padding.
        boxes_xyxy: (n, 4) pixels of the picture.
        names: (n,) class names.
        title: where it came from.
    """

    picture: Image.Image
    size_hw: tuple[int, int]
    boxes_xyxy: np.ndarray
    names: Sequence[str]
    title: str


def tiles_of_batch(
    inputs: Tensor, samples: Sequence[Any], data_preprocessor: Any, class_names: Sequence[str]
) -> list[Tile]:
    """A prepared batch as pictures.

    Args:
        inputs: (B, 3, H, W), RGB, normalised.
        samples: B data samples with ``gt_instances`` in the frame of ``inputs``, and ``img_shape``.
        data_preprocessor: mmdet's; its ``mean`` and ``std`` (3, 1, 1), on the scale 0..255, are undone.
        class_names: by label.
    """
    mean, std = data_preprocessor.mean, data_preprocessor.std
    pixels = (inputs.detach().float() * std + mean).round().clamp(0, 255).byte().cpu()
    tiles = []
    for image, sample in zip(pixels, samples, strict=True):
        objects = sample.gt_instances
        boxes = objects.bboxes.tensor if hasattr(objects.bboxes, "tensor") else objects.bboxes
        labels = objects.labels.tolist()
        names = [class_names[label] if label < len(class_names) else str(label) for label in labels]
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy(), "RGB")
        title = f"{Path(sample.img_path).name}  {sample.img_shape[1]}x{sample.img_shape[0]}"
        tiles.append(
            Tile(picture, tuple(sample.img_shape[:2]), boxes.cpu().numpy().reshape(-1, 4), names, title)
        )
    return tiles


def draw_contact_sheet(path: Path, tiles: Sequence[Tile], heading: str, class_names: Sequence[str]) -> Path:
    """Draw tiles side by side.

    Args:
        path: a PNG file, written whole or not at all.
        tiles: at most :data:`MOST_TILES` of them are drawn.
        heading: one line above.
        class_names: all classes, so that one class has one colour on every sheet.
    """
    colors = palette([*class_names, *(name for tile in tiles for name in tile.names)])
    shown = list(tiles[:MOST_TILES])
    columns = min(4, max(1, math.ceil(math.sqrt(len(shown)))))
    rows = math.ceil(len(shown) / columns) if shown else 1
    drawn = [_drawn(tile, colors) for tile in shown]
    height = max((picture.height for picture in drawn), default=TILE_PX)
    font, heading = label_font(heading, 15)
    sheet = Image.new("RGB", (columns * (TILE_PX + 8) + 8, 34 + rows * (height + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), heading, fill="black", font=font)
    for number, (tile, picture) in enumerate(zip(shown, drawn, strict=True)):
        left = 8 + (number % columns) * (TILE_PX + 8)
        top = 34 + (number // columns) * (height + 30)
        title_font, title = label_font(_short(tile.title), 13)
        draw.text((left, top), title, fill=(60, 60, 60), font=title_font)
        sheet.paste(picture, (left, top + 20))
    with written_whole(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _drawn(tile: Tile, colors: Mapping[str, Color]) -> Image.Image:
    """A tile at the sheet's size: the padding hatched, boxes and names over the image."""
    scale = TILE_PX / max(tile.picture.size)
    size = (max(round(tile.picture.width * scale), 1), max(round(tile.picture.height * scale), 1))
    picture = tile.picture.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    _hatch(draw, size, (round(tile.size_hw[1] * scale), round(tile.size_hw[0] * scale)))
    return draw_detections(picture, tile.boxes_xyxy * scale, tile.names, None, colors, outline_width=2)


def _hatch(draw: ImageDraw.ImageDraw, size_wh: tuple[int, int], image_wh: tuple[int, int]) -> None:
    """Diagonal lines over the padding, at the right and the bottom."""
    width, height = size_wh
    for left, top, right, bottom in ((image_wh[0], 0, width, height), (0, image_wh[1], image_wh[0], height)):
        for start in range(-height, width, 10):
            x1, x2 = max(left, start + top), min(right, start + bottom)
            if x1 < x2:
                draw.line((x1, x1 - start, x2, x2 - start), fill=_PADDING_COLOR)


def _short(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]
