"""Categories to labels and class names."""

import numpy as np
import pytest
from data_builders import box, categories, coco, image, write_json
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.data.labels import build_label_map, labels_of
from ddetr_mm.data.sources import read_coco_sources
from ddetr_mm.errors import DataError


@pytest.fixture
def table(tmp_path):
    def make(cats, annotated):
        boxes = [box(index, 1, [0, 0, 9, 9], category) for index, category in enumerate(annotated)]
        path = write_json(tmp_path / "a.json", coco([image(1)], boxes, cats))
        return read_coco_sources([{"image_dir": "x", "json_file": str(path)}])

    return make


PEOPLE = [{"id": 3, "name": "person"}, {"id": 1, "name": "face"}, {"id": 6, "name": "bag"}]


def test_contiguous_labels_follow_the_file(table):
    labels = build_label_map(table(PEOPLE, [1, 3]), "contiguous")
    assert labels.classes == ("person", "face", "bag")
    assert labels.category_ids == (3, 1, 6)
    assert labels_of(np.array([1, 3, 6, 2], np.int32), labels.lookup()).tolist() == [1, 0, 2, -1]


def test_contiguous_labels_of_some_classes(table):
    labels = build_label_map(table(PEOPLE, [1, 3]), "contiguous", ("person", "bag"))
    assert labels.category_ids == (3, 6)
    assert labels.notes == ()
    assert labels_of(np.array([1, 3, 6], np.int32), labels.lookup()).tolist() == [-1, 0, 1]


def test_another_order_of_classes_is_put_right_and_told(table):
    labels = build_label_map(table(PEOPLE, [1, 3]), "contiguous", ("bag", "person"))
    assert labels.classes == ("person", "bag")
    assert "order of the annotation file" in labels.notes[0]


@pytest.mark.parametrize(
    ("cats", "classes", "num_classes", "what"),
    [
        (PEOPLE, ("person", "dog"), None, "dog"),
        (PEOPLE, None, 2, "3 classes"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], None, None, "one name"),
    ],
)
def test_contiguous_labels_that_cannot_be(table, cats, classes, num_classes, what):
    with pytest.raises(DataError, match=what):
        build_label_map(table(cats, [1]), "contiguous", classes, num_classes)


def test_category_ids_as_labels_leave_gaps(table):
    labels = build_label_map(table(PEOPLE, [1, 3]), "category_id", num_classes=8)
    assert labels.classes == (
        "background",
        "face",
        "unknown",
        "person",
        "unknown",
        "unknown",
        "bag",
        "unknown",
    )
    assert labels.category_ids == (None, 1, None, 3, None, None, 6, None)
    assert labels_of(np.array([1, 3, 6, 0, 5], np.int32), labels.lookup()).tolist() == [1, 3, 6, -1, -1]


def test_number_of_labels_defaults_to_the_largest_id_plus_one(table):
    assert len(build_label_map(table(PEOPLE, [1]), "category_id").classes) == 7


def test_names_may_be_given(table):
    given_names = ("bg", "Gesicht", "-", "Mensch", "-", "-", "Tasche")
    labels = build_label_map(table(PEOPLE, [1]), "category_id", given_names)
    assert labels.classes == given_names
    assert labels.category_ids == (None, 1, None, 3, None, None, 6)


@pytest.mark.parametrize(
    ("cats", "annotated", "options", "what"),
    [
        (PEOPLE, [1, 6], {"num_classes": 6}, r"6 \(bag\).*set num_classes .*\(7\)"),
        (
            categories("zero", "one", first=0),
            [0],
            {"num_classes": 6},
            "category id 0 .*number the categories from 1",
        ),
        (PEOPLE, [1], {"classes": ("a", "b")}, "2 class names for 7"),
    ],
)
def test_category_ids_that_cannot_be_labels(table, cats, annotated, options, what):
    with pytest.raises(DataError, match=what):
        build_label_map(table(cats, annotated), "category_id", **options)


def test_categories_that_are_only_listed_are_told_not_refused(table):
    cats = [*categories("zero", "one", first=0), {"id": 40, "name": "forty"}]
    labels = build_label_map(table(cats, [1]), "category_id", num_classes=3)
    assert labels.classes == ("background", "one", "unknown")
    assert labels.category_ids == (None, 1, None)
    assert "0 (zero), 40 (forty)" in labels.notes[0]


def test_unknown_mode(table):
    with pytest.raises(ValueError, match="contiguous"):
        build_label_map(table(PEOPLE, [1]), "raw")


def test_no_category_at_all():
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64))
    assert labels_of(np.array([1, 2], np.int32), nothing).tolist() == [-1, -1]


@given(
    known=st.dictionaries(st.integers(0, 1000), st.integers(0, 99), min_size=1, max_size=20),
    asked=st.lists(st.integers(0, 1000), max_size=20),
)
def test_lookup_is_a_dictionary(known, asked):
    keys = np.array(sorted(known), np.int64)
    lookup = (keys, np.array([known[key] for key in sorted(known)], np.int64))
    found = labels_of(np.array(asked, np.int32), lookup)
    assert found.tolist() == [known.get(category, -1) for category in asked]
