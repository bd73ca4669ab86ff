"""The classes beyond tensors that a checkpoint may hold and still be read with ``weights_only=True``.

mmengine saves its log history (``HistoryBuffer``, numpy arrays and scalars) with the weights, and the
first Deformable DETR releases hold an ``argparse.Namespace``. All of it is plain data; the protection
of ``torch.load`` stays on for everything else.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]

_NUMBER_TYPES = "? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8"


def safe_globals() -> list[SafeGlobal]:
    """What to hand to ``torch.serialization.safe_globals`` or ``add_safe_globals``.

    Returns:
        Callables, and pairs of a callable and the name that the file knows it by.
    """
    from mmengine.logging import HistoryBuffer

    # Taken from values, since numpy 1 and 2 keep them in different modules; files of both exist.
    rebuild_array: Any = np.empty(0).__reduce__()[0]
    rebuild_scalar: Any = np.float64(0).__reduce__()[0]
    numpy_globals: list[SafeGlobal] = [np.ndarray, np.dtype]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        numpy_globals += [(rebuild_array, f"{module}._reconstruct"), (rebuild_scalar, f"{module}.scalar")]
    # One class per number type: an array of objects is not among them.
    numpy_globals += list(dict.fromkeys(type(np.dtype(name)) for name in _NUMBER_TYPES.split()))
    return [
        HistoryBuffer,
        (_history_buffer_method, "builtins.getattr"),
        argparse.Namespace,
        *numpy_globals,
    ]


def _history_buffer_method(owner: Any, name: str) -> Any:
    """What ``getattr`` may do in a checkpoint: name one of ``HistoryBuffer``'s own statistics.

    ``HistoryBuffer`` pickles references to its methods ``min``, ``max``, ``current`` and ``mean``.

    Raises:
        pickle.UnpicklingError: any other attribute of anything is asked for.
    """
    from mmengine.logging import HistoryBuffer

    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"the file asks for attribute {name!r} of {owner!r}, which is no plain data")
