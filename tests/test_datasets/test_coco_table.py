"""Several files and sources merged into one table."""

import copy
import pickle

import numpy as np
import pytest
from data_builders import box, categories, coco, image, three_images, write_json

from ddetr_mm.datasets.coco_table import name_fault, visible_boxes
from ddetr_mm.datasets.sources import CocoSource, class_names_of_files, read_coco_sources
from ddetr_mm.errors import DataError


def read(tmp_path, *documents, **options):
    """One source a document; a list of documents makes the shards of one source."""
    sources = []
    for index, document in enumerate(documents):
        shards = document if isinstance(document, list) else [document]
        for shard, content in enumerate(shards):
            write_json(tmp_path / f"source{index}" / f"shard-{shard}.json", content)
        sources.append({"image_dir": f"images{index}", "json_file": str(tmp_path / f"source{index}")})
    return read_coco_sources(sources, **options)


def problems(tmp_path, *documents, **options):
    with pytest.raises(DataError) as caught:
        read(tmp_path, *documents, **options)
    return caught.value.problems


def test_boxes_are_grouped_by_image_in_file_order(tmp_path):
    table = read(tmp_path, three_images())
    assert table.image_ids.tolist() == table.original_image_ids.tolist() == [7, 3, 5]
    assert table.box_starts.tolist() == [0, 3, 3, 4]
    assert table.category_ids.tolist() == [2, 1, 1, 3]
    assert table.crowd.tolist() == [False, False, True, False]
    assert table.boxes_xywh[1].tolist() == [5.5, 6.25, 30, 20]
    assert table.box_image_rows.tolist() == [0, 0, 0, 2]
    assert [table.file_name(row) for row in range(3)] == ["7.jpg", "sub/3.jpg", "5.jpg"]
    assert (table.num_images, table.num_boxes) == (3, 4)
    assert table.notes == []


def test_colliding_image_ids_are_replaced_by_row_numbers(tmp_path):
    table = read(tmp_path, three_images(), coco([image(7, "other.jpg")], [box(1, 7, [1, 1, 5, 5], 2)]))
    assert table.image_ids.tolist() == [0, 1, 2, 3]
    assert table.original_image_ids.tolist() == [7, 3, 5, 7]
    assert table.source_indices.tolist() == [0, 0, 0, 1]
    assert table.boxes_xywh[table.boxes_of(3)].tolist() == [[1, 1, 5, 5]]
    assert "repeat across sources" in table.notes[0]


def test_ids_that_are_unique_over_sources_stay(tmp_path):
    table = read(tmp_path, three_images(), coco([image(8)], []))
    assert table.image_ids.tolist() == [7, 3, 5, 8]


def test_annotations_may_lie_in_another_shard_than_their_image(tmp_path):
    table = read(tmp_path, [coco([image(1)], []), coco([image(2)], [box(1, 1, [1, 1, 5, 5])])])
    assert table.box_starts.tolist() == [0, 1, 1]
    assert table.shard_indices.tolist() == [0, 1]


def test_shards_without_images_are_fine(tmp_path):
    table = read(tmp_path, [coco([], []), coco([image(2)], []), coco([], [])])
    assert table.image_ids.tolist() == [2]
    assert table.shard_indices.tolist() == [1]


def test_a_source_without_images_gives_an_empty_table(tmp_path):
    table = read(tmp_path, coco([], []))
    assert (table.num_images, table.num_boxes) == (0, 0)


def test_unicode_names_survive(tmp_path):
    table = read(tmp_path, coco([image(1, "straße/写真.jpg"), image(2, "b.jpg")], []))
    assert [table.file_name(row) for row in range(2)] == ["straße/写真.jpg", "b.jpg"]


def test_copies_share_the_table_and_pickling_keeps_it(tmp_path):
    table = read(tmp_path, three_images())
    assert copy.deepcopy(table) is table
    again = pickle.loads(pickle.dumps(table))
    for name in table.array_names():
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert again.category_names == table.category_names


