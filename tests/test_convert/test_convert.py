"""What a conversion writes; repeated, stopped or killed, it leaves the old result or the new one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from golden_files import BCCD
from kitti_builder import CATEGORY_IDS, KittiFolder, image_bytes, label_line, read_shards, tree, warnings_of
from pycocotools.coco import COCO

from ddetr_mm.convert import convert
from ddetr_mm.convert.convert import ConvertOptions, convert_kitti
from ddetr_mm.convert.reader import ordered_map
from ddetr_mm.datasets.sources import read_coco_sources
from ddetr_mm.errors import DataError

# --- files, ids, partitions ---


class TestOutput:
    def test_one_shard_per_sequence(self, data):
        report = convert_kitti(data.options())
        assert [str(path.relative_to(report.results_dir)) for path in report.shard_paths] == [
            "a/a-shard-00000-of-00001.json",
            "b/b-shard-00000-of-00001.json",
        ]
        content = json.loads(report.shard_paths[1].read_text())
        assert content["categories"] == [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]
        assert content["images"][0] == {
            "id": 7,
            "file_name": "b/images/frame0.jpg",
            "width": 64,
            "height": 48,
        }
        assert content["annotations"][:2] == [
            {"id": 7, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 8, "image_id": 7, "category_id": 2, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0},
        ]

    def test_ids_run_on_across_sequences_and_shards(self, data):
        report = convert_kitti(data.options(num_shards=3))
        images, annotations = read_shards(report.shard_paths)
        assert [image["id"] for image in images] == list(range(10))
        assert [annotation["id"] for annotation in annotations] == list(range(13))
        assert (report.num_images, report.num_annotations) == (10, 13)

    def test_every_image_is_found_from_its_file_name(self, data):
        report = convert_kitti(data.options(num_shards=2))
        images, _ = read_shards(report.shard_paths)
        assert all((data.root / image["file_name"]).is_file() for image in images)
        assert {sequence.image_root for sequence in report.sequences} == {data.root}

    def test_every_shard_loads_alone_in_pycocotools(self, data, capsys):
        report = convert_kitti(data.options(num_shards=4))
        for path in report.shard_paths:
            coco = COCO(str(path))
            assert coco.getCatIds() == [1, 2]
            found = {"category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
            results = [{"image_id": image, **found} for image in coco.getImgIds()]
            if results:
                assert len(coco.loadRes(results).anns) == len(results)
        capsys.readouterr()

    def test_shards_are_near_equal_and_may_be_empty(self, data):
        report = convert_kitti(data.options(num_shards=5))
        assert [shard.num_images for shard in report.sequences[0].shards] == [2, 2, 1, 1, 1]
        assert [shard.num_images for shard in report.sequences[1].shards] == [1, 1, 1, 0, 0]
        assert json.loads(report.shard_paths[-1].read_text())["images"] == []

    def test_padded_shards_repeat_images_under_new_ids(self, data):
        report = convert_kitti(data.options(num_shards=5, pad_shards=True))
        assert [shard.num_images for shard in report.sequences[0].shards] == [2] * 5
        assert [shard.num_images for shard in report.sequences[1].shards] == [1] * 5
        images, annotations = read_shards(report.shard_paths)
        assert [image["id"] for image in images] == list(range(15))
        assert len({image["file_name"] for image in images}) == 10
        assert [annotation["id"] for annotation in annotations] == list(range(len(annotations)))
        boxes = {image["file_name"]: [] for image in images}
        for annotation in annotations:
            boxes[images[annotation["image_id"]]["file_name"]].append(tuple(annotation["bbox"]))
        assert all(len(set(found)) * count == len(found) for found, count in _with_counts(boxes, images))

    def test_stats_carry_counts_and_offsets(self, data):
        report = convert_kitti(data.options(num_shards=2))
        stats = json.loads(report.stats_path.read_text())
        assert (stats["num_images"], stats["num_annotations"]) == (10, 13)
        assert (stats["next_image_id"], stats["next_annotation_id"]) == (10, 13)
        assert stats["categories"] == [
            {"id": 1, "name": "person", "num_annotations": 3},
            {"id": 2, "name": "car", "num_annotations": 10},
        ]
        offsets = [
            (shard["first_image_id"], shard["first_annotation_id"])
            for sequence in stats["sequences"]
            for shard in sequence["shards"]
        ]
        assert offsets == [(0, 0), (4, 4), (7, 7), (9, 11)]

    def test_reports(self, data):
        progress, status = [], []
        report = convert_kitti(
            data.options(num_shards=2), progress=lambda *step: progress.append(step), status=status.append
        )
        assert progress[0] == (0, 10)
        assert progress[-1] == (10, 10)
        assert progress == sorted(progress)
        assert status == [
            "Generating partitions",
            *["Writing partition 0, shard 0", "Writing partition 0, shard 1"] * 2,
            "Json generation complete.",
        ]
        assert report.boxes_per_category == {"person": 3, "car": 10}
        assert report.category_ids == CATEGORY_IDS
        assert report.warning_lines() == []
        assert report.images_per_second > 0

    def test_default_mapping(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        classes = ["Person", "Person Group", "rider", "FACE", "backpack", "car"]
        folder.add("a", "x", "\n".join(label_line(name) for name in classes))
        report = convert_kitti(folder.options(mapping=None))
        assert report.category_ids == {"person": 1, "face": 2, "bag": 3}
        _, annotations = read_shards(report.shard_paths)
        assert [annotation["category_id"] for annotation in annotations] == [1, 1, 1, 2, 3]
        assert report.unknown_classes == {"car": 1}

    def test_mapping_file(self, data, tmp_path):
        (tmp_path / "mapping.json").write_text('{"Car": "vehicle", "person": null, "Truck": null}')
        report = convert_kitti(data.options(mapping=None, mapping_path=tmp_path / "mapping.json"))
        assert report.category_ids == {"vehicle": 1}
        assert report.boxes_per_category == {"vehicle": 7}

    @pytest.mark.parametrize(
        "split", [{}, {"partition_mode": "random", "num_partitions": 2, "val_split": 30}]
    )
    def test_the_dataset_section_reads_every_image(self, data, tmp_path, monkeypatch, split):
        monkeypatch.chdir(tmp_path)  # relative folders become absolute: the section holds anywhere
        out = {"data_root": data.root.relative_to(tmp_path), "results_dir": Path("out [1]")}
        report = convert_kitti(data.options(num_shards=2, **out, **split))
        monkeypatch.chdir("/")
        text = (tmp_path / report.dataset_path).read_text()
        section = yaml.safe_load(text)["dataset"]
        assert text == report.dataset_section and section["num_classes"] == 3
        assert "# Classes: 1 person, 2 car." in text and ("No validation data" in text) == (not split)
        names = []
        for key in ("train_data_sources", "val_data_sources"):
            assert (key in section) == (bool(split) or key.startswith("train"))
            if key not in section:
                continue
            table = read_coco_sources(section[key])
            names += [Path(table.file_name(row)).name for row in range(table.num_images)]
            assert all(Path(one["image_dir"]) == data.root for one in section[key])
        assert len(names) == report.num_images and names.count("frame0.jpg") == 2

    def test_a_class_name_of_two_lines_leaves_the_section_readable(self, data):
        report = convert_kitti(data.options(mapping={"Car": "a\nb: c", "Truck": "t", "person": "t"}))
        assert yaml.safe_load(report.dataset_section)["dataset"]["num_classes"] == 3
        assert '2 "a\\nb: c"' in report.dataset_section.splitlines()[0]

    def test_every_image_type_and_rotation(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        for kind, extension in (
            ("JPEG", ".jpg"),
            ("PNG", ".png"),
            ("BMP", ".bmp"),
            ("WEBP", ".webp"),
            ("TIFF", ".tif"),
        ):
            folder.add("a", kind, "", image_bytes(kind, (50, 40)), extension)
        exif = _orientation(6)
        folder.add("a", "turned", label_line("Car", (0, 0, 30, 45)), image_bytes("JPEG", (50, 40), exif=exif))
        report = convert_kitti(folder.options())
        images, annotations = read_shards(report.shard_paths)
        sizes = {image["file_name"].split("/")[-1]: (image["width"], image["height"]) for image in images}
        assert sizes == {
            "BMP.bmp": (50, 40),
            "JPEG.jpg": (50, 40),
            "PNG.png": (50, 40),
            "TIFF.tif": (50, 40),
            "WEBP.webp": (50, 40),
            "turned.jpg": (40, 50),
        }
        assert annotations[0]["bbox"] == [0, 0, 30, 45]
        only_png = convert_kitti(folder.options(image_extension=".png", allow_empty=True))
        assert only_png.num_images == 1


def _orientation(number):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def _with_counts(boxes, images):
    names = [image["file_name"] for image in images]
    return [(found, names.count(name)) for name, found in boxes.items()]


class TestPartitions:
    def many(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        for sequence, count in (("a", 20), ("b", 10), ("c", 7)):
            for number in range(count):
                folder.add(sequence, f"{number:03d}", label_line())
        return folder

    def names(self, report, partition):
        images, _ = read_shards(
            [
                report.results_dir / s.file
                for sequence in report.sequences
                for s in sequence.shards
                if s.partition == partition
            ]
        )
        return {image["file_name"] for image in images}

    def test_random(self, tmp_path):
        folder = self.many(tmp_path)
        options = {"partition_mode": "random", "num_partitions": 2, "val_split": 20, "num_shards": 2}
        report = convert_kitti(folder.options(**options))
        assert report.sequences[0].shards[0].file == "a/a-fold-000-of-002-shard-00000-of-00002.json"
        validation, training = self.names(report, 0), self.names(report, 1)
        assert (len(validation), len(training)) == (4 + 2 + 1, 16 + 8 + 6)
        assert not validation & training
        assert report.num_images == 37
        assert self.names(convert_kitti(folder.options(**options)), 0) == validation
        assert self.names(convert_kitti(folder.options(**options, seed=1)), 0) != validation

    @pytest.mark.parametrize(("percent", "counts"), [(0, (0, 37)), (100, (37, 0))])
    def test_random_extremes(self, tmp_path, percent, counts):
        report = convert_kitti(
            self.many(tmp_path).options(partition_mode="random", num_partitions=2, val_split=percent)
        )
        assert (len(self.names(report, 0)), len(self.names(report, 1))) == counts

    def test_sequences_stay_whole(self, tmp_path):
        report = convert_kitti(
            self.many(tmp_path).options(partition_mode="sequence", num_partitions=2, num_shards=2)
        )
        assert [sequence.shards[0].file for sequence in report.sequences] == [
            "a/a-fold-000-of-002-shard-00000-of-00002.json",
            "b/b-fold-001-of-002-shard-00000-of-00002.json",
            "c/c-fold-001-of-002-shard-00000-of-00002.json",
        ]
        assert len(report.shard_paths) == 6

    def test_sequences_by_share(self, tmp_path):
        report = convert_kitti(
            self.many(tmp_path).options(partition_mode="sequence", num_partitions=2, val_split=25)
        )
        assert [{shard.partition for shard in sequence.shards} for sequence in report.sequences] == [
            {1},
            {0},
            {1},
        ]

    def test_more_partitions_than_sequences(self, tmp_path):
        with pytest.raises(DataError, match="at most 3"):
            convert_kitti(self.many(tmp_path).options(partition_mode="sequence", num_partitions=4))


@pytest.mark.parametrize("mapping", [{}, {"": "car"}, {"Car": " "}])
def test_a_bad_mapping_stops_before_anything_is_written(data, mapping):
    with pytest.raises(DataError, match="mapping"):
        convert_kitti(data.options(mapping=mapping))
    assert not (data.root.parent / "out").exists()


class TestNumberOfProcesses:
    def test_the_output_does_not_depend_on_it(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        good, image = label_line(), image_bytes()
        odd = ["", "Car", label_line("Bike"), label_line("Car", (0, 0, 99, 9)), None, good + "\r\n"]
        for sequence, count in (("a", 1500), ("b", 40)):
            for number in range(count):
                label = odd[number // 50 % len(odd)] if number % 50 == 0 else f"{good}\n" * (number % 4 + 1)
                folder.add(sequence, f"{number:05d}", label, image)
        trees = []
        for num_workers in (0, 1, 3):
            convert_kitti(folder.options(num_workers=num_workers, num_shards=3, partition_mode="random",
                                         num_partitions=2, val_split=30, pad_shards=True,
                                         allow_empty=True))  # fmt: skip
            trees.append(tree(tmp_path / "out"))
        assert trees[0] == trees[1] == trees[2]
        assert len(json.loads(trees[0]["warnings.json"])["counts"]) == 7

    @pytest.mark.parametrize(("cores", "images", "expected"), [(1, 40, 0), (2, 40, 2), (8, 40, 4), (8, 9, 0)])
    def test_every_core_is_used_where_the_task_is_worth_it(
        self, tmp_path, monkeypatch, cores, images, expected
    ):
        folder = KittiFolder(tmp_path / "data")
        for number in range(images):
            folder.add("a", f"{number:05d}", label_line(), image_bytes())
        seen = []

        def spied(function, tasks, num_processes, *rest):
            seen.append(num_processes)
            return ordered_map(function, tasks, 0, *rest)

        monkeypatch.setattr(convert, "ordered_map", spied)
        monkeypatch.setattr(convert, "usable_cores", lambda: cores)
        for name in ("_IMAGES_WORTH_A_FORK", "_IMAGES_WORTH_A_PROCESS"):
            monkeypatch.setattr(convert, name, 10)
        assert convert_kitti(folder.options(num_workers=None)).num_images == images
        assert seen == [expected]


def test_blood_cells(tmp_path):
    (tmp_path / "sequences.txt").write_text("train\nval\n")
    mapping = {"RBC": "rbc", "WBC": "wbc", "Platelets": "platelets"}
    report = convert_kitti(
        ConvertOptions(
            tmp_path / "sequences.txt",
            tmp_path / "out",
            BCCD,
            "images",
            "labels",
            num_shards=3,
            mapping=mapping,
        )
    )
    assert report.category_ids == {"wbc": 1, "rbc": 2, "platelets": 3}
    assert [sequence.num_images for sequence in report.sequences] == [4, 3]
    assert report.problem_counts == {"box_zero_area": 2}
    assert [problem["file"].split("/")[0] for problem in warnings_of(report)["problems"]] == ["train", "val"]
    num_lines = sum(len(path.read_text().splitlines()) for path in BCCD.glob("*/labels/*.txt"))
    assert report.num_annotations == num_lines - 2
    images, annotations = read_shards(report.shard_paths)
    assert {(image["width"], image["height"]) for image in images} == {(640, 480)}
    for annotation in annotations:
        left, top, width, height = annotation["bbox"]
        assert 0 <= left < left + width <= 640
        assert 0 <= top < top + height <= 480


# --- repeated, stopped or killed ---


class TestRunningAgain:
    def test_replaces_the_old_result_and_keeps_what_is_not_ours(self, data):
        out = data.root.parent / "out"
        convert_kitti(data.options(num_shards=4))
        (out / "status.json").write_text("{}\n")
        (out / "a/notes.txt").write_text("mine")
        data.sequences.remove("b")
        convert_kitti(data.options(num_shards=2))
        assert sorted(name for name in tree(out) if not name.startswith(".")) == [
            "a/a-shard-00000-of-00002.json",
            "a/a-shard-00001-of-00002.json",
            "a/notes.txt",
            "dataset.yaml",
            "stats.txt",
            "status.json",
            "warnings.json",
        ]

    def test_gives_the_same_files(self, data):
        out = data.root.parent / "out"
        convert_kitti(data.options())
        before = tree(out)
        convert_kitti(data.options())
        assert tree(out) == before

    def test_a_failed_run_leaves_the_old_result(self, data):
        out = data.root.parent / "out"
        convert_kitti(data.options())
        before = tree(out)
        data.add("b", "bad", "Car")
        with pytest.raises(DataError):
            convert_kitti(data.options(strict=True))
        assert tree(out) == before

    def test_a_full_disk_is_reported_and_leaves_the_old_result(self, data, monkeypatch):
        out = data.root.parent / "out"
        convert_kitti(data.options())
        before = tree(out)

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ddetr_mm.convert.plan._append", full)
        with pytest.raises(DataError, match="No space left"):
            convert_kitti(data.options())
        assert tree(out) == before

    def test_shards_of_others_are_not_mixed_with_ours(self, data):
        out = data.root.parent / "out"
        (out / "a").mkdir(parents=True)
        (out / "a/a-shard-00000-of-00009.json").write_text("{}")
        with pytest.raises(DataError, match="00009"):
            convert_kitti(data.options())
        assert sorted(tree(out)) == ["a/a-shard-00000-of-00009.json"]

    def test_results_may_go_beside_the_data(self, data):
        before = tree(data.root / "a")
        convert_kitti(data.options(results_dir=data.root))
        convert_kitti(data.options(results_dir=data.root, num_shards=2))
        after = tree(data.root / "a")
        assert before == {name: content for name, content in after.items() if "shard" not in name}
        assert sorted(path.name for path in data.root.glob("*/*.json")) == [
            f"{name}-shard-0000{number}-of-00002.json" for name in "ab" for number in (0, 1)
        ]

    def test_a_sequence_cannot_take_the_place_of_a_result_file(self, tmp_path):
        folder = KittiFolder(tmp_path / "data")
        folder.add("stats.txt", "x")
        with pytest.raises(DataError, match="cannot have this name"):
            convert_kitti(folder.options())


RUN = """
import signal, sys, time
from pathlib import Path
from ddetr_mm.convert.convert import ConvertOptions, convert_kitti

