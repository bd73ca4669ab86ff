"""The datasets against mmdet's, their labels, and mmdet's wrappers around them."""

import copy
import pickle
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from data_builders import box, categories, coco, image, three_images, write_json
from dataset_builders import NAMES, PIPELINE, build, config, make_root, two_sources
from hypothesis import given
from hypothesis import strategies as st
from mmdet.datasets import CocoDataset
from mmdet.datasets.samplers import AspectRatioBatchSampler, ClassAwareSampler
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from ddetr_mm.datasets.coco import SerializedCocoDataset, build_label_map, labels_of
from ddetr_mm.datasets.sources import read_coco_sources
from ddetr_mm.errors import DataError
from ddetr_mm.evaluation.metric import FastCocoMetric

# --- The dataset against mmdet's CocoDataset, and what it does beyond ---


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path)


def random_document(seed):
    rng = np.random.default_rng(seed)
    images = [
        image(int(i), width=int(rng.integers(30, 90)), height=int(rng.integers(30, 90)))
        for i in rng.permutation(30)
    ]
    boxes = []
    for index in range(80):
        record = images[int(rng.integers(0, 25))]
        width, height = rng.uniform(2, [record["width"] - 2, record["height"] - 2])
        x, y = rng.uniform(0, [record["width"] - width, record["height"] - height])
        xywh = [round(float(value), 2) for value in (x, y, width, height)]
        more = {"iscrowd": int(rng.random() < 0.2), "ignore": int(rng.random() < 0.1)}
        boxes.append(box(index + 1, record["id"], xywh, int(rng.integers(1, 4)), **more))
    return coco(images, boxes)


SETTINGS = [
    {},
    {"test_mode": True},
    {"filter_cfg": {"filter_empty_gt": True, "min_size": 40}},
    {"filter_cfg": {"filter_empty_gt": True}, "indices": 5},
    {"filter_cfg": {"min_size": 50}, "indices": -4},
    {"indices": [3, 1, 2]},
    {"metainfo": {"classes": ("person", "bag")}, "filter_cfg": {"filter_empty_gt": True}},
    {"metainfo": {"classes": ("face",), "palette": [(1, 2, 3)]}},
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_samples_equal_those_of_coco_dataset(tmp_path, settings, seed):
    write_json(tmp_path / "a.json", random_document(seed))
    ours = build(tmp_path, **settings)
    theirs = build(tmp_path, **{"type": "CocoDataset", "metainfo": {"classes": NAMES}, **settings})
    assert len(ours) == len(theirs) > 0
    assert ours.metainfo["classes"] == theirs.metainfo["classes"]
    assert ours.cat_ids == theirs.cat_ids
    assert ours.cat2label == theirs.cat2label
    for index in range(len(theirs)):
        expected = theirs.get_data_info(index)
        found = ours.get_data_info(index)
        for key in ("img_path", "img_id", "height", "width", "seg_map_path", "sample_idx", "instances"):
            assert found[key] == expected[key], key
        assert ours.get_cat_ids(index) == theirs.get_cat_ids(index)
    assert ours.get_data_info(-1) == ours.get_data_info(len(ours) - 1)


def test_classes_come_from_the_file(root):
    dataset = build(root)
    assert dataset.metainfo["classes"] == NAMES
    assert dataset.metainfo["category_ids"] == (1, 2, 3)


def test_category_ids_as_labels(root):
    dataset = two_sources(root, label_mode="category_id", num_classes=5)
    assert dataset.metainfo["classes"] == ("background", *NAMES, "unknown")
    assert dataset.metainfo["category_ids"] == (None, 1, 2, 3, None)
    assert [item["bbox_label"] for item in dataset.get_data_info(0)["instances"]] == [2, 1, 1]


def test_several_sources_have_unique_ids_and_their_own_folders(root):
    dataset = two_sources(root)
    infos = [dataset.get_data_info(index) for index in range(5)]
    assert [info["img_id"] for info in infos] == [0, 1, 2, 3, 4]
    assert [info["original_img_id"] for info in infos] == [7, 3, 5, 7, 9]
    assert [info["source_id"] for info in infos] == [0, 0, 0, 1, 1]
    assert infos[1]["img_path"] == f"{root}/a/sub/3.jpg"
    assert infos[4]["img_path"] == f"{root}/b/9.jpg"
    assert infos[4]["instances"] == [{"bbox": [1, 1, 9, 9], "bbox_label": 1, "ignore_flag": 0}]


def test_samples_know_their_annotation_file(root):
    dataset = two_sources(root)
    assert dataset.shard_indices.tolist() == [0, 0, 0, 1, 1]
    assert dataset.get_subset([4, 0]).shard_indices.tolist() == [1, 0]


def test_crowds_are_ignored_and_ignored_boxes_left_out(root):
    document = three_images()
    document["annotations"][0]["ignore"] = 1
    write_json(root / "c.json", document)
    instances = build(root, ann_file="c.json").get_data_info(0)["instances"]
    assert [item["ignore_flag"] for item in instances] == [0, 1]


def test_images_without_objects_stay_unless_filtered(root):
    assert len(build(root)) == 3
    assert len(build(root, filter_cfg={"filter_empty_gt": True})) == 2
    assert len(build(root, filter_cfg={"filter_empty_gt": True}, test_mode=True)) == 3


def test_nothing_left_is_an_error(root):
    with pytest.raises(DataError, match="no image is left"):
        build(root, filter_cfg={"min_size": 1000})
    write_json(root / "c.json", coco([], []))
    with pytest.raises(DataError, match="there is no image"):
        build(root, ann_file="c.json")


def test_degenerate_boxes_are_no_instances(root):
    boxes = [box(1, 1, [5, 5, 0, 9]), box(2, 1, [5, 5, 9, 9]), box(3, 1, [90, 90, 9, 9])]
    write_json(root / "c.json", coco([image(1)], boxes))
    assert [item["bbox"] for item in build(root, ann_file="c.json").get_data_info(0)["instances"]] == [
        [5, 5, 14, 14]
    ]


def test_masks_when_asked_for(root):
    polygon = [[1.0, 1, 20, 1, 20, 20]]
    write_json(
        root / "c.json",
        coco([image(1)], [box(1, 1, [1, 1, 19, 19], segmentation=polygon), box(2, 1, [0, 0, 9, 9])]),
    )
    with_masks = build(root, ann_file="c.json", with_masks=True).get_data_info(0)["instances"]
    assert with_masks[0]["mask"] == polygon
    assert with_masks[1]["mask"] == []
    assert "mask" not in build(root, ann_file="c.json").get_data_info(0)["instances"][0]


LOAD_MASKS = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True, "poly2mask": False}


