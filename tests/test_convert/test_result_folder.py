import contextlib
import json
import os
import shutil
import threading

import pytest
from kitti_builder import tree

from ddetr_mm.convert import result_folder
from ddetr_mm.convert.result_folder import MANIFEST_NAME, ResultFolder
from ddetr_mm.errors import DataError

FIRST = {"a/1.json": "a1", "a/2.json": "a2", "b/c/1.json": "bc", "stats.txt": "first"}
SECOND = {"a/1.json": "A1", "d/1.json": "d", "stats.txt": "second"}


def write(folder, files):
    """One run that leaves ``files``."""
    with ResultFolder(folder) as result:
        for name, content in files.items():
            result.staged(name).write_text(content)
        result.commit(list(files))


def visible(folder):
    files = tree(folder).items()
    return {name: content.decode() for name, content in files if not name.startswith(".ddetr_mm")}


def test_files_appear_together_and_nothing_else_stays(tmp_path):
    write(tmp_path / "new/out", FIRST)
    assert visible(tmp_path / "new/out") == FIRST
    assert sorted(os.listdir(tmp_path / "new/out")) == [MANIFEST_NAME, "a", "b", "stats.txt"]


def test_a_second_run_replaces_the_first_as_a_whole(tmp_path):
    write(tmp_path, FIRST)
    write(tmp_path, SECOND)
    assert visible(tmp_path) == SECOND
    assert not (tmp_path / "b").exists()


def test_files_of_others_stay(tmp_path):
    others = {"notes.txt": "n", "a/notes.txt": "an", "b/c/notes.txt": "bcn", "status.json": "{}"}
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    write(tmp_path, FIRST)
    assert visible(tmp_path) == {**FIRST, **others}
    write(tmp_path, SECOND)
    assert visible(tmp_path) == {**SECOND, **others}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_without_commit_everything_stays_as_it_was(tmp_path, error):
    write(tmp_path, FIRST)
    before = tree(tmp_path)
    with pytest.raises(error), ResultFolder(tmp_path) as result:
        result.staged("a/1.json").write_text("half")
        assert [path.name for path in tmp_path.rglob("1.json")] == ["1.json"] * 2
        raise error
    assert tree(tmp_path) == before


def test_files_of_others_in_the_way_are_named(tmp_path):
    write(tmp_path, {"a/1.json": "a1"})
    (tmp_path / "stats.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"in the way: stats\.txt"):
        write(tmp_path, FIRST)
    assert tree(tmp_path) == before


class TestKill:
    """A run that is killed leaves all or nothing, at the latest when the next one starts."""

    CALLS = ("unlink", "rename", "replace", "rmdir")

    def killed_after(self, monkeypatch, number, error=None, once=False):
        """Let the process die at the n-th change of the file system."""
        count = 0

        def counted(real):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == number + 1 or (count > number and not once):
                    raise error or _Killed
                return real(*arguments, **options)

            return call

        for name in self.CALLS:
            monkeypatch.setattr(result_folder.os, name, counted(getattr(os, name)))
        monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))

    @pytest.mark.parametrize("number", range(30))
    def test_at_every_step_of_the_commit(self, tmp_path, number):
        write(tmp_path, FIRST)
        with pytest.MonkeyPatch.context() as monkeypatch:
            self.killed_after(monkeypatch, number)
            try:
                write(tmp_path, SECOND)
                completed = True
            except _Killed:
                completed = False
        state = visible(tmp_path)
        assert number > 5 or not completed
        with pytest.raises(ValueError, match="stop"), ResultFolder(tmp_path):
            after_start = visible(tmp_path)
            raise ValueError("stop")
        assert after_start in (FIRST, SECOND)
        if "stats.txt" in state:
            assert state in (FIRST, SECOND), "the last file stands for the whole"
        assert [name for name in os.listdir(tmp_path) if "tmp" in name] == []

    @pytest.mark.parametrize("number", range(20))
    def test_ctrl_c_at_every_step_of_the_commit(self, tmp_path, number):
        write(tmp_path, FIRST)
        with pytest.MonkeyPatch.context() as monkeypatch:
            self.killed_after(monkeypatch, number, KeyboardInterrupt, once=True)
            with contextlib.suppress(KeyboardInterrupt):
                write(tmp_path, SECOND)
        assert visible(tmp_path) in (FIRST, SECOND)
        write(tmp_path, FIRST)
        assert visible(tmp_path) == FIRST
        assert [name for name in os.listdir(tmp_path) if "tmp" in name] == []

    @pytest.mark.parametrize("number", range(4, 14))
    def test_a_disk_that_fails_during_the_commit(self, tmp_path, number):
        write(tmp_path, FIRST)
        with pytest.MonkeyPatch.context() as monkeypatch:
            self.killed_after(monkeypatch, number, OSError(5, "Input/output error"))
            with contextlib.suppress(OSError):
                write(tmp_path, SECOND)
        with ResultFolder(tmp_path):
            assert visible(tmp_path) in (FIRST, SECOND)

    def test_before_the_commit(self, tmp_path):
        write(tmp_path, FIRST)
        stale = tmp_path / f"{result_folder._STAGING_PREFIX}abc"
        stale.mkdir()
        (stale / "x.json").write_text("half")
        write(tmp_path, SECOND)
        assert visible(tmp_path) == SECOND


class _Killed(BaseException):
    """The end of the process."""


class TestRefusing:
    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(DataError, match="cannot be written to"), ResultFolder(tmp_path / "out"):
            pytest.fail("entered")

    def test_a_folder_that_cannot_be_written_to(self, tmp_path, monkeypatch):
        def refuse(*arguments, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(result_folder.tempfile, "mkdtemp", refuse)
        with pytest.raises(DataError, match="Permission denied"), ResultFolder(tmp_path):
            pytest.fail("entered")
        monkeypatch.undo()
        with ResultFolder(tmp_path) as result:  # the lock was given back
            assert result.staged("x").parent.is_dir()

    def test_two_runs_at_once(self, tmp_path):
        first = ResultFolder(tmp_path)
        with first, pytest.raises(DataError, match="another conversion"), ResultFolder(tmp_path):
            pytest.fail("entered")
        write(tmp_path, FIRST)
        assert visible(tmp_path) == FIRST

    def test_two_runs_at_once_from_another_thread(self, tmp_path):
        caught = []

        def run():
            try:
                with ResultFolder(tmp_path):
                    caught.append(None)
            except DataError as error:
                caught.append(error)

        with ResultFolder(tmp_path):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert isinstance(caught[0], DataError)

    @pytest.mark.parametrize(
        "manifest",
        [
            "{",
            "[]",
            '{"files": "a"}',
            '{"files": [1]}',
            json.dumps({"files": ["../precious"]}),
            json.dumps({"files": ["/etc/passwd"]}),
            json.dumps(
                {"files": [], "former_files": ["../precious"], "move_from": ".ddetr_mm_convert.tmp-x"}
            ),
            json.dumps({"files": [], "former_files": [], "move_from": "../precious"}),
        ],
    )
    def test_a_damaged_list_of_files(self, tmp_path, manifest):
        (tmp_path / "precious").write_text("keep")
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / MANIFEST_NAME).write_text(manifest)
        with pytest.raises(DataError, match="damaged"), ResultFolder(folder):
            pytest.fail("entered")
        assert (tmp_path / "precious").read_text() == "keep"