def test_segmentations(tmp_path):
    polygon = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    boxes = [box(1, 2, [0, 0, 4, 5]), box(2, 1, [0, 0, 4, 5], segmentation=polygon)]
    document = coco([image(1), image(2)], boxes)
    table = read(tmp_path, document, with_masks=True)
    assert [table.segmentation(index) for index in range(2)] == [polygon, None]
    assert read(tmp_path, document).segmentation(0) is None


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_duplicate_ids_in_one_file(tmp_path, kind):
    document = three_images()
    document[kind][2]["id"] = document[kind][0]["id"]
    (found,) = problems(tmp_path, document)
    assert found.where == f"{kind}[0].id"
    assert f"{kind}[2]" in found.what


def test_duplicate_image_ids_in_two_shards_name_both(tmp_path):
    (found,) = problems(tmp_path, [coco([image(1)], []), coco([image(4), image(1)], [])])
    assert found.file.name == "shard-0.json"
    assert "images[1] of" in found.what
    assert "shard-1.json" in found.what


def test_annotations_without_ids_are_no_duplicates(tmp_path):
    boxes = [box(1, 1, [0, 0, 4, 5]) for _ in range(3)]
    for item in boxes:
        del item["id"]
    assert read(tmp_path, coco([image(1)], boxes)).num_boxes == 3


def test_files_without_annotations_are_named(tmp_path):
    document = three_images()
    del document["annotations"]
    assert read(tmp_path, coco([image(1)], []), document, annotations_required=False).num_boxes == 0
    (found,) = problems(tmp_path, coco([image(1)], []), document)
    assert found.where == "annotations"
    assert found.file.parent.name == "source1"


@pytest.mark.parametrize(
    ("key", "kind"), [("image_id", "annotations of images"), ("category_id", "annotations of categories")]
)
def test_annotations_of_what_is_not_listed_are_left_out_and_counted(tmp_path, key, kind):
    document = three_images()
    document["annotations"][2][key] = 99
    table = read(tmp_path, document)
    assert table.category_ids.tolist() == [2, 1, 3]
    assert table.box_starts.tolist() == [0, 2, 2, 3]
    assert table.crowd.tolist() == [False, True, False]
    (repair,) = table.repairs
    assert repair.startswith(f"{kind} that are not in the file: left out: 1, the first: ")
    assert repair.endswith(f"shard-0.json: annotations[2].{key} (99)")
    assert table.notes == list(table.repairs)


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_strict_reading_refuses_annotations_that_would_be_left_out(tmp_path, key):
    document = three_images()
    for annotation in document["annotations"][1:]:
        annotation[key] = -5
    (found,) = problems(tmp_path, document, strict=True)
    assert (found.where, found.value) == (f"annotations[1].{key}", -5)
    assert f"3 in all: also annotations[2].{key} (-5), annotations[3].{key} (-5)" in found.what
    assert "strict_annotations" in found.hint


def test_an_annotation_without_image_and_category_counts_once(tmp_path):
    document = three_images()
    document["annotations"][0].update(image_id=98, category_id=99)
    table = read(tmp_path, document)
    assert table.num_boxes == 3
    assert len(table.repairs) == 1
    assert "images" in table.repairs[0]


def test_one_line_a_kind_over_all_files(tmp_path):
    shards = [coco([image(n)], [box(n, 70 + n, [0, 0, 4, 5]), box(9 + n, n, [1, 1, 2, 2])]) for n in range(5)]
    (repair,) = read(tmp_path, shards).repairs
    assert "left out: 5, the first: " in repair
    assert repair.count("shard-") == 3


def test_boxes_without_any_image(tmp_path):
    table = read(tmp_path, coco([], [box(1, 1, [0, 0, 4, 5])]))
    assert (table.num_images, table.num_boxes) == (0, 0)
    assert "left out: 1" in table.repairs[0]


def test_segmentations_stay_with_their_boxes_when_others_are_left_out(tmp_path):
    polygons = [[[float(n), 0, 9, 0, 9, 9]] for n in range(3)]
    boxes = [box(n, 1 if n else 55, [0, 0, 4, 5], segmentation=polygons[n]) for n in range(3)]
    table = read(tmp_path, coco([image(1)], boxes), with_masks=True)
    assert [table.segmentation(index) for index in range(2)] == polygons[1:]


