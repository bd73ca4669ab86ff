"""Decoded JPEGs against OpenCV and Pillow."""

import io
import struct

import cv2
import numpy as np
import pytest
from data_builders import random_image
from PIL import Image

from ddetr_mm.data.jpeg import decode_jpeg_bgr, decode_jpeg_reduced_bgr


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
