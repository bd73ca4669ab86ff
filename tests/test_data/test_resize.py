"""Resized pixels against Pillow's."""

import cv2
import numpy as np
import pytest
from golden_files import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddetr_mm.data.resize import contiguous, resize_like_pillow, resize_plain, split_planes

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pillow(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size_hw[::-1], Image.Resampling.BILINEAR))


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("index", [0, 1])
def test_pixels_equal_the_reference_to_one_grey_level(index):
    data = np.load(GOLDEN / "transforms.npz")
    expected = data[f"{index}/plain"].transpose(1, 2, 0) * STD + MEAN  # back to 0..1
    resized = resize_like_pillow(data[f"{index}/image_rgb_u8"], tuple(data[f"{index}/size_hw"].tolist()))
    assert np.abs(resized / 255 - expected).max() <= 1 / 255 + 1e-6


size = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(deadline=None, max_examples=200)
@given(before=size, after=size, seed=st.integers(0, 5))
def test_noise_of_any_size_equals_pillow_to_one_grey_level(before, after, seed):
    image = noise(*before, seed)
    resized = resize_like_pillow(image, after)
    assert resized.dtype == np.uint8
    assert largest_difference(resized, pillow(image, after)) <= 1


@pytest.mark.parametrize("after", [(480, 640), (640, 853), (400, 533), (800, 1066), (96, 128), (600, 500)])
def test_usual_sizes_equal_pillow_to_one_grey_level(after):
    image = noise(480, 640)
    assert largest_difference(resize_like_pillow(image, after), pillow(image, after)) <= 1


def test_a_view_of_a_larger_image():
    image = noise(100, 120)[10:70, 20:100]
    assert largest_difference(resize_like_pillow(image, (30, 40)), pillow(image.copy(), (30, 40))) <= 1
    assert largest_difference(resize_like_pillow(image, (90, 120)), pillow(image.copy(), (90, 120))) <= 1


@pytest.mark.parametrize("after", [(30, 40), (90, 120), (60, 40)])
def test_a_flipped_view(after):
    image = noise(50, 70)
    flipped = image[:, ::-1]
    assert largest_difference(resize_like_pillow(flipped, after), pillow(flipped.copy(), after)) <= 1
    np.testing.assert_array_equal(contiguous(flipped), flipped)
    np.testing.assert_array_equal(contiguous(flipped[:, :, :1]), flipped[:, :, :1])
    np.testing.assert_array_equal(contiguous(image[::-1]), image[::-1])
    np.testing.assert_array_equal(contiguous(image[:, ::-1, 0]), image[:, ::-1, 0])
    assert contiguous(image) is image


def test_grey_and_float_images():
    grey = noise(40, 60)[:, :, 0]
    assert largest_difference(resize_like_pillow(grey, (20, 25)), pillow(grey, (20, 25))) <= 1
    assert resize_like_pillow(grey[:, :, None], (80, 90)).shape == (80, 90, 1)
    assert resize_like_pillow(grey[:, :, None], (20, 90)).shape == (20, 90, 1)
    floats = grey.astype(np.float32)
    assert np.abs(resize_like_pillow(floats, (20, 25)) - pillow(grey, (20, 25))).max() <= 1


def test_same_size_is_no_copy():
    image = noise(8, 9)
    assert resize_like_pillow(image, (8, 9)) is image
    assert resize_plain(image, (8, 9)) is image


def test_the_fast_backend_differs_when_shrinking():
    image = noise(480, 640)
    assert largest_difference(resize_plain(image, (120, 160)), pillow(image, (120, 160))) > 20
    assert largest_difference(resize_plain(image, (640, 853)), pillow(image, (640, 853))) <= 1


@pytest.mark.parametrize("flip", [False, True])
def test_enlarged_images_lie_channel_after_channel(flip):
    image = noise(48, 64)[:, ::-1] if flip else noise(48, 64)
    once = resize_plain(image, (60, 80))
    assert once.transpose(2, 0, 1).flags.c_contiguous
    np.testing.assert_array_equal(once, cv2.resize(image.copy(), (80, 60), interpolation=cv2.INTER_LINEAR))
    window = once[3:50, 5:70]
    assert np.shares_memory(split_planes(window), window)
    again = resize_plain(window, (90, 100))
    np.testing.assert_array_equal(again, cv2.resize(window.copy(), (100, 90), interpolation=cv2.INTER_LINEAR))