def test_text_ids_join_files_and_stay_known(tmp_path):
    """Annotations find their image over shards; images are numbered, and the id as written is kept."""
    first = coco([image("cam/a"), image("0012"), image(5)], [box("b1", "cam/z", [0, 0, 4, 5])])
    second = coco(
        [image("cam/z", "z.jpg")], [box("b2", 12, [1, 1, 3, 3], 2), box("b3", "cam/a", [2, 2, 3, 3])]
    )
    table = read(tmp_path, [first, second])
    assert table.image_ids.tolist() == [0, 1, 2, 3]
    assert [table.original_id(row) for row in range(4)] == ["cam/a", "0012", 5, "cam/z"]
    assert table.box_starts.tolist() == [0, 1, 2, 2, 3]
    assert table.boxes_xywh[:, 0].tolist() == [2, 1, 0]
    assert "image ids are texts: images are numbered from 0 instead" in table.notes


def test_a_text_id_that_is_not_listed_is_shown_as_written(tmp_path):
    table = read(tmp_path, coco([image("a")], [box(1, "b", [0, 0, 4, 5])]))
    assert any("annotations[0].image_id ('b')" in repair for repair in table.repairs)


def test_sources_must_agree_on_category_names(tmp_path):
    other = coco([image(1)], [], categories("person", "hand"))
    (found,) = problems(tmp_path, three_images(), other)
    assert "'hand'" in found.what
    assert "'face'" in found.what
    assert "source0" in found.what
    assert "source1" in str(found.file)


def test_categories_of_several_sources_are_joined(tmp_path):
    other = coco([image(1)], [box(1, 1, [0, 0, 4, 5], 9)], categories("dog", first=9))
    assert read(tmp_path, three_images(), other).category_names == {
        1: "person",
        2: "face",
        3: "bag",
        9: "dog",
    }


@pytest.mark.parametrize(
    "name",
    [
        "../x.jpg",
        "a/../../x.jpg",
        "a/..",
        "",
        "C:\\x.jpg",
        "c:/x.jpg",
        "\\\\host\\x.jpg",
        "a\0b.jpg",
        "s3://bucket/x.jpg",
        "S3:x.jpg",
        "HTTPS://host/x.jpg",
        "http:/host/x.jpg",
        "file:///x.jpg",
        "lmdb:x.jpg",
        "a/petrel://x.jpg",
        "/http://x.jpg",
    ],
)
@pytest.mark.parametrize("image_dir", ["images", ""])
def test_names_that_leave_the_folder_or_this_machine(tmp_path, name, image_dir):
    document = three_images()
    document["images"][1]["file_name"] = name
    path = write_json(tmp_path / "a.json", document)
    with pytest.raises(DataError) as caught:
        read_coco_sources([{"image_dir": image_dir, "json_file": str(path)}])
    (found,) = caught.value.problems
    assert (found.where, found.value) == ("images[1].file_name", name)
    assert "image_dir" in found.hint


@pytest.mark.parametrize(
    "name",
    ["x.jpg", "a/b/x.jpg", "..x.jpg", "a..b/x.jpg", "a:b.jpg", "./x.jpg", "/data/x.jpg", "cam 12:30:05.jpg"],
)
def test_names_that_can_be_used(name):
    assert name_fault(name) is None


def test_backslashes_cannot_leave_the_folder_either(tmp_path):
    document = three_images()
    document["images"][0]["file_name"] = "a\\..\\..\\b.jpg"
    (found,) = problems(tmp_path, document)
    assert "leave the image folder" in found.what


def test_refused_names_are_counted_and_the_first_three_shown(tmp_path):
    document = coco([image(n, f"http://host/{n}.jpg") for n in range(5)], [])
    (found,) = problems(tmp_path, document)
    assert "are URLs, which are not fetched (5 in all: also images[1].file_name" in found.what
    assert "images[2].file_name" in found.what
    assert "images[3].file_name" not in found.what


