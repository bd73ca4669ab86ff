"""Typed reading of one COCO file, and what is said about broken ones."""

import gzip
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
        (lambda d: d["images"][1].update(height=-60), "images[1].height", ">= 1", -60),
        (lambda d: d["images"][1].update(height=60.5), "images[1].height", "whole number", 60.5),
        (lambda d: d["images"][1].update(height="tall"), "images[1].height", "whole number", "tall"),
        (lambda d: d["images"][2].update(id=None), "images[2].id", "neither an integer", None),
        (lambda d: d["images"][2].update(id=5.5), "images[2].id", "neither an integer", 5.5),
        (lambda d: d["images"][2].update(id=""), "images[2].id", "neither an integer", ""),
        (lambda d: d["images"][2].update(file_name=None), "images[2].file_name", "no text", None),
        (lambda d: d["images"][2].update(file_name=7), "images[2].file_name", "no text", 7),
        (lambda d: d["annotations"][3].update(bbox=[1, 2, 3]), "annotations[3].bbox", "length 4", [1, 2, 3]),
        (
            lambda d: d["annotations"][3].update(bbox=[1, 2, 3, "4"]),
            "annotations[3].bbox",
            "float",
            [1, 2, 3, "4"],
        ),
        (lambda d: d["annotations"][1].update(iscrowd="yes"), "annotations[1].iscrowd", "0 nor 1", "yes"),
        (lambda d: d["annotations"][1].update(image_id=2**70), "annotations[1].image_id", "64 bits", 2**70),
        (lambda d: d["annotations"][1].update(image_id=[5]), "annotations[1].image_id", "integer", [5]),
        (lambda d: d["images"].append(7), "images[3]", "object", 7),
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


# --- Deviations that are repaired and counted ---


def repaired(change, **options):
    """The columns of a changed document, and what was repaired: text and number of cases."""
    columns = parse(broken(change), **options)
    return columns, {repair.what: repair.count for repair in columns.repairs}


def test_a_file_as_the_format_has_it_needs_no_repair():
    assert parse(three_images()).repairs == []


def each(key, values):
    """Change one key of every image or annotation in turn."""

    def change(document):
        kind, _, field = key.partition(".")
        for record, value in zip(document[kind], values, strict=True):
            if value is ...:
                record.pop(field, None)
            else:
                record[field] = value

    return change


@pytest.mark.parametrize("ids", [["7", "3", "5"], [7.0, 3.0, 5.0], ["007", " 3 ", "5.0"], [7, "3", 5.0]])
def test_ids_that_are_numbers_in_another_type(ids):
    columns, repairs = repaired(each("images.id", ids))
    assert columns.image_ids.tolist() == [7, 3, 5]
    assert repairs == {
        "images whose id is no integer: read as number or text": sum(type(one) is not int for one in ids)
    }
    texts = [one if isinstance(one, str) else None for one in ids]
    assert columns.image_id_texts == (texts if any(texts) else [])


@pytest.mark.parametrize("wanted", ["7", 7.0])
@pytest.mark.parametrize("key", ["image_id", "id"])
def test_ids_of_annotations_in_another_type(wanted, key):
    columns, repairs = repaired(each(f"annotations.{key}", [wanted, 5, 8, 9]))
    found = columns.annotation_image_ids if key == "image_id" else columns.annotation_ids
    assert found.tolist() == [7, 5, 8, 9]
    assert repairs == {f"annotations whose {key} is no integer: read as number or text": 1}


def test_texts_that_are_no_numbers_have_one_number_everywhere():
    def change(document):
        each("images.id", ["a/7", "b", "c-5"])(document)
        each("annotations.image_id", ["a/7", "c-5", "a/7", "a/7"])(document)
        each("annotations.category_id", ["p", "q", "p", "p"])(document)
        document["categories"] = [{"id": "p", "name": "person"}, {"id": "q", "name": "face"}]

    columns, repairs = repaired(change)
    first, _, third = columns.image_ids.tolist()
    assert len({*columns.image_ids.tolist()}) == 3
    assert columns.annotation_image_ids.tolist() == [first, third, first, first]
    assert [columns.categories[number] for number in columns.category_ids.tolist()] == [
        "person",
        "face",
        "person",
        "person",
    ]
    assert set(columns.id_texts.values()) == {"a/7", "b", "c-5", "p", "q"}
    assert sum(repairs.values()) == 3 + 4 + 4 + 2


