"""A data worker that gives no batch ends the run in time, with what it reads; small /dev/shm is reported."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch
from bad_input_project import edit_json, run_here
from mmengine.registry import init_default_scope
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ddetr_mm.datasets.image_size import UnreadableImage, read_image_size
from ddetr_mm.datasets.images import read_image
from ddetr_mm.datasets.worker_state import files_being_read, reading
from ddetr_mm.engine.runner import DATA_TIMEOUT_S, QuietRunner
from ddetr_mm.errors import DataError, RunError
from ddetr_mm.preflight.resources import check_shared_memory, shared_memory_free
from ddetr_mm.spec.own_schema import OwnSection
from ddetr_mm.tasks.session import machine_error
from ddetr_mm.translate.data import DATA_TIMEOUT_S as TRANSLATED_S

SPEC = ("-e", "spec.yaml")
SHARD = "coco/val/val-shard-00000-of-00001.json"


class Stuck(Dataset):
    """Its third sample never comes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2:
            with reading("/data/third.png"):
                time.sleep(600)
        return torch.zeros(1)


def test_the_message_names_worker_and_file():
    loader = DataLoader(Stuck(), num_workers=2, timeout=3)
    iterator = iter(loader)
    workers = {worker.pid for worker in iterator._workers}
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out") as caught:
        for _ in iterator:
            pass
    assert time.monotonic() - started < 60
    found = machine_error(caught.value)
    assert isinstance(found, RunError) and "/data/third.png" in str(found) and "within 3 s" in str(found)
    assert any(str(pid) in str(found) for pid in workers) and "data_timeout_s" in str(found)
    for worker in iterator._workers:
        worker.kill()
        worker.join()
    assert not files_being_read()


def test_workers_that_read_nothing_point_to_shared_memory():
    found = machine_error(RuntimeError("DataLoader timed out after 300 seconds"))
    assert "--shm-size" in str(found) and "dataset.workers=0" in str(found) and "/dev/shm" in str(found)


def test_places_are_emptied():
    with reading("/a/b.png"):
        assert files_being_read()[os.getpid()] == "/a/b.png"
        long = "/" + "x" * 5000 + ".png"
        with reading(long):
            assert files_being_read()[os.getpid()].endswith("xxx.png")
    assert os.getpid() not in files_being_read()


def test_the_limit_of_a_loader(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    dataset = {"type": "ImageFolderDataset", "folders": str(tmp_path)}
    init_default_scope("mmdet")
    built = {"dataset": dataset, "sampler": {"type": "DefaultSampler", "shuffle": False}, "batch_size": 1}
    for workers, given, expected in ((0, {}, 0), (1, {}, DATA_TIMEOUT_S), (1, {"timeout": 7}, 7)):
        loader = QuietRunner.build_dataloader({**built, "num_workers": workers, **given})
        assert loader.timeout == expected
    assert OwnSection().data_timeout_s == DATA_TIMEOUT_S == TRANSLATED_S


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    return str(path)


def test_a_pipe_is_no_picture(pipe):
    """Reading one waits for ever: an alarm would end this test."""
    signal.alarm(20)
    try:
        with pytest.raises(DataError, match="no regular file"):
            read_image(pipe)
        for decode in (False, True):
            with pytest.raises(UnreadableImage, match="no regular file"):
                read_image_size(pipe, decode=decode)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_pipe_among_the_pictures_of_a_run(command, own_project):
    names = []
    edit_json(own_project / SHARD, lambda content: names.append(content["images"][0]["file_name"]))
    path = own_project / "data" / names[0]
    path.unlink()
    os.mkfifo(path)
    words = ("evaluate.checkpoint=random.pth",) if command == "evaluate" else ()
    ended = run_here(own_project, command, *SPEC, *words, timeout=100)
    words = "no regular file" if command == "evaluate" else "do not exist"  # the check of a run's start
    assert ended.status == 2 and words in ended.message, ended.message


@pytest.mark.parametrize(
    ("workers", "batch", "free", "small"),
    [(0, 64, 1, False), (2, 1, 64 << 20, False), (8, 4, 64 << 20, True), (2, 4, 51_000_000, True)],
)
def test_small_shared_memory(workers, batch, free, small):
    findings = check_shared_memory(workers, batch, (800, 1333), free)
    assert bool(findings) == small
    assert all("--shm-size" in str(one.problem) for one in findings)


def test_check_and_train_say_it(own_project, monkeypatch):
    free = shared_memory_free()
    if free is None:
        pytest.skip("this system has no /dev/shm")
    words = (f"dataset.batch_size={max(free // 9000, 1) + 1}", "dataset.workers=8")
    ended = run_here(own_project, "check", *SPEC, "--quick", *words)
    assert "shared-memory-small" in ended.said and "--shm-size" in ended.said, ended.said
    assert np.isfinite(free)
