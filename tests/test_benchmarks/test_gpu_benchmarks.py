"""The GPU benchmarks run through on a CPU, tiny: what they compare agrees, and the report has every row."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mmengine.registry import DefaultScope

from ddetr_mm.models import fused_sampling
from ddetr_mm.models.triton_attention import LAUNCHES, has_triton

REPO = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes of processor time, which may be shared
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_attention() -> None:
    answer = run("attention_gpu.py", "--device", "cpu", "--quick", TRITON_INTERPRET="1")
    assert answer.returncode == 0, answer.stdout[-2000:]
    report = answer.stdout.split("# Deformable sampling on a GPU")[1]
    assert "| differs |" not in report.split("| --- ", 1)[1]  # all agree
    for part in ("encoder, 10", "decoder, 3"):
        for dtype in ("float32", "float16", "bfloat16"):
            rows = [line for line in report.splitlines() if line.startswith(f"| {part} | {dtype}")]
            assert sum("| forward | triton" in row for row in rows) == len(LAUNCHES)
            assert sum("| backward | triton gather" in row for row in rows) == len(LAUNCHES)
            fused = [row for row in rows if " | triton fused " in row]
            assert sum("fused-forward" in row for row in fused) == len(fused_sampling.FORWARD_LAUNCHES)
            assert sum("fused-backward" in row for row in fused) == sum(
                1 if one.merges else 2 for one in fused_sampling.BACKWARD_LAUNCHES
            )
            assert sum("PyTorch form" in row for row in rows) == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)  # minutes of processor time, which may be shared
@pytest.mark.parametrize("script", ["inference_gpu.py", "train_gpu.py"])
def test_detectors(script: str) -> None:
    pytest.importorskip("transformers")
    answer = run(script, "--device", "cpu", "--quick")
    assert answer.returncode == 0, answer.stdout[-2000:]
    report = answer.stdout[answer.stdout.index("on a GPU\n") :]
    for name in ("mmdet, fp32", "Hugging Face, fp32", "ours, fp32"):
        assert f"| {name} |" in report
    assert "Left out" not in report
    if script == "train_gpu.py":
        assert "Regions of ours, fp32" in report and "matching" in report
        (ours,) = [line.split("|") for line in report.splitlines() if line.startswith("| ours, fp32 |")]
        assert float(ours[7]) < 1e-5 and float(ours[8]) < 1e-3  # the losses are mmdet's


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_from_files() -> None:
    names = ("mmdet, fp32", "ours, fp32")
    answer = run("pipeline_gpu.py", "--device", "cpu", "--quick", "--only", *names)
    assert answer.returncode == 0, answer.stdout[-2000:]
    report = answer.stdout[answer.stdout.index("# Training from image files") :]
    for name in names:
        (row,) = [line.split("|") for line in report.splitlines() if line.startswith(f"| {name} |")]
        step_ms, data_ms, images_s, steps = (float(row[column]) for column in (2, 3, 4, 6))
        assert 0 < data_ms < step_ms and steps == 5
        assert images_s == pytest.approx(2e3 / step_ms, rel=0.1)


@pytest.fixture
def attention() -> ModuleType:
    """``benchmarks/attention_gpu.py``."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    return importlib.import_module("attention_gpu")


@pytest.fixture
def deformops(monkeypatch, attention) -> None:
    """A package of that name with its interface, which samples with PyTorch."""

    def msda(value, shapes, starts, locations, weights, *, method="given"):
        weights = weights.softmax(-1) if method == "softmax" else weights
        return attention.multi_scale_deformable_attn_pytorch(
            value, shapes, locations, weights.view(locations.shape[:-1])
        )

    registry = ModuleType("deformops.registry")
    registry.msda = msda
    monkeypatch.setitem(sys.modules, "deformops", ModuleType("deformops"))
    monkeypatch.setitem(sys.modules, "deformops.registry", registry)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "deformops" or find_spec(name, *rest)
    )


