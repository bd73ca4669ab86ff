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

from ddetr_mm.models import fused_sampling, sampling_choice
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


FUSED_CASES: dict[str, dict[str, Any]] = {
    "centres": {"sizes_hw": ((3, 4), (2, 2)), "queries": 5},
    "boxes": {"sizes_hw": ((3, 4), (2, 2)), "boxes": True},
    "three points, odd channels": {"sizes_hw": ((4, 3),), "points": 3, "channels": 6, "heads": 1},
    "one set of references": {"sizes_hw": ((3, 2),), "shared": True, "spread": 3.0},
    "float16": {"sizes_hw": ((3, 2),), "dtype": torch.float16},
    "bfloat16": {"sizes_hw": ((3, 2),), "dtype": torch.bfloat16, "boxes": True},
}


def fused_inputs(
    device: str,
    sizes_hw: tuple,
    *,
    queries: int = 4,
    heads: int = 2,
    channels: int = 4,
    points: int = 2,
    boxes: bool = False,
    shared: bool = False,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, offsets and logits in ``dtype`` and references in float32, for two images."""
    generator = torch.Generator().manual_seed(0)
    levels = len(sizes_hw)
    num_values = sum(height * width for height, width in sizes_hw)
    value = torch.randn(2, num_values, heads, channels, generator=generator)
    references = torch.rand(1 if shared else 2, queries, levels, 4 if boxes else 2, generator=generator)
    offsets = spread * torch.randn(2, queries, heads, levels, points, 2, generator=generator)
    logits = 3 * torch.randn(2, queries, heads, levels, points, generator=generator)
    value, offsets, logits = (one.to(device, dtype) for one in (value, offsets, logits))
    return value, references.to(device), offsets, logits


def judge_fused(device: str, case: dict[str, Any]) -> dict[str, float]:
    """Differences of the fused kernels, and of the operator, from mmcv's PyTorch form in float64."""
    sizes_hw = case["sizes_hw"]
    tensors = fused_inputs(device, **case)
    geometry = level_layout(sizes_hw, device)
    wanted = [one.double().requires_grad_() for one in tensors]
    expected = exact_attention(wanted, sizes_hw)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
    gradients = torch.autograd.grad(expected, wanted, upstream)
    upstream = upstream.to(tensors[0].dtype)
    figures = {}
    for launch in (SMALL, Launch(8, 2)):
        given = (*tensors, *geometry)
        output, log_sums = fused_sampling.triton_forward(*given, launch=launch)
        figures[f"{launch} forward"] = apart(output, expected)
        exact_sums = wanted[3].detach().flatten(3).logsumexp(-1)
        figures[f"{launch} log sums"] = apart(log_sums, exact_sums)
        for gather in (False, True):
            found = fused_sampling.triton_backward(upstream, log_sums, *given, gather=gather, launch=launch)
            for what, one, place in zip(("value", "offsets", "logits"), found, (0, 2, 3), strict=True):
                figures[f"{launch} {gather} {what}"] = apart(one, gradients[place])
    merging = Launch(queries=4, warps=1, merges=True)
    given = (*tensors, *geometry)
    found = fused_sampling.triton_backward(upstream, log_sums, *given, gather=False, launch=merging)
    for what, one, place in zip(("value", "offsets", "logits"), found, (0, 2, 3), strict=True):
        figures[f"merged {what}"] = apart(one, gradients[place])
    leaves = [one.detach().requires_grad_(place != 1 or not case.get("boxes")) for place, one in
              enumerate(tensors)]  # fmt: skip
    output, _ = fused_sampling.fused_sampling(*leaves, *geometry, "triton", 64, True)
    needed = [place for place, one in enumerate(leaves) if one.requires_grad]
    found = torch.autograd.grad(output, [leaves[place] for place in needed], upstream)
    for place, one in zip(needed, found, strict=True):
        figures[f"operator {place}"] = apart(one, gradients[place])
    return figures


def exact_attention(wanted: list[Tensor], sizes_hw: tuple) -> Tensor:
    """Attention as the papers write it, with mmcv's PyTorch form of sampling."""
    value, references, offsets, logits = wanted
    sizes_wh = torch.tensor([(width, height) for height, width in sizes_hw]).to(value)
    centers = references[:, :, None, :, None, :2]
    if references.shape[-1] == 2:
        locations = centers + offsets / sizes_wh[:, None]
    else:
        locations = centers + offsets / logits.shape[-1] * references[:, :, None, :, None, 2:] * 0.5
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return multi_scale_deformable_attn_pytorch(value, sizes_hw, locations, weights)


def judge_fused_operator(device: str) -> dict[str, Any]:
    """Registration of the fused operator, its choice among candidates, and NaN in and out."""
    sizes_hw = ((2, 3),)
    tensors = [one.requires_grad_() for one in fused_inputs(device, sizes_hw)]
    geometry = level_layout(sizes_hw, device)
    torch.library.opcheck(
        fused_sampling.fused_sampling,
        (*tensors, *geometry, "triton", 64, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    sampling_choice.forget_choices()
    output, _ = fused_sampling.fused_sampling(*tensors, *geometry, "auto", 64)
    output.sum().backward()
    chosen = sampling_choice.chosen_names()
    spoilt = [one.detach().clone() for one in tensors]
    spoilt[3][0, 0, 0, 0, 0] = torch.nan
    spoilt[2][0, 1, 0, 0, 0, 0] = torch.nan
    spoilt[2][0, 2, 1, 0, 0, 1] = torch.inf
    spoilt[2][0, 3, 1, 0, 0, 1] = -1e30
    found, _ = fused_sampling.triton_forward(*spoilt, *geometry, launch=SMALL)
    clean, _ = fused_sampling.triton_forward(*(one.detach() for one in tensors), *geometry, launch=SMALL)
    broken = found.isnan().view(2, 4, 2, 4)
    return {
        "chosen": sorted(chosen.values()),
        "kinds": sorted(chosen),
        "NaN only where it came in": broken.any(-1).nonzero().tolist(),
        "others equal": torch.equal(found[1], clean[1]),
    }


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
    report["fused"] = {name: judge_fused(device, case) for name, case in FUSED_CASES.items()}
    report["fused operator"] = judge_fused_operator(device)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
