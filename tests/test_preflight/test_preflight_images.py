"""Files on disk: damage, EXIF, overlap of splits."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from ddetr_mm.preflight.images import check_doubles, check_images, check_overlap
from ddetr_mm.preflight.inputs import Split


def read(data_set, name: str) -> Split:
    folder = data_set.folder
    return Split.read(name, [dict(image_dir=str(folder / name), json_file=str(folder / f"{name}.json"))])


def kinds(section) -> list[str]:
    return [finding.kind for finding in section.findings]


def test_a_file_cut_short_is_found(data_set):
    path = data_set.pictures("val")[3]
    path.write_bytes(path.read_bytes()[:2000])
    section = check_images(read(data_set, "val"))
    assert kinds(section) == ["images-broken"]
    assert "1 of 30" in str(section.findings[0].problem) and path.name in str(section.findings[0].problem)


def test_damage_inside_a_file_is_found_by_full(data_set):
    path = data_set.pictures("val")[3]
    content = bytearray(path.read_bytes())
    content[5000:5400] = bytes(400)
    path.write_bytes(bytes(content))
    split = read(data_set, "val")
    assert kinds(check_images(split, decoded=1)) == []
    assert kinds(check_images(split)) == ["images-broken"]
    assert kinds(check_images(split, full=True)) == ["images-broken"]


def test_sizes_recorded_before_an_exif_turn_are_noted(data_set):
    for path in data_set.pictures("val"):
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, exif=exif)
    section = check_images(read(data_set, "val"))
    assert kinds(section) == ["sizes-before-exif"] and section.findings[0].weight == "note"


def test_a_sample_of_a_large_split_says_so(data_set):
    section = check_images(read(data_set, "train"), sample=10)
    assert section.lines == ["10 of 40 image files checked, 10 of them decoded (--full decodes all)"]


def replace_pictures(data_set, pixels: np.ndarray, count: int) -> list[str]:
    """Write ``pixels`` under the names of the first pictures of training; gives the names."""
    paths = data_set.pictures("train")[:count]
    for path in paths:
        cv2.imwrite(str(path), pixels)
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((80, 120, 3), np.uint8),
        np.full((80, 120), 40_000, np.uint16),
        np.eye(80, 120, dtype=np.uint8),
    ],
    ids=["black", "one-value-of-16-bits", "a-mask"],
)
def test_constant_pictures_are_a_fault_where_they_have_objects(data_set, pixels):
    names = replace_pictures(data_set, pixels, 4)
    section = check_images(read(data_set, "train"))
    assert kinds(section) == ["images-constant"] and section.findings[0].weight == "fault"
    text = str(section.findings[0].problem)
    assert "4 of 40 decoded images with objects" in text
    assert all(name in text for name in names[:3]) and names[3] not in text
    document = data_set.read("train")
    document["annotations"] = [item for item in document["annotations"] if item["image_id"] > 3]
    data_set.write("train", document)
    weights = {one.kind: one.weight for one in check_images(read(data_set, "train")).findings}
    assert weights == {"images-without-objects": "note", "images-constant": "note"}


def test_twelve_bits_are_seen_and_what_eight_bits_lose_is_broken(data_set):
    ramp = np.linspace(0, 1, 80 * 120).reshape(80, 120)
    replace_pictures(data_set, (ramp * 4095).astype(np.uint16), 3)
    assert kinds(check_images(read(data_set, "train"))) == []
    names = replace_pictures(data_set, (29_000 + ramp * 900).astype(np.uint16), 2)
    section = check_images(read(data_set, "train"))
    assert kinds(section) == ["images-broken"]
    assert names[0] in str(section.findings[0].problem) and "grey levels" in str(section.findings[0].problem)


def test_copies_inside_a_split_are_counted(data_set):
    paths = data_set.pictures("train")
    for target in paths[1:4]:
        shutil.copy(paths[0], target)
    section = check_doubles(read(data_set, "train"))
    assert kinds(section) == ["images-doubled"] and section.data == {"num_copies": 3}
    assert "3 of 40 images of train are copies" in str(section.findings[0].problem)
    assert check_doubles(read(data_set, "val")).findings == []


def test_images_at_urls_are_not_taken_for_missing(data_set):
    source = dict(image_dir="https://example.org/x", json_file=str(data_set.folder / "val.json"))
    split = Split.read("val", [source])
    assert split.location(0) == "https://example.org/x/000.png"
    section = check_images(split)
    assert section.findings == [] and section.lines[0] == "30 images at URLs are not looked at"
    assert check_doubles(split).findings == []


def test_one_shared_picture_is_noted_and_most_of_them_are_a_fault(data_set):
    train, val = data_set.pictures("train"), data_set.pictures("val")
    shutil.copy(train[0], val[0])
    section = check_overlap([read(data_set, "train"), read(data_set, "val")])
    assert kinds(section) == ["splits-overlap"] and section.findings[0].weight == "note"
    assert "1 images of val (3%)" in str(section.findings[0].problem)
    for source, target in zip(train, val, strict=False):
        shutil.copy(source, target)
    section = check_overlap([read(data_set, "train"), read(data_set, "val")])
    assert section.findings[0].weight == "fault" and section.data == {"train-val": 30}


def test_different_pictures_do_not_overlap(data_set):
    assert check_overlap([read(data_set, "train"), read(data_set, "val")]).findings == []
