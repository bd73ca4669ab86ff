"""Draws pictures of coloured shapes with KITTI labels: a small detection problem with known answers.

Every picture holds one to five filled shapes of four classes (circle, rectangle, triangle, star) in
random colours, sizes and positions over a noisy gradient, and some line clutter that is not labelled.
Pictures are landscape, portrait or square. The same seed draws the same pictures.

    python projects/shapes/generate.py OUTPUT --train 400 --val 80 --test 80

leaves, for each split, ``OUTPUT/<split>/images/*.png`` and ``OUTPUT/<split>/labels/*.txt``, and beside
them what ``ddetr-mm convert`` wants: ``mapping.json`` and ``sequences.txt``, the list of the folders.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "rectangle", "star", "triangle")
SIZES_WH = ((128, 128), (160, 120), (120, 160), (144, 112))
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Shape:
    """One labelled shape: its class, colour (RGB, 0..255) and outline in pixels, ``[(x, y), …]``."""

    name: str
    colour_rgb: tuple[int, int, int]
    outline_xy: list[tuple[float, float]]

    @property
    def box_xyxy(self) -> tuple[float, float, float, float]:
        """The tight box around the outline, in pixels."""
        xs, ys = zip(*self.outline_xy, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Scene:
    """What one picture shows: its size, background corner colours, clutter lines and shapes."""

    size_wh: tuple[int, int]
    background_rgb: tuple[tuple[int, int, int], tuple[int, int, int]]
    clutter: list[tuple[tuple[float, float, float, float], tuple[int, int, int]]]
    shapes: list[Shape]


def make_scene(rng: np.random.Generator) -> Scene:
    """A random scene; shapes overlap little, so that every label can be seen."""
    width, height = SIZES_WH[rng.integers(len(SIZES_WH))]
    shapes: list[Shape] = []
    wanted = int(rng.integers(1, 6))
    for _ in range(40):
        if len(shapes) == wanted:
            break
        shape = random_shape(rng, width, height)
        if all(overlap(shape.box_xyxy, other.box_xyxy) < 0.1 for other in shapes):
            shapes.append(shape)
    clutter = []
    for _ in range(int(rng.integers(0, 6))):
        x0, x1 = rng.uniform(0, width, 2)
        y0, y1 = rng.uniform(0, height, 2)
        clutter.append(((x0, y0, x1, y1), colour(rng, 0.3, 0.5)))
    return Scene((width, height), (colour(rng, 0.2, 0.9), colour(rng, 0.2, 0.9)), clutter, shapes)


def colour(rng: np.random.Generator, saturation: float, value: float) -> tuple[int, int, int]:
    """A colour of random hue."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def random_shape(rng: np.random.Generator, width: int, height: int) -> Shape:
    """A shape of random class, size (18 to 64 pixels), aspect ratio (2:3 to 3:2) and place inside."""
    name = CLASSES[rng.integers(len(CLASSES))]
    side = rng.uniform(18, 64)
    ratio = math.exp(rng.uniform(math.log(2 / 3), math.log(1.5)))
    radius_x, radius_y = side / 2 * math.sqrt(ratio), side / 2 / math.sqrt(ratio)
    centre_x = rng.uniform(radius_x + 1, width - radius_x - 1)
    centre_y = rng.uniform(radius_y + 1, height - radius_y - 1)
    outline = [(centre_x + radius_x * x, centre_y + radius_y * y) for x, y in unit_outline(name)]
    return Shape(name, colour(rng, 0.9, rng.uniform(0.5, 1.0)), outline)


def unit_outline(name: str) -> list[tuple[float, float]]:
    """The outline of a class inside the square from -1 to 1."""
    if name == "rectangle":
        return [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    if name == "triangle":
        return [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    if name == "circle":
        turns = [2 * math.pi * step / 48 for step in range(48)]
        return [(math.cos(turn), math.sin(turn)) for turn in turns]
    points = []
    for corner in range(10):
        reach = 1.0 if corner % 2 == 0 else 0.42
        turn = -math.pi / 2 + math.pi * corner / 5
        points.append((reach * math.cos(turn), reach * math.sin(turn)))
    return points


def overlap(a_xyxy: tuple[float, ...], b_xyxy: tuple[float, ...]) -> float:
    """Intersection of two boxes over the smaller one's area."""
    width = min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0])
    height = min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a_xyxy, b_xyxy)]
    return width * height / min(areas)


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture, antialiased, with a little noise."""
    width, height = scene.size_wh
    ramp = np.linspace(0.0, 1.0, width)[None, :, None] * 0.5 + np.linspace(0.0, 0.5, height)[:, None, None]
    first, second = (np.array(corner, float) for corner in scene.background_rgb)
    background = first * (1 - ramp) + second * ramp
    canvas = Image.fromarray(background.astype(np.uint8)).resize(
        (width * SUPERSAMPLING, height * SUPERSAMPLING), Image.Resampling.NEAREST
    )
    pen = ImageDraw.Draw(canvas)
    for line_xyxy, line_rgb in scene.clutter:
        pen.line([SUPERSAMPLING * value for value in line_xyxy], fill=line_rgb, width=SUPERSAMPLING)
    for shape in scene.shapes:
        pen.polygon(
            [(SUPERSAMPLING * x, SUPERSAMPLING * y) for x, y in shape.outline_xy], fill=shape.colour_rgb
        )
    pixels = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    noisy = pixels + rng.normal(0.0, 4.0, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def kitti_label(shape: Shape) -> str:
    """One 15-column KITTI line; only the class and the box carry meaning."""
    x1, y1, x2, y2 = shape.box_xyxy
    return f"{shape.name} 0.00 0 0.00 {x1:.2f} {y1:.2f} {x2:.2f} {y2:.2f} 0.00 0.00 0.00 0.00 0.00 0.00 0.00"


def write_split(folder: Path, count: int, seed: int) -> None:
    """``count`` pictures and label files under ``folder``; the same seed writes the same files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        scene = make_scene(rng)
        draw_scene(scene, rng).save(folder / "images" / f"{index:05d}.png")
        lines = [kitti_label(shape) for shape in scene.shapes]
        (folder / "labels" / f"{index:05d}.txt").write_text("".join(line + "\n" for line in lines))


def write_dataset(output: Path, counts: dict[str, int], seed: int) -> None:
    """All splits with their sequence lists and the class mapping."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "mapping.json").write_text(json.dumps({name: name for name in CLASSES}, indent=1) + "\n")
    (output / "sequences.txt").write_text("".join(f"{split}\n" for split in counts))
    for number, (split, count) in enumerate(counts.items()):
        write_split(output / split, count, seed + number)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Draw pictures of coloured shapes with KITTI labels.")
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, default=400, help="pictures to learn from (default 400)")
    parser.add_argument("--val", type=int, default=60, help="pictures for validation (default 60)")
    parser.add_argument(
        "--test", type=int, default=100, help="unseen pictures for the final score (default 100)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = {"train": arguments.train, "val": arguments.val, "test": arguments.test}
    write_dataset(arguments.output, counts, arguments.seed)
    print(f"{sum(counts.values())} pictures in {arguments.output}")


if __name__ == "__main__":
    main()
