"""Count how often the host reads from tensors, which on a GPU makes it wait for the device.

On CUDA PyTorch itself reports such reads. On a CPU nothing waits, but the same calls are made: they are
recognised by name, so that a test without a GPU can count them.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result's size or whose Python value depends on what a tensor holds.
_READING_OPERATORS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::equal",
}
_TO_HOST = {"cpu", "numpy", "tolist"}


def _texts(args: tuple, kwargs: dict | None) -> set[str]:
    """The strings among some arguments."""
    return {value for value in (*args, *(kwargs or {}).values()) if isinstance(value, str)}


def _storages(values: Any) -> set[int]:
    """Addresses of the storages of all tensors in arguments or results."""
    found: set[int] = set()
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, torch.Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, (tuple, list)):
            found |= _storages(value)
    return found


class _Operators(TorchDispatchMode):
    def __init__(self, reads: list[str], on_host: set[int]) -> None:
        super().__init__()
        self.reads, self.on_host = reads, on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        reads = name in _READING_OPERATORS
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            # A mask is turned into indices, whose number the host must know.
            reads = any(index is not None and index.dtype == torch.bool for index in args[1])
        if name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None:
            reads = True
        if reads and not _storages(args) <= self.on_host:
            self.reads.append(_call_site(name))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, reads: list[str], on_host: set[int]) -> None:
        super().__init__()
        self.reads, self.on_host = reads, on_host

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        # A device given as such is the model's own, which in a test is the CPU, too.
        to_host = name in _TO_HOST or (name == "to" and "cpu" in _texts(args[1:], kwargs))
        if to_host and not _storages(args[:1]) <= self.on_host:
            self.reads.append(_call_site(name))
            self.on_host |= _storages((args[0], result))
        return result


def _call_site(name: str) -> str:
    """The call and the line outside of PyTorch that made it."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename != __file__ and "/torch/" not in frame.filename
    ]
    if not frames:
        return name
    return f"{name} at {frames[-1].filename}:{frames[-1].lineno}"


@contextlib.contextmanager
def counted_host_reads(device: torch.device) -> Iterator[list[str]]:
    """A block whose reads from tensors of ``device`` are listed, with the line that made each.

    On a CPU a tensor that was sent to the host by ``.cpu()``, ``.numpy()`` or ``.tolist()`` counts as being
    there: that was one read, and looking at it again is none. Tensors made on the host and read there count
    all the same, since they cannot be told from the device's.

    Args:
        device: a CUDA device or the CPU.

    Yields:
        The list, which fills up during the block (for CUDA, when it ends).
    """
    reads: list[str] = []
    if device.type != "cuda":
        on_host: set[int] = set()
        with _Functions(reads, on_host), _Operators(reads, on_host):
            yield reads
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield reads
        finally:
            torch.cuda.set_sync_debug_mode(before)
    reads += [
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    ]
