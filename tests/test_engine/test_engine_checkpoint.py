from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmengine.runner.runner as mmengine_runner
import numpy as np
import pytest
import torch
from folders import visible
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.hooks import Hook

import ddetr_mm
from ddetr_mm.engine.checkpoint import (
    LATEST_NAME,
    RESUME_KEY,
    CheckpointName,
    Latest,
    Start,
    TAOCheckpointHook,
    checkpoint_written_whole,
    find_latest_checkpoint,
    find_start,
    full_disk_as_error,
    is_whole,
    link_latest,
    list_checkpoints,
    read_latest,
    refuse_other_classes,
)
from ddetr_mm.errors import DataError, InputError, WeightsError
from ddetr_mm.models import sampling_choice
from ddetr_mm.models.sampling_choice import Candidate, choose
from ddetr_mm.outputs import protected_inputs


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def load(path):
    return torch.load(path, weights_only=True)


def test_saves_by_epoch_and_the_last(make_runner, tmp_path):
    make_runner([TAOCheckpointHook(interval=2)], epochs=5).train()
    folder = tmp_path / "train"
    assert names(folder) == ["model_epoch_001.pth", "model_epoch_003.pth", "model_epoch_004.pth"]
    assert str((folder / LATEST_NAME).readlink()) == "model_epoch_004.pth"
    assert (folder / "last_checkpoint").read_text() == str(folder / "model_epoch_004.pth")
    meta = load(folder / LATEST_NAME)["meta"]
    assert (meta["epoch"], meta["iter"], meta["batches_done"]) == (5, 25, 0)


def test_saves_by_step_with_the_step_in_the_name(make_runner, tmp_path):
    make_runner([TAOCheckpointHook(interval=5, unit="step")], epochs=3, batches=4).train()
    folder = tmp_path / "train"
    assert names(folder) == [
        "model_epoch_001_step_00005.pth",
        "model_epoch_002_step_00010.pth",
        "model_epoch_002_step_00012.pth",
    ]
    metas = [load(path)["meta"] for path in list_checkpoints(folder)]
    assert [(meta["epoch"], meta["iter"], meta["batches_done"]) for meta in metas] == [
        (1, 5, 1),
        (2, 10, 2),
        (3, 12, 0),
    ]


def test_a_step_that_ends_an_epoch_is_saved_as_finished_epoch(make_runner, tmp_path):
    make_runner([TAOCheckpointHook(interval=4, unit="step")], epochs=2, batches=4).train()
    folder = tmp_path / "train"
    assert names(folder) == ["model_epoch_000_step_00004.pth", "model_epoch_001_step_00008.pth"]
    first = load(list_checkpoints(folder)[0])
    assert (first["meta"]["epoch"], first["meta"]["batches_done"]) == (1, 0)
    assert first["param_schedulers"][0]["last_step"] == 1


def test_loops_that_count_iterations(make_runner, tmp_path):
    runner = make_runner(
        [TAOCheckpointHook(interval=3, unit="step")],
        batches=5,
        train_cfg={"by_epoch": False, "max_iters": 7},
        param_scheduler=None,
    )
    runner.train()
    steps = [load(path)["meta"]["iter"] for path in list_checkpoints(tmp_path / "train")]
    assert steps == [3, 6, 7]


def test_content_is_plain_and_carries_what_tools_need(make_runner, tmp_path):
    extra = {"spec": "a: 1", "labels": [1, {"deep": (2,)}]}
    hook = ConfigDict({"type": "TAOCheckpointHook", "extra_meta": extra})
    make_runner([hook], epochs=1, validate=True).train()
    checkpoint = load(tmp_path / "train" / "model_epoch_000.pth")
    assert {"meta", "state_dict", "message_hub", "optimizer", "param_schedulers", "rng_states"} <= set(
        checkpoint
    )
    # A network without attention has no settings of its own.
    assert checkpoint["meta"]["ddetr_mm"] == {**extra, "package_version": ddetr_mm.__version__}
    assert checkpoint["meta"]["dataset_meta"]["category_ids"] == [1, 2]
    assert len(checkpoint["rng_states"]) == 1


class ChoosesKernels(Hook):
    """Computes attention in the first step, with two kernels that agree."""

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = candidates

    def after_train_iter(self, *_args: Any, **_kwargs: Any) -> None:
        expected = Candidate("torch", lambda: (torch.ones(3),))
        candidates = [Candidate(name, expected.run) for name in self.candidates]
        choose("forward", "float32", candidates, tuple, last=expected, expected=expected)


