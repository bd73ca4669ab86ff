import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddetr_mm.convert import plan
from ddetr_mm.convert.plan import ShardWriter, assign_sequences, shard_file, split_evenly, validation_mask


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50))
def test_parts_are_near_equal_and_complete(num_items, num_parts):
    parts = split_evenly(num_items, num_parts)
    assert len(parts) == num_parts
    assert [item for part in parts for item in part] == list(range(num_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("num_items", "percent", "chosen"),
    [(10, 20, 2), (10, 25, 2), (10, 0, 0), (10, 100, 10), (0, 50, 0), (3, 33.4, 1)],
)
def test_validation_share(num_items, percent, chosen):
    assert sum(validation_mask(num_items, percent, "seed")) == chosen


def test_validation_choice_depends_on_the_seed_alone():
    chosen = validation_mask(100, 30, "0/a")
    assert chosen.tolist() == validation_mask(100, 30, "0/a").tolist()
    assert chosen.tolist() != validation_mask(100, 30, "1/a").tolist()


def test_validation_choice_is_spread_over_all_images():
    chosen = np.flatnonzero(validation_mask(1000, 20, "0/a"))
    assert 50 < np.count_nonzero(chosen < 500) < 150


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda parts: st.tuples(
            st.lists(st.integers(0, 500), min_size=parts, max_size=20),
            st.lists(st.floats(0.1, 10), min_size=parts, max_size=parts),
        )
    )
)
def test_every_partition_gets_a_sequence(case):
    num_images, shares = case
    partitions = assign_sequences(num_images, shares)
    assert len(partitions) == len(num_images)
    assert set(partitions) == set(range(len(shares)))


def test_partitions_come_near_their_shares():
    num_images = [100, 90, 80, 40, 30, 30, 20, 10]
    partitions = assign_sequences(num_images, [20, 80])
    validation = sum(count for count, partition in zip(num_images, partitions, strict=True) if partition == 0)
    assert abs(validation - 80) <= 10
    assert sorted(
        sum(np.array(num_images)[np.array(assign_sequences(num_images, [1, 1])) == p]) for p in (0, 1)
    ) == [
        200,
        200,
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", 0, 1, 0, 1), "train/train-shard-00000-of-00001.json"),
        (("train", 1, 2, 7, 32), "train/train-fold-001-of-002-shard-00007-of-00032.json"),
        (("2011/drive_1", 0, 1, 0, 4), "2011/drive_1/drive_1-shard-00000-of-00004.json"),
    ],
)
def test_file_names(arguments, expected):
    assert str(shard_file(*arguments)) == expected


CATEGORIES = [{"id": 1, "name": "person"}]


class TestShardWriter:
    def add(self, writer, names, boxes, image_index):
        writer.add(
            names,
            np.array([[64, 48]] * len(names), np.int32).reshape(-1, 2),
            np.array(boxes, float).reshape(-1, 4),
            np.ones(len(boxes), np.int32),
            np.array(image_index, np.int32),
        )

    @pytest.mark.parametrize("spool_bytes", [16, 2**20])
    def test_writes_one_coco_file(self, tmp_path, monkeypatch, spool_bytes):
        monkeypatch.setattr(plan, "_SPOOL_BYTES", spool_bytes)
        path = tmp_path / "shard.json"
        writer = ShardWriter(path, "test", CATEGORIES, 100, 1000)
        self.add(writer, ["x.jpg", "ü.jpg"], [(0, 0, 2, 3), (1, 1, 0.5, 4)], [1, 1])
        self.add(writer, [], [], [])
        self.add(writer, ["z.jpg"], [(5, 6, 7, 8)], [0])
        writer.close()
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["categories"] == CATEGORIES
        assert content["images"] == [
            {"id": 100, "file_name": "x.jpg", "width": 64, "height": 48},
            {"id": 101, "file_name": "ü.jpg", "width": 64, "height": 48},
            {"id": 102, "file_name": "z.jpg", "width": 64, "height": 48},
        ]
        assert content["annotations"] == [
            {"id": 1000, "image_id": 101, "category_id": 1, "bbox": [0, 0, 2, 3], "area": 6, "iscrowd": 0},
            {"id": 1001, "image_id": 101, "category_id": 1, "bbox": [1, 1, 0.5, 4], "area": 2, "iscrowd": 0},
            {"id": 1002, "image_id": 102, "category_id": 1, "bbox": [5, 6, 7, 8], "area": 56, "iscrowd": 0},
        ]
        assert (writer.num_images, writer.num_annotations) == (3, 3)
        assert [file.name for file in path.parent.iterdir()] == ["shard.json"]

    def test_an_empty_shard_is_a_coco_file_too(self, tmp_path):
        writer = ShardWriter(tmp_path / "shard.json", "test", CATEGORIES, 0, 0)
        writer.close()
        content = json.loads((tmp_path / "shard.json").read_text())
        assert content["images"] == content["annotations"] == []
