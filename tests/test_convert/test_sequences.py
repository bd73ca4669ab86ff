import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.convert import sequences
from ddetr_mm.convert.sequences import (
    NameList,
    count_labels,
    image_stem,
    labels_without_image,
    list_images,
    read_sequences,
)
from ddetr_mm.errors import DataError


@pytest.fixture
def root(tmp_path):
    for name in ("data/a", "data/b/c", "data/ü x", "other/a"):
        for folder in ("images", "labels"):
            (tmp_path / name / folder).mkdir(parents=True)
    return tmp_path


def read(root, text, data_root="data", images="images", labels="labels"):
    source = root / "sequences.txt"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_sequences(source, None if data_root is None else root / data_root, images, labels)


class TestReading:
    def test_names_are_paths_relative_to_data_root(self, root):
        sequences = read(root, "a\nb/c\n./a/../ü x/\n")
        assert [sequence.name for sequence in sequences] == ["a", "b/c", "ü x"]
        assert sequences[1].image_prefix == "b/c/images/"
        assert sequences[1].label_prefix == "b/c/labels/"
        assert sequences[1].image_dir == root / "data/b/c/images"
        assert all(sequence.image_root == root / "data" for sequence in sequences)

    @pytest.mark.parametrize("text", [b"\xef\xbb\xbfa\r\n\r\n  \r\nb/c  \r\n", b"# comment\na\n\nb/c"])
    def test_blank_lines_comments_and_windows_line_ends(self, root, text):
        assert [sequence.name for sequence in read(root, text)] == ["a", "b/c"]

    def test_absolute_lines_inside_data_root(self, root):
        (sequence,) = read(root, str(root / "data/b/c"))
        assert (sequence.name, sequence.image_root) == ("b/c", root / "data")

    @pytest.mark.parametrize("data_root", [None, "data"])
    def test_absolute_lines_elsewhere_are_called_by_their_last_name(self, root, data_root):
        (sequence,) = read(root, str(root / "other/a"), data_root)
        assert (sequence.name, sequence.image_root) == ("a", root / "other")

    def test_without_data_root_lines_are_relative_to_the_current_folder(self, root, monkeypatch):
        monkeypatch.chdir(root / "data/b")
        sequences = read(root, "c\n../a\n", None)
        assert [(sequence.name, sequence.image_root) for sequence in sequences] == [
            ("c", root / "data/b"),
            ("a", root / "data"),
        ]

    def test_the_root_itself(self, root):
        (sequence,) = read(root, ".", "data/a")
        assert (sequence.name, sequence.image_dir) == ("a", root / "data/a/images")

    @pytest.mark.parametrize("name", [None, "", "."])
    def test_images_may_lie_in_the_sequence_folder_itself(self, root, name):
        (sequence,) = read(root, "a", images=name)
        assert sequence.image_dir == root / "data/a"
        assert sequence.image_prefix == "a/"


class TestRefusing:
    @pytest.mark.parametrize("text", ["a\na\n", "a\n./a/\n", "a\nb/../a\n"])
    def test_the_same_sequence_twice(self, root, text):
        with pytest.raises(DataError, match=r"line 2.*same sequence as line 1"):
            read(root, text)

    def test_two_sequences_of_the_same_name(self, root):
        with pytest.raises(DataError, match="common data_root"):
            read(root, f"{root}/data/a\n{root}/other/a\n", None)

    @pytest.mark.parametrize("line", ["../other/a", "b/../../other/a"])
    def test_lines_that_lead_out_of_data_root(self, root, line):
        with pytest.raises(DataError, match="leads out of data_root"):
            read(root, line)

    def test_the_file_system_root(self, root):
        with pytest.raises(DataError, match="no folder with a name"):
            read(root, "/", None)

    @pytest.mark.parametrize(
        ("folders", "missing"),
        [({}, "nowhere"), ({"images": "pictures"}, "a/pictures"), ({"labels": "boxes"}, "a/boxes")],
    )
    def test_folders_that_do_not_exist(self, root, folders, missing):
        line = "a" if folders else "nowhere"
        with pytest.raises(DataError, match="does not exist") as caught:
            read(root, line, **folders)
        (problem,) = caught.value.problems
        assert problem.value == str(root / "data" / missing)
        assert problem.where == "line 1"

    def test_a_file_in_place_of_a_folder(self, root):
        (root / "data/file").write_text("")
        with pytest.raises(DataError, match="cannot be read"):
            read(root, "file")

    def test_all_faults_are_shown_at_once(self, root):
        with pytest.raises(DataError) as caught:
            read(root, "nowhere\na\na\n../x\n")
        assert [problem.where for problem in caught.value.problems] == ["line 1", "line 3", "line 4"]

    @pytest.mark.parametrize("text", ["", "\n \n", "# a\n"])
    def test_a_list_of_nothing(self, root, text):
        with pytest.raises(DataError, match="lists no sequence"):
            read(root, text)

    def test_a_list_that_is_not_text(self, root):
        with pytest.raises(DataError, match="not UTF-8"):
            read(root, b"\xff\xfea")

    def test_a_list_that_does_not_exist(self, root):
        with pytest.raises(DataError, match="input_source"):
            read_sequences(root / "nowhere.txt", None, None, None)

    @pytest.mark.parametrize("name", ["..", "../images", "/images", "x/../../images"])
    def test_folder_names_that_lead_out(self, root, name):
        with pytest.raises(DataError, match="image_dir_name"):
            read(root, "a", images=name)


