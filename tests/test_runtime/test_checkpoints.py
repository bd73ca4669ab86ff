from __future__ import annotations

import errno
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.errors import InputError
from ddetr_mm.runtime.checkpoints import (
    LATEST_NAME,
    CheckpointName,
    checkpoint_written_whole,
    find_latest_checkpoint,
    full_disk_told,
    is_whole,
    link_latest,
    list_checkpoints,
    remove_leftovers,
)


def save(folder, name, number=0):
    path = folder / name
    with checkpoint_written_whole(path) as temporary:
        torch.save({"number": number, "weights": torch.zeros(1000)}, temporary)
    return path


@given(epoch=st.integers(0, 100_000), step=st.none() | st.integers(0, 10**9))
def test_names_read_back(epoch, step):
    name = CheckpointName(epoch, step)
    assert CheckpointName.parse(str(name)) == name


def test_names_as_documented():
    assert str(CheckpointName(0)) == "model_epoch_000.pth"
    assert str(CheckpointName(0, 100)) == "model_epoch_000_step_00100.pth"
    assert CheckpointName.parse("model_epoch_1.pth") is None
    assert CheckpointName.parse(LATEST_NAME) is None
    assert CheckpointName.parse(".tmp-17-model_epoch_001.pth") is None


def test_listed_by_training_time_not_by_alphabet(tmp_path):
    names = ["model_epoch_1000.pth", "model_epoch_999.pth", "model_epoch_001_step_00250.pth"]
    names += ["model_epoch_001.pth", "model_epoch_001_step_100000.pth"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "other.pth").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "model_epoch_001_step_00250.pth",
        "model_epoch_001_step_100000.pth",
        "model_epoch_001.pth",
        "model_epoch_999.pth",
        "model_epoch_1000.pth",
    ]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = save(tmp_path, "model_epoch_000.pth", number=1)
    with pytest.raises(RuntimeError), checkpoint_written_whole(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("killed")
    assert torch.load(path, weights_only=True)["number"] == 1
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_latest_is_a_relative_link_to_the_newest(tmp_path):
    first, second = save(tmp_path, "model_epoch_000.pth"), save(tmp_path, "model_epoch_001.pth")
    link = link_latest(first)
    assert str(link.readlink()) == first.name
    assert link_latest(second) == link
    assert find_latest_checkpoint(tmp_path) == second.resolve()
    # The folder can be moved as a whole.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert find_latest_checkpoint(moved) == (moved / second.name).resolve()


@pytest.mark.parametrize("without", [("symlink",), ("symlink", "link")], ids=["hard link", "copy"])
def test_latest_where_links_are_not_supported(tmp_path, monkeypatch, without):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "not supported here")

    for name in without:
        monkeypatch.setattr(os, name, refuse)
    for number in (1, 2):
        link = link_latest(save(tmp_path, f"model_epoch_00{number}.pth", number))
        assert not link.is_symlink()
        assert torch.load(find_latest_checkpoint(tmp_path), weights_only=True)["number"] == number


def test_cut_off_files_are_not_whole(tmp_path):
    path = save(tmp_path, "model_epoch_000.pth")
    content = path.read_bytes()
    assert is_whole(path)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not is_whole(path), length
    assert not is_whole(tmp_path / "missing.pth")


def test_broken_or_missing_latest_falls_back_to_the_newest_whole_file(tmp_path):
    assert find_latest_checkpoint(tmp_path) is None
    assert find_latest_checkpoint(tmp_path / "nowhere") is None
    good = save(tmp_path, "model_epoch_000.pth")
    assert find_latest_checkpoint(tmp_path) == good.resolve()
    broken = tmp_path / "model_epoch_001.pth"
    broken.write_bytes(good.read_bytes()[:100])
    link_latest(broken)
    assert find_latest_checkpoint(tmp_path) == good.resolve()
    broken.unlink()
    assert find_latest_checkpoint(tmp_path) == good.resolve()


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    kept = ["model_epoch_000.pth", "dd_model_latest.pth", ".tmp-12-results.json", "notes.txt"]
    gone = [".tmp-12-model_epoch_001.pth", ".tmp-7-dd_model_latest.pth"]
    for name in kept + gone:
        (tmp_path / name).touch()
    assert sorted(path.name for path in remove_leftovers(tmp_path)) == sorted(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_full_disk_names_the_last_good_checkpoint(tmp_path):
    good = save(tmp_path, "model_epoch_000.pth")
    link_latest(good)
    wanted = tmp_path / "model_epoch_001.pth"
    with (
        pytest.raises(InputError) as caught,
        full_disk_told(wanted),
        checkpoint_written_whole(wanted) as path,
    ):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(wanted) in str(caught.value)
    assert f"last good checkpoint is {good.resolve()}" in str(caught.value)
    assert {item.name for item in tmp_path.iterdir()} == {good.name, LATEST_NAME}


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), full_disk_told(tmp_path / "model_epoch_000.pth"):
        raise PermissionError(errno.EACCES, "no")
