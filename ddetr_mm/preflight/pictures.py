"""Contact sheet of training samples, and the check of normalisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ddetr_mm.engine.detections import Color, palette
from ddetr_mm.files import written_whole
from ddetr_mm.preflight.report import Finding, Section, Split, fault, suspicion

# --- Small copies of a sample of images, for checks that look at colours and content ---

SIDE_PX = 192


@dataclass(frozen=True)
class Thumbnail:
    """One image made small, with its boxes.

    Attributes:
        row: the image row in the split's table.
        rgb: (h, w, 3) float32, 0..1, the longer side at most :data:`SIDE_PX` pixels.
        boxes_xyxy: (n, 4) visible boxes as fractions of the image, 0..1.
    """

    row: int
    rgb: npt.NDArray[np.float32]
    boxes_xyxy: npt.NDArray[np.float64]


def thumbnails(split: Split, most: int) -> list[Thumbnail]:
    """Small copies of at most so many images, evenly spread; unreadable ones are left out."""
    found = []
    for row in split.spread_rows(most).tolist():
        try:
            with Image.open(split.path(row)) as image:
                # For JPEG a decoder that may stop at an eighth of the size is many times faster.
                image.draft("RGB", (SIDE_PX, SIDE_PX))
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # told by the check of the images
        upright.thumbnail((SIDE_PX, SIDE_PX))
        rgb = np.asarray(upright, dtype=np.float32) / 255
        boxes = split.table.boxes_of(row)
        height, width = split.table.sizes_hw[row].tolist()
        xywh = split.table.boxes_xywh[boxes][split.table.visible[boxes] & ~split.table.crowd[boxes]]
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        found.append(Thumbnail(row, rgb, (corners / [width, height, width, height]).clip(0, 1)))
    return found


# --- Colours: the mean and standard deviation of the spec against the images, and the order of channels ---

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST_IMAGES = 8
"""Fewer images say nothing about the colours of a data set."""


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> list[Finding]:
    """The spec's numbers by themselves.

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
    if _near(mean, IMAGENET_MEAN[::-1]) and not _near(mean, IMAGENET_MEAN):
        findings.append(
            suspicion(
                "channels-bgr",
                "is ImageNet's mean in the order blue, green, red; the spec's order is red, green, blue",
                where="dataset.augmentation.input_mean",
                value=list(mean),
                hint=f"write {list(IMAGENET_MEAN)}, and input_std as {list(IMAGENET_STD)}",
            )
        )
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


def _near(values: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(values) == 3 and bool(np.allclose(values, wanted, atol=0.004))


def check_colors(
    by_split: Mapping[str, Sequence[Thumbnail]], mean: Sequence[float], std: Sequence[float]
) -> Section:
    """Colours of the images: after normalisation, and compared between splits."""
    section = Section("colours")
    measured = {name: channel_means(images) for name, images in by_split.items() if images}
    for name, means in measured.items():
        overall = means.mean(axis=0)
        spread = np.mean([image.rgb.reshape(-1, 3).std(axis=0) for image in by_split[name]], axis=0)
        section.lines.append(
            f"{name}: mean RGB {_three(overall)}, standard deviation within an image {_three(spread)} "
            "(0 to 1)"
        )
        section.data[name] = dict(mean_rgb=overall.round(4).tolist(), std_rgb=spread.round(4).tolist())
        section.findings += _far_off(name, overall, spread, np.asarray(mean), np.asarray(std))
    names = list(measured)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            section.findings += _reversed_channels(first, measured[first], second, measured[second])
    return section


def channel_means(images: Sequence[Thumbnail]) -> npt.NDArray[np.float64]:
    """(n, 3) mean red, green and blue of every image, 0..1."""
    return np.array([image.rgb.reshape(-1, 3).mean(axis=0) for image in images], dtype=np.float64)


def _far_off(
    name: str, overall: np.ndarray, spread: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> Iterator[Finding]:
    """Whether what the network sees is near zero mean and unit spread, as its weights expect."""
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


def _reversed_channels(first: str, one: np.ndarray, second: str, other: np.ndarray) -> Iterator[Finding]:
    """Whether one split is as red as the other is blue."""
    if min(len(one), len(other)) < LEAST_IMAGES:
        return
    (tint, error), (other_tint, other_error) = _tint(one), _tint(other)
    clear = (
        abs(tint) > 4 * error and abs(other_tint) > 4 * other_error and min(abs(tint), abs(other_tint)) > 0.01
    )
    if clear and tint * other_tint < 0 and 0.5 < abs(tint / other_tint) < 2:
        yield suspicion(
            "channels-bgr",
            f"red and blue look exchanged between {first} and {second}: red exceeds blue by {tint:+.3f} in "
            f"{first} and by {other_tint:+.3f} in {second}",
            where=f"dataset.{first}_data_sources and dataset.{second}_data_sources",
            hint="one of them was written by a program with the other order of channels (OpenCV's is BGR)",
        )


def _tint(means: np.ndarray) -> tuple[float, float]:
    """How much red exceeds blue over many images, and the standard error of that."""
    red_over_blue = means[:, 0] - means[:, 2]
    return float(red_over_blue.mean()), float(red_over_blue.std(ddof=1) / np.sqrt(len(means))) + 1e-9


def _three(values: np.ndarray) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


# --- The first batches as the network sees them: normalised, padded, with boxes, turned back into a picture ---

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
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (columns * (TILE_PX + 8) + 8, 34 + rows * (height + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), heading, fill="black", font=font)
    for number, (tile, picture) in enumerate(zip(shown, drawn, strict=True)):
        left = 8 + (number % columns) * (TILE_PX + 8)
        top = 34 + (number // columns) * (height + 30)
        draw.text((left, top), _short(tile.title), fill=(60, 60, 60), font=ImageFont.load_default(13))
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
    font = ImageFont.load_default(12)
    for box, name in zip((tile.boxes_xyxy * scale).tolist(), tile.names, strict=True):
        x1, y1, x2, y2 = box
        draw.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=colors[name], width=2)
        label = _short(name, 18)
        left, top, right, bottom = draw.textbbox((x1, max(y1 - 14, 0)), label, font=font)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=colors[name])
        draw.text((x1, max(y1 - 14, 0)), label, fill=_ink(colors[name]), font=font)
    return picture


def _hatch(draw: ImageDraw.ImageDraw, size_wh: tuple[int, int], image_wh: tuple[int, int]) -> None:
    """Diagonal lines over the padding, at the right and the bottom."""
    width, height = size_wh
    for left, top, right, bottom in ((image_wh[0], 0, width, height), (0, image_wh[1], image_wh[0], height)):
        for start in range(-height, width, 10):
            x1, x2 = max(left, start + top), min(right, start + bottom)
            if x1 < x2:
                draw.line((x1, x1 - start, x2, x2 - start), fill=_PADDING_COLOR)


def _ink(color: Color) -> str:
    return "black" if 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] > 120 else "white"


def _short(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]
