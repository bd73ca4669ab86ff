"""Who samples on a GPU: measured once, checked against the default, and told."""

from __future__ import annotations

import logging

import pytest
import torch
from mmengine.logging import MMLogger

from ddetr_mm.errors import StackError
from ddetr_mm.models import triton_attention
from ddetr_mm.models.triton_attention import (
    Candidate,
    agree,
    backward_candidates,
    check_available,
    choose,
    forget_choices,
    measure,
)

X = torch.linspace(-1, 1, 2000)


def double(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (2 * x,)


def double_with_rounding(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (2 * x + 1e-6,)


def triple(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (3 * x,)


def fails(x: torch.Tensor) -> tuple[torch.Tensor]:
    raise RuntimeError("no such instruction")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture):
    """What the log says, through a logger of mmengine's as in a run."""
    logger = MMLogger.get_instance("choice")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def clock():
    """Times given in advance, in the order in which the candidates are timed."""
    forget_choices()

    def times(*milliseconds: float):
        waiting = iter(milliseconds)
        return lambda run: (run(), next(waiting))[1]

    yield times
    forget_choices()


def test_the_fastest_that_agrees_is_chosen_and_told(told, clock) -> None:
    candidates = [
        Candidate("mmcv", double),
        Candidate("close", double_with_rounding),
        Candidate("slow", double),
    ]
    best = measure(candidates, (X,), clock(3.0, 1.0, 2.0), "forward")
    assert best.name == "close"
    assert "forward: close (ms: mmcv 3.000, close 1.000, slow 2.000)" in told.text


def test_one_that_differs_or_fails_is_left_out_and_told(told, clock) -> None:
    candidates = [Candidate("mmcv", double), Candidate("wrong", triple), Candidate("broken", fails)]
    assert measure(candidates, (X,), clock(3.0, 1.0, 1.0), "forward").name == "mmcv"
    assert "wrong is left out: its results differ from those of mmcv" in told.text
    assert "broken is left out: RuntimeError('no such instruction')" in told.text


def test_a_default_that_fails_is_an_error(clock) -> None:
    with pytest.raises(RuntimeError, match="no such instruction"):
        measure([Candidate("mmcv", fails), Candidate("other", double)], (X,), clock(1.0), "forward")


def test_each_kind_is_measured_once(clock) -> None:
    candidates = [Candidate("mmcv", double), Candidate("triton", double_with_rounding)]
    value = torch.zeros(1, 10, 1, 4)
    encoder = choose("forward", candidates, (X,), value, 10, clock(2.0, 1.0))
    assert encoder.name == "triton"
    # A clock without times would raise: nothing is measured again, for other sizes neither.
    assert choose("forward", candidates, (X,), torch.zeros(2, 20, 1, 4), 20, clock()) is encoder
    assert choose("forward", candidates, (X,), value, 3, clock(1.0, 2.0)).name == "mmcv"  # a decoder
    assert choose("backward", candidates, (X,), value, 10, clock(1.0, 2.0)).name == "mmcv"
    assert choose("forward", candidates, (X,), value.half(), 10, clock(1.0, 2.0)).name == "mmcv"


def test_nothing_is_measured_under_deterministic_algorithms(told, clock) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        candidates = [
            Candidate("adds in any order", double, deterministic=False),
            Candidate("steady", double),
            Candidate("steady too", double),
        ]
        assert choose("backward", candidates, (X,), X.view(1, -1, 1, 1), 5, clock()).name == "steady"
        unsteady = candidates[:1]
        assert choose("backward", unsteady, (X,), X.view(1, -1, 1, 1), 5, clock()) is unsteady[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert "adds in any order is not deterministic" in told.text


@pytest.mark.parametrize(
    ("found", "same"),
    [
        (2 * X, True),
        (2 * X + 1e-3, False),
        (torch.full_like(X, torch.nan), False),
        (torch.cat((2 * X[:-1], X[-1:])), True),  # one of 2,000: a location on a cell's edge
    ],
)
def test_agreement(found: torch.Tensor, same: bool) -> None:
    assert agree((found,), (2 * X,)) is same


def test_half_precision_may_differ_more() -> None:
    assert agree(((2 * X + 1e-3).half(),), ((2 * X).half(),))


def test_candidates_of_a_cpu_without_interpreter_are_none(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backward_candidates(torch.device("cpu")) == []
    with pytest.raises(StackError, match="Triton kernels of deformable attention cannot run here"):
        check_available("triton", torch.device("cpu"))


def test_mmcvs_op_comes_first_and_is_not_deterministic_backward(monkeypatch) -> None:
    monkeypatch.setattr(triton_attention, "has_compiled_cuda_op", lambda: True)
    monkeypatch.setattr(triton_attention, "runs_on", lambda device: True)
    gpu = torch.device("cuda")
    names = [candidate.name for candidate in backward_candidates(gpu)]
    assert names[0] == "mmcv" and any(name.startswith("triton gather") for name in names)
    steady = {candidate.name for candidate in backward_candidates(gpu) if candidate.deterministic}
    assert steady and all(name.startswith("triton gather") for name in steady)
    assert [candidate.name for candidate in triton_attention.forward_candidates(gpu, "mmcv")] == ["mmcv"]


def test_an_op_that_is_not_installed_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(triton_attention, "has_compiled_cuda_op", lambda: False)
    with pytest.raises(StackError, match="install-ops"):
        check_available("mmcv", torch.device("cuda"))
