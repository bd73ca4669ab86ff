"""The choice of the GPU implementation: in a fixed order, judged by PyTorch's results, and logged."""

from __future__ import annotations

import logging

import pytest
import torch
from mmengine.logging import MMLogger

from ddetr_mm.errors import StackError
from ddetr_mm.models import sampling_choice, triton_attention
from ddetr_mm.models.sampling_choice import (
    Candidate,
    agree,
    choose,
    chosen_names,
    forget_choices,
    in_order,
    prefer,
)
from ddetr_mm.models.triton_attention import backward_candidates, check_available

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
def log(caplog: pytest.LogCaptureFixture):
    """The log, through a logger of mmengine's as in a run."""
    logger = MMLogger.get_instance("choice")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    forget_choices()
    yield caplog
    forget_choices()
    logger.removeHandler(caplog.handler)


PYTORCH = Candidate("torch", double, deterministic=False)
NEVER = Candidate("must not run", fails)


def chosen(*runs, direction="forward", kind="float32", last=PYTORCH, **options) -> Candidate:
    """The choice among functions of X, which PyTorch doubles."""
    candidates = [run if isinstance(run, Candidate) else Candidate(run.__name__, run) for run in runs]
    return choose(direction, kind, candidates, lambda: (X,), last=last, expected=PYTORCH, **options)


def zeros(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.zeros_like(x),)


def nans(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.full_like(x, torch.nan),)


def test_the_first_that_agrees_is_chosen_and_logged(log) -> None:
    assert chosen(double_with_rounding, double).name == "double_with_rounding"
    assert "deformable attention, forward, float32: double_with_rounding" in log.text


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (triple, "its results differ from PyTorch's"),
        (zeros, "its results are zeros"),
        (nans, "its results are not finite"),
        (fails, "RuntimeError('no such instruction')"),
    ],
)
def test_one_that_differs_or_fails_is_skipped_and_logged(log, wrong, reason) -> None:
    assert chosen(wrong, double).name == "double"
    assert f"{wrong.__name__} is skipped: {reason}" in log.text


def test_without_one_that_agrees_pytorch_is_used_or_it_is_an_error(log) -> None:
    assert chosen(triple, fails) is PYTORCH
    with pytest.raises(StackError, match=r"triple, fails does not compute.*ddetr_mm\.attention=auto"):
        chosen(triple, fails, last=None)


def test_each_kind_and_direction_is_chosen_once(log) -> None:
    assert chosen(double).name == "double"
    known = Candidate("double", fails)
    assert chosen(known).run is double  # not judged again
    assert chosen(known, kind="float16") is PYTORCH
    assert chosen(known, direction="backward") is PYTORCH


def test_nothing_is_judged_in_a_cuda_graph_or_by_numbers_that_are_not_finite(log) -> None:
    assert chosen(NEVER, capturing=True) is NEVER
    assert chosen(capturing=True) is PYTORCH
    diverged = Candidate("torch", nans)
    assert choose("forward", "float32", [NEVER], lambda: (X,), last=diverged, expected=diverged) is diverged
    assert chosen(double).name == "double"  # nothing was kept


def test_an_op_built_for_another_gpu_returns_zeros_and_the_right_kernel_is_chosen(log) -> None:
    """mmcv's op prints an error and returns zeros; it is not what others are judged by."""
    right = torch.randn(2, 10, 32)
    pytorch = Candidate("torch", lambda: (right,))
    zero, triton = (
        Candidate("mmcv", lambda: (torch.zeros(2, 10, 32),)),
        Candidate("triton 16x2", lambda: (right.clone(),)),
    )
    found = choose("forward", "float32", [zero, triton], tuple, last=pytorch, expected=pytorch)
    assert found is triton
    assert "mmcv is skipped: its results are zeros" in log.text


def test_inputs_of_zeros_do_not_let_an_op_pass_that_returns_zeros(log) -> None:
    state = torch.get_rng_state()
    found = choose(
        "backward",
        "float32",
        [Candidate("mmcv", zeros), Candidate("triton", double)],
        lambda: (torch.zeros(2000),),
        last=PYTORCH,
        expected=PYTORCH,
    )
    assert found.name == "triton"
    assert torch.equal(torch.get_rng_state(), state)


def test_in_a_cuda_graph_one_that_failed_before_is_not_used(log) -> None:
    assert chosen(zeros, double).name == "double"
    assert chosen(zeros, double, direction="backward", capturing=True).name == "double"


