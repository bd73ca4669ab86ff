"""Classes of annotation files: counts, ids that do not fit, what was never trained."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddetr_mm.preflight.annotations import (
    are_corners,
    are_fractions,
    check_between_splits,
    check_boxes,
    check_split_classes,
    num_repeated,
    quick_sections,
)
from ddetr_mm.preflight.images import check_images
from ddetr_mm.preflight.inputs import Split, read_splits

# --- Boxes: formats told apart, boxes out of place counted ---


def random_boxes(seed: int, count: int = 60, largest: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (x, y, width, height) inside images of 640x480, and the images' sizes."""
    rng = np.random.default_rng(seed)
    sizes_wh = np.tile([640.0, 480.0], (count, 1))
    sides = rng.uniform(0.02, largest, (count, 2)) * sizes_wh
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (sizes_wh - sides), sides], axis=1), sizes_wh


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("largest", [0.05, 0.3, 0.9])
def test_formats_are_reported_apart(seed, largest):
    boxes, sizes_wh = random_boxes(seed, largest=largest)
    corners = boxes.copy()
    corners[:, 2:] += corners[:, :2]
    assert not are_corners(boxes, sizes_wh) and not are_fractions(boxes, sizes_wh)
    assert are_corners(corners, sizes_wh) and not are_fractions(corners, sizes_wh)
    fractions = boxes / np.tile(sizes_wh, 2)
    assert are_fractions(fractions, sizes_wh) and not are_corners(fractions, sizes_wh)


def test_objects_that_fill_their_images_are_no_corners():
    sizes_wh = np.tile([640.0, 480.0], (30, 1))
    boxes = np.concatenate([np.zeros((30, 2)) + 2, sizes_wh - 4], axis=1)
    assert not are_corners(boxes, sizes_wh)


def test_few_boxes_prove_nothing():
    assert not are_corners(np.array([[10.0, 10, 90, 70]]), np.array([[96.0, 72]]))


def findings_of(data_set, change) -> dict[str, str]:
    """Kinds and texts after ``change`` was applied to the first box of the training split."""
    document = data_set.read("train")
    change(document["annotations"])
    data_set.write("train", document)
    folder = data_set.folder
    split = Split.read("train", [dict(image_dir=str(folder / "train"), json_file=str(folder / "train.json"))])
    return {finding.kind: str(finding.problem) for finding in check_boxes(split).findings}


def test_sound_boxes_give_no_finding(data_set):
    assert findings_of(data_set, lambda items: None) == {}


@pytest.mark.parametrize(
    "bbox, kind",
    [
        ([100, 10, 60, 20], "boxes-beyond-image"),
        ([300, 10, 60, 20], "boxes-outside-image"),
        ([10, 10, 0, 20], "boxes-outside-image"),
        ([10, 10, 0.4, 20], "boxes-tiny"),
    ],
)
def test_a_box_out_of_place_is_counted_and_shown(data_set, bbox, kind):
    found = findings_of(data_set, lambda items: items[0].update(bbox=bbox))
    assert list(found) == [kind]
    assert "1 of 120 boxes" in found[kind] and "000.png" in found[kind]


def test_doubled_boxes(data_set):
    def double(items):
        items.append(items[0] | dict(id=9001))
        items.append(items[1] | dict(id=9002, category_id=1))

    found = findings_of(data_set, double)
    assert set(found) == {"boxes-doubled", "boxes-of-two-classes"}
    assert found["boxes-doubled"].startswith("dataset.train_data_sources: 1 boxes")
    assert "1 boxes are in one place with another class" in found["boxes-of-two-classes"]


def test_ignored_boxes_are_counted_and_not_judged(data_set):
    """They may be regions of any shape; neither their place nor their format says anything."""

    def ignore(items):
        items[0].update(ignore=1, bbox=[-50, -50, 500, 500])
        items[1].update(ignore=1, bbox=[300, 10, 60, 20])

    found = findings_of(data_set, ignore)
    assert set(found) == {"boxes-ignored"}
    assert "2 of 120 boxes have ignore: 1" in found["boxes-ignored"]


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0**60, 1e-300])] * 3), max_size=30),
)
def test_repeated_rows_are_counted(rows):
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    assert num_repeated(table) == len(rows) - len({tuple(value + 0.0 for value in row) for row in rows})


