"""The spec of ``convert``: every field changes what the command leaves."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddetr_mm.errors import DataError

LABEL = "{} 0.00 0 0.00 1 2 30 40 0 0 0 0 0 0 0\n"


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """Convert two sequences of four pictures with further spec lines; returns the results folder."""
    from ddetr_mm.tasks.convert import run

    root = tmp_path / "data"
    for sequence in ("a", "b"):
        for images, labels in (("images", "labels"), ("more", "tags")):
            (root / sequence / images).mkdir(parents=True)
            (root / sequence / labels).mkdir()
            for number in range(4):
                ending = "png" if number == 3 else "jpg"
                name = f"{images}{number}"
                Image.new("RGB", (60, 50), (number, 5, 9)).save(root / sequence / images / f"{name}.{ending}")
                (root / sequence / labels / f"{name}.txt").write_text(LABEL.format("person"))
    (tmp_path / "both.txt").write_text("a\nb\n")
    (tmp_path / "one.txt").write_text("a\n")

    def go(**fields: Any) -> Path:
        given = dict(
            input_source=str(tmp_path / "both.txt"),
            data_root=str(root),
            results_dir=str(tmp_path / "out"),
            image_dir_name="images",
            label_dir_name="labels",
            num_shards=1,
        )
        (tmp_path / "convert.yaml").write_text(json.dumps(given | fields))
        run(Namespace(experiment_spec=str(tmp_path / "convert.yaml"), overrides=[], debug=False))
        return Path((given | fields)["results_dir"])

    return go


def shards(folder: Path) -> dict[str, dict[str, Any]]:
    """Content of every shard by its name."""
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text())
        for path in sorted(folder.rglob("*-shard-*.json"))
    }


def names(folder: Path) -> list[str]:
    """File names of all images."""
    return sorted(image["file_name"] for one in shards(folder).values() for image in one["images"])


def test_input_source_lists_the_sequences(convert, tmp_path: Path):
    assert {name.split("/")[0] for name in names(convert())} == {"a", "b"}
    assert {name.split("/")[0] for name in names(convert(input_source=str(tmp_path / "one.txt")))} == {"a"}


def test_data_root_is_what_lines_are_relative_to(convert, tmp_path: Path):
    (tmp_path / "absolute.txt").write_text(f"{tmp_path}/data/a\n")
    folder = convert(input_source=str(tmp_path / "absolute.txt"), data_root=None)
    assert len(names(folder)) == 4
    with pytest.raises(DataError, match="data_root"):
        convert(data_root=str(tmp_path))


def test_results_dir_gets_the_files(convert, tmp_path: Path):
    folder = convert(results_dir=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "stats.txt").is_file() and len(shards(folder)) == 2
    assert not (tmp_path / "out").exists()


def test_image_and_label_folders(convert):
    assert names(convert())[0] == "a/images/images0.jpg"
    folder = convert(image_dir_name="more", label_dir_name="tags")
    assert names(folder)[0] == "a/more/more0.jpg"
    assert all(one["annotations"] for one in shards(folder).values())
    with pytest.raises(DataError):
        convert(image_dir_name="nothing")
    (first, *_) = shards(convert(label_dir_name="tags", ddetr_mm=dict(allow_empty=True))).values()
    assert not first["annotations"]  # the labels there belong to other pictures


def test_num_shards(convert):
    for count in (1, 3):
        found = shards(convert(num_shards=count))
        assert len(found) == 2 * count  # for each sequence
    assert {len(one["images"]) for one in found.values()} == {1, 2}


def test_allow_empty_accepts_label_files_without_a_usable_line(convert, tmp_path: Path):
    (tmp_path / "data" / "a" / "labels" / "images1.txt").write_text(LABEL.format("Bike"))
    with pytest.raises(DataError, match=r"a/labels/images1\.txt"):
        convert()
    found = shards(convert(ddetr_mm=dict(allow_empty=True)))
    assert sum(len(one["annotations"]) for one in found.values()) == 7


def test_pad_shards_fills_short_ones(convert):
    found = shards(convert(num_shards=3, ddetr_mm=dict(pad_shards=True)))
    assert {len(one["images"]) for one in found.values()} == {2}


def test_partitions(convert):
    random = shards(convert(partition_mode="random", num_partitions=2, val_split=25))
    assert {name: len(one["images"]) for name, one in random.items() if "fold-000" in name} == {
        "a/a-fold-000-of-002-shard-00000-of-00001.json": 1,
        "b/b-fold-000-of-002-shard-00000-of-00001.json": 1,
    }
    half = shards(convert(partition_mode="random", num_partitions=2, val_split=50))
    assert sum(len(one["images"]) for name, one in half.items() if "fold-000" in name) == 4
    whole = shards(convert(partition_mode="sequence", num_partitions=2))
    folds = {name.split("-fold-")[1][:3]: len(one["images"]) for name, one in whole.items() if one["images"]}
    assert folds == {"000": 4, "001": 4}
    assert len(shards(convert())) == 2 and not any("fold" in name for name in shards(convert()))


def test_image_extension(convert):
    assert len(names(convert())) == 8
    assert len(names(convert(image_extension=".png"))) == 2


def test_mapping_path(convert, tmp_path: Path):
    (first, *_) = shards(convert()).values()
    assert [one["name"] for one in first["categories"]] == ["person", "face", "bag"]
    (tmp_path / "mapping.json").write_text(json.dumps(dict(person="human", car="vehicle")))
    (first, *_) = shards(convert(mapping_path=str(tmp_path / "mapping.json"))).values()
    assert [one["name"] for one in first["categories"]] == ["vehicle", "human"]
    assert {one["category_id"] for one in first["annotations"]} == {2}


def test_strict_stops_at_a_bad_label(convert, tmp_path: Path):
    (tmp_path / "data" / "a" / "labels" / "images1.txt").write_text("person 1 2\n")
    folder = convert(ddetr_mm=dict(allow_empty=True))
    assert "images1.txt" in (folder / "warnings.json").read_text()
    with pytest.raises(DataError, match=r"images1\.txt"):
        convert(ddetr_mm=dict(strict=True), results_dir=str(tmp_path / "strict"))


def test_num_workers_are_processes(convert, monkeypatch):
    from ddetr_mm.convert import convert as converter

    seen: list[Any] = []
    original = converter.convert_kitti

    def watched(options: Any, **keywords: Any) -> Any:
        seen.append(options.num_workers)
        return original(options, **keywords)

    monkeypatch.setattr("ddetr_mm.tasks.convert.convert_kitti", watched)
    contents = [shards(convert(ddetr_mm=dict(num_workers=count))) for count in (0, 2)]
    assert seen == [0, 2]
    assert contents[0] == contents[1]


def test_it_ends_with_the_counts_by_class_and_the_section_to_paste(convert, tmp_path: Path, capsys):
    labels = tmp_path / "data" / "a" / "labels"
    (labels / "images1.txt").write_text(LABEL.format("person") + LABEL.format("traffic light") * 2)
    folder = convert()
    printed = capsys.readouterr()
    assert "lines of classes that the mapping lacks: traffic light 2" in printed.err
    assert "boxes by class (id, name, count): 1 person 8, 2 face 0, 3 bag 0" in printed.out
    assert (folder / "dataset.yaml").read_text() in printed.out
