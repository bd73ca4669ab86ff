"""Runs the Triton kernels on small inputs and prints how far they are from other implementations, as JSON.

A program of its own, because Triton decides on import whether it interprets: on a CPU start it with
``TRITON_INTERPRET=1``, on a GPU with ``cuda`` as argument. :mod:`test_triton_sampling` judges the figures.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

import ddetr_mm  # noqa: F401  (before mmcv's ops: answers for the compiled ones)

from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # isort: skip

from ddetr_mm.models import sampling_choice
from ddetr_mm.models.cpu_sampling import sample_values_on_cpu
from ddetr_mm.models.deformable_attention import level_layout
from ddetr_mm.models.triton_attention import Launch, deformable_sampling, sample_backward, sample_forward

SMALL = Launch(queries=4, warps=1)
CASES: dict[str, dict[str, Any]] = {
    "one level": {"sizes_hw": ((3, 4),), "spread": 0.1},
    "two levels, points outside": {"sizes_hw": ((2, 3), (1, 2)), "spread": 0.7, "queries": 5},
    "odd channels, one cell": {"sizes_hw": ((1, 1), (2, 2)), "channels": 6, "heads": 1, "spread": 0.4},
    "float16": {"sizes_hw": ((3, 2),), "dtype": torch.float16},
    "bfloat16": {"sizes_hw": ((3, 2),), "dtype": torch.bfloat16},
}


def inputs(
    device: str,
    sizes_hw: tuple,
    *,
    queries: int = 4,
    heads: int = 2,
    channels: int = 4,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value in ``dtype``, locations and weights in float32, for two images and two points a level."""
    generator = torch.Generator().manual_seed(0)
    num_values = sum(height * width for height, width in sizes_hw)
    shape = (2, queries, heads, len(sizes_hw), 2)
    value = torch.randn(2, num_values, heads, channels, generator=generator)
    locations = 0.5 + spread * torch.randn(*shape, 2, generator=generator)
    weights = torch.randn(shape, generator=generator).flatten(3).softmax(-1).view(shape)
    return value.to(device, dtype), locations.to(device), weights.to(device)


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    difference = (found.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max().clamp(min=1e-6))


def judge(device: str, case: dict[str, Any]) -> dict[str, float]:
    """Differences of one case from mmcv's PyTorch form in float32."""
    sizes_hw = case["sizes_hw"]
    tensors = inputs(device, **case)
    wanted = [tensor.float().requires_grad_() for tensor in tensors]
    expected = multi_scale_deformable_attn_pytorch(wanted[0], sizes_hw, *wanted[1:])
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
    gradients = torch.autograd.grad(expected, wanted, upstream)
    geometry = level_layout(sizes_hw, device)
    figures = {"forward": apart(sample_forward(*tensors, *geometry, SMALL), expected)}
    runs = {}
    for gather in (False, True):
        runs[gather] = sample_backward(
            upstream.to(tensors[0].dtype), *tensors, *geometry, gather=gather, launch=SMALL
        )
        name = "gather" if gather else "atomic"
        for what, found, wanted_gradient in zip(
            ("value", "locations", "weights"), runs[gather], gradients, strict=True
        ):
            figures[f"{name} {what}"] = apart(found, wanted_gradient)
    other_cut = sample_backward(
        upstream.to(tensors[0].dtype), *tensors, *geometry, gather=True, launch=Launch(8, 2)
    )
    figures["gather's bits depend on the cut"] = float(not torch.equal(other_cut[0], runs[True][0]))
    return figures


def judge_spoilt(device: str) -> dict[str, bool]:
    """NaN and infinite locations and weights have the effect that they have on a CPU."""
    sizes_hw = ((2, 3),)
    value, locations, weights = inputs(device, sizes_hw)
    locations[0, 0, 0, 0, 0, 0] = torch.nan
    locations[0, 1, 0, 0, 0, 1] = torch.inf
    locations[0, 2, 0, 0, 0, 1] = -1e30
    weights[1, 3, 1, 0, 0] = torch.nan
    geometry = level_layout(sizes_hw, device)
    found = sample_forward(value, locations, weights, *geometry, SMALL).cpu()
    expected = sample_values_on_cpu(value.cpu(), locations.cpu(), weights.cpu(), sizes_hw)
    upstream = torch.ones_like(found).to(device)
    finite = [
        torch.isfinite(sample_backward(upstream, value, locations, torch.nan_to_num(weights), *geometry,
                                       gather=gather, launch=SMALL)[0]).all().item()
        for gather in (False, True)
    ]  # fmt: skip
    return {
        "same places": torch.equal(found.isnan(), expected.isnan()),
        "some": bool(found.isnan().any()),
        "others equal": torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True),
        "values' gradients stay finite": all(finite),
    }


def judge_operator(device: str) -> dict[str, float]:
    """The operator's deterministic form with its gradients, against mmcv's PyTorch form."""
    sizes_hw = ((2, 3),)
    tensors = [tensor.requires_grad_() for tensor in inputs(device, sizes_hw, queries=3, heads=1)]
    geometry = level_layout(sizes_hw, device)
    output = deformable_sampling(*tensors, *geometry, "triton", 64, True)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    found = torch.autograd.grad(output, tensors, upstream)
    again = torch.autograd.grad(
        deformable_sampling(*tensors, *geometry, "triton", 64, True), tensors, upstream
    )
    used = [one.name for key, one in sampling_choice._chosen.items() if key[0] == "backward"]
    torch.library.opcheck(
        deformable_sampling,
        (*tensors, *geometry, "triton", 64, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    expected = multi_scale_deformable_attn_pytorch(tensors[0], sizes_hw, *tensors[1:])
    gradients = torch.autograd.grad(expected, tensors, upstream)
    figures = {
        f"gradient {number}": apart(*pair) for number, pair in enumerate(zip(found, gradients, strict=True))
    }
    figures["forward"] = apart(output, expected)
    figures["other forms"] = float(len(used) != 1 or "gather" not in used[0])
    figures["changes"] = float(any(not torch.equal(*pair) for pair in zip(found, again, strict=True)))
    return figures


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {name: judge(device, case) for name, case in CASES.items()}
    report["spoilt"] = judge_spoilt(device)
    report["operator"] = judge_operator(device)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