def test_large_and_negative_ids():
    columns, repairs = repaired(each("images.id", [2**62, -3, 2**63 - 1]))
    assert columns.image_ids.tolist() == [2**62, -3, 2**63 - 1]
    assert repairs == {}


@pytest.mark.parametrize(
    ("key", "values", "expected", "count"),
    [
        ("iscrowd", [None, None, 0, 1], [False, False, False, True], 2),
        ("iscrowd", ["0", "1", 0.0, 1.0], [False, True, False, True], 4),
        ("iscrowd", [True, False, ..., 1], [True, False, False, True], 0),
        ("ignore", [None, 1, ..., "1"], [False, True, False, True], 2),
    ],
)
def test_flags(key, values, expected, count):
    columns, repairs = repaired(each(f"annotations.{key}", values))
    assert (columns.crowd if key == "iscrowd" else columns.ignored).tolist() == expected
    assert sum(repairs.values()) == count


def test_sizes_in_another_type_and_missing_ones():
    def change(document):
        each("images.width", ["64", 40.0, ...])(document)
        each("images.height", [48, 60, None])(document)

    columns, repairs = repaired(change)
    assert columns.sizes_hw.tolist() == [[48, 64], [60, 40], [0, 0]]
    assert repairs == {"images whose width is no integer: read as the number": 2}


def test_a_size_of_zero_is_no_size():
    assert repaired(each("images.height", [0, 60, 48]))[0].sizes_hw.tolist() == [[0, 0], [60, 40], [48, 64]]


POLYGONS = [[10.5, 20, 30, 20, 30, 60.25], [5, 25, 12, 25, 12, 30]]


@pytest.mark.parametrize("missing", [..., None, []])
def test_boxes_from_polygons(missing):
    def change(document):
        each("annotations.bbox", [missing, [0, 0, 64, 48], missing, [0, 0, 50, 40]])(document)
        each("annotations.segmentation", [POLYGONS, ..., [], ...])(document)
        each("annotations.area", [..., 9, ..., 9])(document)

    columns, repairs = repaired(change)
    assert columns.boxes_xywh.tolist() == [[5, 20, 25, 40.25], [0, 0, 64, 48], [0, 0, 50, 40]]
    assert columns.areas.tolist() == [25 * 40.25, 9, 9]
    assert repairs == {
        "annotations without bbox: the box around the segmentation": 1,
        "annotations without bbox, polygon and RLE: left out": 1,
    }
    assert columns.annotation_ids.tolist() == [1, 2, 4]
    assert columns.place(2) == 3
    assert [repair.drops for repair in columns.repairs] == [False, True]


def test_box_from_rle():
    code = {"size": [6, 5], "counts": [7, 2, 4, 2, 15]}
    columns, _ = repaired(lambda d: d["annotations"][0].update(bbox=None, segmentation=code), with_masks=True)
    assert columns.boxes_xywh[0].tolist() == [1, 1, 2, 2]
    assert json.loads(columns.segmentations[0]) == code


def test_area_that_is_no_number():
    columns, repairs = repaired(each("annotations.area", ["12", 3, None, 4.5]))
    assert columns.areas.tolist() == [200, 3, 600, 4.5]
    assert repairs == {"annotations whose area is no number: width times height": 1}