@pytest.mark.parametrize("image_dir", ["", "images"])
def test_absolute_names_are_taken_as_they_are(tmp_path, image_dir):
    path = write_json(tmp_path / "a.json", coco([image(1, "/data/x.jpg"), image(2)], []))
    source = CocoSource(image_dir, str(path))
    table = read_coco_sources([source])
    assert source.image_path(table.file_name(0)) == "/data/x.jpg"
    assert source.image_path(table.file_name(1)) == (f"{image_dir}/2.jpg" if image_dir else "2.jpg")
    expected = [f"absolute file names: image_dir is not used: 1, the first: {path}: images[0].file_name "]
    assert [repair.split("(")[0] for repair in table.repairs] == (expected if image_dir else [])


def test_boxes_without_area_in_the_image_are_counted(tmp_path):
    boxes = [
        box(1, 1, [10, 10, 0, 5]),
        box(2, 1, [10, 10, 5, -5]),
        box(3, 1, [70, 10, 10, 10]),
        box(4, 1, [-10, -10, 10, 30]),
        box(5, 1, [60, 40, 100, 100]),
        box(6, 1, [0, 0, 0.5, 0.5]),
    ]
    table = read(tmp_path, coco([image(1)], boxes))
    assert table.visible.tolist() == [False, False, False, False, True, True]
    assert "4 boxes" in table.notes[0]
    assert "the first in 1.jpg: [10.0, 10.0, 0.0, 5.0]" in table.notes[0]


def test_a_box_outside_the_recorded_size_may_lie_in_the_turned_image():
    boxes_xywh = np.array([[10.0, 50, 5, 10], [10, 70, 5, 10]])
    sizes_hw = np.array([[48, 64], [48, 64]], np.int32)
    assert visible_boxes(boxes_xywh, sizes_hw).tolist() == [True, False]
    assert visible_boxes(boxes_xywh, np.zeros_like(sizes_hw)).tolist() == [True, True]  # sizes not known


# --- Categories of all files ---

SHAPES = [{"id": 1, "name": "circle"}, {"id": 2, "name": "star"}]


def one_box_each(cats, used=None):
    """An image with one box of every category, 10 pixels wide for the first, 20 for the second …"""
    ids = [entry["id"] for entry in cats] if used is None else used
    boxes = [box(n, 1, [0, 0, 10 * (n + 1), 5], number) for n, number in enumerate(ids)]
    return coco([image(1)], boxes, cats)


def ids_of(table):
    """(row, width) of every box → category id."""
    widths = table.boxes_xywh[:, 2].tolist()
    places = zip(table.box_image_rows.tolist(), widths, strict=True)
    return dict(zip(places, table.category_ids.tolist(), strict=True))


def test_two_categories_of_one_name_are_refused_or_merged(tmp_path):
    cats = [{"id": 4, "name": "circle"}, {"id": 9, "name": "star"}, {"id": 2, "name": "circle"}]
    (found,) = problems(tmp_path, one_box_each(cats))
    assert found.what == "categories 4 and 2 have one name, 'circle'"
    assert "merge_categories: true" in found.hint
    table = read(tmp_path, one_box_each(cats), merge_categories=True)
    assert table.category_names == {2: "circle", 9: "star"}
    assert ids_of(table) == {(0, 10): 2, (0, 20): 9, (0, 30): 2}
    assert "categories of one name are merged: 'circle' [4, 2]" in table.notes[0]


def test_another_id_in_another_source_is_one_name_twice(tmp_path):
    other = [{"id": 1, "name": "circle"}, {"id": 3, "name": "star"}]
    (found,) = problems(tmp_path, one_box_each(SHAPES), one_box_each(other))
    assert "categories 2 and 3 have one name, 'star'" in found.what
    assert "category_ids: by_name" in found.hint


@pytest.mark.parametrize(
    "ids",
    [
        (0, 1),
        (2, 1),
        (77, 2**63 - 1),
        (-1, 2**63),
        (2**70, "-3"),
        ("a", "b"),
        ("1", "0"),
        (3.0, 1.0),
        (None, None),
    ],
    ids=str,
)
def test_classes_are_numbered_by_name_whatever_their_ids(tmp_path, ids):
    if ids == (None, None):  # as in another file, in another order
        other = one_box_each([{"id": 5, "name": "square"}, {"id": 1, "name": "star"}])
        second = {(1, 10): 3, (1, 20): 2}
    else:
        other = one_box_each([{"id": ids[0], "name": "star"}, {"id": ids[1], "name": "circle"}])
        second = {(1, 10): 2, (1, 20): 1}
    table = read(tmp_path, one_box_each(SHAPES), other, numbered_names=("circle", "star", "square"))
    assert table.category_names == {1: "circle", 2: "star", 3: "square"}
    assert ids_of(table) == {(0, 10): 1, (0, 20): 2} | second


