"""Encoder and decoder against mmdet's."""

from __future__ import annotations

import pytest
import torch
from detr_builders import detector_config
from torch import nn

from ddetr_mm.models.transformer import DeformableDecoder, DeformableEncoder, place_boxes


def constant_branch(values: list[float]) -> nn.Sequential:
    """A box branch that answers the same to every hidden state."""
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    layer.bias.data = torch.tensor(values, dtype=torch.float32)
    return nn.Sequential(layer)


def test_boxes_are_corrections_in_logit_space() -> None:
    hidden = torch.randn(1, 2, 8)
    boxes = torch.tensor([[[0.3, 0.6, 0.2, 0.1], [0.5, 0.5, 0.4, 0.9]]])
    unchanged = place_boxes(constant_branch([0, 0, 0, 0]), hidden, boxes)
    torch.testing.assert_close(unchanged, boxes, rtol=1e-4, atol=1e-4)
    from_points = place_boxes(constant_branch([0, 0, 0, -2.0]), hidden, boxes[..., :2])
    torch.testing.assert_close(from_points[..., :2], boxes[..., :2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(from_points[0, 0, 2:], torch.tensor([0.0, -2.0]).sigmoid())
    moved = place_boxes(constant_branch([1.0, 0, 0, 0]), hidden, boxes)
    assert (moved[..., 0] > boxes[..., 0]).all()


def test_boxes_keep_float32_under_autocast() -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    hidden, points = torch.randn(1, 50, 8), torch.rand(1, 50, 2)
    expected = place_boxes(branch, hidden, points)
    with torch.autocast("cpu", torch.bfloat16):
        found = place_boxes(branch, hidden, points)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_num_cp_checkpoints_the_first_layers() -> None:
    config = detector_config(num_encoder_layers=3)["encoder"]
    encoder = DeformableEncoder(**config, num_cp=2)
    assert [layer.activation_checkpoint for layer in encoder.layers] == [True, True, False]
    encoder = DeformableEncoder(**config)
    assert not any(layer.activation_checkpoint for layer in encoder.layers)


def test_decoder_without_intermediates_gives_the_last_layer() -> None:
    torch.manual_seed(0)
    config = detector_config(num_decoder_layers=2)["decoder"]
    decoder = DeformableDecoder(**config).eval()
    sizes_hw = ((4, 6), (2, 3))
    arguments = {
        "query": torch.randn(1, 5, 32),
        "query_pos": torch.randn(1, 5, 32),
        "value": torch.randn(1, 30, 32),
        "key_padding_mask": None,
        "reference_points": torch.rand(1, 5, 2),
        "spatial_shapes": torch.tensor(sizes_hw),
        "level_start_index": torch.tensor([0, 24]),
        "valid_ratios": torch.ones(1, 2, 2),
    }
    states, references = decoder(**arguments, level_sizes_hw=sizes_hw)
    assert states.shape == (2, 1, 5, 32)
    assert references.shape == (2, 1, 5, 2)
    decoder.return_intermediate = False
    state, reference = decoder(**arguments)  # sizes read from the tensor
    torch.testing.assert_close(state, states[-1], rtol=0, atol=0)
    torch.testing.assert_close(reference, references[-1], rtol=0, atol=0)


def test_post_norm_is_refused() -> None:
    config = {**detector_config()["decoder"], "post_norm_cfg": {"type": "LN"}}
    with pytest.raises(ValueError, match="post_norm_cfg=None"):
        DeformableDecoder(**config)