def test_choices_are_kept_for_checkpoints_and_tried_first_on_resume(log) -> None:
    assert chosen(triple, double_with_rounding, double).name == "double_with_rounding"
    assert chosen_names() == {"forward, float32": "double_with_rounding"}
    prefer({"forward, float32": "double", "backward, float32": "torch", 3: "x"})
    assert chosen_names() == {"forward, float32": "double", "backward, float32": "torch"}
    assert chosen(double_with_rounding, double).name == "double"
    assert "forward, float32: double, as in the checkpoint (ddetr_mm.attention chooses another)" in log.text
    assert chosen(double, direction="backward") is PYTORCH  # PyTorch's form may be the checkpoint's choice
    assert chosen(triple, double, kind="float16").name == "double"  # a new kind: in order
    assert chosen_names()["forward, float16"] == "double"


@pytest.mark.parametrize("candidates", [(fails, double), (double,)])
def test_a_checkpoints_choice_that_no_longer_qualifies_is_replaced_and_logged(log, candidates) -> None:
    prefer({"forward, float32": "fails"})
    assert chosen(*candidates).name == "double"
    reason = "RuntimeError('no such instruction')" if len(candidates) > 1 else "not available here"
    assert f"forward, float32: double, not fails as in the checkpoint: {reason}" in log.text
    assert chosen_names() == {"forward, float32": "double"}


@pytest.mark.parametrize("spoilt", [None, 3, "mmcv", ["mmcv"], {"forward, float32": {}}])
def test_a_checkpoint_with_something_else_in_its_place_prefers_nothing(log, spoilt) -> None:
    prefer(spoilt)
    assert chosen_names() == {}
    assert chosen(double).name == "double"


def test_the_order_comes_from_the_table_by_generation(monkeypatch) -> None:
    names = ("triton 32x4", "triton 16x2", "other", "mmcv")
    candidates = [Candidate(name, double) for name in names]
    table = {9: ("triton 16x2", "mmcv", "triton")}
    monkeypatch.setattr(sampling_choice, "ORDER_BY_GENERATION", table)
    for generation, expected in (
        (9, ["triton 16x2", "mmcv", "triton 32x4", "other"]),
        (8, ["mmcv", "triton 32x4", "triton 16x2", "other"]),
    ):
        monkeypatch.setattr(sampling_choice, "_generation", lambda device, found=generation: found)
        assert [one.name for one in in_order(candidates, torch.device("cuda", 0))] == expected
    assert in_order(candidates, torch.device("cpu"))[0].name == "mmcv"


def test_deterministic_algorithms_are_preferred_where_they_are_demanded(log) -> None:
    unsteady = Candidate("adds in any order", double, deterministic=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(unsteady, Candidate("steady", double)).name == "steady"
        assert chosen(unsteady) is unsteady
        assert torch.are_deterministic_algorithms_enabled()
        # Where PyTorch only warns, as train.cudnn.deterministic has it, the fast ones stay.
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert chosen(unsteady, Candidate("steady", double)) is unsteady
    finally:
        torch.use_deterministic_algorithms(False)
    assert "no deterministic implementation is available" in log.text


def test_the_deterministic_form_is_demanded_or_refused(log) -> None:
    unsteady, steady = (
        Candidate("adds in any order", double, deterministic=False),
        Candidate("steady", double),
    )
    assert chosen(unsteady, steady, deterministic=True) is steady
    assert chosen(unsteady, steady) is unsteady
    with pytest.raises(StackError, match=r"no deterministic implementation .*precise_msda"):
        chosen(unsteady, deterministic=True)  # PyTorch's own form is none either
    with pytest.raises(StackError, match="does not compute what PyTorch does"):
        chosen(unsteady, triple, deterministic=True)


SIZES_HW = ((5, 7), (3, 4))


def attention_arguments(num_queries: int = 6):
    """Arguments of a candidate: two images, three heads of four channels, two points; some outside."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 5 * 7 + 3 * 4, 3, 4, generator=generator)
    locations = torch.rand(2, num_queries, 3, 2, 2, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, num_queries, 3, 2, 2, generator=generator)
    upstream = torch.randn(2, num_queries, 12, generator=generator)
    return upstream, value, locations, weights, torch.tensor(SIZES_HW), torch.tensor((0, 35))


def test_pytorchs_gradients_without_autograd_equal_those_with_it() -> None:
    upstream, *arguments = attention_arguments()
    needed = [tensor.requires_grad_() for tensor in arguments[:3]]
    expected = torch.autograd.grad(triton_attention.torch_forward(*arguments)[0], needed, upstream)
    with torch.no_grad():
        found = triton_attention.torch_backward(upstream, *arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_candidates_are_judged_on_some_queries_of_one_image() -> None:
    upstream, *arguments = attention_arguments(num_queries=5000)
    value, locations, weights, shapes, _ = triton_attention.judged_part(*arguments)
    assert len(value) == 1 and locations.shape[:2] == weights.shape[:2] == (1, 1000)
    assert shapes is arguments[3] and (locations[0, 1] == arguments[1][0, 5]).all()
    assert triton_attention.judged_part(upstream, *arguments)[0].shape == (1, 1000, 12)


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
