"""Names of classes: comparing, numbering, class maps."""

import pytest

from ddetr_mm.classes import (
    compare_columns,
    find_names,
    named_columns,
    number_names,
    read_class_map,
    require_same_names,
)
from ddetr_mm.errors import DataError

# --- Comparing ---


@pytest.mark.parametrize(
    ("names", "among", "found"),
    [
        (("dog", "cat"), ("cat", "dog"), [1, 0]),
        (("Traffic_Light",), ("cat", "traffic light"), [1]),
        (("A", "a"), ("a", "A"), [1, 0]),
        (("a",), ("A", "aa"), [0]),
        (("a",), ("A", "-a"), [None]),  # two candidates
        (("A", "a"), ("a",), [None, 0]),
        (("-", "_"), ("_", "-"), [1, 0]),  # letters of a text recognition set
        (("-",), ("_",), [None]),
        ((None, "x"), (None, None, "x"), [None, 2]),
    ],
)
def test_names_are_found_exactly_first_then_leniently(names, among, found):
    assert find_names(names, among) == found


def test_columns_without_a_class_are_known_by_ids_before_names():
    names = ("background", "unknown", "cat")
    assert named_columns(names) == (None, None, "cat")
    assert named_columns(names, (None, 1, 2)) == (None, "unknown", "cat")
    assert named_columns((None, "unknown")) == (None, "unknown")


def test_a_difference_names_both_sides():
    found = compare_columns((None, "a", "b", "c"), (None, "b", "a", "d"))
    assert found.shared == ((2, 1), (1, 2))
    assert (found.only_first, found.only_second, found.clashes) == (("c",), ("d",), True)


@pytest.mark.parametrize(
    ("first", "second", "clashes"),
    [
        ((None, "a", "b"), (None, "a", "b"), False),
        ((None, "a", "b"), (None, "a", None), False),
        ((None, "a", None), (None, "a", "b", "c"), False),
        ((None, "a", "b"), (None, "a", "c"), True),  # one column, two classes
        ((None, "a"), (None, None, "a"), True),
    ],
)
def test_columns_clash_only_where_one_means_two_classes(first, second, clashes):
    assert compare_columns(first, second).clashes is clashes


# --- Numbering ---


def test_numbers_do_not_depend_on_the_order_of_files_and_names():
    assert number_names([["star", "circle"], ["triangle", "circle"]]) == ("circle", "star", "triangle")
    assert number_names([["circle", "triangle"], ["star"]]) == ("circle", "star", "triangle")


def test_spellings_count_once_unless_a_file_has_both():
    assert number_names([["Traffic Light"], ["traffic_light", "bus"]]) == ("Traffic Light", "bus")
    assert number_names([["A", "a"], ["a"]]) == ("A", "a")
    assert number_names([["-"], ["_"]]) == ("-", "_")


# --- Class maps ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n", (None, "cat", "dog")),
        ("cat\n\n dog \n\n", (None, "cat", None, "dog")),
        ("background\ncat\nunknown\ndog\n", (None, "cat", None, "dog")),
        ("\ufeffcat\r\ndog\r\n", (None, "cat", "dog")),
        ('["cat", "dog"]', (None, "cat", "dog")),
        ('["background", "cat"]', (None, "cat")),
        ('{"1": "cat", "3": "dog"}', (None, "cat", None, "dog")),
        ('{"cat": 1, "dog": 3}', (None, "cat", None, "dog")),
        ('{"category_ids": {"cat": 1}}', (None, "cat")),
        ('{"categories": [{"id": 2, "name": "cat"}], "images": []}', (None, None, "cat")),
    ],
)
def test_class_maps_keep_ids(tmp_path, text, names):
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    assert read_class_map(path, where="x") == names


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not valid JSON"),
        ("{}", "no class names"),
        ("[1, 2]", "no class names"),
        ('{"a": "b"}', "no class names"),
        ('{"0": "cat"}', "id 0 is the background"),
        ('[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "two names"),
    ],
)
def test_other_json_is_refused(tmp_path, text, what):
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(DataError, match=what):
        read_class_map(path, where="dataset.infer_data_sources.classmap")


def test_a_class_map_must_not_contradict_the_model():
    known = (None, "cat", "dog", None)
    where = dict(path="c.txt", where="classmap")
    for listed in [(None, "Cat"), (None, None, "dog", "new"), (None,)]:
        require_same_names(listed, known, **where)
    require_same_names((None, "x", "y"), (None, None, None), **where)
    with pytest.raises(DataError, match=r"category 1 is 'dog' here and 'cat' in the model \(2 names differ"):
        require_same_names((None, "dog", "cat"), known, **where)
    with pytest.raises(DataError, match="names 4 classes, the model has 3"):
        require_same_names((None, "cat", "dog", "x", "y"), known, **where)
