"""What mmdeploy 1.3.1 needs on a new torch, mended for the time of a block.

Three things, none of which does anything on the torch that mmdeploy was written for:

1. ``torch.onnx.export`` uses a new exporter by default since torch 2.9, which mmdeploy's rewriters do not
   fit. It gets ``dynamo=False``.
2. mmdeploy treats torch's table of fx-wrapped functions as the list that it once was and takes the last entry
   off it; today it is a dict and that fails with ``KeyError: -1``. mmdeploy gets a list of its own: tracing
   does not use it.
3. mmdeploy exports ``grid_sampler`` as an operator of its own runtime library. From opset 16 on ONNX has
   GridSample, so its record is taken out and torch's own export comes through.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

FIRST_OPSET_WITH_GRID_SAMPLE = 16


@contextmanager
def mended_mmdeploy(opset: int) -> Iterator[None]:
    """Keep mmdeploy working inside the block.

    Args:
        opset: the opset that will be written; below 16 mmdeploy's own ``grid_sampler`` stays.
    """
    with ExitStack() as stack:
        stack.enter_context(_old_exporter())
        stack.enter_context(_list_of_wrapped_functions())
        if opset >= FIRST_OPSET_WITH_GRID_SAMPLE:
            stack.enter_context(_standard_grid_sample())
        yield


@contextmanager
def _old_exporter() -> Iterator[None]:
    import torch

    original = torch.onnx.export
    if "dynamo" not in inspect.signature(original).parameters:
        yield
        return

    @functools.wraps(original)
    def export(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{"dynamo": False, **kwargs})

    torch.onnx.export = export
    try:
        yield
    finally:
        torch.onnx.export = original


@contextmanager
def _list_of_wrapped_functions() -> Iterator[None]:
    from mmdeploy.core.rewriters import function_rewriter

    original = function_rewriter._wrapped_fns_to_patch
    if isinstance(original, list):
        yield
        return
    function_rewriter._wrapped_fns_to_patch = []
    try:
        yield
    finally:
        function_rewriter._wrapped_fns_to_patch = original


@contextmanager
def _standard_grid_sample() -> Iterator[None]:
    import mmdeploy.pytorch  # noqa: F401 - registers the record
    from mmdeploy.core import SYMBOLIC_REWRITER

    records = SYMBOLIC_REWRITER._registry._rewrite_records
    taken = records.pop("grid_sampler", None)
    try:
        yield
    finally:
        if taken is not None:
            records["grid_sampler"] = taken