def test_attention_kernels_are_kept_and_preferred_on_resume(make_runner, tmp_path):
    make_runner([TAOCheckpointHook(), ChoosesKernels(["mmcv", "triton"])], epochs=1).train()
    path = tmp_path / "train" / "model_epoch_000.pth"
    assert load(path)["meta"]["ddetr_mm"]["attention_kernels"] == {"forward, float32": "mmcv"}
    resumed = make_runner([TAOCheckpointHook(), ChoosesKernels(["triton", "mmcv"])], epochs=2, resume=True)
    resumed.train()
    path = tmp_path / "train" / "model_epoch_001.pth"
    assert load(path)["meta"]["ddetr_mm"]["attention_kernels"] == {"forward, float32": "mmcv"}
    # A new run of the same process chooses anew.
    make_runner([TAOCheckpointHook(), ChoosesKernels(["triton"])], tmp_path / "new", epochs=1).train()
    path = tmp_path / "new" / "model_epoch_000.pth"
    assert load(path)["meta"]["ddetr_mm"]["attention_kernels"] == {"forward, float32": "triton"}
    sampling_choice.forget_choices()


def test_reading_needs_no_class(make_runner, tmp_path):
    make_runner([TAOCheckpointHook()], epochs=2, validate=True).train()
    path = tmp_path / "train" / "model_epoch_001.pth"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []


def test_message_hub_survives_resuming(make_runner, tmp_path):
    first = make_runner([TAOCheckpointHook()], epochs=2, validate=True)
    first.train()
    second = make_runner([TAOCheckpointHook()], epochs=3, validate=True, resume=True)
    second.train()
    losses = second.message_hub.get_scalar("train/loss").data[0]
    assert len(losses) == 15
    assert losses[:10].tolist() == first.message_hub.get_scalar("train/loss").data[0].tolist()


def test_keeps_only_as_many_as_asked(make_runner, tmp_path):
    make_runner([TAOCheckpointHook(max_keep=2)], epochs=5).train()
    assert names(tmp_path / "train") == ["model_epoch_003.pth", "model_epoch_004.pth"]


def test_a_finished_run_writes_nothing_more(make_runner, tmp_path):
    make_runner([TAOCheckpointHook()], epochs=1).train()
    before = (tmp_path / "train" / "model_epoch_000.pth").stat().st_mtime_ns
    make_runner([TAOCheckpointHook()], epochs=1, resume=True).train()
    assert names(tmp_path / "train") == ["model_epoch_000.pth"]
    assert (tmp_path / "train" / "model_epoch_000.pth").stat().st_mtime_ns == before


def test_early_stop_saves_the_end(make_runner, tmp_path):
    runner = make_runner([TAOCheckpointHook(interval=3)], epochs=5)
    epoch_run = runner.train_loop.run_epoch

    def stop_after_two():
        epoch_run()
        runner.train_loop.stop_training = runner.epoch == 2

    runner.train_loop.run_epoch = stop_after_two
    runner.train()
    assert names(tmp_path / "train") == ["model_epoch_001.pth"]
    assert load(tmp_path / "train" / LATEST_NAME)["meta"]["epoch"] == 2


@pytest.mark.parametrize(
    ("classes", "ids", "says"),
    [
        (("b", "a"), [1, 2], "error"),
        (("a", "c"), [1, 2], "error"),
        (("background", "b", "a"), [None, 1, 2], "error"),
        (("a", "b"), [1, 2], ""),
        (("a", "b", "c"), [1, 2, 3], "1 classes of the data are new to the checkpoint: c"),
        (("a",), [1], "1 classes of the checkpoint are not in the data: b"),
        ((), None, ""),
    ],
)
def test_classes_stay_in_their_columns_on_resume(caplog, classes, ids, says):
    meta = {"dataset_meta": {"classes": ("a", "b"), "category_ids": [1, 2]}}
    data = SimpleNamespace(metainfo={"classes": classes, "category_ids": ids})
    if says == "error":
        with pytest.raises(WeightsError, match="0 a, 1 b") as caught:
            refuse_other_classes(meta, data, logging.getLogger("resume"))
        assert "category_ids: by_name" in str(caught.value)
    else:
        refuse_other_classes(meta, data, logging.getLogger("resume"))
        assert says in caplog.text and bool(caplog.text) is bool(says)


