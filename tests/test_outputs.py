"""What a run may write, and that two runs do not write to one folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from folders import visible

from ddetr_mm import outputs
from ddetr_mm.errors import DataError
from ddetr_mm.files import write_text_whole, written_whole
from ddetr_mm.outputs import (
    OWNED_NAME,
    only_writer,
    protected_inputs,
    remove_leftovers,
    require_free,
)


def new_process() -> None:
    """Nothing is known from an earlier run."""
    outputs._known = outputs._Known()
    outputs._known.active = True


@pytest.fixture(autouse=True)
def a_command():
    new_process()
    yield
    outputs._known = outputs._Known()


def test_our_own_results_are_replaced(tmp_path):
    for text in ("one", "two"):
        write_text_whole(tmp_path / "a.json", text)
    new_process()
    write_text_whole(tmp_path / "a.json", "three")
    assert (tmp_path / "a.json").read_text() == "three" and visible(tmp_path) == ["a.json"]


@pytest.mark.parametrize("kind", ["file", "link", "dead link"])
def test_files_of_others_stay(tmp_path, kind):
    target = tmp_path / "report.html"
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to("there" if kind == "dead link" else __file__)
    before = os.readlink(target) if kind != "file" else target.read_text()
    with pytest.raises(DataError, match=r"report\.html.*--force"):
        write_text_whole(target, "new")
    assert before == (os.readlink(target) if kind != "file" else target.read_text())
    assert visible(tmp_path) == ["report.html"]
    with protected_inputs([], force=True):
        write_text_whole(target, "new")
    assert target.read_text() == "new" and not target.is_symlink()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("as_link", [False, True])
def test_an_input_is_never_replaced(tmp_path, force, as_link):
    source = write_text_whole(tmp_path / "a.txt", "input")  # ours, and yet an input of this run
    (tmp_path / "link.txt").symlink_to("a.txt")
    read = tmp_path / "link.txt" if as_link else source
    with protected_inputs([read], force=force), pytest.raises(DataError, match="is read by this run"):
        write_text_whole(tmp_path / "a.txt", "result")
    assert source.read_text() == "input"


def test_everything_in_the_way_is_listed_before_the_work(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError) as caught:
        require_free([tmp_path / name for name in "abc"])
    assert len(caught.value.problems) == 2


def test_a_file_is_ours_only_in_its_folder(tmp_path):
    write_text_whole(tmp_path / "one" / "a.txt", "x")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.txt").write_text("mine")
    with pytest.raises(DataError):
        write_text_whole(tmp_path / "two" / "a.txt", "x")


def test_a_removed_file_is_no_longer_ours(tmp_path):
    target = write_text_whole(tmp_path / "a.txt", "x")
    target.unlink()
    outputs.disown(target)
    target.write_text("mine")
    assert not outputs.is_ours(target)
    new_process()
    assert not outputs.is_ours(target)


def test_names_with_line_breaks_and_bytes_that_are_no_text(tmp_path):
    for name in ("a\nb", os.fsdecode(b"\xff.txt"), '"', "人" * 80):
        write_text_whole(tmp_path / name, "x")
        new_process()
        assert outputs.is_ours(tmp_path / name)
        write_text_whole(tmp_path / name, "y")


def test_a_half_line_of_a_killed_run_does_no_harm(tmp_path):
    write_text_whole(tmp_path / "a", "x")
    with (tmp_path / OWNED_NAME).open("a") as file:
        file.write('"hal')
    write_text_whole(tmp_path / "b", "x")
    new_process()
    assert outputs.is_ours(tmp_path / "a") and outputs.is_ours(tmp_path / "b")


def test_another_process_adds_to_the_list(tmp_path):
    write_text_whole(tmp_path / "a", "x")
    code = "from ddetr_mm import files, outputs; import sys\nwith outputs.protected_inputs(()):\n"
    code += " files.write_text_whole(sys.argv[1], 'x')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    write_text_whole(tmp_path / "b", "y")
    assert outputs.is_ours(tmp_path / "b")


@pytest.mark.parametrize("length", [250, 255])
def test_the_longest_names_can_be_written(tmp_path, length):
    target = write_text_whole(tmp_path / ("n" * (length - 4) + ".txt"), "x")
    assert target.read_text() == "x" and visible(tmp_path) == [target.name]


def test_only_what_nobody_writes_is_left_over(tmp_path):
    kept = [".tmp-12-model_epoch_000.pth", ".ddetr_mm-notes", ".ddetr_mm-0123456789abcdeg.tmp", "a.txt"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".ddetr_mm-00000000000000aa.tmp").symlink_to("a.txt")
    (tmp_path / ".ddetr_mm-00000000000000bb.tmp").mkdir()
    with written_whole(tmp_path / "b.txt") as living:
        living.write_text("x")
        (tmp_path / ".ddetr_mm-00000000000000cc.tmp.png").touch()
        assert remove_leftovers(tmp_path) == [".ddetr_mm-00000000000000cc.tmp.png"]
        assert living.exists()
    assert (tmp_path / "b.txt").read_text() == "x" and {*kept} <= {*visible(tmp_path)}


def test_the_first_write_to_a_folder_removes_what_killed_runs_left(tmp_path):
    leftover = tmp_path / ".ddetr_mm-00000000000000cc.tmp.onnx"
    leftover.touch()
    write_text_whole(tmp_path / "a.txt", "x")
    assert visible(tmp_path) == ["a.txt"] and not leftover.exists()


HOLD = """
import sys, time
from ddetr_mm.outputs import only_writer
with only_writer(sys.argv[1], "ddetr-mm train"):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_one_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "in\n"
        refused = pytest.raises(DataError, match=rf"ddetr-mm train, process {holder.pid} on ")
        with refused, only_writer(tmp_path, "ddetr-mm train"):
            pytest.fail("both are in")
    finally:
        holder.kill()
        holder.wait()
    for _ in range(50):
        try:
            with only_writer(tmp_path, "ddetr-mm train"):
                break
        except DataError:
            time.sleep(0.1)
    else:
        pytest.fail("the lock outlived its holder")


def test_other_code_writes_what_it_wants(tmp_path):
    outputs._known = outputs._Known()
    (tmp_path / "a").write_text("mine")
    write_text_whole(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_list_for_the_folders_of_a_run(tmp_path):
    with outputs.results_root(tmp_path):
        write_text_whole(tmp_path / "labels" / "a.txt", "x")
        new_process()
    assert not outputs.is_ours(tmp_path / "labels" / "a.txt")
    with outputs.results_root(tmp_path):
        assert outputs.is_ours(tmp_path / "labels" / "a.txt")
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["a.txt"]
