"""Sampling fused with softmax and offsets: the operator, its candidates, and the attention that uses it.

Its Triton kernels are tested by :mod:`test_triton_sampling`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton_cases import exact_attention, fused_inputs

from ddetr_mm.errors import StackError
from ddetr_mm.models import fused_sampling as fused
from ddetr_mm.models import sampling_choice, triton_attention
from ddetr_mm.models.deformable_attention import DeformableAttention, level_layout

SIZES_HW = ((4, 5), (2, 3))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch):
    """On a CPU without Triton's interpreter the operator has PyTorch's form alone."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sampling_choice.forget_choices()
    yield
    sampling_choice.forget_choices()


def operator_gradients(*tensors: torch.Tensor, run: Callable = fused.fused_sampling):
    is_centre = tensors[1].shape[-1] == 2
    leaves = [one.detach().requires_grad_(is_centre or place != 1) for place, one in enumerate(tensors)]
    output, _ = run(*leaves, *level_layout(SIZES_HW, "cpu"), "auto", 64)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    wanted = [one for one in leaves if one.requires_grad]
    return output, torch.autograd.grad(output, wanted, upstream)


@pytest.mark.parametrize("options", [{}, {"boxes": True}, {"shared": True}])
def test_pytorchs_form_of_the_operator_equals_the_steps_in_float64(options: dict) -> None:
    tensors = fused_inputs("cpu", SIZES_HW, points=3, **options)
    exact = [one.double().requires_grad_() for one in tensors]
    expected = exact_attention(exact, SIZES_HW)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    places = (0, 2, 3) if options.get("boxes") else (0, 1, 2, 3)
    gradients = torch.autograd.grad(expected, [exact[place] for place in places], upstream.double())
    output, found = operator_gradients(*tensors)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_the_operator_is_whole_under_torch_compile() -> None:
    tensors = fused_inputs("cpu", SIZES_HW)
    expected = operator_gradients(*tensors)
    compiled = torch.compile(fused.fused_sampling, backend="aot_eager", fullgraph=True)
    output, found = operator_gradients(*tensors, run=compiled)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(found, expected[1])


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_on_a_gpu_equals_that_on_a_cpu(coordinates: int, monkeypatch) -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(
        16, num_heads=2, num_levels=2, num_points=2, dropout=0.0, batch_first=True
    )
    torch.nn.init.normal_(attention.attention_weights.weight)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    shapes, starts = level_layout(SIZES_HW, "cpu")
    query, value = torch.randn(2, 5, 16), torch.randn(2, 26, 16)
    references = torch.rand(2, 5, 2, coordinates, requires_grad=coordinates == 2)

    def run() -> list[torch.Tensor]:
        output = attention(
            query,
            value=value,
            reference_points=references,
            spatial_shapes=shapes,
            level_start_index=starts,
            level_sizes_hw=SIZES_HW,
        )
        wanted = [*attention.parameters(), *([references] if references.requires_grad else [])]
        return [output, *torch.autograd.grad(output.square().sum(), wanted)]

    assert not attention._samples_fused(value, references)
    expected = run()
    calls = []
    monkeypatch.setattr(
        DeformableAttention,
        "_samples_fused",
        lambda self, value, references: calls.append(value.shape) or True,
    )
    for one, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert calls == [(2, 26, 2, 8)]


def test_boxes_that_need_a_gradient_plain_pytorch_and_traces_are_not_fused() -> None:
    class OnGpu:
        is_cuda = True

    attention = DeformableAttention(16, num_heads=2, num_levels=2, num_points=2)
    points, boxes = torch.rand(1, 5, 2, 2), torch.rand(1, 5, 2, 4)
    attention.choose_implementation("triton")
    assert attention._samples_fused(OnGpu(), boxes) and attention._samples_fused(OnGpu(), points)
    assert attention._samples_fused(OnGpu(), points.requires_grad_())
    assert not attention._samples_fused(OnGpu(), boxes.requires_grad_())
    attention.choose_implementation("torch")
    assert not attention._samples_fused(OnGpu(), points)


