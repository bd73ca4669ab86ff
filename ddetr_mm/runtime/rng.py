"""The state of all random number generators of a process, as plain values that load safely.

Nothing here needs pickled classes: the state is made of tensors, numbers, strings, lists and dicts, so a
checkpoint that holds it can be read with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RngState = dict[str, Any]


def capture_rng_state() -> RngState:
    """The states of ``random``, numpy's global generator, torch on CPU and torch on every GPU."""
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "python": {"version": version, "internal": list(internal), "gauss_next": gauss_next},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached_gaussian),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_host_rng(state: RngState) -> None:
    """Put back ``random`` and numpy: what data augmentation in this process draws from."""
    saved = state["python"]
    random.setstate((saved["version"], tuple(saved["internal"]), saved["gauss_next"]))
    saved = state["numpy"]
    keys = saved["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(
        (saved["name"], keys, saved["position"], saved["has_gauss"], saved["cached_gaussian"])
    )


def restore_torch_rng(state: RngState) -> None:
    """Put back torch's generators: what dropout and the like draw from.

    GPU states are put back for as many GPUs as there are both now and in the state.
    """
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(saved.cpu(), device)
