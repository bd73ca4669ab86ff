"""Ending the data workers of a run in good order."""

from __future__ import annotations

from typing import Any


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
