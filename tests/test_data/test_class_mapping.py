import pytest

from ddetr_mm.data.class_mapping import (
    DEFAULT_CLASS_MAPPING,
    category_ids,
    check_class_mapping,
    coco_categories,
    load_class_mapping,
)
from ddetr_mm.errors import DataError


def test_default_mapping_has_the_documented_ids():
    assert category_ids(DEFAULT_CLASS_MAPPING.values()) == {"person": 1, "face": 2, "bag": 3}


def test_categories_are_listed_by_id():
    ids = category_ids(["bag", "face", "person"])
    assert coco_categories(ids) == [
        {"id": 1, "name": "person"},
        {"id": 2, "name": "face"},
        {"id": 3, "name": "bag"},
    ]


def test_reads_a_mapping_file_with_byte_order_mark(tmp_path):
    path = tmp_path / "mapping.json"
    path.write_bytes(b'\xef\xbb\xbf{"RBC": "rbc", "WBC": "wbc"}')
    assert load_class_mapping(path) == {"RBC": "rbc", "WBC": "wbc"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "b",}', "line 1, column 1"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "not an object"),
        (b"{}", "is empty"),
        (b'{"a": 1}', "got 1"),
        (b'{"a": null}', "got None"),
        (b'{"a": ""}', "non-empty"),
        (b'{" ": "b"}', "non-empty"),
        (b'{"a": "b", "a": "c"}', "two categories"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_refuses_what_maps_no_name_to_a_name(tmp_path, content, message):
    path = tmp_path / "mapping.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_class_mapping(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="mapping_path"):
        load_class_mapping(tmp_path / "nowhere.json")


def test_all_bad_entries_are_shown_at_once():
    with pytest.raises(DataError) as caught:
        check_class_mapping({"a": 1, "b": "fine", "c": []})
    assert [problem.where for problem in caught.value.problems] == ["a", "c"]
