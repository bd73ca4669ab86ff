"""Decoded pixels against OpenCV's and Pillow's, resized ones against Pillow's."""

import io
import struct

import cv2
import numpy as np
import pytest
from data_builders import random_image
from golden_files import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ddetr_mm.datasets.image_size import UnreadableImage
from ddetr_mm.datasets.images import (
    contiguous,
    decode_image,
    decode_jpeg,
    decode_jpeg_reduced_bgr,
    image_errors_named,
    read_image,
    resize_like_pillow,
    resize_plain,
    split_planes,
)
from ddetr_mm.errors import DataError

# --- decoding ---


def encoded(image: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    target = io.BytesIO()
    picture = Image.fromarray(image)
    (picture if mode is None else picture.convert(mode)).save(target, kind, **options)
    return target.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_every_format_is_decoded_upright(kind, orientation):
    content = encoded(random_image(0, 48, 64), kind, exif=turned(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    for order, step in (("rgb", 1), ("bgr", -1)):
        image = decode_image(content, order)
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        np.testing.assert_array_equal(image[:, :, ::step], expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_colour_without_alpha(mode):
    pixels = random_image(0, 40, 50)
    image = decode_image(encoded(pixels, "PNG", mode))
    colours = Image.fromarray(pixels).convert(mode)
    np.testing.assert_array_equal(image, np.asarray(colours.convert("RGB")))


def test_cmyk_becomes_the_colours_shown():
    content = encoded(random_image(0, 40, 50), "JPEG", "CMYK", quality=95)
    shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert np.abs(decode_image(content) - shown).mean() < 3


def tiff(values: np.ndarray) -> bytes:
    return cv2.imencode(".tiff", values)[1].tobytes()


RAMP = np.linspace(0, 1, 4800).reshape(60, 80)


@pytest.mark.parametrize("encode", [lambda values: encoded(values, "PNG"), tiff], ids=["png", "tiff"])
@pytest.mark.parametrize(("largest", "bits"), [(200, 8), (900, 10), (4095, 12), (10_000, 14), (65_535, 16)])
def test_sixteen_bits_are_scaled_by_the_bits_in_use(encode, largest, bits):
    values = (RAMP * largest).astype(np.uint16)
    image = decode_image(encode(values))
    np.testing.assert_array_equal(image, np.repeat((values >> (bits - 8))[:, :, None], 3, axis=2))


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_sixteen_bits_and_no_alpha(channels):
    values = np.random.default_rng(0).integers(0, 4096, (40, 50, channels)).astype(np.uint16)
    for content in (tiff(values), cv2.imencode(".png", values)[1].tobytes()):
        np.testing.assert_array_equal(decode_image(content, "bgr"), values[:, :, :3] >> 4)


def test_hot_pixels_do_not_darken_an_image():
    values = (RAMP * 4095).astype(np.uint16)
    values[3, :2] = 65_535
    image = decode_image(encoded(values, "PNG"))[:, :, 0]
    assert (image[3, :2] == 255).all()
    np.testing.assert_array_equal(image[10:], values[10:] >> 4)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_number_types_follow_the_same_rule(dtype, channels):
    values = (RAMP * 4095).astype(dtype)[:, :, None].repeat(channels, axis=2)
    expected = np.repeat((values[:, :, :1] // 16), 3, axis=2)
    np.testing.assert_array_equal(decode_image(tiff(values), "bgr"), expected)


def test_floats_up_to_one_are_fractions_and_what_is_not_finite_is_black():
    values = RAMP.astype(np.float32)
    values[0, 5], values[0, 6], values[0, 7] = np.nan, np.inf, -np.inf
    image = decode_image(tiff(values))[:, :, 0]
    expected = np.rint(RAMP * 255)
    expected[0, 5:8] = 0
    np.testing.assert_allclose(image, expected, atol=1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((40, 50), np.nan, np.float32), "has no finite value"),
        ((RAMP * 3000 - 1000).astype(np.int16), "has negative values, down to -99"),
        ((RAMP * 1000 + 29_000).astype(np.uint16), r"from 29\d+ to 29\d+.*keep \d grey levels"),
        ((RAMP * 0.01).astype(np.float32), "grey levels"),
        ((RAMP * 1e12).astype(np.float32), "more than 32 bits"),
    ],
)
def test_what_eight_bits_cannot_show_is_refused(tmp_path, values, reason):
    """Never a black, white or even picture of an image that has something in it."""
    (tmp_path / "x.tiff").write_bytes(tiff(values))
    with pytest.raises(DataError, match=f"x.tiff: image file .*{reason}"):
        read_image(tmp_path / "x.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_decoded_upright(kind, orientation):
    values = (RAMP * 65_535).astype(np.uint16)
    upright = decode_image(encoded((values >> 8).astype(np.uint8), "PNG", exif=turned(orientation)))
    image = decode_image(encoded(values, kind, exif=turned(orientation)))
    np.testing.assert_array_equal(image, upright)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("options", [{}, {"exif": turned(6)}])
def test_files_cut_short_are_refused(kind, options):
    whole = encoded(random_image(0, 200, 300), kind, **({} if kind == "BMP" else options))
    decode_image(whole)
    with pytest.raises(UnreadableImage):
        decode_image(whole[: len(whole) * 2 // 3])


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8 no image", b"GIF89a"])
def test_what_no_decoder_reads_is_refused(content):
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        decode_image(content)


def test_read_image_names_the_file(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    header = struct.pack(">II", 60_000, 60_000)
    huge = bytearray(encoded(random_image(0), "PNG"))
    huge[16:24] = header
    (tmp_path / "huge.png").write_bytes(huge)
    for name, reason in {
        "none.png": "does not exist",
        "bad.png": "cannot be decoded",
        "folder.png": "is no regular file",
        "huge.png": "has 60000 x 60000 pixels",
    }.items():
        with pytest.raises(DataError, match=rf"{name}: image file {reason}"):
            read_image(tmp_path / name)
        message = rf"{name}: image file {reason}"
        with pytest.raises(DataError, match=message), image_errors_named(str(tmp_path / name)):
            raise AssertionError("mmcv could not load it")
    path = tmp_path / "good.png"
    path.write_bytes(encoded(random_image(0), "PNG"))
    np.testing.assert_array_equal(read_image(path), random_image(0))
    with pytest.raises(AssertionError, match="another cause"), image_errors_named(str(path)):
        raise AssertionError("another cause")


# --- JPEGs ---


def jpeg(image: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    return encoded(image, "JPEG", mode, **options)


@pytest.mark.parametrize("size_hw", [(1, 1), (33, 47), (120, 160)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_pixels_equal_those_of_opencv_and_pillow(size_hw, subsampling, progressive):
    for quality in (30, 75, 95):
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        content = jpeg(random_image(0, *size_hw), **options)
        ours = decode_jpeg(content, "bgr")
        np.testing.assert_array_equal(ours, cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR))
        np.testing.assert_array_equal(ours[:, :, ::-1], np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_exif_turns_is_left_to_others(orientation):
    assert (decode_jpeg(jpeg(random_image(0), exif=turned(orientation))) is None) == (orientation != 1)


def test_exif_data_without_a_plain_orientation_are_left_to_others():
    content = jpeg(random_image(0), exif=turned(1))
    described = Image.Exif()
    described[0x010E] = "a microscope"
    assert decode_jpeg(content.replace(b"Exif\0\0MM", b"Exif\0\0QQ")) is None
    assert decode_jpeg(jpeg(random_image(0), exif=described)) is None


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_what_is_not_of_three_channels_is_left_to_others(mode):
    assert decode_jpeg(jpeg(random_image(0), mode)) is None


def test_damaged_files_are_left_to_others():
    content = jpeg(random_image(0, 200, 300))
    for damaged in (b"", b"no image", content[:20], content[: len(content) // 2]):
        assert decode_jpeg(damaged) is None
        assert decode_jpeg_reduced_bgr(damaged[:20], 2) is None


def test_a_header_that_claims_too_much_is_left_to_others():
    content = bytearray(jpeg(random_image(0, 40, 64)))
    size_at = content.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", content, size_at, 65000, 65000)
    assert decode_jpeg(bytes(content)) is None


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced(reduction):
    reduced = decode_jpeg_reduced_bgr(jpeg(random_image(0, 81, 123)), reduction)
    assert reduced.shape == (-(-81 // reduction), -(-123 // reduction), 3)


# --- resizing ---

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pillow(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size_hw[::-1], Image.Resampling.BILINEAR))


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("index", [0, 1])
def test_pixels_equal_tao_to_one_grey_level(index):
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