def test_names_that_are_not_numbered_come_after_and_gaps_stay(tmp_path):
    cats = [{"id": 1, "name": "b"}, {"id": 2, "name": "a"}, {"id": 3, "name": "Star"}]
    table = read(tmp_path, one_box_each(cats), numbered_names=("x", None, "star"))
    assert table.category_names == {1: "x", 3: "star", 4: "a", 5: "b"}
    assert ids_of(table) == {(0, 10): 5, (0, 20): 4, (0, 30): 3}


def test_shards_of_a_source_may_number_differently_by_name(tmp_path):
    first = coco([image(1)], [box(1, 1, [0, 0, 10, 5], 1)], SHAPES)
    second = coco([image(2)], [box(2, 2, [0, 0, 10, 5], 1)], [{"id": 1, "name": "star"}])
    table = read(tmp_path, [first, second], numbered_names=("circle", "star"))
    assert ids_of(table) == {(0, 10): 1, (1, 10): 2}


def test_one_name_twice_in_a_file_is_refused_by_name_too(tmp_path):
    cats = [*SHAPES, {"id": 7, "name": "star"}]
    write_json(tmp_path / "a.json", one_box_each(cats))
    sources = [{"image_dir": "x", "json_file": str(tmp_path / "a.json")}]
    with pytest.raises(DataError, match="categories 2 and 7 have one name, 'star'"):
        read_coco_sources(sources, numbered_names=("circle", "star"))
    table = read_coco_sources(sources, numbered_names=("circle", "star"), merge_categories=True)
    assert ids_of(table) == {(0, 10): 1, (0, 20): 2, (0, 30): 2}


ROBOFLOW = [
    {"id": 0, "name": "shapes", "supercategory": "none"},
    {"id": 1, "name": "circle", "supercategory": "shapes"},
    {"id": 2, "name": "star", "supercategory": "shapes"},
]


def test_the_only_category_is_not_its_own_supercategory(tmp_path):
    """As TAO's converter writes it; here for images without objects."""
    alone = [{"id": 1, "name": "bag", "supercategory": "bag"}]
    assert read(tmp_path, one_box_each(alone, used=[])).category_names == {1: "bag"}


def test_a_category_that_is_only_the_supercategory_is_left_out(tmp_path):
    table = read(tmp_path, one_box_each(ROBOFLOW, used=[1, 2]))
    assert table.category_names == {1: "circle", 2: "star"}
    assert "only the supercategory of the others: left out: 1" in table.notes[0]
    assert "0 (shapes)" in table.notes[0]
    # Of the name of its only class, too.
    cats = [
        {"id": 0, "name": "cat", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "cat"},
    ]
    assert read(tmp_path, one_box_each(cats, used=[1])).category_names == {1: "cat"}
    # A class with boxes stays.
    assert read(tmp_path, one_box_each(ROBOFLOW)).category_names == {0: "shapes", 1: "circle", 2: "star"}


def test_names_of_files_are_read_without_the_rest(tmp_path):
    write_json(tmp_path / "a.json", one_box_each(ROBOFLOW, used=[1, 2]))
    write_json(tmp_path / "b.json", one_box_each([{"id": "x", "name": "square"}]))
    sources = [{"image_dir": "x", "json_file": str(tmp_path / name)} for name in ("a.json", "b.json")]
    assert class_names_of_files(sources) == [("circle", "star"), ("square",)]


def test_millions_of_ids_take_the_time_of_their_number(tmp_path):
    cats = [{"id": 5_000_000, "name": "circle"}, {"id": 2**62, "name": "star"}]
    assert ids_of(read(tmp_path, one_box_each(cats))) == {(0, 10): 5_000_000, (0, 20): 2**62}