@pytest.mark.parametrize("validate", [False, True])
def test_resumed_run_ends_bit_equal(make_runner, tmp_path, validate):
    straight = make_runner([TAOCheckpointHook()], tmp_path / "a", epochs=3, validate=validate)
    straight.train()

    class Killed(Exception):
        pass

    class Stop(Hook):
        priority = "VERY_HIGH"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 7:
                raise Killed

    with pytest.raises(Killed):
        make_runner([TAOCheckpointHook(), Stop()], tmp_path / "b", epochs=3, validate=validate).train()
    torch.rand(17)
    np.random.random(5)
    # The data of the interrupted epoch are drawn again from the state at its beginning.
    resumed = make_runner([TAOCheckpointHook()], tmp_path / "b", epochs=3, validate=validate, resume=True)
    resumed.train()
    ends = [load(tmp_path / name / "model_epoch_002.pth") for name in "ab"]
    for key, weights in ends[0]["state_dict"].items():
        assert torch.equal(weights, ends[1]["state_dict"][key]), key
    moments = [end["optimizer"]["state"][0]["exp_avg"] for end in ends]
    assert torch.equal(*moments)
    assert ends[0]["param_schedulers"] == ends[1]["param_schedulers"]


def test_full_disk_is_one_message_and_keeps_the_last_good(make_runner, tmp_path, monkeypatch):
    folder = tmp_path / "train"
    real = mmengine_runner.save_checkpoint

    def save_on_full_disk(checkpoint, filename, **options):
        if checkpoint["meta"]["epoch"] == 2:
            Path(filename).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(checkpoint, filename, **options)

    monkeypatch.setattr(mmengine_runner, "save_checkpoint", save_on_full_disk)
    with pytest.raises(InputError, match=r"no space left.*model_epoch_000\.pth"):
        make_runner([TAOCheckpointHook()], epochs=3).train()
    assert names(folder) == ["model_epoch_000.pth"]
    assert is_whole(find_latest_checkpoint(folder))
    assert not list(folder.glob(".ddetr_mm-*"))


def test_a_limit_of_the_system_is_reported_like_a_full_disk(make_runner, tmp_path):
    """No stand-in: the system itself ends the writing in the middle of the file."""
    folder = tmp_path / "train"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class HalfTheSize(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                size = (folder / "model_epoch_000.pth").stat().st_size // 2
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        with pytest.raises(
            InputError, match=r"no space left.*last good checkpoint is .*model_epoch_000\.pth"
        ):
            make_runner([TAOCheckpointHook(), HalfTheSize()], epochs=3).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(folder) == ["model_epoch_000.pth"]
    assert load(folder / LATEST_NAME)["meta"]["epoch"] == 1
    assert not list(folder.glob(".ddetr_mm-*"))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="epoch, step"):
        TAOCheckpointHook(unit="iter")
    with pytest.raises(ValueError, match="at least 1"):
        TAOCheckpointHook(interval=0)