def test_both_ways_to_sample_are_of_the_same_points(attention, deformops) -> None:
    """All contestants of all directions give the same from the same inputs, gradients included."""
    args = SimpleNamespace(size=[16, 24], batch=2, heads=2)
    given = attention.inputs(args, None, torch.device("cpu"))
    results = {}
    for direction in attention.DIRECTIONS:
        tensors, exact = attention.arguments_of(direction, given, torch.float32)
        runs = attention.contestants(direction, given, torch.device("cpu"))
        assert {"PyTorch form", "deformops"} <= set(runs)
        expected: list = []
        for name in ("PyTorch form", "deformops"):
            apart, agrees, found = attention.judged(runs[name], exact if not expected else tensors, expected)
            assert agrees and apart < 1e-5
            results[direction, name] = found
    outputs = [found[0] for (direction, _), found in results.items() if direction.endswith("forward")]
    gradients = [found[0] for (direction, _), found in results.items() if direction.endswith("backward")]
    for same in (outputs, gradients):
        assert len(same) == 4 and same[0].any()
        for one in same[1:]:
            torch.testing.assert_close(one, same[0], rtol=1e-4, atol=1e-5)


def test_results_of_zeros_do_not_agree(attention, deformops) -> None:
    expected = [(torch.tensor([1e-9, 0.0]),)]
    assert attention.judged(lambda: (torch.tensor([0.0, 0.0]),), (), expected)[1] is False


@pytest.fixture
def matching() -> ModuleType:
    """``benchmarks/matching_gpu.py``."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    return importlib.import_module("matching_gpu")


@pytest.mark.parametrize("objects", [1, 7, 300])
def test_a_batched_solver_is_compared_pair_by_pair(matching, objects) -> None:
    pytest.importorskip("torch_linear_assignment")
    costs = matching.costs_of(objects, 2, torch.device("cpu"))
    pairs = matching.match("scipy", costs, 2)
    assert pairs.shape == (4, 6 * 2 * objects)
    assert torch.equal(matching.match("torch-linear-assignment", costs, 2), pairs)
    layer, _, query, target = pairs
    by_hand = [
        float(costs.double()[one, target[layer == one], query[layer == one]].sum()) for one in range(6)
    ]
    assert matching.total_costs(costs, pairs).tolist() == pytest.approx(by_hand)
    if objects > 1:
        pairs[2, 1] = pairs[2, 0]
        with pytest.raises(ValueError, match="in two pairs"):
            matching.total_costs(costs, pairs)


@pytest.fixture(scope="module")
def detectors() -> ModuleType:
    """``benchmarks/gpu_detectors.py``."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    return importlib.import_module("gpu_detectors")


def test_mmdet_gets_float32_where_its_op_has_no_kernel(detectors, monkeypatch) -> None:
    class NoBfloat16(detectors.PyTorchSampling):
        @staticmethod
        def apply(value, shapes, starts, locations, weights, step):
            if torch.bfloat16 in (value.dtype, locations.dtype, weights.dtype):
                raise NotImplementedError("not implemented for 'BFloat16'")
            return detectors.PyTorchSampling.apply(value, shapes, starts, locations, weights, step)

    monkeypatch.setattr(detectors.Float32Sampling, "base", NoBfloat16)
    value = torch.rand(1, 26, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    shapes, starts = torch.tensor([[4, 5], [2, 3]]), torch.tensor([0, 20])
    locations, weights = torch.rand(1, 3, 2, 2, 4, 2), torch.rand(1, 3, 2, 2, 4)
    found = detectors.Float32Sampling.apply(value, shapes, starts, locations, weights.bfloat16(), 64)
    assert found.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(found.sum(), value)
    assert gradient.dtype == torch.bfloat16 and gradient.any()
    args = (shapes, starts, locations, weights.bfloat16().float(), 64)
    torch.testing.assert_close(found, NoBfloat16.apply(value.float(), *args).bfloat16(), rtol=0, atol=0)
    assert detectors.sampling_problem(detectors.Float32Sampling, torch.device("cpu")) is None


def test_mmdet_gets_float32_at_its_focal_loss(detectors) -> None:
    given = []
    run = detectors.focal_loss_in_float32(lambda pred, *rest: given.append((pred.dtype, *rest)) or pred)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        run(torch.zeros(2, 3, dtype=dtype), "target", 2.0)
    assert given == [(dtype, "target", 2.0) for dtype in (torch.float32, torch.float16, torch.float32)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda sampled: sampled, None),
        (lambda sampled: sampled * 0, "returns zeros"),
        (lambda sampled: sampled * 1.5, "is off by "),
        (lambda sampled: sampled.no_such_kernel, "fails: "),
    ],
)
def test_an_op_that_is_built_for_another_gpu_is_found(detectors, change, problem) -> None:
    class Op(detectors.PyTorchSampling):
        @staticmethod
        def apply(*args):
            return change(detectors.PyTorchSampling.apply(*args))

    found = detectors.sampling_problem(Op, torch.device("cpu"))
    assert found is problem if problem is None else found.startswith(problem)


