"""The Triton kernels against mmcv's PyTorch form: by the interpreter on a CPU, compiled where a GPU is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_cases import CASES, FUSED_CASES

from ddetr_mm.models.triton_attention import has_triton, sample_forward

pytestmark = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
REPO = Path(__file__).resolve().parents[2]
TOLERANCE = {"float16": 3e-3, "bfloat16": 2e-2}


def run_cases(device: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    environment["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_cases.py")), device],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def report(request: pytest.FixtureRequest) -> dict:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    return run_cases(request.param)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_mmcvs(report: dict, case: str) -> None:
    figures = report[case]
    assert set(figures) >= {"forward", "atomic value", "gather value", "atomic locations", "gather weights"}
    worst = {name: figure for name, figure in figures.items() if not figure <= TOLERANCE.get(case, 1e-5)}
    assert not worst


@pytest.mark.parametrize("case", FUSED_CASES)
def test_fused_with_softmax_and_offsets_it_equals_the_steps_in_float64(report: dict, case: str) -> None:
    figures = report["fused"][case]
    assert len(figures) == 2 * (2 + 6) + 3 + (3 if FUSED_CASES[case].get("boxes") else 4)
    limit = TOLERANCE.get(case, 1e-5)
    assert not {name: figure for name, figure in figures.items() if not figure <= limit}


def test_the_fused_operator_is_chosen_registered_and_keeps_nan_in_its_place(report: dict) -> None:
    found = report["fused operator"]
    assert found["chosen"] == ["triton fused 2x1", "triton fused 8x1"]
    assert [kind.split(",")[0] for kind in found["kinds"]] == ["backward", "forward"]
    assert found["NaN only where it came in"] == [[0, 0, 0], [0, 1, 0]]
    assert found["others equal"]


def test_what_is_no_number_spreads_and_what_is_outside_does_not(report: dict) -> None:
    assert report["spoilt"] == dict.fromkeys(report["spoilt"], True)


def test_the_operator_has_gradients_and_repeats_itself(report: dict) -> None:
    assert not {name: figure for name, figure in report["operator"].items() if not figure <= 1e-5}


def test_shapes_that_do_not_fit_are_refused() -> None:
    value, locations, weights = (
        torch.zeros(1, 6, 2, 4),
        torch.zeros(1, 3, 2, 1, 2, 2),
        torch.zeros(1, 3, 2, 1, 2),
    )
    shapes, starts = torch.tensor([[2, 3]]), torch.tensor([0])
    with pytest.raises(ValueError, match="do not fit together"):
        sample_forward(value, locations[:, :, :1], weights, shapes, starts)
    with pytest.raises(ValueError, match="must be float32, not torch.float16"):
        sample_forward(value, locations.half(), weights, shapes, starts)
