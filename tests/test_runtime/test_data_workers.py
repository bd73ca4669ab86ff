"""Data workers hand tensors over wherever the temporary folder lies."""

from __future__ import annotations

import tempfile
from multiprocessing import util
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ddetr_mm.runtime.data_workers import LONGEST_FOLDER, keep_socket_names_short
from ddetr_mm.runtime.stop_signals import signal_proof_worker_init


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes a temporary folder with a name of so many bytes the one in use."""

    def use(num_bytes: int) -> Path:
        folder = Path("/tmp/" + "x" * (num_bytes - len("/tmp/")))
        folder.mkdir()
        made.append(folder)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        return folder

    made: list[Path] = []
    yield use
    for folder in made:
        folder.rmdir()


def test_a_long_temporary_folder_is_passed_over(temporary):
    temporary(LONGEST_FOLDER + 1)
    keep_socket_names_short()
    assert len(tempfile.gettempdir()) <= LONGEST_FOLDER


def test_the_longest_folder_still_takes_a_socket(temporary, monkeypatch):
    folder = temporary(LONGEST_FOLDER)
    keep_socket_names_short()
    assert tempfile.gettempdir() == str(folder)
    with tempfile.TemporaryDirectory(prefix="pymp-") as sockets:
        monkeypatch.setattr(util, "get_temp_dir", lambda: sockets)
        Listener(family="AF_UNIX").close()


def test_without_any_short_folder_the_variable_is_named(temporary, monkeypatch):
    temporary(LONGEST_FOLDER + 1)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OSError, match=r"TMPDIR=/tmp/x+ is too long .* set TMPDIR to a folder"):
        keep_socket_names_short()


def test_batches_arrive_from_below_a_long_folder(temporary):
    temporary(120)
    loader = DataLoader(
        torch.arange(8.0), batch_size=4, num_workers=1, worker_init_fn=signal_proof_worker_init, timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), torch.arange(8.0))
