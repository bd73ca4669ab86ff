"""Typed reading of one COCO file, and what is said about broken ones."""

import json
from pathlib import Path

import pytest
from data_builders import box, categories, coco, image, three_images
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.datasets.coco_json import parse_coco_json
from ddetr_mm.errors import DataError

PATH = Path("instances.json")


def parse(document, **options):
    text = document if isinstance(document, (str, bytes)) else json.dumps(document)
    return parse_coco_json(text if isinstance(text, bytes) else text.encode(), PATH, **options)


def problem(document, **options):
    with pytest.raises(DataError) as caught:
        parse(document, **options)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_columns_follow_the_file():
    columns = parse(three_images())
    assert columns.image_ids.tolist() == [7, 3, 5]
    assert columns.file_names == ["7.jpg", "sub/3.jpg", "5.jpg"]
    assert columns.sizes_hw.tolist() == [[48, 64], [60, 40], [48, 64]]
    assert columns.annotation_image_ids.tolist() == [7, 5, 7, 7]
    assert columns.boxes_xywh[2].tolist() == [5.5, 6.25, 30, 20]
    assert columns.crowd.tolist() == [False, False, False, True]
    assert columns.category_ids.tolist() == [2, 3, 1, 1]
    assert columns.categories == {1: "person", 2: "face", 3: "bag"}
    assert columns.segmentations is None


def test_area_defaults_to_the_box():
    annotation = box(1, 1, [0, 0, 4, 5])
    del annotation["area"]
    assert parse(coco([image(1)], [annotation])).areas.tolist() == [20]


def test_byte_order_mark_and_unknown_fields_are_skipped():
    document = {**three_images(), "info": {"x": [1, {"y": None}]}, "licenses": []}
    columns = parse(b"\xef\xbb\xbf" + json.dumps(document).encode())
    assert len(columns.image_ids) == 3


def test_segmentations_are_kept_when_asked_for():
    polygon = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    document = coco([image(1)], [box(1, 1, [0, 0, 4, 5], segmentation=polygon), box(2, 1, [0, 0, 4, 5])])
    columns = parse(document, with_masks=True)
    assert [json.loads(text) if text else None for text in columns.segmentations] == [polygon, None]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('{"images": [], "annotations": [}', "byte 31", "invalid character"),
        ('{"images": [], "anno', "byte 20", "truncated"),
        ("", "byte 0", "truncated"),
        ('{"images": [], "annotations": [],, "categories": []}', "byte 33", "not valid JSON"),
        (b'{"images": [{"id": \xff', "byte 19", "invalid character"),
    ],
)
def test_broken_json_names_the_byte(text, where, what):
    found = problem(text)
    assert found.file == PATH
    assert found.where == where
    assert what in found.what


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_python_writes_but_json_lacks(number):
    text = json.dumps(coco([image(1)], [box(1, 1, [0, 0, 4, 5])])).replace(
        "[0, 0, 4, 5]", f"[0, {number}, 4, 5]"
    )
    found = problem(text)
    assert "finite" in found.what
    byte = text.index(number)
    assert found.where in (f"byte {byte}", f"byte {byte + 1}")


@pytest.mark.parametrize("number", ["1e39", "-3.5e38", "1e999"])
def test_numbers_beyond_single_precision(number):
    text = json.dumps(coco([image(1)], [box(1, 1, [0, 0, 4, 5])])).replace(
        "[0, 0, 4, 5]", f"[0, {number}, 4, 5]"
    )
    assert problem(text).where.startswith("annotations[0].bbox")


def broken(change):
    document = three_images()
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "where", "what", "value"),
    [
        (lambda d: d.pop("images"), None, "images", None),
        (lambda d: d.pop("categories"), None, "categories", None),
        (lambda d: d["images"][1].pop("width"), "images[1]", "width", None),
        (lambda d: d["images"][1].update(height="60"), "images[1].height", "expected 'int'", "60"),
        (lambda d: d["images"][1].update(height=0), "images[1].height", ">= 1", 0),
        (lambda d: d["images"][2].update(id="5"), "images[2].id", "expected 'int'", "5"),
        (lambda d: d["images"][2].update(file_name=None), "images[2].file_name", "expected 'str'", None),
        (lambda d: d["annotations"][3].pop("bbox"), "annotations[3]", "bbox", None),
        (lambda d: d["annotations"][3].update(bbox=[1, 2, 3]), "annotations[3].bbox", "length 4", [1, 2, 3]),
        (lambda d: d["annotations"][3].update(bbox=[1, 2, 3, "4"]), "annotations[3].bbox[3]", "float", "4"),
        (lambda d: d["annotations"][1].update(category_id=-1), "annotations[1].category_id", ">= 0", -1),
        (lambda d: d["annotations"][1].update(image_id=2**70), "annotations[1].image_id", "<=", 2**70),
        (lambda d: d["categories"].append({"id": 4}), "categories[3]", "name", None),
        (lambda d: d["categories"].append({"id": 1, "name": "x"}), "categories[3]", "two names", None),
        (lambda d: d.update(images={}), "images", "expected 'array'", {}),
    ],
)
def test_missing_keys_and_wrong_types_name_the_place(change, where, what, value):
    found = problem(broken(change))
    assert found.file == PATH
    assert found.where == where
    assert what in found.what
    if value is not None:
        assert repr(value) in str(found)


def test_a_list_is_no_annotation_file():
    assert "not a COCO annotation file" in problem("[]").what


def test_annotations_may_be_missing_in_a_test_set():
    document = three_images()
    del document["annotations"]
    columns = parse(document)
    assert columns.boxes_xywh.shape == (0, 4)
    assert not columns.annotated
    assert parse(three_images()).annotated


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(
    boxes=st.lists(st.tuples(finite, finite, finite, finite), max_size=5),
    crowd=st.booleans(),
    cats=st.lists(st.text(max_size=5), min_size=1, max_size=3, unique=True),
)
def test_round_trip_of_any_file(boxes, crowd, cats):
    annotations = [box(i, 1, list(values), 1, area=1.5, iscrowd=int(crowd)) for i, values in enumerate(boxes)]
    columns = parse(coco([image(1)], annotations, categories(*cats)))
    assert columns.boxes_xywh.tolist() == [list(values) for values in boxes]
    assert columns.crowd.tolist() == [crowd] * len(boxes)
    assert columns.areas.tolist() == [1.5] * len(boxes)
    assert list(columns.categories.values()) == cats


@given(text=st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_with_a_place(text):
    found = problem(text)
    assert found.file == PATH


@given(data=st.data())
def test_a_cut_file_is_never_accepted(data):
    text = json.dumps(three_images()).encode()
    cut = data.draw(st.integers(0, len(text) - 1))
    assert problem(text[:cut]).where.startswith("byte ")