def listed(sequence, image_extension):
    """Images and left-out images as lists."""
    return tuple(names.part(0, len(names)) for names in list_images(sequence, image_extension))


class TestListing:
    def fill(self, root, *names):
        (sequence,) = read(root, "a")
        for name in names:
            folder = sequence.label_dir if name.endswith(".txt") else sequence.image_dir
            (folder / name).write_bytes(b"")
        return sequence

    def test_every_common_image_type(self, root):
        names = ["a.jpg", "b.JPEG", "c.png", "d.BMP", "e.webp", "f.tif", "g.tiff"]
        sequence = self.fill(root, *names, "h.csv", "jpg", ".hidden.jpg", "._a.jpg")
        assert listed(sequence, None) == (names, [])

    def test_only_the_extension_that_is_asked_for(self, root):
        sequence = self.fill(root, "a.jpg", "a.png", "b.png", "c.PNG", ".png")
        assert listed(sequence, ".png") == (["a.png", "b.png"], [])

    def test_images_of_the_same_name(self, root):
        sequence = self.fill(root, "a.png", "a.jpg", "a-1.jpg", "a.b.jpg", "b.png", "a.bmp")
        assert listed(sequence, None) == (["a-1.jpg", "a.b.jpg", "a.bmp", "b.png"], ["a.jpg", "a.png"])

    def test_labels_without_image(self, root):
        sequence = self.fill(root, "a.jpg", "a.txt", "b.txt", "a.jpg.txt", ".c.txt")
        images, _ = list_images(sequence, None)
        assert count_labels(sequence) == 3
        assert labels_without_image(sequence, images, None) == ["a.jpg.txt", "b.txt"]

    @pytest.mark.parametrize(
        ("name", "extension", "stem"),
        [
            ("a.jpg", None, "a"),
            ("a.b.jpg", None, "a.b"),
            ("a.b.jpg", ".b.jpg", "a"),
            ("a_left.png", "_left.png", "a"),
        ],
    )
    def test_stems(self, name, extension, stem):
        assert image_stem(name, extension) == stem

    def test_names_that_are_not_utf8_are_listed(self, root):
        (sequence,) = read(root, "a")
        Path(os.fsdecode(os.fsencode(sequence.image_dir) + b"/\xff.jpg")).write_bytes(b"")
        assert listed(sequence, None) == (["\udcff.jpg"], [])


names = st.lists(st.binary(min_size=1, max_size=9).filter(lambda name: b"\0" not in name))


def as_list(names):
    return names.part(0, len(names))


@given(names)
def test_names_come_back_as_the_file_system_knows_them(found):
    assert [os.fsencode(name) for name in as_list(NameList.of(iter(found)))] == found


def test_parts_are_collected_in_batches(monkeypatch):
    monkeypatch.setattr(sequences, "_NAMES_AT_ONCE", 3)
    names = NameList.of(f"{number}{'x' * number}".encode() for number in range(10))
    assert as_list(names) == [f"{number}{'x' * number}" for number in range(10)]
    assert as_list(names.map(lambda name: name[:1])) == list("0123456789")
    assert names.part(8, 20) == ["8xxxxxxxx", "9xxxxxxxxx"]


def test_folders_are_sorted_and_filtered(tmp_path):
    for name in ("b.jpg", "a.jpg", "ü.jpg", "c.png", "10.jpg", "9.jpg"):
        (tmp_path / name).touch()
    names = NameList.of_folder(tmp_path, lambda name: name.endswith(b".jpg"))
    assert as_list(names) == ["10.jpg", "9.jpg", "a.jpg", "b.jpg", "ü.jpg"]


def test_an_empty_folder(tmp_path):
    names = NameList.of_folder(tmp_path, lambda name: True)
    assert len(names) == 0
    assert as_list(names) == []
    assert names.first_of_each().shape == (0,)


@given(names)
def test_first_of_each(found):
    kept = NameList.of(found).take(NameList.of(found).first_of_each())
    assert [os.fsencode(name) for name in as_list(kept)] == list(dict.fromkeys(found))


@given(names, names)
def test_missing(found, others):
    mask = NameList.of(found).missing_in(NameList.of(others))
    assert mask.tolist() == [name not in others for name in found]


def test_positions_and_masks():
    names = NameList.of([b"a", b"b", b"c"])
    assert as_list(names.take(np.array([2, 0, 0]))) == ["c", "a", "a"]
    assert as_list(names.take(np.array([True, False, True]))) == ["a", "c"]


def test_a_name_takes_few_bytes():
    tracemalloc.start()
    names = NameList.of(f"frame_{number:07d}.jpg".encode() for number in range(300_000))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names) == 300_000
    assert kept < 20 * 300_000
    assert peak < 60 * 300_000