@pytest.mark.parametrize(
    "pipeline",
    [
        [PIPELINE[0], LOAD_MASKS, PIPELINE[3]],
        [PIPELINE[0], {"type": "RandomChoice", "transforms": [[LOAD_MASKS]]}, PIPELINE[3]],
        [TRANSFORMS.build(PIPELINE[0]), TRANSFORMS.build(LOAD_MASKS), TRANSFORMS.build(PIPELINE[3])],
    ],
    ids=["plain", "nested", "built"],
)
def test_masks_are_loaded_where_the_pipeline_wants_them(root, pipeline):
    polygon = [[1.0, 1, 20, 1, 20, 20]]
    boxes = [box(1, 7, [1, 1, 19, 19], segmentation=polygon), box(2, 7, [0, 0, 9, 9])]
    write_json(root / "c.json", coco([image(7)], boxes))
    ours = build(root, ann_file="c.json", pipeline=pipeline)[0]["data_samples"]
    assert ours.gt_instances.masks.masks[0][0].tolist() == polygon[0]
    assert ours.gt_instances.bboxes.tensor.tolist() == [[1, 1, 20, 20]]
    assert ours.ignored_instances.bboxes.tensor.tolist() == [[0, 0, 9, 9]]  # as mmdet does with empty masks


def test_no_mask_is_kept_where_no_step_wants_it(root):
    assert not build(root, pipeline=PIPELINE).with_masks
    assert not build(root, pipeline=[PIPELINE[0], LOAD_MASKS], with_masks=False).with_masks


def test_segmentation_maps(root):
    dataset = build(root, data_prefix={"img": "a/", "seg": "maps/"}, seg_map_suffix="_seg.png")
    theirs = build(
        root,
        type="CocoDataset",
        data_prefix={"img": "a/", "seg": "maps/"},
        seg_map_suffix="_seg.png",
        metainfo={"classes": NAMES},
    )
    assert dataset.get_data_info(1)["seg_map_path"] == f"{root}/maps/sub/3_seg.png"
    assert [dataset.get_data_info(i)["seg_map_path"] for i in range(3)] == [
        theirs.get_data_info(i)["seg_map_path"] for i in range(3)
    ]


