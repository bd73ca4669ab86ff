"""The choice between implementations of deformable sampling on a GPU: in a fixed order, judged, logged, kept.

Candidates are tried in the order of :data:`ORDER_BY_GENERATION`. The first whose results agree with mmcv's
PyTorch form on the first tensors of a kind is used from then on, and logged; one that fails, returns zeros
(as an op does that was built for another GPU) or differs is skipped with a warning. Nothing is timed, so that
two runs on one machine use the same kernels.

Checkpoints keep the choices (:func:`chosen_names`), and a resumed run tries those first (:func:`prefer`), so
that a change of the stack does not change its rounding unnoticed. ``ddetr_mm.attention`` overrides both.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from ddetr_mm.errors import Problem, StackError

Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidate:
    """One way to sample, or to compute the gradients.

    Attributes:
        name: for the log and for checkpoints; its first word is the backend.
        run: takes the tensors, returns a tuple of tensors.
        deterministic: whether equal inputs give equal bits.
    """

    name: str
    run: Run
    deterministic: bool = True


# --- Order ---

# The one place to edit when figures of a GPU exist (benchmarks/attention_gpu.py measures them).
# Evidence so far: none. No GPU has run this code; the kernels were only compiled for Hopper. So all rows are
# equal: mmcv's op first, which others have trained with for years, then Triton's launches in the order of
# triton_attention.LAUNCHES. A row may name single launches ("triton 16x2") before "triton".
ORDER_BY_GENERATION: dict[int, tuple[str, ...]] = {
    7: ("mmcv", "triton"),  # Volta, Turing
    8: ("mmcv", "triton"),  # Ampere, Ada
    9: ("mmcv", "triton"),  # Hopper
    10: ("mmcv", "triton"),  # Blackwell, data centre
    12: ("mmcv", "triton"),  # Blackwell, workstation
}
"""Major number of a GPU's compute capability → names of candidates or backends, best first."""

OTHER_ORDER = ("mmcv", "triton")
"""For GPUs without a row, and for a CPU with Triton's interpreter."""


def in_order(candidates: Sequence[Candidate], device: torch.device) -> list[Candidate]:
    """Sort candidates by the table's row for a device; those that it does not name come last, as given."""
    order = OTHER_ORDER
    if device.type == "cuda":
        order = ORDER_BY_GENERATION.get(_generation(device), OTHER_ORDER)

    def place(candidate: Candidate) -> int:
        names = (candidate.name, candidate.name.split(" ")[0])
        return min((order.index(name) for name in names if name in order), default=len(order))

    return sorted(candidates, key=place)


@functools.cache
def _generation(device: torch.device) -> int:
    """Return the major number of a GPU's compute capability, 0 where no GPU is."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 0


# --- Judging ---


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether results are equal up to rounding: 1e-4 of the largest in float32, 2e-2 in half
    precision.

    One element of a thousand may differ more: the gradient of a location is discontinuous at a cell's edge.
    """
    for one, other in zip(found, expected, strict=True):
        if not other.numel():
            continue
        tolerance = 1e-4 if other.dtype == torch.float32 else 2e-2
        largest = other.float().abs().max()
        # Only what is zero for all arguments, such as the gradient of a single logit, is zero here.
        limit = tolerance * torch.where(largest > 0, largest, torch.ones_like(largest))
        near = (one.float() - other.float()).abs() <= limit  # False for NaN
        if near.float().mean() < 0.999:
            return False
    return True


def fault_of(candidate: Candidate, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Say why a candidate cannot be used; None if it runs and agrees with the expected results."""
    try:
        found = candidate.run(*tensors)
        if any(other.any() and not one.any() for one, other in zip(found, expected, strict=True)):
            return "its results are zeros"
        if not all(bool(one.isfinite().all()) for one in found):
            return "its results are not finite"
        if not agree(found, expected):
            return "its results differ from PyTorch's"
    except Exception as error:  # any error of a compiler or driver: another candidate may do
        return repr(error)
    return None


def random_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return numbers of 0..1 in place of all that are not integers, always the same.

    Their generator is not torch's, whose state a resumed run restores.
    """
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(one.shape, generator=generator).to(one) if one.is_floating_point() else one
        for one in tensors
    ]


def _expected_results(
    expected: Candidate, arguments: Sequence[Tensor], replaced: Callable[[Sequence[Tensor]], Sequence[Tensor]]
) -> tuple[Sequence[Tensor], tuple[Tensor, ...] | None]:
    """Return arguments on which candidates can be judged, and PyTorch's results; None where there are none.

    Where a result is zero or not finite, nearly any candidate or none would agree: the arguments are then
    ``replaced``.
    """
    with _non_deterministic_allowed():
        wanted = expected.run(*arguments)
        if not all(bool(one.isfinite().all()) and (not one.numel() or bool(one.any())) for one in wanted):
            arguments = replaced(arguments)
            wanted = expected.run(*arguments)
    finite = all(bool(one.isfinite().all()) for one in wanted)
    return arguments, wanted if finite else None


@contextlib.contextmanager
def _non_deterministic_allowed() -> Iterator[None]:
    """Allow the gradient of ``grid_sample``, which has no deterministic form, inside the block."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


# --- Choice ---

_chosen: dict[tuple, Candidate] = {}
_names: dict[str, str] = {}  # direction and kind → the chosen candidate's name
_preferred: dict[str, str] = {}  # the same of a checkpoint
_faults: dict[str, str] = {}  # names of candidates that failed for any kind


def forget_choices() -> None:
    """Choose again at the next call, without a checkpoint's choices."""
    for known in (_chosen, _names, _preferred, _faults):
        known.clear()


