"""Conversions that are repeated, stopped or killed: the old result or the new one, never a mixture."""

import os
import signal
import subprocess
import sys

import pytest
from kitti_builder import KittiFolder, image_bytes, label_line, read_shards, tree

from ddetr_mm.data.convert import convert_kitti
from ddetr_mm.errors import DataError


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

    def test_a_full_disk_is_told_and_leaves_the_old_result(self, data, monkeypatch):
        out = data.root.parent / "out"
        convert_kitti(data.options())
        before = tree(out)

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ddetr_mm.data.shards._append", full)
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
from ddetr_mm.data.convert import convert_kitti
from ddetr_mm.data.convert_options import ConvertOptions

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
