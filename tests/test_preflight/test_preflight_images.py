"""Files on disk: damage, EXIF, overlap of splits."""

from __future__ import annotations

import shutil

from PIL import Image

from ddetr_mm.preflight.images import check_images, check_overlap
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
    assert kinds(check_images(split)) == []
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
    assert section.lines == ["10 of 40 image files checked (--full decodes all)"]


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