def chosen_names() -> dict[str, str]:
    """Return the choices so far for a checkpoint, those that a resumed run has yet to make included.

    Returns:
        Direction and kind, such as ``forward, float32, 8 heads, ...`` → a candidate's name.
    """
    return {**_preferred, **_names}


def prefer(names: Any) -> None:
    """Try a checkpoint's choices first from now on; what is no mapping of strings is ignored.

    Args:
        names: as :func:`chosen_names` returned them.
    """
    forget_choices()
    if isinstance(names, Mapping):
        pairs = names.items()
        _preferred.update(
            {key: name for key, name in pairs if isinstance(key, str) and isinstance(name, str)}
        )


def place_of(value: Tensor) -> dict[str, Any]:
    """The arguments of :func:`choose` that say where an operator on this tensor runs."""
    capturing = value.is_cuda and torch.cuda.is_current_stream_capturing()
    return {"device": str(value.device), "capturing": capturing}


def choose(
    direction: str,
    kind: str,
    candidates: Sequence[Candidate],
    tensors: Callable[[], Sequence[Tensor]],
    *,
    last: Candidate | None,
    expected: Candidate,
    replaced: Callable[[Sequence[Tensor]], Sequence[Tensor]] = random_like,
    device: str = "",
    capturing: bool = False,
    deterministic: bool = False,
) -> Candidate:
    """Return the first candidate that agrees with PyTorch, chosen once for each direction, kind and device.

    Args:
        direction: ``forward`` or ``backward``.
        kind: dtype and sizes of the attention, in words.
        candidates: in order.
        tensors: returns the arguments for the comparison.
        last: the choice where no candidate agrees; None makes that an error.
        expected: computes the expected results.
        replaced: makes arguments with which results are not zero, from those that are.
        device: where the tensors are; checkpoints do not keep it.
        capturing: whether a CUDA graph is captured, in which nothing can be compared; the first candidate
            that has not failed before is used then.
        deterministic: whether only deterministic candidates may be chosen.

    Raises:
        StackError: no candidate agrees, and there is no ``last``; or none is deterministic.
    """
    name = f"{direction}, {kind}"
    what = f"deformable attention, {name}"
    candidates, last = _allowed(candidates, last, what, deterministic)
    key = (direction, kind, device, tuple(candidate.name for candidate in candidates), last is None)
    if key in _chosen:
        return _chosen[key]
    stored = _preferred.get(name)
    ordered = sorted(candidates, key=lambda candidate: candidate.name != stored)
    if last is not None and last.name == stored:
        ordered.insert(0, last)
    if capturing:
        return next((one for one in ordered if one.name not in _faults), last or expected)
    arguments, wanted = _expected_results(expected, tensors(), replaced)
    if wanted is None:
        return last or ordered[0]
    best, faults = _first_good(ordered, arguments, wanted, what)
    best = best or last
    if best is None:
        tried = ", ".join(candidate.name for candidate in candidates)
        raise StackError(
            Problem(f"{what}: {tried} does not compute what PyTorch does", hint="set ddetr_mm.attention=auto")
        )
    _log_choice(what, best.name, stored, faults)
    _chosen[key] = best
    _names[name] = best.name
    return best


def _allowed(
    candidates: Sequence[Candidate], last: Candidate | None, what: str, deterministic: bool
) -> tuple[Sequence[Candidate], Candidate | None]:
    """Return the candidates, and the last resort, that determinism allows.

    Raises:
        StackError: none is deterministic, and that is demanded.
    """
    steady = [candidate for candidate in candidates if candidate.deterministic]
    if deterministic:
        last = last if last is not None and last.deterministic else None
        if not steady and last is None:
            raise StackError(
                Problem(
                    f"{what}: no deterministic implementation is available",
                    hint="install triton, or set model.precise_msda=false",
                )
            )
        return steady, last
    if _only_deterministic_algorithms():
        if not steady:
            _warn_once(f"{what}: no deterministic implementation is available")
        return steady or candidates, last
    return candidates, last


def _first_good(
    candidates: Sequence[Candidate], arguments: Sequence[Tensor], wanted: Sequence[Tensor], what: str
) -> tuple[Candidate | None, dict[str, str]]:
    """Return the first candidate that agrees, and the faults of those before it, which are logged."""
    faults: dict[str, str] = {}
    for candidate in candidates:
        fault = fault_of(candidate, arguments, wanted)
        if fault is None:
            return candidate, faults
        faults[candidate.name] = _faults[candidate.name] = fault
        print_log(f"{what}: {candidate.name} is skipped: {fault}", "current", logging.WARNING)
    return None, faults


def _log_choice(what: str, name: str, stored: str | None, faults: Mapping[str, str]) -> None:
    """Log a choice, and why it is not the checkpoint's."""
    if stored is None:
        print_log(f"{what}: {name}", "current")
    elif stored == name:
        print_log(f"{what}: {name}, as in the checkpoint (ddetr_mm.attention chooses another)", "current")
    else:
        reason = faults.get(
            stored, "not available here, not deterministic, or excluded by ddetr_mm.attention"
        )
        print_log(f"{what}: {name}, not {stored} as in the checkpoint: {reason}", "current", logging.WARNING)


def _only_deterministic_algorithms() -> bool:
    """Whether PyTorch refuses other algorithms; where it only warns, sampling stays as fast as it can be."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


@functools.cache
def _warn_once(message: str) -> None:
    print_log(message, "current", logging.WARNING)
