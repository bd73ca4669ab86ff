"""Resized pixels against Pillow's."""

import io
import struct

import cv2
import numpy as np
import pytest
from data_builders import random_image
from dataset_builders import config  # noqa: F401
from golden_files import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import TRANSFORMS
from PIL import Image, ImageOps

import ddetr_mm.datasets.images  # noqa: F401
from ddetr_mm.datasets.images import (
    contiguous,
    decode_jpeg_bgr,
    decode_jpeg_reduced_bgr,
    resize_like_pillow,
    resize_plain,
    split_planes,
)

# --- Loading, with and without scaled decoding ---

BOX = [10.0, 20, 300, 200]


@pytest.fixture
def path(tmp_path):
    cv2.imwrite(str(tmp_path / "x.jpg"), random_image(0, 401, 603))
    return str(tmp_path / "x.jpg")


def load(path, name="TAOLoadImageFromFile", size_hw=(401, 603), **options):
    info = {"img_path": str(path), "height": size_hw[0], "width": size_hw[1]}
    info["instances"] = [{"bbox": list(BOX), "bbox_label": 1, "ignore_flag": 0}]
    return TRANSFORMS.build({"type": name, **options})(info)


def test_decodes_in_full_by_default(path):
    ours, theirs = load(path), load(path, "LoadImageFromFile")
    assert ours.keys() == theirs.keys()
    np.testing.assert_array_equal(ours["img"], theirs["img"])
    assert ours["img_shape"] == ours["ori_shape"] == (401, 603)


def test_pixels_are_those_that_pillow_decodes(path):
    np.testing.assert_array_equal(load(path)["img"][:, :, ::-1], np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("short", "size_hw"),
    [(400, (401, 603)), (201, (401, 603)), (200, (201, 302)), (101, (201, 302)), (50, (51, 76))],
)
def test_the_shorter_side_stays_long_enough(path, short, size_hw):
    results = load(path, min_short_side=short)
    assert results["img"].shape[:2] == results["img_shape"] == size_hw
    assert results["ori_shape"] == (401, 603)
    assert min(size_hw) >= short


def test_boxes_follow_the_reduced_image(path):
    results = load(path, min_short_side=200)
    scale_w, scale_h = results["scale_factor"]
    assert (scale_w, scale_h) == (302 / 603, 201 / 401)
    expected = np.array(BOX) * [scale_w, scale_h, scale_w, scale_h]
    np.testing.assert_allclose(results["instances"][0]["bbox"], expected)
    assert results["instances"][0]["bbox_label"] == 1
    np.testing.assert_allclose(np.diag(results["homography_matrix"]), [scale_w, scale_h, 1], rtol=1e-6)


def test_the_reduced_image_shows_the_same(path):
    reduced = load(path, min_short_side=200)["img"]
    averaged = cv2.resize(load(path)["img"], reduced.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.astype(int) - averaged.astype(int)).mean() < 2


def test_wrong_recorded_size_means_a_full_decode(path):
    results = load(path, size_hw=(1000, 603), min_short_side=100)
    assert results["img"].shape[:2] == results["ori_shape"] == (401, 603)
    assert results["instances"][0]["bbox"] == BOX


def test_exif_rotation_is_applied_to_reduced_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_image(0, 400, 600)).save(tmp_path / "x.jpg", exif=exif)
    turned = load(tmp_path / "x.jpg", size_hw=(600, 400), min_short_side=200)
    assert turned["img"].shape[:2] == (300, 200)
    as_stored = load(tmp_path / "x.jpg", size_hw=(400, 600), min_short_side=200)
    assert as_stored["img"].shape[:2] == as_stored["ori_shape"] == (600, 400)


def test_other_formats_are_decoded_in_full(tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), random_image(0, 401, 603))
    assert load(tmp_path / "x.png", min_short_side=100)["img"].shape[:2] == (401, 603)


def test_missing_file_is_reported_as_by_mmcv(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "x.jpg", min_short_side=100)
    assert load(tmp_path / "x.jpg", min_short_side=100, ignore_empty=True) is None


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_every_format_is_turned_as_its_tag_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(random_image(0, 48, 64)).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    results = load(path)
    assert results["img_shape"] == results["ori_shape"] == expected.shape[:2]
    np.testing.assert_array_equal(results["img"][:, :, ::-1], expected)


def test_undecodable_files_are_reported_as_by_mmcv(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8 no image")
    for options in ({}, {"min_short_side": 100}):
        with pytest.raises(AssertionError, match="failed to load image"):
            load(tmp_path / "x.jpg", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"min_short_side": 0},
        {"min_short_side": 9, "color_type": "grayscale"},
        {"min_short_side": 9, "imdecode_backend": "pillow"},
    ],
)
def test_wrong_arguments(options):
    with pytest.raises(ValueError, match="min_short_side"):
        TRANSFORMS.build({"type": "TAOLoadImageFromFile", **options})


def test_repr_tells_the_settings():
    assert "min_short_side=9" in repr(TRANSFORMS.build({"type": "TAOLoadImageFromFile", "min_short_side": 9}))


# --- Decoded JPEGs against OpenCV and Pillow ---


def jpeg(image: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(image).convert(mode).save(target, "JPEG", **options)
    return target.getvalue()


@pytest.mark.parametrize("size_hw", [(1, 1), (33, 47), (120, 160)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_equal_those_of_opencv_and_pillow(size_hw, subsampling, progressive):
    for quality in (30, 75, 95):
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        content = jpeg(random_image(0, *size_hw), **options)
        ours = decode_jpeg_bgr(content)
        np.testing.assert_array_equal(ours, cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR))
        np.testing.assert_array_equal(ours[:, :, ::-1], np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_exif_turns_is_left_to_others(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode_jpeg_bgr(jpeg(random_image(0), exif=exif)) is None) == (orientation != 1)


def test_exif_data_without_a_plain_orientation_are_left_to_others():
    exif = Image.Exif()
    exif[0x0112] = 1
    content = jpeg(random_image(0), exif=exif)
    described = Image.Exif()
    described[0x010E] = "a microscope"
    assert decode_jpeg_bgr(content.replace(b"Exif\0\0MM", b"Exif\0\0QQ")) is None
    assert decode_jpeg_bgr(jpeg(random_image(0), exif=described)) is None


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_what_is_not_of_three_channels_is_left_to_others(mode):
    assert decode_jpeg_bgr(jpeg(random_image(0), mode)) is None


def test_damaged_files_are_left_to_others():
    content = jpeg(random_image(0, 200, 300))
    for damaged in (b"", b"no image", content[:20], content[: len(content) // 2]):
        assert decode_jpeg_bgr(damaged) is None
        assert decode_jpeg_reduced_bgr(damaged[:20], 2) is None


def test_a_header_that_claims_too_much_is_left_to_others():
    content = bytearray(jpeg(random_image(0, 40, 64)))
    size_at = content.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", content, size_at, 65000, 65000)
    assert decode_jpeg_bgr(bytes(content)) is None


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced(reduction):
    reduced = decode_jpeg_reduced_bgr(jpeg(random_image(0, 81, 123)), reduction)
    assert reduced.shape == (-(-81 // reduction), -(-123 // reduction), 3)


# --- Resized pixels against Pillow's ---

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