def test_ours_predicts_without_norms_and_trains_with_them(detectors) -> None:
    ours = detectors.Contestant("ours, fp32", detectors.OURS, "fp32")

    def norms(model: torch.nn.Module) -> int:
        return sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())

    with DefaultScope.overwrite_default_scope("mmdet"):
        weights = detectors.Weights(torch.device("cpu"), quick=True)
        assert norms(weights.predicting_model(ours)) == 0
        assert norms(weights.model(ours)) == 53


def test_each_compiled_contestant_has_its_own_process(detectors) -> None:
    train = importlib.import_module("train_gpu")
    groups = detectors.groups_of(train.contestants())
    compiled = [one.name for one in train.contestants() if one.is_compiled]
    assert len(compiled) == 4 and groups[1:] == [[name] for name in compiled]
    assert groups[0][0] == detectors.YARDSTICK and not set(compiled) & set(groups[0])


def test_what_fails_is_left_out_of_the_rounds(tmp_path) -> None:
    sys.path.insert(0, str(REPO / "benchmarks"))
    alternating = importlib.import_module("gpu_alternating")
    process = importlib.import_module("gpu_process")
    calls = {"steady": 0, "fails later": 0}

    def step(name: str) -> None:
        calls[name] += 1
        if name == "fails later" and calls[name] == 3:
            raise RuntimeError("CUDA out of memory")

    figures = process.Figures(tmp_path / "figures.jsonl", "train_gpu")
    steps = {name: functools.partial(step, name) for name in ("fails later", "steady")}
    times = alternating.alternate_on(torch.device("cpu"), steps, 4, "fails later", warm_up=1, figures=figures)
    assert set(times) == {"steady"} and times["steady"]["rounds"] == 4
    assert times["steady"]["yardstick"] == "steady" and calls == {"steady": 5, "fails later": 3}
    assert figures.left_out() == {"fails later"}
    with pytest.raises(RuntimeError, match="out of memory"):
        calls["fails later"] = 2
        alternating.alternate_on(torch.device("cpu"), steps, 1, "steady", warm_up=1)


def test_a_round_that_the_deadline_cuts_does_not_count() -> None:
    sys.path.insert(0, str(REPO / "benchmarks"))
    alternating = importlib.import_module("gpu_alternating")
    process = importlib.import_module("gpu_process")
    done: list[str] = []

    class AfterSteps(process.Deadline):
        def has_passed(self, share: float = 1.0) -> bool:
            return len(done) >= self.most

    def times(most: int) -> dict:
        done.clear()
        deadline = AfterSteps(None)
        deadline.most = most
        steps = {name: functools.partial(done.append, name) for name in ("a", "b", "c")}
        return alternating.alternate_on(torch.device("cpu"), steps, 9, "a", 1, deadline=deadline)

    assert {name: found["rounds"] for name, found in times(10).items()} == {"a": 2, "b": 2, "c": 2}
    assert times(5) == times(2) == {}
    assert done == ["a", "b"]


def test_a_gpu_that_is_not_there_is_named() -> None:
    answer = run("run.py", "nonsense_gpu")
    assert answer.returncode == 2
    names = answer.stderr.replace("\n", "").rpartition("there are: ")[2].split(", ")
    assert {"attention_gpu", "matching_gpu", "pipeline_gpu", "train_gpu", "inference_gpu"} <= set(names)
    assert not {"run", "gpu_call", "gpu_process", "gpu_summary"} & set(names)