def test_annotations_that_are_left_out(root):
    document = three_images()
    document["annotations"][0]["category_id"] = 77
    write_json(root / "c.json", document)
    dataset = build(root, ann_file="c.json")
    assert [item["bbox_label"] for item in dataset.get_data_info(0)["instances"]] == [0, 0]
    with pytest.raises(DataError, match=r"annotations\[0\].category_id.*77"):
        build(root, ann_file="c.json", strict_annotations=True)


def test_repairs_are_logged_once(root, monkeypatch):
    logged = []
    monkeypatch.setattr("ddetr_mm.datasets.coco.print_log", lambda text, **_: logged.append(text))
    document = three_images()
    for annotation in document["annotations"]:
        annotation["iscrowd"] = None
    write_json(root / "c.json", document)
    build(root, ann_file="c.json")
    places = "; ".join(f"annotations[{row}].iscrowd" for row in range(3))
    expected = f"annotations whose iscrowd is null: read as 0: 4, the first: {root}/c.json: {places}"
    assert logged == [expected]


def test_text_ids_in_samples(root):
    document = three_images()
    for record in document["images"]:
        record["id"] = f"frame {record['id']}"
    for record in document["annotations"]:
        record["image_id"] = f"frame {record['image_id']}"
    write_json(root / "c.json", document)
    infos = build(root, ann_file="c.json").load_data_list()
    assert [info["img_id"] for info in infos] == [0, 1, 2]
    assert [info["original_img_id"] for info in infos] == ["frame 7", "frame 3", "frame 5"]
    assert [len(info["instances"]) for info in infos] == [3, 0, 1]


# --- Classes that nobody gives ---


def test_default_classes_are_those_of_mmdet_until_the_file_is_read(root):
    theirs = build(root, type="CocoDataset", lazy_init=True).metainfo
    assert build(root, lazy_init=True).metainfo == theirs
    read = build(root).metainfo
    assert read["classes"] == NAMES
    assert "palette" not in read  # it belongs to COCO's classes


def test_default_classes_hold_where_the_file_has_none_either(root):
    write_json(root / "c.json", {"images": [image(7)]})
    metainfo = build(root, ann_file="c.json", test_mode=True).metainfo
    assert metainfo["classes"] == CocoDataset.METAINFO["classes"]
    assert metainfo["palette"] == CocoDataset.METAINFO["palette"]
    assert metainfo["category_ids"] == (None,) * 80


def test_a_given_palette_stays(root):
    palette = [(1, 2, 3)] * 3
    assert build(root, metainfo={"palette": palette}).metainfo["palette"] == palette


def test_classes_of_a_subclass_are_given(root):
    class Bags(SerializedCocoDataset):
        METAINFO: ClassVar = {"classes": ("bag",)}

    dataset = build(root, type=Bags)
    assert dataset.metainfo["classes"] == ("bag",)
    assert [len(info["instances"]) for info in dataset.load_data_list()] == [0, 0, 1]


def test_open_vocabulary_keys(root):
    info = build(root, return_classes=True).get_data_info(0)
    assert info["text"] == NAMES
    assert info["custom_entities"] is True


def test_a_test_set_needs_no_annotations(root):
    document = three_images()
    del document["annotations"]
    write_json(root / "c.json", document)
    assert len(build(root, ann_file="c.json", test_mode=True)) == 3
    with pytest.raises(DataError, match="no annotations"):
        build(root, ann_file="c.json")


@pytest.mark.parametrize(
    "options",
    [
        {"ann_file": ""},
        {"sources": [{"image_dir": "a", "json_file": "a.json"}]},
        {"storage": "disk"},
        {"missing_images": "skip"},
        {"proposal_file": "x.pkl"},
        {"label_mode": "raw"},
        {"file_client_args": {"backend": "disk"}},
        {
            "ann_file": "",
            "sources": [{"image_dir": "a", "json_file": "a.json"}],
            "data_prefix": {"img": "", "seg": "maps"},
        },
    ],
)
def test_wrong_arguments(root, options):
    names = r"ann_file|storage|missing_images|proposal_file|label_mode|file_client_args|seg"
    with pytest.raises(ValueError, match=names):
        build(root, **options)


def test_index_out_of_range(root):
    dataset = build(root)
    with pytest.raises(IndexError, match="3 of 3"):
        dataset.get_data_info(3)
    with pytest.raises(IndexError, match="-4 of 3"):
        dataset.get_data_info(-4)


