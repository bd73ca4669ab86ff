"""Inference files: which detections are written, which are drawn, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.errors import DataError, SpecError
from ddetr_mm.runtime.detection_writer import DetectionWriter, name_of, read_class_names

NAMES = ("background", "cat", "guinea pig")


def sample(path: Path, boxes_xyxy, scores, labels) -> dict:
    found = dict(
        bboxes=torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.long),
    )
    return dict(img_path=str(path), pred_instances=found)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "seq" / "images" / "one.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (80, 60), "white").save(path)
    return path


def writer(folder: Path, **options) -> DetectionWriter:
    made = DetectionWriter(str(folder), **options)
    made.dataset_meta = dict(classes=NAMES)
    return made


def test_only_confident_detections_are_written(picture: Path, tmp_path: Path):
    out = tmp_path / "out"
    made = writer(out, conf_threshold=0.5)
    made.process(None, [sample(picture, [[5, 6, 40, 50], [1, 1, 9, 9]], [0.75, 0.25], [2, 1])])
    lines = (out / "labels" / "one.txt").read_text().splitlines()
    assert lines == [
        "guinea_pig 0.00 0 0.00 5.000 6.000 40.000 50.000 0.00 0.00 0.00 0.00 0.00 0.00 0.00 0.750"
    ]
    assert made.compute_metrics(made.results) == {"images": 1.0, "objects": 1.0}


def test_a_class_without_colour_is_written_and_not_drawn(picture: Path, tmp_path: Path):
    white = np.asarray(Image.open(picture))
    boxes, scores, labels = [[5, 6, 40, 50]], [0.9], [1]
    writer(tmp_path / "a", color_map={"guinea pig": "red"}).process(
        None, [sample(picture, boxes, scores, labels)]
    )
    assert (tmp_path / "a" / "labels" / "one.txt").read_text().startswith("cat ")
    assert (np.asarray(Image.open(tmp_path / "a" / "images_annotated" / "one.png")) == white).all()
    writer(tmp_path / "b", color_map={"cat": "red"}).process(None, [sample(picture, boxes, scores, labels)])
    drawn = np.asarray(Image.open(tmp_path / "b" / "images_annotated" / "one.png"))
    assert (drawn[30, 5] == (255, 0, 0)).all()


def test_no_detection_leaves_an_empty_label_file(picture: Path, tmp_path: Path):
    writer(tmp_path / "out").process(None, [sample(picture, [], [], [])])
    assert (tmp_path / "out" / "labels" / "one.txt").read_text() == ""
    assert (tmp_path / "out" / "images_annotated" / "one.png").is_file()


def test_per_sequence_uses_the_folder_two_levels_up(picture: Path, tmp_path: Path):
    writer(tmp_path / "out", per_sequence=True).process(None, [sample(picture, [], [], [])])
    assert (tmp_path / "out" / "seq" / "labels" / "one.txt").is_file()


def test_two_images_never_write_the_same_file(picture: Path, tmp_path: Path):
    other = tmp_path / "other" / "images" / "one.png"
    other.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(other)
    made = writer(tmp_path / "out")
    made.process(None, [sample(picture, [], [], [])])
    with pytest.raises(DataError, match="would both write"):
        made.process(None, [sample(other, [], [], [])])


def test_names_come_from_the_file_if_there_is_one(picture: Path, tmp_path: Path):
    names = tmp_path / "names.txt"
    names.write_text("dog\nhorse\n")
    assert read_class_names(names) == ["background", "dog", "horse"]
    made = writer(tmp_path / "out", class_names_file=str(names))
    made.process(None, [sample(picture, [[1, 1, 9, 9]], [0.9], [2])])
    assert (tmp_path / "out" / "labels" / "one.txt").read_text().startswith("horse ")
    assert name_of(NAMES, 7) == "class_7"


def test_wrong_input_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="classmap"):
        read_class_names(tmp_path / "nowhere.txt")
    with pytest.raises(SpecError, match="no-such-colour"):
        DetectionWriter(str(tmp_path), color_map={"cat": "no-such-colour"})
