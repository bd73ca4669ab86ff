"""The state of mmengine's message hub as tensors and plain values, and back.

mmengine pickles its ``HistoryBuffer`` objects into a checkpoint, together with references to methods, and
numpy scalars beside them. ``torch.load(weights_only=True)``, the default since torch 2.6, refuses all of
that. In the plain form a checkpoint needs no class at all to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_BUFFER_KEYS = {"values", "counts", "max_length"}


def plain_message_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The plain form of ``MessageHub.state_dict()``."""
    return {
        "log_scalars": {name: _plain_buffer(buffer) for name, buffer in state["log_scalars"].items()},
        "runtime_info": plain_values(dict(state["runtime_info"])),
        "resumed_keys": dict(state["resumed_keys"]),
    }


def message_state_from_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What ``MessageHub.load_state_dict`` takes, from the plain form; buffers of mmengine's own pass."""
    restored = dict(state)
    restored["log_scalars"] = {
        name: _restored_buffer(buffer) for name, buffer in state.get("log_scalars", {}).items()
    }
    return restored


def plain_values(value: Any) -> Any:
    """Config containers as dicts and lists, numpy's numbers as Python's, numpy arrays as lists."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain_values(item) for item in value)
    if isinstance(value, list):
        return [plain_values(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value


def _plain_buffer(buffer: Any) -> Any:
    if not isinstance(buffer, HistoryBuffer):
        return buffer
    values, counts = buffer.data
    return {
        "values": torch.from_numpy(np.asarray(values, dtype=np.float64)),
        "counts": torch.from_numpy(np.asarray(counts, dtype=np.int64)),
        "max_length": buffer.max_length,
    }


def _restored_buffer(buffer: Any) -> Any:
    if not isinstance(buffer, Mapping) or not _BUFFER_KEYS.issubset(buffer):
        return buffer
    return HistoryBuffer(
        buffer["values"].cpu().numpy(), buffer["counts"].cpu().numpy(), max_length=buffer["max_length"]
    )