def test_lazy_init_reads_nothing_until_used(root):
    dataset = build(root, ann_file="missing.json", lazy_init=True)
    with pytest.raises(DataError, match=r"missing\.json"):
        len(dataset)
    assert len(build(root, lazy_init=True)) == 3


def test_subsets(root):
    dataset = two_sources(root)
    subset = dataset.get_subset([4, 0])
    assert [subset.get_data_info(index)["img_id"] for index in range(2)] == [4, 0]
    assert subset.table is dataset.table
    assert len(dataset) == 5
    dataset.get_subset_(-2)
    assert [dataset.get_data_info(index)["img_id"] for index in range(2)] == [3, 4]
    dataset.get_subset_([1])
    assert [info["img_id"] for info in dataset.load_data_list()] == [4]


def test_digest_of_the_images(tmp_path):
    def digest(names: list[str], **options) -> str:
        images = [image(number) | {"file_name": name} for number, name in enumerate(names, start=1)]
        write_json(tmp_path / "a.json", coco(images, [box(1, 1, [1, 1, 5, 5], 1)]))
        return build(tmp_path, **options).image_digest()

    first = digest(["a.jpg", "b.jpg", "c.jpg"])
    assert len(first) == 32 and digest(["a.jpg", "b.jpg", "c.jpg"]) == first
    others = [["a.jpg", "b.jpg"], ["b.jpg", "a.jpg", "c.jpg"], ["a.jpg", "b.jpg", "d.jpg"]]
    found = {
        first,
        *(digest(names) for names in others),
        digest(["a.jpg", "b.jpg", "c.jpg"], indices=[0, 2, 1]),
    }
    assert len(found) == 5


def test_metainfo_is_a_copy(root):
    dataset = build(root)
    dataset.metainfo["classes"] = ()
    assert dataset.metainfo["classes"] == NAMES


def same_samples(one, other):
    assert len(one) == len(other)
    for index in range(len(one)):
        assert one.get_data_info(index) == other.get_data_info(index)


@pytest.mark.parametrize("storage", ["shared", "process"])
def test_pickle_and_copy_give_the_same_samples(root, storage):
    dataset = two_sources(root, storage=storage, indices=[0, 2, 4])
    same_samples(pickle.loads(pickle.dumps(dataset)), dataset)
    same_samples(copy.deepcopy(dataset), dataset)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_what_the_main_process_gives(root, start):
    dataset = two_sources(root, pipeline=PIPELINE)
    loader = DataLoader(
        dataset, batch_size=2, num_workers=1, collate_fn=pseudo_collate, multiprocessing_context=start
    )
    found = [sample for batch in loader for sample in batch["data_samples"]]
    assert [sample.img_id for sample in found] == [0, 1, 2, 3, 4]
    for index, sample in enumerate(found):
        expected = dataset[index]["data_samples"]
        assert torch.equal(sample.gt_instances.bboxes.tensor, expected.gt_instances.bboxes.tensor)
        assert sample.img_path == expected.img_path


class TestUnreadableImages:
    @pytest.fixture(params=["missing", "damaged"])
    def damaged_root(self, root, request):
        path = root / "a" / "7.jpg"
        path.unlink()
        if request.param == "damaged":
            path.write_bytes(b"this is no image")
        return root

    @pytest.fixture(params=["LoadImageFromFile", "TAOLoadImageFromFile"])
    def pipeline(self, request):
        return [{"type": request.param}, *PIPELINE[1:]]

    def test_reported_by_default(self, damaged_root, pipeline):
        dataset = build(damaged_root, pipeline=pipeline)
        with pytest.raises(DataError, match=r"7\.jpg: image file (does not exist|cannot be decoded)"):
            dataset[0]
        assert dataset[1]["data_samples"].img_id == 3

    def test_replaced_and_counted_by_option(self, damaged_root, pipeline):
        dataset = build(damaged_root, pipeline=pipeline, missing_images="replace")
        assert dataset[0]["data_samples"].img_id in (3, 5)
        assert dataset.num_replaced >= 1

    def test_counted_over_workers(self, damaged_root):
        dataset = build(damaged_root, pipeline=PIPELINE, missing_images="replace", indices=[0, 1])
        loader = DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=pseudo_collate)
        assert [batch["data_samples"][0].img_id for batch in loader] == [3, 3]
        assert dataset.num_replaced >= 1

    def test_never_replaced_in_a_test(self, damaged_root):
        dataset = build(damaged_root, pipeline=PIPELINE, missing_images="replace", test_mode=True)
        with pytest.raises(DataError, match=r"7\.jpg"):
            dataset[0]

    def test_other_faults_are_not_hidden(self, root):
        def fault(results):
            raise AssertionError("a fault of the pipeline")

        with pytest.raises(AssertionError, match="a fault of the pipeline"):
            build(root, pipeline=[fault], missing_images="replace")[0]