def test_locations_and_weights_are_not_kept_for_the_backward_pass() -> None:
    tensors = fused_inputs("cpu", SIZES_HW, queries=50, dtype=torch.bfloat16)
    leaves = [one.requires_grad_(place != 1) for place, one in enumerate(tensors)]
    kept: dict[tuple, int] = {}

    def keep(one: torch.Tensor) -> torch.Tensor:
        kept[(one.data_ptr(), one.shape)] = one.nbytes
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        fused.fused_sampling(*leaves, *level_layout(SIZES_HW, "cpu"), "auto", 64)
    given = sum(one.nbytes for one in leaves)
    log_sums, geometry = 2 * 50 * 2 * 4, 6 * 8
    assert sum(kept.values()) == given + log_sums + geometry
    float32_places = 2 * 50 * 2 * 2 * 2 * 3 * 4
    assert leaves[2].nbytes + leaves[3].nbytes == float32_places // 2


def test_candidates_are_in_order_and_the_gather_alone_is_deterministic(monkeypatch) -> None:
    monkeypatch.setattr(triton_attention, "has_compiled_cuda_op", lambda: True)
    monkeypatch.setattr(triton_attention, "runs_on", lambda device: True)
    gpu = torch.device("cuda")
    names = [one.name for one in fused.forward_candidates(gpu)]
    assert names == ["mmcv", "triton fused 8x1", "triton fused 32x4", "triton fused 16x4"]
    found = fused.backward_candidates(gpu)
    assert [one.name for one in found][:2] == ["mmcv", "triton fused 2x1"]
    steady = [one.name for one in found if one.deterministic]
    assert steady == [f"triton fused gather {cut}" for cut in ("2x1", "8x4", "4x1", "8x2")]
    assert [one.name for one in fused.forward_candidates(gpu, "mmcv")] == ["mmcv"]
    assert all(one.name.startswith("triton") for one in fused.backward_candidates(gpu, "triton"))


def test_what_candidates_are_judged_on() -> None:
    tensors = fused_inputs("cpu", SIZES_HW, queries=3000, shared=True)
    geometry = level_layout(SIZES_HW, "cpu")
    value, references, offsets, logits, *_ = fused._judged_part(*tensors, *geometry)
    assert len(value) == 1 and references.shape == (1, 1000, 2, 2)
    assert offsets.shape[:2] == logits.shape[:2] == (1, 1000)
    assert torch.equal(logits[0, 1], tensors[3][0, 3])
    # Random arguments of a backward pass have the log-sum-exp of their logits.
    arguments = (torch.zeros(2, 3000, 8), torch.zeros(2, 3000, 2), *tensors, *geometry)
    replaced = fused._random_arguments(arguments)
    torch.testing.assert_close(replaced[1], replaced[5].flatten(3).logsumexp(-1))
    assert replaced[0].any() and replaced[6] is geometry[0]


def test_one_logit_whose_gradient_is_always_zero_is_judged() -> None:
    tensors = fused_inputs("cpu", ((3, 4),), points=1)
    geometry = level_layout(((3, 4),), "cpu")
    _, log_sums = fused.PYTORCH_FORM["forward"].run(*tensors, *geometry)
    given = (torch.ones(2, 4, 8), log_sums, *tensors, *geometry)
    pytorch = fused.PYTORCH_FORM["backward"]

    def nearly(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grad_value, grad_offsets, grad_logits = pytorch.run(*arguments)
        return grad_value, grad_offsets, grad_logits + 1e-8

    assert not pytorch.run(*given)[2].any()
    candidate = sampling_choice.Candidate("nearly", nearly)
    chosen = fused._choose_for("backward", [candidate], given, "auto", False)
    assert chosen is candidate


def test_arguments_that_do_not_fit_or_are_not_available_are_refused() -> None:
    value, references, offsets, logits = fused_inputs("cpu", SIZES_HW)
    geometry = level_layout(SIZES_HW, "cpu")
    with pytest.raises(ValueError, match="do not fit"):
        fused.triton_forward(value, references[:, :3], offsets, logits, *geometry)
    with pytest.raises(ValueError, match="do not fit"):
        fused.triton_forward(value[:1], references, offsets, logits, *geometry)
    with pytest.raises(ValueError, match="references must be float32, not torch.float16"):
        fused.triton_forward(value, references.half(), offsets, logits, *geometry)
    boxes = torch.rand(2, 4, 2, 4, requires_grad=True)
    output, _ = fused.fused_sampling(value, boxes, offsets, logits, *geometry, "auto", 64)
    with pytest.raises(ValueError, match="no gradient for reference boxes"):
        output.sum().backward()
    with pytest.raises(StackError, match="cannot run here"):
        fused.fused_sampling(value, references, offsets, logits, *geometry, "triton", 64)
