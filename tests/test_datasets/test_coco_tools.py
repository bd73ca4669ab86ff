import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kitti_builder import KittiFolder, label_line, read_shards, tree

from ddetr_mm.convert.convert import convert_kitti
from ddetr_mm.datasets.coco_tools import balanced_parts, coco_to_kitti, merge_coco, split_coco
from ddetr_mm.errors import DataError


def coco(images, categories=("car", "person"), first_id=0, first_category=1):
    """A document from file name → list of (category, box)."""
    ids = {name: number for number, name in enumerate(categories, start=first_category)}
    document = {
        "info": {"year": 2026},
        "categories": [{"id": number, "name": name, "supercategory": "x"} for name, number in ids.items()],
        "images": [],
        "annotations": [],
    }
    for image_id, (file_name, boxes) in enumerate(images.items(), start=first_id):
        document["images"].append(
            {"id": image_id, "file_name": file_name, "width": 64, "height": 48, "license": 3}
        )
        for name, box in boxes:
            document["annotations"].append(
                {
                    "id": first_id + len(document["annotations"]),
                    "image_id": image_id,
                    "category_id": ids[name],
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": [[1, 2, 3, 4, 5, 6]],
                }
            )
    return document


def written(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def contents(document):
    """File name → sorted (category, box)."""
    names = {category["id"]: category["name"] for category in document["categories"]}
    images = {image["id"]: image["file_name"] for image in document["images"]}
    found = {name: [] for name in images.values()}
    for annotation in document["annotations"]:
        found[images[annotation["image_id"]]].append(
            (names[annotation["category_id"]], tuple(annotation["bbox"]))
        )
    return {name: sorted(boxes) for name, boxes in found.items()}


BOX = (1, 2, 3, 4)
BOX2 = (5, 6, 7, 8)


class TestMerge:
    def merge(self, tmp_path, *documents):
        paths = [written(tmp_path / f"{number}.json", document) for number, document in enumerate(documents)]
        report = merge_coco(paths, tmp_path / "merged" / "all.json")
        return report, json.loads((tmp_path / "merged" / "all.json").read_text())

    def test_shards_merge_to_the_same_as_one_shard(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        for number in range(9):
            folder.add("ab"[number % 2], str(number), f"{label_line()}\n" * (number % 3))
        shards = convert_kitti(folder.options(num_shards=4))
        report = merge_coco([tmp_path / "out/a", str(tmp_path / "out/b/*.json")], tmp_path / "merged.json")
        images, annotations = read_shards(shards.shard_paths)
        merged = json.loads((tmp_path / "merged.json").read_text())
        assert merged["images"] == images
        assert merged["annotations"] == annotations
        assert (report.num_files, report.num_images, report.kept_ids) == (8, 9, True)

    def test_padded_shards_lose_their_repeats(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        for number in range(5):
            folder.add("a", str(number), f"{label_line()}\n" * 2)
        convert_kitti(folder.options(num_shards=4, pad_shards=True))
        report = merge_coco([tmp_path / "out/a"], tmp_path / "merged.json")
        assert (report.num_images, report.num_annotations) == (5, 10)
        assert (report.num_repeated_images, report.num_repeated_annotations) == (3, 6)

    def test_equal_ids_are_counted_anew(self, tmp_path):
        first, second = coco({"a.jpg": [("car", BOX)]}), coco({"b.jpg": [("person", BOX2)]})
        report, merged = self.merge(tmp_path, first, second)
        assert not report.kept_ids
        assert [image["id"] for image in merged["images"]] == [0, 1]
        assert [annotation["id"] for annotation in merged["annotations"]] == [0, 1]
        assert contents(merged) == {"a.jpg": [("car", BOX)], "b.jpg": [("person", BOX2)]}

    def test_other_fields_are_carried_along(self, tmp_path):
        _, merged = self.merge(tmp_path, coco({"a.jpg": [("car", BOX)]}), coco({"b.jpg": []}, first_id=5))
        assert merged["info"] == {"year": 2026}
        assert merged["images"][1] == {"id": 5, "file_name": "b.jpg", "width": 64, "height": 48, "license": 3}
        assert merged["annotations"][0]["segmentation"] == [[1, 2, 3, 4, 5, 6]]
        assert merged["categories"][0]["supercategory"] == "x"

    def test_categories_are_the_same_by_name(self, tmp_path):
        first = coco({"a.jpg": [("car", BOX), ("person", BOX)]}, ("car", "person"))
        second = coco({"b.jpg": [("person", BOX2), ("bus", BOX2)]}, ("person", "bus"), first_id=10)
        report, merged = self.merge(tmp_path, first, second)
        assert report.category_ids == {"car": 1, "person": 2, "bus": 3}
        assert report.changed_categories == ["person", "bus"]
        assert contents(merged) == {**contents(first), **contents(second)}

    def test_the_same_image_in_two_files_unites_its_annotations(self, tmp_path):
        first = coco({"a.jpg": [("car", BOX), ("car", BOX)]})
        second = coco({"a.jpg": [("car", BOX), ("person", BOX2)]}, first_id=10)
        report, merged = self.merge(tmp_path, first, second)
        assert contents(merged) == {"a.jpg": [("car", BOX), ("car", BOX), ("person", BOX2)]}
        assert (report.num_repeated_images, report.num_repeated_annotations) == (1, 1)
        assert {annotation["image_id"] for annotation in merged["annotations"]} == {0}

    def test_the_same_image_in_two_sizes_is_refused(self, tmp_path):
        first, second = coco({"a.jpg": []}), coco({"a.jpg": []})
        second["images"][0]["width"] = 65
        with pytest.raises(DataError, match="65x48"):
            self.merge(tmp_path, first, second)
        assert not (tmp_path / "merged").exists() or not list((tmp_path / "merged").iterdir())

    def test_files_without_annotations_and_annotations_without_id(self, tmp_path):
        first, second = coco({"a.jpg": []}), coco({"b.jpg": [("car", BOX)]}, first_id=9)
        del first["annotations"], second["annotations"][0]["id"]
        report, merged = self.merge(tmp_path, first, second)
        assert not report.kept_ids
        assert [annotation["id"] for annotation in merged["annotations"]] == [0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda document: document["annotations"][0].update(image_id=99), "annotations"),
            (lambda document: document["annotations"][0].update(category_id=99), "category_id"),
            (lambda document: document["images"].append(document["images"][0]), "used twice"),
            (lambda document: document["annotations"].append(document["annotations"][0]), "used twice"),
            (lambda document: document["annotations"][0].pop("bbox"), "bbox"),
            (lambda document: document.pop("images"), "images"),
        ],
    )
    def test_wrong_files_are_refused(self, tmp_path, change, message):
        document = coco({"a.jpg": [("car", BOX)]})
        change(document)
        with pytest.raises(DataError, match=message) as caught:
            self.merge(tmp_path, document)
        assert "0.json" in str(caught.value)

    def test_missing_and_broken_files(self, tmp_path):
        with pytest.raises(DataError, match="does not exist"):
            merge_coco([tmp_path / "nowhere.json"], tmp_path / "x.json")
        (tmp_path / "broken.json").write_text('{"images": [')
        with pytest.raises(DataError, match=r"broken\.json"):
            merge_coco([tmp_path / "broken.json"], tmp_path / "x.json")


class TestBalance:
    def spread(self, images, classes, parts, num_parts):
        table = np.zeros((num_parts, classes.max() + 1))
        np.add.at(table, (parts[images], classes), 1)
        return table / table.sum(axis=0)

    def test_every_class_gets_its_share(self):
        random = np.random.default_rng(3)
        num_images, fractions = 2000, [0.7, 0.2, 0.1]
        counts = random.poisson(4, num_images)
        images = np.repeat(np.arange(num_images), counts)
        weights = np.array([0.6, 0.25, 0.1, 0.04, 0.01])
        classes = random.choice(5, size=len(images), p=weights)
        parts = balanced_parts(images, classes, num_images, fractions)
        shares = self.spread(images, classes, parts, 3)
        np.testing.assert_allclose(shares, np.array(fractions)[:, None] * np.ones(5), atol=0.02)
        np.testing.assert_allclose(np.bincount(parts) / num_images, fractions, atol=0.02)

    def test_a_rare_class_is_better_spread_than_by_chance(self):
        images = np.arange(400)
        classes = np.where(images < 10, 1, 0)
        parts = balanced_parts(images, classes, 400, [0.8, 0.2])
        assert self.spread(images, classes, parts, 2)[:, 1].tolist() == [0.8, 0.2]

    def test_images_without_boxes_are_divided_too(self):
        parts = balanced_parts(np.zeros(0, np.int64), np.zeros(0, np.int64), 10, [0.5, 0.5])
        assert np.bincount(parts).tolist() == [5, 5]

    @settings(deadline=None)
    @given(
        st.integers(1, 30).flatmap(
            lambda num: st.tuples(
                st.just(num), st.lists(st.tuples(st.integers(0, num - 1), st.integers(0, 4)), max_size=60)
            )
        ),
        st.integers(0, 3),
    )
    def test_every_image_gets_one_part_and_the_same_each_time(self, case, seed):
        num_images, boxes = case
        images = np.array([image for image, _ in boxes], np.int64)
        classes = np.array([number for _, number in boxes], np.int64)
        parts = balanced_parts(images, classes, num_images, [0.6, 0.4], seed)
        assert set(parts.tolist()) <= {0, 1}
        np.testing.assert_array_equal(parts, balanced_parts(images, classes, num_images, [0.6, 0.4], seed))


class TestSplit:
    @pytest.fixture
    def document(self):
        boxes = {
            f"{n:02d}.jpg": [("car", BOX)] * (n % 3) + [("person", BOX2)] * (n % 5 == 0) for n in range(40)
        }
        return coco(boxes, first_category=4)

    @pytest.mark.parametrize("fractions", [{"train": 0.75, "val": 0.25}, {"train": 75, "val": 25}])
    def test_parts_hold_everything_once(self, tmp_path, document, fractions):
        reports = split_coco(written(tmp_path / "all.json", document), tmp_path / "parts", fractions)
        assert [report.num_images for report in reports.values()] == [30, 10]
        parts = [json.loads(reports[name].path.read_text()) for name in ("train", "val")]
        assert reports["val"].path == tmp_path / "parts/val.json"
        assert {**contents(parts[0]), **contents(parts[1])} == contents(document)
        assert all(part["categories"] == document["categories"] for part in parts)
        assert parts[0]["images"][0].keys() == document["images"][0].keys()
        assert reports["val"].boxes_per_category == {"car": 10, "person": 2}
        merged = merge_coco([tmp_path / "parts"], tmp_path / "again.json")
        assert (merged.num_images, merged.kept_ids) == (40, True)

    def test_the_order_of_ids_does_not_matter(self, tmp_path, document):
        shuffled = copy.deepcopy(document)
        shuffled["images"].reverse()
        shuffled["categories"].reverse()
        report = split_coco(written(tmp_path / "all.json", shuffled), tmp_path, {"a": 0.5, "b": 0.5})
        assert report["a"].boxes_per_category == {"car": 20, "person": 4}

    @pytest.mark.parametrize(
        ("fractions", "message"),
        [
            ({"a": 0.5, "b": 0.6}, "sum to 1"),
            ({}, "sum to 1"),
            ({"a": 1.5, "b": -0.5}, "no share"),
            ({"../a": 1}, "no part name"),
            ({"": 1}, "no part name"),
        ],
    )
    def test_wrong_shares_are_refused(self, tmp_path, document, fractions, message):
        with pytest.raises(DataError, match=message):
            split_coco(written(tmp_path / "all.json", document), tmp_path / "parts", fractions)
        assert not (tmp_path / "parts").exists()


class TestToKitti:
    def test_and_back_again(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        folder.add("a", "x", label_line("Car", (0.25, 1, 30.5, 40)) + "\n" + label_line("person"))
        folder.add("a", "empty", "")
        folder.add("b", "x", label_line("Truck", (1.1, 2.2, 3.3, 4.4)))
        first = convert_kitti(folder.options(num_shards=2))
        report = coco_to_kitti(first.shard_paths, tmp_path / "back")
        assert (report.num_files, report.num_lines) == (3, 3)
        labels = {name: text for name, text in tree(tmp_path / "back").items() if not name.startswith(".")}
        assert sorted(labels) == ["a/labels/empty.txt", "a/labels/x.txt", "b/labels/x.txt"]
        assert labels["a/labels/empty.txt"] == b""
        for name, text in labels.items():
            (folder.root / name).write_bytes(text)
        mapping = {"car": "car", "person": "person"}
        second = convert_kitti(folder.options(num_shards=2, mapping=mapping, results_dir=tmp_path / "out2"))
        for before, after in zip(
            read_shards(first.shard_paths), read_shards(second.shard_paths), strict=True
        ):
            for row, other in zip(before, after, strict=True):
                assert row.keys() == other.keys()
                for key, value in row.items():
                    assert other[key] == (
                        value if isinstance(value, (str, int)) else pytest.approx(value, abs=1e-5)
                    )

    def test_where_labels_go(self, tmp_path):
        document = coco({"a/images/x.jpg": [], "y.png": [], "deep/er/z.v.jpg": [], "images/w.jpg": []})
        coco_to_kitti([written(tmp_path / "all.json", document)], tmp_path / "out")
        names = sorted(name for name in tree(tmp_path / "out") if not name.startswith("."))
        assert names == ["a/labels/x.txt", "deep/er/z.v.txt", "labels/w.txt", "y.txt"]

    def test_crowds_and_names_with_spaces(self, tmp_path):
        document = coco({"x.jpg": [("traffic light", BOX), ("car", BOX2)]}, ("traffic light", "car"))
        document["annotations"][1]["iscrowd"] = 1
        report = coco_to_kitti([written(tmp_path / "all.json", document)], tmp_path / "out")
        lines = (tmp_path / "out/x.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == ["traffic_light", "DontCare"]
        assert [len(line.split()) for line in lines] == [15, 15]
        assert report.renamed_classes == {"traffic light": "traffic_light"}
        assert report.num_crowds == 1

    @pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", ""])
    def test_names_that_lead_out_are_refused(self, tmp_path, name):
        path = written(tmp_path / "all.json", coco({name: []}))
        with pytest.raises(DataError, match=r"leads out|file_name"):
            coco_to_kitti([path], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_two_images_with_one_label_are_refused(self, tmp_path):
        path = written(tmp_path / "all.json", coco({"a/x.jpg": [], "a/x.png": []}))
        with pytest.raises(DataError, match=r"a/x\.txt"):
            coco_to_kitti([path], tmp_path / "out")

    def test_categories_that_differ_in_spaces_only_are_refused(self, tmp_path):
        path = written(tmp_path / "all.json", coco({"x.jpg": []}, ("a b", "a_b")))
        with pytest.raises(DataError, match="same name"):
            coco_to_kitti([path], tmp_path / "out")

    def test_labels_of_others_are_not_replaced(self, tmp_path):
        path = written(tmp_path / "all.json", coco({"a/images/x.jpg": [("car", BOX)]}))
        (tmp_path / "out/a/labels").mkdir(parents=True)
        (tmp_path / "out/a/labels/x.txt").write_text("precious")
        with pytest.raises(DataError, match="in the way"):
            coco_to_kitti([path], tmp_path / "out")
        assert (tmp_path / "out/a/labels/x.txt").read_text() == "precious"