def test_exif_orientation_decides_over_the_recorded_size(tmp_path):
    """An image stored as 64x48 that a tag turns by a quarter: boxes live in the turned image."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "a" / "1.jpg", exif=exif)
    # recorded once as stored and once as shown
    records = [image(1, width=64, height=48), image(2, "1.jpg", width=48, height=64)]
    write_json(tmp_path / "a.json", coco(records, [box(i, i, [10, 50, 20, 10]) for i in (1, 2)]))
    dataset = build(tmp_path, pipeline=PIPELINE)
    for index in range(2):
        sample = dataset[index]["data_samples"]
        assert sample.ori_shape == (64, 48)
        assert sample.img_shape == (32, 24)
        assert sample.gt_instances.bboxes.tensor.tolist() == [[5, 25, 15, 30]]


def test_tiny_real_pixels(root):
    """What the pipeline gives is what OpenCV decodes, in BGR."""
    dataset = build(root, pipeline=[PIPELINE[0], PIPELINE[3]])
    expected = cv2.imread(str(root / "a" / "7.jpg"))
    np.testing.assert_array_equal(dataset[0]["inputs"].numpy(), expected.transpose(2, 0, 1))


# --- Categories to labels and class names ---


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


def test_labels_follow_the_given_classes_whatever_the_order_of_the_file(table):
    labels = build_label_map(table(PEOPLE, [1, 3]), "contiguous", ("bag", "Person"))
    assert (labels.classes, labels.category_ids) == (("bag", "Person"), (6, 3))
    assert "is not that of the annotation file" in labels.notes[0]


def test_classes_that_the_file_lacks_keep_their_labels(table):
    labels = build_label_map(table(PEOPLE, [1, 3]), "contiguous", ("dog", "person", "bag"))
    assert labels.category_ids == (None, 3, 6)
    assert labels.notes == ("1 classes are in no annotation file: dog",)


@pytest.mark.parametrize(
    ("cats", "classes", "num_classes", "what"),
    [
        (PEOPLE, ("cat", "dog"), None, "none of the classes.*cat.*dog"),
        (PEOPLE, ("bag", "bag"), None, "several classes have one name"),
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
        (PEOPLE, [1, 6], {"num_classes": 6}, "category_ids: by_name"),
        (categories("zero", "one", first=0), [0], {}, "category_ids: by_name"),
        ([{"id": 2**62, "name": "far"}], [2**62], {}, "do not fit in num_classes 100000.*by_name"),
        (
            [{"id": 2**62, "name": "far"}],
            [2**62],
            {"num_classes": 5},
            "do not fit in num_classes 5 .*by_name",
        ),
    ],
)
def test_category_ids_that_cannot_be_labels(table, cats, annotated, options, what):
    with pytest.raises(DataError, match=what):
        build_label_map(table(cats, annotated), "category_id", **options)


def test_categories_that_are_only_listed_are_reported_not_refused(table):
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


# --- Folders of images as a dataset ---


@pytest.fixture
def folder_root(tmp_path):
    init_default_scope("mmdet")
    return make_root(tmp_path)


def build_folder(**options):
    return DATASETS.build({"type": "ImageFolderDataset", **options})


def test_several_folders(folder_root):
    pipeline = [PIPELINE[0], *PIPELINE[2:]]
    dataset = build_folder(data_root=str(folder_root), folders=["b", "a"], recursive=True, pipeline=pipeline)
    infos = [dataset.get_data_info(index) for index in range(5)]
    assert [info["img_id"] for info in infos] == [0, 1, 2, 3, 4]
    assert [info["source_id"] for info in infos] == [0, 0, 1, 1, 1]
    sample = dataset[4]["data_samples"]
    assert sample.img_path == f"{folder_root}/a/sub/3.jpg"
    assert sample.ori_shape == (60, 40)


def test_one_folder_and_annotations_in_the_pipeline(folder_root):
    dataset = build_folder(folders=str(folder_root / "b"), pipeline=PIPELINE)
    assert len(dataset) == 2
    assert dataset[0]["data_samples"].gt_instances.bboxes.tensor.shape == (0, 4)


# --- The dataset inside mmdet's wrappers and samplers, and under mmdet's COCO metric ---


@pytest.fixture
def wrapped_root(tmp_path):
    init_default_scope("mmdet")
    return make_root(tmp_path)


def test_concat(wrapped_root):
    part = config(wrapped_root, pipeline=PIPELINE)
    joined = DATASETS.build({"type": "ConcatDataset", "datasets": [part, part]})
    assert len(joined) == 6
    assert joined[4]["data_samples"].img_id == 3
    assert joined.metainfo["classes"] == NAMES


def test_repeat(wrapped_root):
    repeated = DATASETS.build(
        {"type": "RepeatDataset", "times": 3, "dataset": config(wrapped_root, pipeline=PIPELINE)}
    )
    assert len(repeated) == 9
    assert repeated[7]["data_samples"].img_id == 3


def test_class_balanced(wrapped_root):
    part = config(wrapped_root, pipeline=PIPELINE, filter_cfg={"filter_empty_gt": True})
    balanced = DATASETS.build({"type": "ClassBalancedDataset", "oversample_thr": 0.9, "dataset": part})
    assert len(balanced) >= 2
    assert balanced[0]["data_samples"].img_id == 7


def test_multi_image_mix(wrapped_root):
    mosaic = [{"type": "Mosaic", "img_scale": (64, 48)}, PIPELINE[2], {"type": "PackDetInputs"}]
    part = config(wrapped_root, pipeline=PIPELINE[:2])
    mixed = DATASETS.build({"type": "MultiImageMixDataset", "dataset": part, "pipeline": mosaic})
    np.random.seed(0)
    sample = mixed[0]
    assert sample["inputs"].shape == (3, 24, 32)
    assert len(sample["data_samples"].gt_instances) >= 2


def test_samplers(wrapped_root):
    dataset = two_sources(wrapped_root, pipeline=PIPELINE)
    assert sorted(DefaultSampler(dataset, shuffle=True, seed=0)) == [0, 1, 2, 3, 4]
    assert set(ClassAwareSampler(dataset, seed=0)) <= {0, 2, 4}
    batches = list(AspectRatioBatchSampler(DefaultSampler(dataset, shuffle=False), batch_size=2))
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    assert [1] in batches  # the only portrait image


@pytest.mark.parametrize("with_file", [True, False])
def test_coco_metric(wrapped_root, with_file):
    """Perfect predictions score 1 by mmdet's own metric, with and without the annotation file."""
    dataset = build(wrapped_root, pipeline=PIPELINE, test_mode=True)
    ann_file = str(wrapped_root / "a.json") if with_file else None
    metric = METRICS.build({"type": "CocoMetric", "ann_file": ann_file, "metric": "bbox"})
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        boxes = [item for item in info["instances"] if not item["ignore_flag"]]
        predicted = InstanceData(
            bboxes=torch.tensor([item["bbox"] for item in boxes], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([item["bbox_label"] for item in boxes], dtype=torch.int64),
            scores=torch.ones(len(boxes)),
        )
        size_hw = (info["height"], info["width"])
        sample = {"img_id": info["img_id"], "ori_shape": size_hw, "instances": info["instances"]}
        metric.process({}, [{**sample, "pred_instances": predicted}])
    assert metric.evaluate(size=len(dataset))["coco/bbox_mAP"] == 1.0


def test_classes_are_not_copied_at_every_look(root):
    """They are one name a label; with ids in the millions a copy takes seconds."""
    dataset = build(root, label_mode="category_id", num_classes=100_000)
    assert dataset.metainfo["classes"] is dataset.metainfo["classes"]
    assert dataset.get_subset([0]).metainfo["category_ids"] is dataset.metainfo["category_ids"]
    dataset.metainfo["classes"] = ()
    assert len(dataset.metainfo["classes"]) == 100_000


@pytest.mark.parametrize("given", ["ann_file", "sources"])
def test_messages_name_the_argument_that_was_given(tmp_path, given):
    arguments = {
        "ann_file": dict(ann_file=str(tmp_path / "none.json")),
        "sources": dict(sources=[dict(image_dir=str(tmp_path), json_file=str(tmp_path / "none.json"))]),
    }[given]
    for build_it in (
        lambda: SerializedCocoDataset(**arguments).full_init(),
        lambda: FastCocoMetric(**arguments)._ground_truth([]),
    ):
        with pytest.raises(DataError) as caught:
            build_it()
        name = {"ann_file": "ann_file", "sources": "json_file"}[given]
        assert caught.value.problems[0].hint == f"correct {name}"
