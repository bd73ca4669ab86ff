"""Classes of annotation files: counts, ids that do not fit, what was never trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ddetr_mm.preflight.annotations import quick_sections, read_splits
from ddetr_mm.preflight.classes import check_between_splits, check_split_classes
from ddetr_mm.preflight.images import check_images
from ddetr_mm.preflight.report import counts
from ddetr_mm.preflight.split import Split


@pytest.fixture
def make_split(tmp_path: Path):
    """Write a COCO file with images on disk and read it as a split."""

    def write(name, annotations, *, names=("cat", "dog"), first_id=1, images=2) -> Split:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for number in range(images):
            Image.new("RGB", (40, 30)).save(folder / f"{number}.png")
        document = {
            "images": [dict(id=n, file_name=f"{n}.png", width=40, height=30) for n in range(images)],
            "annotations": [dict(id=n, area=1, iscrowd=0, **entry) for n, entry in enumerate(annotations)],
            "categories": [dict(id=first_id + n, name=class_name) for n, class_name in enumerate(names)],
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        return Split.read(name, [dict(image_dir=str(folder), json_file=str(path))])

    return write


def box(image: int, category: int, xywh=(1, 1, 5, 5)) -> dict:
    return dict(image_id=image, category_id=category, bbox=list(xywh))


def kinds(section) -> list[str]:
    return [finding.kind for finding in section.findings]


def test_counts(make_split):
    split = make_split("train", [box(0, 1), box(0, 2), box(0, 2)])
    figures = counts(split)
    assert (figures["num_images"], figures["num_images_without_objects"], figures["num_boxes"]) == (2, 1, 3)
    assert figures["boxes_by_class"] == {"cat": 1, "dog": 2}
    assert kinds(check_split_classes(split, num_classes=3)) == []


def test_ids_beyond_the_class_columns(make_split):
    section = check_split_classes(make_split("val", [box(0, 2)]), num_classes=2)
    assert "ids-beyond-columns" in kinds(section)
    text = str(section.findings[0].problem)
    assert "dataset.num_classes" in text and "3 or more" in text


def test_boxes_of_the_background(make_split):
    section = check_split_classes(make_split("train", [box(0, 0), box(1, 1)], first_id=0), num_classes=3)
    assert kinds(section)[0] == "ids-from-zero"
    assert "stands for the background" in str(section.findings[0].problem)


def test_class_columns_without_a_class_are_noted(make_split):
    section = check_split_classes(make_split("train", [box(0, 1), box(1, 2)]), num_classes=91)
    assert kinds(section) == ["columns-unused"] and section.findings[0].weight == "note"


def test_eval_class_ids_that_are_not_there(make_split):
    section = check_split_classes(make_split("test", [box(0, 1), box(0, 2)]), 3, eval_class_ids=[7])
    assert kinds(section) == ["eval-classes-absent"]
    assert "1 (cat)" in str(section.findings[0].problem)


def test_classes_without_training_boxes_are_noted(make_split):
    splits = [make_split("train", [box(0, 1)]), make_split("val", [box(0, 1), box(1, 2)])]
    section = check_between_splits(splits)
    assert kinds(section) == ["classes-never-trained"] and "dog" in str(section.findings[0].problem)


def test_missing_images_are_counted(make_split):
    split = make_split("train", [box(0, 1), box(1, 2)])
    split.path(1).unlink()
    finding = check_images(split).findings[0]
    assert finding.kind == "images-missing"
    assert "1 of 2 images" in str(finding.problem) and "dataset.train_data_sources[0]" in str(finding.problem)


def test_no_box_at_all(make_split):
    assert "no-boxes" in kinds(check_split_classes(make_split("train", []), num_classes=3))


def test_an_unreadable_file_is_a_finding_and_the_other_split_is_read(make_split, tmp_path):
    split = make_split("val", [box(0, 1), box(0, 2, (9, 9, 4, 4))])
    (tmp_path / "broken.json").write_text('{"images": [')
    sources = {"train": [dict(image_dir="", json_file=str(tmp_path / "broken.json"))]}
    sources["val"] = [
        dict(image_dir=source.image_dir, json_file=source.json_file) for source in split.sources
    ]
    splits, failures = read_splits(sources)
    assert [one.name for one in splits] == ["val"]
    assert kinds(failures[0]) == ["annotations-unreadable"]
    assert "broken.json" in str(failures[0].findings[0].problem)
    assert [kinds(section) for section in quick_sections(splits, 3, None)] == [
        [],
        [],
        ["images-without-objects"],
    ]
