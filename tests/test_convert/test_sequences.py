import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.convert.sequences import (
    KittiSequence,
    count_labels,
    image_names,
    image_stem,
    labels_without_image,
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
        assert image_names(sequence, None) == (names, [])

    def test_only_the_extension_that_is_asked_for(self, root):
        sequence = self.fill(root, "a.jpg", "a.png", "b.png", "c.PNG", ".png")
        assert image_names(sequence, ".png") == (["a.png", "b.png"], [])

    def test_images_of_the_same_name(self, root):
        sequence = self.fill(root, "a.png", "a.jpg", "a-1.jpg", "a.b.jpg", "b.png", "a.bmp")
        assert image_names(sequence, None) == (["a-1.jpg", "a.b.jpg", "a.bmp", "b.png"], ["a.jpg", "a.png"])

    def test_labels_without_image(self, root):
        sequence = self.fill(root, "a.jpg", "a.txt", "b.txt", "a.jpg.txt", ".c.txt")
        images, _ = image_names(sequence, None)
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
        assert image_names(sequence, None) == (["\udcff.jpg"], [])


names = st.lists(
    st.text("ab.", min_size=1, max_size=4).map(lambda stem: stem + ".jpg")
    | st.text("ab.", min_size=1, max_size=4).map(lambda stem: stem + ".png"),
    unique=True,
)


@given(names)
def test_every_label_belongs_to_the_first_image_of_its_name(found):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in found:
            (place / name).touch()
        sequence = KittiSequence("a", place, place, place, "", "")
        kept, left_out = image_names(sequence, None)
    visible = sorted(name for name in found if not name.startswith("."))
    stems = [name[:-4] for name in visible]
    assert sorted(kept + left_out) == visible
    assert kept == [name for index, name in enumerate(visible) if stems.index(stems[index]) == index]
    assert {name[:-4] for name in left_out} <= {name[:-4] for name in kept}


def test_names_are_sorted_by_their_bytes(tmp_path):
    for name in ("b.jpg", "a.jpg", "ü.jpg", "10.jpg", "9.jpg"):
        (tmp_path / name).touch()
    sequence = KittiSequence("a", tmp_path, tmp_path, tmp_path, "", "")
    assert image_names(sequence, ".jpg")[0] == ["10.jpg", "9.jpg", "a.jpg", "b.jpg", "ü.jpg"]
