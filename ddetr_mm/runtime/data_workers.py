"""Data workers' sockets, and ending the workers of a run in good order."""

from __future__ import annotations

import os
import tempfile
from typing import Any

LONGEST_FOLDER = 70
"""Bytes of a temporary folder's name below which a worker's socket still has room in the 104 to 108 of a
socket's name (unix(7)): ``/pymp-XXXXXXXX/listener-XXXXXXXX`` takes 32."""


def keep_socket_names_short() -> None:
    """Let this process make its sockets in a folder with a short name where ``TMPDIR`` has a long one.

    A data worker hands tensors over through a socket below the temporary folder. With a longer name than
    a socket can have, it would fail without the main process hearing of it, which then waits for ever.

    Raises:
        OSError: no folder with a short name may be written to.
    """
    here = tempfile.gettempdir()
    if os.name != "posix" or len(os.fsencode(here)) <= LONGEST_FOLDER:
        return
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - a private folder is made below it
        if os.access(folder, os.W_OK | os.X_OK):
            tempfile.tempdir = folder
            return
    raise OSError(
        f"TMPDIR={here} is too long for the sockets of data workers (at most {LONGEST_FOLDER} bytes); "
        "set TMPDIR to a folder with a shorter name"
    )


def end_data_workers(runner: Any) -> None:
    """Tell the data workers of a runner's loops to end, and wait for them.

    Workers that stay for the next epoch are otherwise killed when Python exits, and leave behind the
    temporary folder of the socket through which they hand tensors over.

    Args:
        runner: mmengine's; loops that were never built are left alone.
    """
    for name in ("_train_loop", "_val_loop", "_test_loop"):
        loader = getattr(getattr(runner, name, None), "dataloader", None)
        iterator = getattr(loader, "_iterator", None)
        end = getattr(iterator, "_shutdown_workers", None)
        if end is not None:
            end()
            loader._iterator = None
