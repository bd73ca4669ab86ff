"""Deformable attention against mmcv's module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention

from ddetr_mm.errors import StackError
from ddetr_mm.models import deformable_attention
from ddetr_mm.models.deformable_attention import DeformableAttention, level_layout, sample_values

SIZES_HW = ((6, 8), (3, 4))
NUM_VALUES = 6 * 8 + 3 * 4


def pair(seed: int = 0, **kwargs) -> tuple[DeformableAttention, MultiScaleDeformableAttention]:
    """Our module and mmcv's with the same random weights."""
    settings = {"embed_dims": 32, "num_heads": 4, "num_levels": 2, "num_points": 3, "dropout": 0.0}
    settings.update(kwargs)
    torch.manual_seed(seed)
    ours = DeformableAttention(batch_first=True, **settings)
    theirs = MultiScaleDeformableAttention(batch_first=True, **settings)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(coordinates: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    spatial_shapes, level_start_index = level_layout(SIZES_HW, "cpu")
    return {
        "query": torch.randn(2, 5, 32, generator=generator, requires_grad=True),
        "query_pos": torch.randn(1, 5, 32, generator=generator),
        "value": torch.randn(2, NUM_VALUES, 32, generator=generator, requires_grad=True),
        "reference_points": torch.rand(2, 5, 2, coordinates, generator=generator),
        "spatial_shapes": spatial_shapes,
        "level_start_index": level_start_index,
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_equals_mmcv_with_gradients(coordinates: int, masked: bool) -> None:
    ours, theirs = pair()
    mask = torch.arange(NUM_VALUES)[None] >= torch.tensor([[40], [NUM_VALUES]]) if masked else None
    results = []
    for module, sizes in ((ours, {"level_sizes_hw": SIZES_HW}), (ours, {}), (theirs, {})):
        arguments = inputs(coordinates)
        output = module(key_padding_mask=mask, **arguments, **sizes)
        module.zero_grad()
        output.square().sum().backward()
        results.append(
            [
                output,
                arguments["query"].grad,
                arguments["value"].grad,
                module.sampling_offsets.weight.grad,
                module.value_proj.weight.grad,
            ]
        )
    for mine in results[:2]:
        for ours_tensor, theirs_tensor in zip(mine, results[2], strict=True):
            torch.testing.assert_close(ours_tensor, theirs_tensor, rtol=1e-4, atol=1e-4)


def test_value_and_identity_default_to_the_query() -> None:
    ours, theirs = pair()
    arguments = inputs(2)
    query = torch.randn(2, NUM_VALUES, 32)
    points = torch.rand(2, NUM_VALUES, 2, 2)
    shared = {name: arguments[name] for name in ("spatial_shapes", "level_start_index")}
    torch.testing.assert_close(
        ours(query, reference_points=points, **shared), theirs(query, reference_points=points, **shared)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_locations_keep_float32_under_autocast(dtype: torch.dtype) -> None:
    """A ramp over the map reads back each location: rounding it would show."""
    width = 256
    value = torch.linspace(0.5, width - 0.5, width).reshape(1, width, 1, 1).div(width)
    locations = torch.rand(1, 50, 1, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    locations[..., 1] = 0.5
    spatial_shapes, start = level_layout(((1, width),), "cpu")
    weights = torch.ones(1, 50, 1, 1, 1)
    with torch.autocast("cpu", dtype):
        read = sample_values(value, locations, weights, ((1, width),), spatial_shapes, start)
    torch.testing.assert_close(read[0, :, 0], locations[0, :, 0, 0, 0, 0], rtol=0, atol=1e-5)
    half = sample_values(value.to(dtype), locations, weights, ((1, width),), spatial_shapes, start)
    assert half.dtype == dtype


@pytest.mark.parametrize(("implementation", "has_own"), [("torch", True), ("auto", False)])
def test_no_gpu_takes_the_pytorch_form_for_deterministic(monkeypatch, implementation: str, has_own: bool):
    monkeypatch.setattr(deformable_attention, "GPU_HAS_ITS_OWN", has_own)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(StackError, match=r"is not deterministic; .*model\.precise_msda=false"):
        sample_values(on_gpu, None, None, None, None, None, implementation=implementation, deterministic=True)


def test_level_layout() -> None:
    spatial_shapes, level_start_index = level_layout(((6, 8), (3, 4), (2, 2)), "cpu")
    assert spatial_shapes.tolist() == [[6, 8], [3, 4], [2, 2]]
    assert level_start_index.tolist() == [0, 48, 60]
    assert spatial_shapes.dtype == level_start_index.dtype == torch.int64


def test_wrong_geometry_is_named() -> None:
    ours, _theirs = pair()
    arguments = inputs(2)
    with pytest.raises(ValueError, match="do not add up to 60 values"):
        ours(**arguments, level_sizes_hw=((6, 8), (3, 5)))
    arguments["reference_points"] = torch.rand(2, 5, 2, 3)
    with pytest.raises(ValueError, match="2 or 4 coordinates, not 3"):
        ours(**arguments)
