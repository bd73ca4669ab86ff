"""The group of ranks that a process belongs to: joining it, leaving it, agreeing within it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from mmengine.dist import broadcast_object_list
from torch import distributed

from ddetr_mm.runtime.rank_env import LAUNCHED_VARIABLE, is_launched_by_us, is_rank

TIMEOUT = timedelta(minutes=60)
"""How long a rank waits for the others. Long, for they wait while the first one scores a large data set or
writes a large checkpoint; a rank that *dies* is noticed by the launcher at once."""

_LAUNCHER_GONE_STATUS = 1


@contextmanager
def process_group() -> Iterator[None]:
    """Belong to the job's group of ranks inside the block.

    Outside a job, and where the group is there already, nothing happens.

    Ranks talk over NCCL where there is a GPU, else over gloo. mmengine's own initialisation is not used:
    it asks for a GPU wherever torch was built for one.
    """
    if not is_rank() or distributed.is_initialized():
        yield
        return
    end_with_launcher()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # mmengine's choice too, which it makes with a warning
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        # Slurm may show each task its own GPU only.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group(backend, timeout=TIMEOUT)
    yield
    # Only after success: a rank that has failed must not wait for the others.
    distributed.barrier()
    distributed.destroy_process_group()


def end_with_launcher() -> None:
    """End this rank when the process that started it is gone without having been able to stop it.

    Without this, ranks of a killed command would go on training, beside those of the command's next start.
    """
    if not is_launched_by_us():
        return
    launcher = int(os.environ[LAUNCHED_VARIABLE])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(_LAUNCHER_GONE_STATUS)

    threading.Thread(target=watch, daemon=True, name="end-with-launcher").start()


def decided_by_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank: for what could differ by the moment it is looked up.

    Args:
        value: anything that can be pickled; that of other ranks is dropped.
    """
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]