def test_backslashes_in_file_names():
    columns, repairs = repaired(each("images.file_name", ["a\\7.jpg", "sub\\x/3.jpg", "5.jpg"]))
    assert columns.file_names == ["a/7.jpg", "sub/x/3.jpg", "5.jpg"]
    assert repairs == {"file names with backslashes: read as '/'": 2}
    assert columns.repairs[0].examples[0] == ("images[0].file_name", "a\\7.jpg")


def test_lvis_files_name_images_by_coco_url():
    def change(document):
        for record in document["images"]:
            name = record.pop("file_name")
            record["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
            record.update(neg_category_ids=[4, 5], not_exhaustive_category_ids=[])
        for record in document["categories"]:
            record.update(synset="x.n.01", frequency="r", image_count=3)

    columns, repairs = repaired(change)
    assert columns.file_names == ["train2017/7.jpg", "train2017/sub/3.jpg", "train2017/5.jpg"]
    assert repairs == {"images with coco_url and no file_name: its path is taken": 3}


def test_category_names_that_are_numbers():
    columns, repairs = repaired(lambda d: d["categories"][1].update(name=12))
    assert columns.categories[2] == "12"
    assert repairs == {"categories whose name is a number: read as text": 1}


def test_a_list_of_images_without_categories_and_annotations():
    document = {"images": three_images()["images"]}
    columns = parse(document)
    assert (columns.categories, columns.annotated, len(columns.image_ids)) == ({}, False, 3)


def test_refusals_are_counted_and_show_three():
    found = problem(broken(each("annotations.bbox", [[1], [2], [3], [4]])))
    assert (found.where, found.value) == ("annotations[0].bbox", [1])
    assert "4 in all: also annotations[1].bbox ([2]), annotations[2].bbox ([3])" in found.what
    assert "annotations[3]" not in found.what


def test_every_kind_of_refusal_is_reported_at_once():
    def change(document):
        document["images"][0]["id"] = None
        document["annotations"][0]["bbox"] = "1 2 3 4"

    with pytest.raises(DataError) as caught:
        parse(broken(change))
    assert [found.where for found in caught.value.problems] == ["images[0].id", "annotations[0].bbox"]


# --- Encodings and containers ---


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_unicode_is_read_and_noted(encoding):
    document = coco([image(1, "straße.jpg")], [box(1, 1, [0, 0, 4, 5])])
    columns = parse(json.dumps(document, ensure_ascii=False).encode(encoding))
    assert columns.file_names == ["straße.jpg"]
    (repair,) = columns.repairs
    assert repair.what == f"{encoding.upper()} text instead of UTF-8 is read"


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_gzip_is_read(prefix):
    assert len(parse(gzip.compress(prefix + json.dumps(three_images()).encode())).image_ids) == 3


def test_a_cut_gzip_file_is_named():
    found = problem(gzip.compress(json.dumps(three_images()).encode())[:-9])
    assert "damaged gzip" in found.what


def test_latin_1_is_refused_by_name_with_the_hint():
    text = json.dumps(coco([image(1, "café.jpg")], []), ensure_ascii=False)
    found = problem(text.encode("latin-1"))
    assert "not UTF-8" in found.what
    assert found.where == f"byte {text.index('é')}"
    assert "café" in found.value
    assert "iconv -f LATIN1 -t UTF-8" in found.hint


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\x03\x04 zip", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\n<!DOCTYPE html><html>", "HTML or XML"),
        (b"<annotation><folder>", "HTML or XML"),
        (b"\x80\x04\x95 pickle", "pickle"),
    ],
)
def test_other_kinds_of_files_are_named(start, what):
    found = problem(start)
    assert what in found.what
    assert found.hint


@pytest.mark.parametrize("place", ["attributes", "area", "segmentation"])
def test_nan_where_nothing_is_read(place):
    document = broken(lambda d: d["annotations"][0].update({place: float("nan")}))
    columns = parse(json.dumps(document))
    assert columns.boxes_xywh[0].tolist() == [1, 2, 10, 20]
    assert columns.repairs[0].what == "NaN or Infinity in fields that are not read"
    assert columns.repairs[0].count == 1


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
