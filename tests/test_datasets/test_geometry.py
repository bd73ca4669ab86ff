"""Sizes and boxes under resizing, cropping and padding."""

import json

import numpy as np
import pytest
from golden_files import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from ddetr_mm.datasets.geometry import (
    box_around_segmentation,
    crop_boxes,
    divisible_size_hw,
    fit_size_hw,
    fixed_pad_size_hw,
    resize_size_hw,
    scale_boxes,
)

side = st.integers(1, 4000)


def test_sizes_equal_tao():
    rows = json.loads((GOLDEN / "resize_sizes.json").read_text())["rows"]
    assert len(rows) == 300
    for width, height, short, max_size, out_width, out_height in rows:
        assert resize_size_hw(height, width, short, max_size) == (out_height, out_width)


@pytest.mark.parametrize(
    ("size_hw", "short", "max_size", "expected"),
    [
        ((480, 640), 480, 1333, (480, 640)),  # nothing to do
        ((480, 640), 800, 1333, (800, 1066)),  # rounded down
        ((640, 480), 800, 1333, (1066, 800)),  # portrait
        ((500, 500), 600, 1333, (600, 600)),
        ((300, 3000), 800, 1333, (133, 1330)),  # bounded by the longer side
        ((300, 3000), 800, None, (800, 8000)),
        ((1, 5000), 800, 1333, (1, 5000)),  # never less than a pixel
    ],
)
def test_resize_size(size_hw, short, max_size, expected):
    assert resize_size_hw(*size_hw, short, max_size) == expected


@given(height=side, width=side, short=st.integers(1, 2000), max_size=st.integers(1, 3000) | st.none())
def test_resize_size_is_symmetric_and_positive(height, width, short, max_size):
    new_h, new_w = resize_size_hw(height, width, short, max_size)
    assert (new_w, new_h) == resize_size_hw(width, height, short, max_size)
    assert min(new_h, new_w) >= 1
    assert min(new_h, new_w) <= short


@given(height=side, width=side, target=st.floats(1, 4000))
def test_fit_size_brings_the_longer_side_to_the_target(height, width, target):
    size_hw = fit_size_hw(height, width, target)
    assert abs(max(size_hw) - target) <= 0.5 + 1e-6
    assert min(size_hw) >= 1


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((96, 128), (96, 160)),
        ((132, 96), (160, 96)),
        ((96, 96), (96, 160)),
        ((100, 167), (100, 167)),  # larger than the target: kept
    ],
)
def test_fixed_pad_size(size_hw, expected):
    assert fixed_pad_size_hw(*size_hw, (96, 160)) == expected
    assert fixed_pad_size_hw(*size_hw, (160, 96)) == expected


def test_divisible_size():
    assert divisible_size_hw(1, 64, 32) == (32, 64)
    assert divisible_size_hw(65, 63, 32) == (96, 64)


def test_scale_boxes_scales_each_axis_and_clips():
    boxes = np.array([[0, 10, 20, 30], [90, 90, 200, 200], [100, 0, 120, 50]], np.float32)
    scaled, keep = scale_boxes(boxes, (2.0, 0.5), (50, 200))
    assert scaled.tolist() == [[0, 5, 40, 15], [180, 45, 200, 50], [200, 0, 200, 25]]
    assert keep.tolist() == [True, True, False]


def test_crop_boxes_moves_and_clips():
    boxes = np.array([[0, 0, 20, 20], [10, 10, 30, 30], [0, 0, 12, 40]], np.float32)
    cropped, keep = crop_boxes(boxes, (15, 12, 10, 10))
    assert cropped.tolist() == [[0, 0, 8, 5], [0, 0, 10, 10], [0, 0, 0, 10]]
    assert keep.tolist() == [True, True, False]


@given(
    boxes=st.lists(st.tuples(*[st.floats(-100, 200, width=32)] * 4), max_size=6),
    window=st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.integers(1, 50)),
)
def test_cropped_boxes_lie_in_the_window(boxes, window):
    array = np.array(boxes, np.float32).reshape(-1, 4)
    cropped, keep = crop_boxes(array, window)
    assert cropped.shape == (len(boxes), 4)
    assert cropped.dtype == np.float32
    kept = cropped[keep]
    assert (kept >= 0).all()
    assert (kept[:, [2, 0]] <= window[3]).all()
    assert (kept[:, [3, 1]] <= window[2]).all()
    assert (kept[:, 2:] > kept[:, :2]).all()


# --- Boxes around segmentations ---


@given(seed=st.integers(0, 10**6), height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1))
def test_boxes_around_run_lengths_equal_pycocotools(seed, height, width, share):
    pixels = np.random.default_rng(seed).random((height, width)) < share**4
    code = coco_mask.encode(np.asfortranarray(pixels, np.uint8))
    expected = coco_mask.toBbox(code).tolist() if pixels.any() else None
    text = {"size": code["size"], "counts": code["counts"].decode()}
    changes = np.flatnonzero(np.diff(pixels.flatten("F").astype(int))) + 1
    starts = [0, *([0] if pixels.flatten("F")[0] else []), *changes.tolist(), height * width]
    runs = {"size": code["size"], "counts": np.diff(starts).tolist()}
    for value in (text, runs):
        found = box_around_segmentation(value)
        assert (None if found is None else list(found)) == expected


def test_boxes_around_polygons():
    polygons = [[10.5, 20, 30, 20, 30, 60.25], [5, 25, 12, 25, 12, 30]]
    assert box_around_segmentation(polygons) == (5, 20, 25, 40.25)
    assert box_around_segmentation(polygons[0]) == (10.5, 20, 19.5, 40.25)
    assert box_around_segmentation([*polygons, [1, 2], [0, 0, 1, 1, 2, 2, 3]]) == (5, 20, 25, 40.25)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        "text",
        7,
        None,
        [[]],
        [[1, 2, 3, 4]],
        [["a", "b", "c", "d", "e", "f"]],
        [[1e400, 0, 1, 1, 2, 2]],
        {"size": [4, 4], "counts": [3, 2]},
        {"size": [4, 4], "counts": [18, -2]},
        {"size": [4, 4], "counts": "\x7f"},
        {"size": [4, 4], "counts": "oo"},
        {"size": [0, 4], "counts": []},
        {"size": [4], "counts": [16]},
        {"size": [4, 4], "counts": [16]},
    ],
    ids=str,
)
def test_segmentations_that_cover_nothing_or_cannot_be_read(value):
    assert box_around_segmentation(value) is None
