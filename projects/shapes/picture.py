"""The demo's detections as a vector drawing: real predictions over the scenes they were made on.

    python projects/shapes/picture.py results/shapes/inference/labels docs/detections.svg

draws the first unseen scenes of the demo's test split again (the same seed gives the same scenes) and puts
the boxes of the label files over them. README.md shows the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from generate import Scene, draw_scene, make_scene

TEST_SEED = 2
"""Seed of the third split that ``generate.py`` writes, which is the test split."""

COLOURS = {"circle": "#e6194b", "rectangle": "#ffd500", "star": "#00c853", "triangle": "#00b8d4"}


def scenes(count: int) -> list[Scene]:
    """The first scenes of the test split; drawing advances the generator exactly as ``generate.py`` does."""
    rng = np.random.default_rng(TEST_SEED)
    found = []
    for _ in range(count):
        scene = make_scene(rng)
        draw_scene(scene, rng)
        found.append(scene)
    return found


def detections(label_file: Path) -> list[tuple[str, tuple[float, float, float, float], float]]:
    """Class, box (x1, y1, x2, y2) and score of every line of a 16-column KITTI file."""
    rows = [line.split() for line in label_file.read_text().splitlines()]
    return [(row[0], tuple(float(value) for value in row[4:8]), float(row[15])) for row in rows]


def colour(rgb: tuple[int, int, int]) -> str:
    """A colour in SVG's words."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def scene_svg(number: int, scene: Scene, label_file: Path) -> str:
    """One scene with its detections as an SVG group, in the scene's own pixels."""
    width, height = scene.size_wh
    first, second = (colour(corner) for corner in scene.background_rgb)
    parts = [
        f'<linearGradient id="g{number}" x1="0" y1="0" x2="1" y2="1">'
        f'<stop offset="0" stop-color="{first}"/><stop offset="1" stop-color="{second}"/></linearGradient>',
        f'<clipPath id="c{number}"><rect width="{width}" height="{height}"/></clipPath>',
        f'<g clip-path="url(#c{number})"><rect width="{width}" height="{height}" fill="url(#g{number})"/>',
    ]
    for (x1, y1, x2, y2), rgb in scene.clutter:
        parts.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour(rgb)}"/>')
    for shape in scene.shapes:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.outline_xy)
        parts.append(f'<polygon points="{points}" fill="{colour(shape.colour_rgb)}"/>')
    for name, (x1, y1, x2, y2), score in detections(label_file):
        line = COLOURS[name]
        tag_y = y1 - 9 if y1 > 9 else y1
        parts.append(
            f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none" '
            f'stroke="{line}" stroke-width="1.6"/>'
            f'<rect x="{x1:.1f}" y="{tag_y:.1f}" width="{4.1 * len(name) + 18:.1f}" height="9" '
            f'fill="{line}"/>'
            f'<text x="{x1 + 1.5:.1f}" y="{tag_y + 7:.1f}" font-size="7.5" '
            f'font-family="sans-serif">{name} {score:.2f}</text>'
        )
    return "".join([*parts, "</g>"])


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Draw the demo's detections as SVG.")
    parser.add_argument("labels", type=Path, help="folder of label files that `ddetr-mm inference` wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--columns", type=int, default=5)
    arguments = parser.parse_args()
    cell = 168
    groups = []
    for number, scene in enumerate(scenes(arguments.count)):
        x, y = number % arguments.columns * cell, number // arguments.columns * cell
        left, top = x + (cell - scene.size_wh[0]) / 2, y + (cell - scene.size_wh[1]) / 2
        body = scene_svg(number, scene, arguments.labels / f"{number:05d}.txt")
        groups.append(f'<g transform="translate({left:.1f} {top:.1f})">{body}</g>')
    width, height = cell * arguments.columns, cell * -(-arguments.count // arguments.columns)
    header = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    arguments.output.write_text("\n".join([header, *groups, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