KILLED_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_runs import build_runner
from ddetr_mm.engine.checkpoint import TAOCheckpointHook
build_runner(Path(sys.argv[1]), [TAOCheckpointHook(interval=1, unit="step")], epochs=100000).train()
"""


def test_a_killed_run_leaves_only_whole_files_and_continues(make_runner, tmp_path):
    folder = tmp_path / "train"
    command = [sys.executable, "-c", KILLED_RUN, str(folder), str(Path(__file__).parents[1])]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list_checkpoints(folder)) < 5 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    written = list_checkpoints(folder)
    assert len(written) >= 5
    assert all(is_whole(path) for path in written)
    latest = find_latest_checkpoint(folder)
    # The link is at most one checkpoint behind: the moment between renaming and linking.
    assert latest.name in [path.name for path in written[-2:]]
    done = load(latest)["meta"]["iter"]
    (folder / ".ddetr_mm-0123456789abcdef.tmp.pth").touch()
    runner = make_runner(
        [TAOCheckpointHook(interval=1, unit="step")],
        folder,
        epochs=load(latest)["meta"]["epoch"] + 1,
        load_from=str(latest),
        resume=True,
    )
    runner.train()
    assert runner.iter > done
    assert not list(folder.glob(".ddetr_mm-*"))
    assert json.dumps(load(folder / LATEST_NAME)["meta"]["iter"]) == str(runner.iter)


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
    assert visible(tmp_path) == [path.name]


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


def test_without_the_link_there_is_nothing_to_resume(tmp_path):
    assert read_latest(tmp_path) == Latest() == read_latest(tmp_path / "nowhere")
    save(tmp_path, "model_epoch_000.pth")
    assert find_latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("target", "length", "found", "fault"),
    [
        ("model_epoch_002.pth", None, "model_epoch_001.pth", "points at {target}, which does not exist"),
        ("model_epoch_002.pth", 100, "model_epoch_001.pth", "points at {target}, which is incomplete (100 "),
        ("gone.pth", None, "model_epoch_003.pth", "points at {target}, which does not exist"),
        # Of an earlier run, after which training began anew:
        (
            "model_epoch_001.pth",
            0,
            "model_epoch_000.pth",
            "points at {target}, which is incomplete (0 bytes)",
        ),
        (
            "model_epoch_000.pth",
            0,
            "model_epoch_003.pth",
            "points at {target}, which is incomplete (0 bytes)",
        ),
    ],
)
def test_a_broken_link_leads_to_the_newest_complete_file(tmp_path, target, length, found, fault):
    for number in (0, 1, 3):
        save(tmp_path, f"model_epoch_00{number}.pth", number)
    link_latest(tmp_path / target)
    if length is not None:
        (tmp_path / target).write_bytes((tmp_path / "model_epoch_003.pth").read_bytes()[:length])
    latest = read_latest(tmp_path)
    assert latest.path == (tmp_path / found).resolve()
    assert latest.fault.startswith(fault.format(target=target))


def test_a_broken_copy_leads_to_the_newest_complete_file(tmp_path):
    good = save(tmp_path, "model_epoch_000.pth")
    (tmp_path / LATEST_NAME).write_bytes(b"PK")
    assert read_latest(tmp_path) == Latest(good.resolve(), "is incomplete (2 bytes)")
    (tmp_path / LATEST_NAME).unlink()
    (tmp_path / LATEST_NAME).symlink_to(LATEST_NAME)
    assert read_latest(tmp_path).path == good.resolve()


def test_a_broken_link_without_complete_files(tmp_path):
    link_latest(tmp_path / "model_epoch_000.pth")
    assert read_latest(tmp_path).path is None
    start = find_start(tmp_path)
    assert start.checkpoint is None and "model_epoch_000.pth, which does not exist" in start.warning
    assert start.message == (
        f"Training begins anew, without pretrained weights: there is no complete checkpoint in {tmp_path}."
    )


def save_resumable(folder, name):
    path = folder / name
    meta = {"epoch": 1, "iter": 3}
    torch.save({"state_dict": {"a": torch.zeros(2)}, "optimizer": {}, "meta": meta}, path)
    return path


def test_a_start_says_what_it_does_and_how_to_get_the_other(tmp_path):
    begins = find_start(tmp_path, weights="w.pth")
    assert begins == Start(
        None,
        f"Training begins anew, with the weights of w.pth: {tmp_path} has no checkpoint; to resume a run "
        f"elsewhere, set {RESUME_KEY}=FILE.",
    )
    first = save_resumable(tmp_path, "model_epoch_000.pth")
    second = save_resumable(tmp_path, "model_epoch_001.pth")
    assert find_start(tmp_path) == Start(
        None,
        f"Training begins anew, without pretrained weights: {tmp_path} has no dd_model_latest.pth; to resume "
        f"the earlier run, set {RESUME_KEY}={second}.",
    )
    named = f"Training resumes from {first} ({RESUME_KEY}); without that key it would"
    assert find_start(tmp_path, str(first)) == Start(first, f"{named} begin anew.")
    link = link_latest(second)
    assert find_start(tmp_path, str(first)) == Start(first, f"{named} resume from {second.resolve()}.")
    anew = f"to begin anew, remove {link} or name another results_dir"
    assert find_start(tmp_path) == Start(
        second.resolve(), f"Training resumes from {second.resolve()} (dd_model_latest.pth); {anew}."
    )
    second.unlink()
    assert find_start(tmp_path) == Start(
        first.resolve(),
        f"Training resumes from {first.resolve()} (the newest complete checkpoint); {anew}.",
        f"{link} points at model_epoch_001.pth, which does not exist",
    )


def test_checkpoints_of_others_stop_the_run_before_its_first_step(make_runner, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "model_epoch_001.pth").write_text("mine")
    (folder / "model_epoch_007.pth").write_text("of another run, and not in the way")
    runner = make_runner([TAOCheckpointHook()], epochs=2)
    with protected_inputs(()), pytest.raises(DataError, match=r"model_epoch_001\.pth"):
        runner.train()
    assert runner.iter == 0 and (folder / "model_epoch_001.pth").read_text() == "mine"


def test_full_disk_names_the_last_good_checkpoint(tmp_path):
    good = save(tmp_path, "model_epoch_000.pth")
    link_latest(good)
    wanted = tmp_path / "model_epoch_001.pth"
    with (
        pytest.raises(InputError) as caught,
        full_disk_as_error(wanted, lambda: 3 << 20),
        checkpoint_written_whole(wanted) as path,
    ):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(wanted) in str(caught.value)
    assert re.search(rf"3\.0 MiB wanted, [0-9.]+ \w+ free in {tmp_path}", str(caught.value))
    assert f"last good checkpoint is {good.resolve()}" in str(caught.value)
    assert visible(tmp_path) == [LATEST_NAME, good.name]


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), full_disk_as_error(tmp_path / "model_epoch_000.pth"):
        raise PermissionError(errno.EACCES, "no")
