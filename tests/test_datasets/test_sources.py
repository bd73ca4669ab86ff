"""Finding annotation files and images."""

import os
import shutil
from pathlib import Path

import pytest
from data_builders import coco, image, three_images, write_images, write_json

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


def test_of_a_conversion_only_the_shards_are_read(tmp_path):
    """``convert`` leaves other files in its results folder, which hold no annotations."""
    names = ["cam/cam-shard-00000-of-00002.json", "cam/cam-shard-00001-of-00002.json"]
    for name in names:
        write_json(tmp_path / name, coco([], []))
    for name in ("status.json", "warnings.json", "experiment.json"):
        write_json(tmp_path / name, '{"status": "SUCCESS"}\n{"status": "SUCCESS"}\n')
    assert files(tmp_path) == [Path(name).name for name in names]


def test_status_json_is_no_shard(shards):
    write_json(shards / "status.json", "{}\n{}\n")
    assert files(shards) == ["a.json", "b.json", "c.json"]


def test_annotation_files_are_not_fetched():
    with pytest.raises(DataError, match="annotation files are not fetched"):
        files("s3://bucket/a.json")


@pytest.fixture
def without_sizes(tmp_path):
    document = three_images()
    write_images(tmp_path / "images", document)
    document["images"][0].pop("width")
    document["images"][1].update(width=None, height=0)
    return tmp_path, {
        "image_dir": str(tmp_path / "images"),
        "json_file": str(write_json(tmp_path / "a.json", document)),
    }


@pytest.mark.parametrize("storage", ["process", "shared"])
def test_missing_sizes_are_read_from_the_images(without_sizes, storage):
    folder, source = without_sizes
    table = read_coco_sources([source], storage=storage)
    assert table.sizes_hw.tolist() == [[48, 64], [60, 40], [48, 64]]
    assert table.visible.all()
    (repair,) = table.repairs
    assert repair.startswith("images without width and height: read from the image files: 2, the first: ")
    if storage == "shared":  # from the cache, without the images
        shutil.rmtree(folder / "images")
        again = read_coco_sources([source], storage="shared")
        assert again.sizes_hw.tolist() == table.sizes_hw.tolist()
        assert again.repairs == table.repairs


def test_missing_sizes_of_missing_images_are_refused(without_sizes):
    folder, source = without_sizes
    (folder / "images" / "7.jpg").unlink()
    with pytest.raises(DataError) as caught:
        read_coco_sources([source])
    (found,) = caught.value.problems
    assert found.where == "images[0]"
    assert "7.jpg: cannot be read" in found.value
    assert "add width and height" in found.hint


def test_a_metric_needs_no_sizes(without_sizes):
    folder, source = without_sizes
    shutil.rmtree(folder / "images")
    table = read_coco_sources([source], sizes_required=False)
    assert table.sizes_hw.tolist() == [[0, 0], [0, 0], [48, 64]]
    assert table.visible.all()


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


@pytest.mark.parametrize("blank", ["", "  "])
def test_no_annotation_file_is_not_the_current_folder(tmp_path, monkeypatch, blank):
    write_json(tmp_path / "a.json", three_images())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="json_file: is not given"):
        CocoSource("images", blank).files()