def test_repeated_rows_among_many():
    rows = np.random.default_rng(0).random((20_000, 5))
    assert num_repeated(rows) == 0
    assert num_repeated(np.concatenate([rows, rows[::4], rows[:10]])) == 5_010


# --- Classes of annotation files: counts, ids that do not fit, what was never trained ---


@pytest.fixture
def make_split(tmp_path: Path):
    """Write a COCO file with images on disk and read it as a split."""

    def write(name, annotations, *, names=("cat", "dog"), first_id=1, images=2) -> Split:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for number in range(images):
            Image.effect_noise((40, 30), 60).convert("RGB").save(folder / f"{number}.png")
        document = {
            "images": [dict(id=n, file_name=f"{n}.png", width=40, height=30) for n in range(images)],
            "annotations": [dict(id=n, area=1, iscrowd=0) | entry for n, entry in enumerate(annotations)],
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
    figures = split.counts()
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
    assert "which is the background" in str(section.findings[0].problem)


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
    assert "1 of 2 checked images" in str(finding.problem) and "dataset.train_data_sources[0]" in str(
        finding.problem
    )


def test_no_box_at_all(make_split):
    assert "no-boxes" in kinds(check_split_classes(make_split("train", []), num_classes=3))


@pytest.mark.parametrize(("flag", "kind"), [("iscrowd", "boxes-all-crowds"), ("ignore", "boxes-all-ignored")])
def test_classes_without_a_target_are_a_fault(make_split, flag, kind):
    split = make_split("train", [box(0, 1) | {flag: 1}, box(0, 1) | {flag: 1}, box(1, 2)])
    section = check_split_classes(split, num_classes=3)
    assert kinds(section) == [kind] and section.findings[0].weight == "fault"
    text = str(section.findings[0].problem)
    assert "cat (2)" in text and "dog" not in text and f"set {flag} to 0" in text
    split = make_split("val", [box(0, 1) | {flag: 1}, box(1, 2) | {flag: 1}])
    section = check_split_classes(split, num_classes=3)
    assert kinds(section) == [kind] and "all 2 boxes" in str(section.findings[0].problem)
    mixed = make_split("test", [box(0, 1) | {flag: 1}, box(1, 1), box(1, 2)])
    assert kinds(check_split_classes(mixed, num_classes=3)) == []


def test_large_ids_take_no_memory_of_their_own(data_set):
    """Time and memory go by the number of categories, not by the largest id."""
    factor = 10**9
    for name in ("train", "val"):
        document = data_set.read(name)
        for item in document["annotations"]:
            item["category_id"] *= factor
        for category in document["categories"]:
            category["id"] *= factor
        data_set.write(name, document)
    folder = data_set.folder
    sources = {
        name: [dict(image_dir=str(folder / name), json_file=str(folder / f"{name}.json"))]
        for name in ("train", "val")
    }
    tracemalloc.start()
    splits, failures = read_splits(sources)
    sections = list(quick_sections(splits, 2 * factor + 1, None))
    counts = [split.counts()["boxes_by_class"] for split in splits]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert failures == [] and peak < 20 << 20
    assert {kind for section in sections for kind in kinds(section)} == set()
    assert all(set(count) == {"car", "person"} for count in counts)


def test_a_file_under_several_ids_is_counted(make_split, tmp_path):
    make_split("train", [box(0, 1), box(1, 2), box(2, 2)], images=3)
    document = json.loads((tmp_path / "train.json").read_text())
    for entry in document["images"]:
        entry["file_name"] = "0.png"
    (tmp_path / "train.json").write_text(json.dumps(document))
    source = dict(image_dir=str(tmp_path / "images"), json_file=str(tmp_path / "train.json"))
    section = check_split_classes(Split.read("train", [source]), num_classes=3)
    assert kinds(section) == ["file-names-repeated"]
    assert "1 files are listed under 3 image ids, the first: 0.png under 3" in str(
        section.findings[0].problem
    )
    # The same names in two sources are two files.
    other = dict(image_dir=str(tmp_path), json_file=str(tmp_path / "other.json"))
    document["images"] = document["images"][:1]
    document["annotations"] = document["annotations"][:1]
    for path in ("train.json", "other.json"):
        (tmp_path / path).write_text(json.dumps(document))
    assert kinds(check_split_classes(Split.read("train", [source, other]), num_classes=3)) == [
        "classes-without-boxes"
    ]


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
