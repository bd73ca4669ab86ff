"""The first batches as the network sees them: normalised, padded, with boxes, turned back into a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddetr_mm.files import written_whole
from ddetr_mm.runtime.results import Color, palette

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
