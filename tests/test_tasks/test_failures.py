"""Failures of the machine as one message."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from ddetr_mm.errors import DataError, RunError
from ddetr_mm.tasks.session import machine_error, machine_failures_as_errors


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/x.json"), DataError, "GiB free in"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DataError, "free some space"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "x"), DataError, "Read-only file system"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), DataError, "ulimit -n"),
        (MemoryError(), RunError, "the machine has too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RunError, "the GPU has too"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), RunError, "was killed"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), RunError, "dataset.workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), RunError, "--shm-size"),
    ],
)
def test_each_is_reported_with_what_to_do(error, kind, words):
    told = machine_error(error)
    assert type(told) is kind and words in str(told)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), OSError("no number")])
def test_defects_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, machine_failures_as_errors():
        raise error
    assert caught.value is error
