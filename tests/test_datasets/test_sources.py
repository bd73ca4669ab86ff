"""Finding annotation files and images."""

import os
from pathlib import Path

import pytest
from data_builders import coco, image, three_images, write_json

from ddetr_mm.datasets.sources import (
    CocoSource,
    find_images,
    join_location,
    list_images,
    read_coco_sources,
)
from ddetr_mm.errors import DataError


def files(json_file):
    return [path.name for path in CocoSource("images", str(json_file)).files()]


@pytest.fixture
def shards(tmp_path):
    for name in ("b.json", "a.json", "deep/c.json", "notes.txt"):
        write_json(tmp_path / name, coco([], []))
    return tmp_path


def test_a_file_a_pattern_and_a_folder(shards):
    assert files(shards / "b.json") == ["b.json"]
    assert files(shards / "*.json") == ["a.json", "b.json"]
    assert files(shards / "**" / "*.json") == ["a.json", "b.json", "c.json"]
    assert files(shards) == ["a.json", "b.json", "c.json"]


@pytest.mark.parametrize("json_file", ["nothing.json", "x-*.json", "empty"])
def test_nothing_there_says_what_was_searched(shards, json_file):
    (shards / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        files(shards / json_file)
    assert str(shards / json_file) in str(caught.value)


def test_a_name_with_brackets_is_a_file_when_it_exists(tmp_path):
    path = write_json(tmp_path / "set[1].json", coco([], []))
    assert files(path) == ["set[1].json"]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ({"image_dir": "x"}, "needs json_file"),
        ({"image_dir": None, "json_file": "x"}, "needs image_dir"),
        ({"image_dir": "x", "json_file": "y", "jsonfile": "z"}, "unknown key"),
        ("x.json", "no data source"),
    ],
)
def test_wrong_sources(source, what):
    with pytest.raises(DataError, match=what):
        read_coco_sources([source])


def test_no_source():
    with pytest.raises(DataError, match="no data source"):
        read_coco_sources([])


def test_an_empty_file_is_refused(tmp_path):
    path = write_json(tmp_path / "a.json", "")
    with pytest.raises(DataError, match="byte 0"):
        read_coco_sources([CocoSource("x", str(path))])


def test_a_folder_among_the_matches_is_no_file(tmp_path):
    write_json(tmp_path / "a.json", three_images())
    (tmp_path / "b.json").mkdir()
    assert files(tmp_path / "*.json") == ["a.json"]


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("", "a.jpg", "a.jpg"),
        ("x", "a.jpg", "x/a.jpg"),
        ("x/", "a.jpg", "x/a.jpg"),
        ("x", "/a.jpg", "/a.jpg"),
        ("s3://bucket/x", "a.jpg", "s3://bucket/x/a.jpg"),
        ("x", "http://host/a.jpg", "http://host/a.jpg"),
        ("x", "", "x"),
    ],
)
def test_join_location(folder, name, joined):
    assert join_location(folder, name) == joined


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_images_of_folders_in_order(tmp_path):
    touch(tmp_path, "b/2.JPG", "b/1.png", "b/readme.txt", "a/z.jpeg", "b/deep/0.bmp")
    names = [str(path.relative_to(tmp_path)) for path in list_images([tmp_path / "b", tmp_path / "a"])]
    assert names == ["b/1.png", "b/2.JPG", "a/z.jpeg"]


def test_images_below_folders_and_single_files(tmp_path):
    touch(tmp_path, "b/2.jpg", "b/deep/0.bmp", "c.png")
    found = list_images([tmp_path / "b", tmp_path / "c.png", tmp_path / "b"], recursive=True)
    assert [path.name for path in found] == ["2.jpg", "0.bmp", "c.png"]


def test_what_only_looks_like_an_image_is_left_out(tmp_path):
    touch(tmp_path, "1.png", "._1.png", ".DS_Store", ".hidden.png", "notes.txt", "dead.png/x", "Thumbs.db")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    found, skipped = find_images([tmp_path])
    assert [path.name for path in found] == [".hidden.png", "1.png"]
    assert {one.path.name: one.reason for one in skipped} == {
        **dict.fromkeys(("._1.png", ".DS_Store", "Thumbs.db"), "a file of the operating system"),
        **dict.fromkeys(("dead.png", "pipe.jpg", "link.png"), "no regular file"),
    }


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list_images([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no image was found"):
        list_images([tmp_path])


def test_unreadable_file(tmp_path):
    path = write_json(tmp_path / "a.json", coco([image(1)], []))
    table = read_coco_sources([{"image_dir": tmp_path, "json_file": path}])
    assert table.image_ids.tolist() == [1]
