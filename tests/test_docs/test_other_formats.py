"""docs/other-formats.md: every snippet is executed, in order, and what it writes holds the same boxes."""

import json
import os
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddetr_mm.cli import main
from ddetr_mm.datasets.sources import read_coco_sources

pytest.importorskip("supervision", reason="supervision is not installed (the `docs` extra has it)")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "other-formats.md"
NUM_SNIPPETS = 6


def write_part(folder: Path, classes: list[str], num_images: int, first_id: int) -> None:
    """A COCO data set of noise images with two boxes each."""
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    images, annotations = [], []
    for image in range(num_images):
        name = f"{folder.name}_{image}.png"
        assert cv2.imwrite(str(folder / "images" / name), pixels)
        images.append(dict(id=image, file_name=name, width=64, height=48))
        for number in range(2):
            box = [4 + 3 * number, 5 + image, 20, 11 + number]
            category = first_id + (image + number) % len(classes)
            row = dict(id=len(annotations), image_id=image, category_id=category, bbox=box, iscrowd=0)
            annotations.append(row | dict(area=box[2] * box[3]))
    categories = [dict(id=first_id + number, name=name) for number, name in enumerate(classes)]
    document = dict(images=images, annotations=annotations, categories=categories)
    (folder / "annotations.json").write_text(json.dumps(document))


def boxes(json_file: str) -> dict[str, list[tuple[str, list[float]]]]:
    """Image name → sorted (class name, box), as training reads the file."""
    table = read_coco_sources([dict(image_dir="", json_file=json_file)])
    return {
        Path(table.file_name(row)).name: sorted(
            (table.category_names[category], box)
            for category, box in zip(
                table.category_ids[table.boxes_of(row)].tolist(),
                table.boxes_xywh[table.boxes_of(row)].tolist(),
                strict=True,
            )
        )
        for row in range(table.num_images)
    }


def assert_equal_boxes(json_file: str, expected: dict, tolerance_px: float) -> None:
    found = boxes(json_file)
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        assert [row[0] for row in rows] == [row[0] for row in expected[name]]
        differences = np.subtract([row[1] for row in rows], [row[1] for row in expected[name]])
        assert np.abs(differences).max() <= tolerance_px


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory):
    """The folder in which all snippets of the page have run."""
    folder = tmp_path_factory.mktemp("formats")
    write_part(folder / "north", ["person", "car"], 5, first_id=1)
    write_part(folder / "south", ["car", "bag"], 4, first_id=3)
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"^```(python|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    before = os.getcwd()
    os.chdir(folder)
    names: dict[str, object] = {}
    try:
        for language, snippet in snippets:
            if language == "python":
                exec(compile(snippet, str(PAGE), "exec"), names)
            elif snippet.startswith("ddetr-mm "):
                assert main(shlex.split(snippet)[1:]) == 0
        assert sum(language == "python" for language, _ in snippets) == NUM_SNIPPETS
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture
def expected(executed: Path):
    return boxes("north/annotations.json") | boxes("south/annotations.json")


def test_merge_keeps_every_box_and_name(executed: Path, expected: dict):
    assert len(expected) == 9
    assert_equal_boxes("merged/annotations.json", expected, 0)
    assert len(list((executed / "merged" / "images").iterdir())) == 9


def test_split_gives_every_image_to_one_part(executed: Path, expected: dict):
    parts = [boxes(f"split/{name}/annotations.json") for name in ("train", "val")]
    assert [len(part) for part in parts] == [7, 2]
    assert parts[0] | parts[1] == expected
    tables = [
        read_coco_sources([dict(image_dir="", json_file=f"split/{name}/annotations.json")])
        for name in ("train", "val")
    ]
    assert tables[0].category_names == tables[1].category_names == {1: "bag", 2: "car", 3: "person"}


@pytest.mark.parametrize(("way", "tolerance_px"), [("yolo", 0.01), ("voc", 0), ("kitti", 0.001)])
def test_round_trips(executed: Path, expected: dict, way: str, tolerance_px: float):
    json_file = "from_kitti/all" if way == "kitti" else f"from_{way}/annotations.json"
    assert_equal_boxes(json_file, expected, tolerance_px)
