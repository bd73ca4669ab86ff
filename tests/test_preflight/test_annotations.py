"""What looking over annotations finds: counts, wrong ids, missing images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ddetr_mm.preflight.annotations import look_over


@pytest.fixture
def source(tmp_path: Path):
    """Write a COCO file with images on disk and give it as a data source."""

    def write(annotations: list[dict], *, names=("cat", "dog"), first_id=1, images=2) -> list[dict[str, str]]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for number in range(images):
            Image.new("RGB", (40, 30)).save(folder / f"{number}.png")
        document = {
            "images": [dict(id=n, file_name=f"{n}.png", width=40, height=30) for n in range(images)],
            "annotations": [dict(id=n, area=1, iscrowd=0, **entry) for n, entry in enumerate(annotations)],
            "categories": [dict(id=first_id + n, name=name) for n, name in enumerate(names)],
        }
        (tmp_path / "a.json").write_text(json.dumps(document))
        return [dict(image_dir=str(folder), json_file=str(tmp_path / "a.json"))]

    return write


def box(image: int, category: int, xywh=(1, 1, 5, 5)) -> dict:
    return dict(image_id=image, category_id=category, bbox=list(xywh))


def test_counts(source):
    report = look_over("train", source([box(0, 1), box(0, 2), box(0, 2)]), num_classes=3)
    assert (report.num_images, report.num_images_without_objects, report.num_boxes) == (2, 1, 3)
    assert report.boxes_by_class == {"cat": 1, "dog": 2} and report.problems == []
    assert report.to_dict()["problems"] == []


def test_ids_beyond_the_class_columns(source):
    report = look_over("val", source([box(0, 2)]), num_classes=2)
    assert len(report.problems) == 1
    assert "dataset.num_classes" in str(report.problems[0]) and "3 or more" in str(report.problems[0])


def test_boxes_of_the_background(source):
    report = look_over("train", source([box(0, 0), box(1, 1)], first_id=0), num_classes=3)
    assert "stands for the background" in str(report.problems[0])


def test_eval_class_ids_that_are_not_there(source):
    report = look_over("test", source([box(0, 1)]), num_classes=3, eval_class_ids=[7])
    assert "dataset.eval_class_ids" in str(report.problems[0]) and "1 (cat)" in str(report.problems[0])


def test_missing_images_are_counted(source):
    sources = source([box(0, 1)])
    (Path(sources[0]["image_dir"]) / "1.png").unlink()
    problem = str(look_over("train", sources, num_classes=3).problems[0])
    assert "1 of 2 images" in problem and "dataset.train_data_sources[0].image_dir" in problem


def test_no_box_at_all(source):
    assert "holds no box" in str(look_over("train", source([]), num_classes=3).problems[0])
