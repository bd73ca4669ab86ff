from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ddetr_mm.models.padding import feature_sizes_hw, level_padding

SIDES = st.integers(1, 70)


@settings(deadline=None, max_examples=60)
@given(
    input_hw=st.tuples(SIDES, SIDES),
    shares=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3),
    strides=st.lists(st.sampled_from([1, 4, 7, 8, 32]), min_size=1, max_size=3),
)
def test_equals_the_interpolated_mask(input_hw, shares, strides) -> None:
    """The reference's way: draw the mask at full size, then take the nearest pixel of each cell."""
    valid = [(max(1, round(a * input_hw[0])), max(1, round(b * input_hw[1]))) for a, b in shares]
    levels = [(-(-input_hw[0] // stride), -(-input_hw[1] // stride)) for stride in strides]
    masks, ratios = level_padding(valid, input_hw, levels, "cpu")
    drawn = torch.ones(len(valid), *input_hw)
    for image, (height, width) in enumerate(valid):
        drawn[image, :height, :width] = 0
    for level, size in enumerate(levels):
        expected = F.interpolate(drawn[None], size=size)[0].bool()
        if masks[level] is None:
            assert not expected.any()
            torch.testing.assert_close(ratios[:, level], torch.ones(1, 2))
            continue
        assert torch.equal(masks[level], expected)
        share_y = (~expected[:, :, 0]).float().mean(1)
        share_x = (~expected[:, 0]).float().mean(1)
        torch.testing.assert_close(ratios[:, level], torch.stack([share_x, share_y], -1))


def test_no_mask_without_padding() -> None:
    masks, ratios = level_padding([(8, 12), (8, 12)], (8, 12), [(4, 6), (2, 3)], "cpu")
    assert masks == [None, None]
    assert ratios.tolist() == [[[1, 1], [1, 1]]]


def test_feature_sizes() -> None:
    assert feature_sizes_hw([torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 2, 3)]) == ((4, 5), (2, 3))
