"""What a conversion makes of wrong labels and images: left out, counted, listed."""

import json
import os

import pytest
from kitti_builder import KittiFolder, image_bytes, label_line, read_shards, warnings_of

from ddetr_mm.convert.convert import convert_kitti
from ddetr_mm.errors import DataError

#: Kinds of wrong lines that leave nothing of a file with one line; "not_a_number" has two below.
LOST_WITH_ITS_FILE = (
    "wrong_column_count",
    "eight_columns",
    "yolo_line",
    "not_finite",
    "unknown_class",
    "not_utf8",
)


class TestBadInput:
    def one(self, tmp_path, label="", image=None):
        folder = KittiFolder(tmp_path / "data")
        folder.add("a", "good", label_line())
        folder.add("a", "odd", label, image)
        return folder

    @pytest.mark.parametrize(
        ("label", "kind", "line", "num_boxes"),
        [
            ("", "empty_label", None, 0),
            ("Car 1 2", "wrong_column_count", 1, 0),
            ("Car 0 0 0 1 2 11 22", "eight_columns", 1, 0),
            ("traffic light 0 0 0 1 2 11 22", "eight_columns", 1, 0),
            ("3 0.5 0.5 0.25 0.125", "yolo_line", 1, 0),
            ("3 0.5 0.5 1.25 0.125", "wrong_column_count", 1, 0),
            (f"{label_line()}\n{label_line('Car', (1, 'x', 3, 4))}", "not_a_number", 2, 1),
            (label_line("Car", (1, "nan", 3, 4)), "not_finite", 1, 0),
            (label_line("Car", (1, "inf", 3, 4)), "not_finite", 1, 0),
            (label_line("Car", (9, 2, 3, 4)), "box_reversed", 1, 0),
            (label_line("Car", (3, 2, 3, 4)), "box_zero_area", 1, 0),
            (label_line("Car", (70, 2, 80, 4)), "box_outside", 1, 0),
            (label_line("Car", (-5, 2, 80, 4)), "box_clipped", 1, 1),
            (label_line("Bike"), "unknown_class", 1, 0),
            (b"\xff" + label_line().encode(), "not_utf8", 1, 0),
            (label_line() + "\r\n", "windows_line_ends", 1, 1),
        ],
    )
    def test_labels(self, tmp_path, label, kind, line, num_boxes):
        folder = self.one(tmp_path, label)
        report = convert_kitti(folder.options(allow_empty=True))
        kinds = {kind: 1} | ({"all_lines_dropped": 1} if kind in LOST_WITH_ITS_FILE else {})
        assert report.problem_counts == kinds
        found = warnings_of(report)
        assert found["counts"] == kinds
        assert set(found["meanings"]) == set(kinds)
        (problem,) = (one for one in found["problems"] if one["kind"] == kind)
        assert (problem["kind"], problem["file"], problem["line"]) == (kind, "a/labels/odd.txt", line)
        assert (report.num_images, report.num_annotations) == (2, 1 + num_boxes)
        assert any(kind in line for line in report.warning_lines())
        with pytest.raises(DataError, match="strict") as caught:
            convert_kitti(folder.options(strict=True, results_dir=tmp_path / "strict"))
        assert "a/labels/odd.txt" in str(caught.value)
        assert kind.replace("_", " ") in str(caught.value)
        assert list((tmp_path / "strict").iterdir()) == []

    @pytest.mark.parametrize(
        ("label", "image", "kind", "file"),
        [
            (None, None, "missing_label", "a/images/odd.jpg"),
            ("", b"no image", "undecodable_image", "a/images/odd.jpg"),
            ("", b"", "undecodable_image", "a/images/odd.jpg"),
            ("", image_bytes("JPEG", (300, 300))[:5000], "truncated_image", "a/images/odd.jpg"),
        ],
    )
    def test_images_that_are_left_out(self, tmp_path, label, image, kind, file):
        report = convert_kitti(self.one(tmp_path, label, image).options())
        (problem,) = warnings_of(report)["problems"]
        assert (problem["kind"], problem["file"], problem["line"]) == (kind, file, None)
        images, annotations = read_shards(report.shard_paths)
        assert [image["file_name"] for image in images] == ["a/images/good.jpg"]
        assert [annotation["image_id"] for annotation in annotations] == [0]

    def test_clipped_box(self, tmp_path):
        report = convert_kitti(self.one(tmp_path, label_line("Car", (-5, 2, 80, 100))).options())
        _, annotations = read_shards(report.shard_paths)
        assert annotations[1]["bbox"] == [0, 2, 64, 46]
        assert annotations[1]["area"] == 64 * 46

    def test_damage_inside_is_found_by_decoding(self, tmp_path):
        content = image_bytes("PNG", (100, 100))
        middle = len(content) // 2
        damaged = content[:middle] + bytes(50) + content[middle + 50 :]
        folder = self.one(tmp_path)
        folder.add("a", "damaged", "", damaged, ".png")
        assert convert_kitti(folder.options()).num_images == 3
        report = convert_kitti(folder.options(decode_images=True))
        assert report.num_images == 2
        assert report.problem_counts["undecodable_image"] == 1

    def test_a_label_that_is_a_folder(self, tmp_path):
        folder = self.one(tmp_path, None)
        (folder.root / "a/labels/odd.txt").mkdir()
        report = convert_kitti(folder.options())
        assert report.problem_counts == {"unreadable_label": 1}
        assert report.num_images == 1

    def test_labels_without_image(self, tmp_path):
        folder = self.one(tmp_path, None)
        for name in ("other", "third"):
            (folder.root / f"a/labels/{name}.txt").write_text(label_line())
        report = convert_kitti(folder.options())
        assert report.problem_counts == {"missing_label": 1, "label_without_image": 2}
        assert [problem["file"] for problem in warnings_of(report)["problems"]] == [
            "a/images/odd.jpg",
            "a/labels/other.txt",
            "a/labels/third.txt",
        ]

    def test_names_used_twice(self, tmp_path):
        folder = self.one(tmp_path, label_line())
        folder.add("a", "odd", label_line(), image_bytes("PNG"), ".png")
        report = convert_kitti(folder.options())
        assert report.problem_counts == {"duplicate_name": 1}
        assert warnings_of(report)["problems"][0]["file"] == "a/images/odd.png"
        assert (report.num_images, report.num_annotations) == (2, 2)

    def test_file_names_that_are_not_utf8(self, tmp_path):
        folder = self.one(tmp_path, "")
        for name in (b"images/\xff.jpg", b"labels/\xff.txt"):
            (folder.root / "a" / os.fsdecode(name)).write_bytes(image_bytes())
        report = convert_kitti(folder.options())
        assert report.problem_counts == {"empty_label": 1, "name_not_utf8": 1}
        assert "\\xff.jpg" in warnings_of(report)["problems"][-1]["file"].replace("udcff", "xff")

    def test_a_sequence_without_images(self, data):
        for folder in ("images", "labels"):
            (data.root / "c" / folder).mkdir(parents=True)
        data.sequences.append("c")
        report = convert_kitti(data.options())
        assert report.problem_counts == {"no_images": 1}
        assert (data.root.parent / "out/c/c-shard-00000-of-00001.json").is_file()

    def test_no_image_at_all_stops(self, data):
        with pytest.raises(DataError, match=r"\.jpeg"):
            convert_kitti(data.options(image_extension=".jpeg"))

    def test_strict_shows_the_first_problems(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        for number in range(50):
            folder.add("a", f"{number:02d}", "Car")
        with pytest.raises(DataError) as caught:
            convert_kitti(folder.options(strict=True))
        assert len(caught.value.problems) == 21
        assert "a/labels/00.txt: line 1: wrong column count (got '1 columns')" in str(caught.value)

    def test_repeats_report_their_problems_once(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        folder.add("a", "x", "")
        report = convert_kitti(folder.options(num_shards=4, pad_shards=True, allow_empty=True))
        assert report.num_images == 4
        assert report.problem_counts == {"empty_label": 1}


LOST = {
    "unknown": ([label_line("Bike")] * 2 + [label_line("traffic light")], "Bike (2), traffic light (1)"),
    "eight": (["Car 0 0 0 1 2 11 22"], "1 x a line of 8 columns"),
    "yolo": (["0 0.5 0.5 0.1 0.1"], "1 x a line in YOLO's format"),
    "columns": (["Car 1 2"], "1 x a line that has neither 15 nor 16 columns"),
}


class TestLosses:
    """A conversion that lost all lines of a file, or has no box, is refused."""

    @pytest.mark.parametrize("kind", LOST)
    @pytest.mark.parametrize("others", [0, 2])
    def test_a_file_that_loses_every_line_is_refused(self, tmp_path, kind, others):
        lines, part = LOST[kind]
        folder = KittiFolder(tmp_path / "data")
        for number in range(others):
            folder.add("a", f"good{number}", label_line())
        folder.add("a", "odd", "\n".join(lines))
        with pytest.raises(DataError) as caught:
            convert_kitti(folder.options())
        message = str(caught.value)
        assert "a/labels/odd.txt" in message and part in message and "ddetr_mm.allow_empty" in message
        assert ("no box was found in 1 images" in message) == (others == 0)
        assert list((tmp_path / "out").iterdir()) == []
        report = convert_kitti(folder.options(allow_empty=True))
        assert report.num_annotations == others

    def test_the_mapping_to_paste_takes_every_line(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        folder.add("a", "one", label_line("traffic light") + "\n" + label_line("Bïke"))
        with pytest.raises(DataError) as caught:
            convert_kitti(folder.options())
        text = str(caught.value)
        mapping = json.loads(text[text.index('{"') : text.index("}") + 1])
        assert mapping == {"Bïke": "Bïke", "traffic light": "traffic light"}
        report = convert_kitti(folder.options(mapping=mapping))
        assert report.boxes_per_category == {"Bïke": 1, "traffic light": 1}
        assert not report.problem_counts

    def test_classes_mapped_to_null_are_no_loss(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        folder.add("a", "one", label_line())
        folder.add("a", "two", label_line("Misc") + "\n" + label_line("Misc"))
        folder.add("a", "three", label_line("Misc") + "\r\n" + label_line())
        report = convert_kitti(folder.options(mapping={"Car": "car", "Misc": None}))
        assert report.problem_counts == {"windows_line_ends": 1} and not report.unknown_classes
        assert (report.num_images, report.boxes_per_category) == (3, {"car": 2})

    def test_a_partial_loss_and_dontcare_regions_are_counted(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        folder.add("a", "one", label_line() + "\n" + label_line("Bike"))
        folder.add("a", "two", label_line("DontCare", (1, 2, 3, 4)))
        folder.add("a", "three", label_line("Car", (9, 2, 3, 4)))
        report = convert_kitti(folder.options())
        assert report.unknown_classes == {"Bike": 1, "DontCare": 1}
        assert report.problem_counts == {"unknown_class": 2, "box_reversed": 1}

    def test_only_pictures_without_objects_are_refused(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        folder.add("a", "one", "")
        with pytest.raises(DataError, match="no box was found in 1 images"):
            convert_kitti(folder.options())
