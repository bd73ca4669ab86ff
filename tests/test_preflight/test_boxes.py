"""Boxes: formats told apart, boxes out of place counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.preflight.boxes import are_corners, are_fractions, check_boxes, num_repeated
from ddetr_mm.preflight.split import Split


def random_boxes(seed: int, count: int = 60, largest: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (x, y, width, height) inside images of 640x480, and the images' sizes."""
    rng = np.random.default_rng(seed)
    sizes_wh = np.tile([640.0, 480.0], (count, 1))
    sides = rng.uniform(0.02, largest, (count, 2)) * sizes_wh
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (sizes_wh - sides), sides], axis=1), sizes_wh


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("largest", [0.05, 0.3, 0.9])
def test_formats_are_told_apart(seed, largest):
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
    assert "1 boxes stand in one place with another class" in found["boxes-of-two-classes"]


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
