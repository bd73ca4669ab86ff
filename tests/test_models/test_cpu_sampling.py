"""Sampling on a CPU against mmcv's PyTorch form and finite differences."""

import importlib.util
import sys
import types

import pytest
import torch

import ddetr_mm  # noqa: F401  (before mmcv's ops: answers for the compiled ones)

from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # isort: skip

from ddetr_mm.models import cpu_sampling, deformable_attention
from ddetr_mm.models.cpu_sampling import sample_values_on_cpu
from ddetr_mm.models.deformable_attention import sample_values

LEVELS = {
    "one cell": ((1, 1),),
    "one level": ((5, 7),),
    "several": ((6, 8), (3, 4), (2, 2), (1, 1)),
    "a row and a column": ((1, 9), (9, 1)),
}


def inputs(sizes_hw, *, batch=2, queries=7, heads=3, points=2, channels=4, spread=0.4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    num_values = sum(height * width for height, width in sizes_hw)
    value = random(batch, num_values, heads, channels)
    locations = 0.5 + spread * random(batch, queries, heads, len(sizes_hw), points, 2)
    weights = random(batch, queries, heads, len(sizes_hw) * points).softmax(-1)
    weights = weights.view(batch, queries, heads, len(sizes_hw), points)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("sizes_hw", LEVELS.values(), ids=LEVELS)
def test_values_and_gradients_equal_mmcvs(sizes_hw, spread):
    value, locations, weights = inputs(sizes_hw, spread=spread)
    ours = sample_values_on_cpu(value, locations, weights, sizes_hw)
    theirs = multi_scale_deformable_attn_pytorch(value, sizes_hw, locations, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(ours, (value, locations, weights), upstream),
        torch.autograd.grad(theirs, (value, locations, weights), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_equal_finite_differences():
    sizes_hw = ((4, 5), (2, 3))
    tensors = inputs(sizes_hw, batch=1, queries=3, heads=2, spread=0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: sample_values_on_cpu(*given, sizes_hw), tensors)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_the_gradients_asked_for(needed):
    sizes_hw = LEVELS["several"]
    tensors = [tensor.detach() for tensor in inputs(sizes_hw)]
    tensors[needed].requires_grad_()
    sample_values_on_cpu(*tensors, sizes_hw).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [index == needed for index in range(3)]


@pytest.mark.parametrize("place", [-1e30, 1e30, float("inf"), -float("inf")])
def test_absurd_locations_count_as_outside(place):
    sizes_hw = LEVELS["several"]
    value, locations, weights = inputs(sizes_hw)
    with torch.no_grad():
        locations[0, 3, 1, 2, 1] = place
    result = sample_values_on_cpu(value, locations, weights, sizes_hw)
    result.sum().backward()
    for tensor in (result, value.grad, locations.grad, weights.grad):
        assert torch.isfinite(tensor).all()
    assert locations.grad[0, 3, 1, 2, 1].eq(0).all() and weights.grad[0, 3, 1, 2, 1] == 0


def test_a_location_that_is_no_number_shows_in_its_own_result_only():
    sizes_hw = LEVELS["several"]
    value, locations, weights = inputs(sizes_hw, heads=3, channels=4)
    with torch.no_grad():
        locations[0, 3, 1, 2, 1] = float("nan")
    spoilt = sample_values_on_cpu(value, locations, weights, sizes_hw).isnan()
    assert spoilt[0, 3, 4:8].all() and spoilt.sum() == 4


def test_deterministic_mode_gives_equal_gradients_every_time():
    sizes_hw = LEVELS["several"]
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(2):
            given = inputs(sizes_hw)
            sample_values_on_cpu(*given, sizes_hw).square().sum().backward()
            gradients.append([tensor.grad for tensor in given if tensor.requires_grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(gradients[0]) == 3
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other) and one.isfinite().all() and one.abs().sum() > 0


@pytest.mark.parametrize(
    ("queries", "chosen"),
    [(60, sample_values_on_cpu), (7, None)],
    ids=["an encoder's many queries", "a decoder's few"],
)
def test_what_the_attention_uses_on_a_cpu(queries, chosen, monkeypatch):
    called = []

    def spy(*given):
        called.append(sample_values_on_cpu)
        return sample_values_on_cpu(*given)

    monkeypatch.setattr(deformable_attention, "sample_values_on_cpu", spy)
    monkeypatch.setattr(deformable_attention, "package_sampling", lambda: None)
    sizes_hw = LEVELS["several"]
    value, locations, weights = inputs(sizes_hw, queries=queries)
    given = (value, locations, weights, sizes_hw, torch.tensor(sizes_hw), torch.zeros(4, dtype=torch.int64))
    expected = multi_scale_deformable_attn_pytorch(value, sizes_hw, locations, weights)
    torch.testing.assert_close(sample_values(*given), expected, rtol=1e-5, atol=1e-6)
    assert called == ([chosen] if chosen else [])


# --- The compiled package, where it is installed ---


@pytest.fixture
def package(monkeypatch):
    """Puts a package in place of the installed one, and forgets the choice afterwards."""

    def put(sample) -> None:
        module = types.ModuleType(cpu_sampling.PACKAGE)
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, loader=None)
        module.ms_deform_attn = sample
        monkeypatch.setitem(sys.modules, module.__name__, module)
        cpu_sampling.package_sampling.cache_clear()

    yield put
    cpu_sampling.package_sampling.cache_clear()


def right(value, shapes, starts, locations, weights):
    sizes_hw = [tuple(size) for size in shapes.tolist()]
    return multi_scale_deformable_attn_pytorch(value, sizes_hw, locations, weights)


def fails(*_):
    raise RuntimeError("built for another torch")


@pytest.mark.parametrize(
    ("sample", "reason"),
    [(right, None), (lambda *given: 0 * right(*given), "its results differ"), (fails, "built for another")],
)
def test_a_package_is_used_where_it_computes_the_same(package, caplog, sample, reason):
    called = []

    def spy(*given):
        called.append(given)
        return sample(*given)

    package(spy)
    sizes_hw = LEVELS["several"]
    value, locations, weights = inputs(sizes_hw)
    shapes, starts = deformable_attention.level_layout(sizes_hw, "cpu")
    expected = right(value, shapes, starts, locations, weights)
    for implementation in ("torch", "auto"):
        found = deformable_attention.sample_values(
            value, locations, weights, sizes_hw, shapes, starts, implementation=implementation
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        # Once by the check, once by the call.
        assert len(called) == (0 if implementation == "torch" else 2 if reason is None else 1)


@pytest.mark.parametrize(("queries", "trains", "calls"), [(60, True, 1), (60, False, 0), (7, False, 1)])
def test_an_encoder_that_is_not_trained_does_without_the_package(package, queries, trains, calls):
    called = []

    def spy(*given):
        called.append(given)
        return right(*given)

    package(spy)
    assert cpu_sampling.package_sampling() is not None
    called.clear()  # the check
    sizes_hw = LEVELS["several"]
    tensors = inputs(sizes_hw, queries=queries)
    with torch.set_grad_enabled(trains):
        deformable_attention.sample_values(
            *tensors, sizes_hw, *deformable_attention.level_layout(sizes_hw, "cpu")
        )
    assert len(called) == calls


def test_the_installed_package_agrees_bit_for_bit_each_time():
    pytest.importorskip(cpu_sampling.PACKAGE)
    cpu_sampling.package_sampling.cache_clear()
    sample = cpu_sampling.package_sampling()
    assert sample is not None
    sizes_hw = LEVELS["several"]
    value, locations, weights = inputs(sizes_hw, queries=60)
    shapes, starts = deformable_attention.level_layout(sizes_hw, "cpu")
    tensors = (value, locations, weights)
    runs = []
    for _ in range(3):
        found = sample(value, shapes, starts, locations, weights)
        runs.append((found, *torch.autograd.grad(found.square().sum(), tensors)))
    ours = sample_values_on_cpu(value, locations, weights, sizes_hw)
    torch.testing.assert_close(runs[0][0], ours, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, other) for run in runs for one, other in zip(run, runs[0], strict=True))