def report(done, total):
    print(done, flush=True)
    time.sleep(0.05 if done >= 512 else 0)

if __name__ == "__main__":
    root = Path(sys.argv[1])
    out = Path(sys.argv[2])
    options = ConvertOptions(root / "sequences.txt", out, root, "images", "labels", num_shards=4,
                             mapping={"Car": "car"}, num_workers=1)
    print("begin", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    convert_kitti(options, progress=report)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Four thousand images, so that a conversion takes a moment."""
    root = tmp_path_factory.mktemp("many") / "data"
    folder = KittiFolder(root)
    image = image_bytes()
    for number in range(4000):
        folder.add("a", f"{number:05d}", label_line(), image)
    folder.options()
    return root


class TestEndingARun:
    def start(self, many, out, until):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, many, out],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for line in process.stdout:
            if line.strip() == until or (
                line.strip().isdigit() and until.isdigit() and int(line) >= int(until)
            ):
                break
        return process

    @pytest.mark.parametrize("until", ["begin", "0", "512", "2048", "4000"])
    def test_a_kill_leaves_none_or_all(self, many, tmp_path, until):
        process = self.start(many, tmp_path / "out", until)
        process.kill()
        process.communicate()
        assert len(list((tmp_path / "out").rglob("*shard*.json"))) in (0, 4)
        again = self.start(many, tmp_path / "out", "nothing")
        _, errors = again.communicate(timeout=120)
        assert again.returncode == 0, errors
        images, _ = read_shards(sorted((tmp_path / "out").glob("*/*.json")))
        assert len(images) == 4000
        assert [name for name in os.listdir(tmp_path / "out") if "tmp" in name] == []

    def test_ctrl_c_ends_it_quietly(self, many, tmp_path):
        process = self.start(many, tmp_path / "out", "512")
        os.killpg(process.pid, signal.SIGINT)  # to all processes, as a terminal does
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 130)
        assert errors.count("KeyboardInterrupt") == 1, errors
        assert list((tmp_path / "out").iterdir()) == []
