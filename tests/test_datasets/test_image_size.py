"""Sizes from headers against those that Pillow decodes."""

import io
import struct
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kitti_builder import image_bytes
from PIL import Image, ImageOps, PngImagePlugin

from ddetr_mm.datasets import image_size
from ddetr_mm.datasets.image_size import UnreadableImage, read_image_size

KINDS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tif"}
ORIENTATIONS = range(1, 9)


def written(folder, content, name="image"):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def shown_size(path):
    """The size that a viewer, and the training, gives the image."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


def with_orientation(kind, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_bytes(kind, (80, 30), exif=exif, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_wh", [(1, 1), (7, 500), (640, 480)])
def test_every_common_kind(tmp_path, kind, size_wh):
    path = written(tmp_path, image_bytes(kind, size_wh))
    assert read_image_size(path) == size_wh
    assert read_image_size(path, decode=True) == size_wh


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_rotation_by_exif_counts(tmp_path, kind, orientation):
    path = written(tmp_path, with_orientation(kind, orientation))
    assert read_image_size(path) == shown_size(path)
    assert read_image_size(path, decode=True) == shown_size(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"progressive": True}),
        ("JPEG", {"comment": b"\xff\xda\xff\xc0" * 3000}),
        ("JPEG", {"icc_profile": b"\xff\xda" * 60_000}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"lossless": False, "quality": 5}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"big_tiff": True}),
        ("GIF", {}),
        ("PPM", {}),
    ],
)
def test_variants(tmp_path, kind, options):
    path = written(tmp_path, image_bytes(kind, (90, 70), **options))
    assert read_image_size(path) == (90, 70)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_png_modes(tmp_path, mode):
    path = str(tmp_path / "image.png")
    Image.new(mode, (33, 44)).save(path)
    assert read_image_size(path) == (33, 44)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_bmp_modes(tmp_path, mode):
    path = str(tmp_path / "image.bmp")
    Image.new(mode, (33, 44)).save(path)
    assert read_image_size(path) == (33, 44)


def test_png_rotation_after_the_pixels_and_in_a_raw_profile(tmp_path):
    plain = image_bytes("PNG", (80, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = exif.tobytes().removeprefix(b"Exif\x00\x00")
    end = plain.rindex(b"IEND") - 4
    buffer = io.BytesIO()
    PngImagePlugin.putchunk(buffer, b"eXIf", payload)
    path = written(tmp_path, plain[:end] + buffer.getvalue() + plain[end:])
    assert read_image_size(path) == shown_size(path) == (30, 80)
    profile = f"\nexif\n    {len(payload) + 6}\n{(b'Exif' + bytes(2) + payload).hex()}\n"
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", profile, zip=True)
    path = written(tmp_path, image_bytes("PNG", (80, 30), pnginfo=text))
    assert read_image_size(path) == shown_size(path) == (30, 80)


def test_the_extension_does_not_matter(tmp_path):
    assert read_image_size(written(tmp_path, image_bytes("PNG", (9, 8)), "image.jpg")) == (9, 8)


def test_bytes_after_the_image_do_no_harm(tmp_path):
    for kind in KINDS:
        assert read_image_size(written(tmp_path, image_bytes(kind, (9, 8)) + b"\0" * 100)) == (9, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_files_that_end_early_are_found(tmp_path, kind, share):
    content = image_bytes(kind, (200, 200))
    path = written(tmp_path, content[: int(len(content) * share)])
    with pytest.raises(UnreadableImage):
        read_image_size(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_ending_early_is_reported_from_other_damage(tmp_path, kind):
    content = image_bytes(kind, (200, 200))
    with pytest.raises(UnreadableImage) as caught:
        read_image_size(written(tmp_path, content[: len(content) // 2]))
    assert caught.value.truncated
    with pytest.raises(UnreadableImage) as caught:
        read_image_size(written(tmp_path, b"no image at all"))
    assert not caught.value.truncated


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"BM",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"\x89PNG\r\n\x1a\n",
        b"\0" * 5000,
    ]
    + [
        kind + b"\xff" * 300
        for kind in (b"\xff\xd8", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0\x08\0\0\0", b"MM\0*")
    ],
)
def test_what_is_no_image_is_refused(tmp_path, content):
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        read_image_size(written(tmp_path, content))


def test_a_jpeg_of_size_zero_is_refused(tmp_path):
    content = bytearray(image_bytes("JPEG", (20, 10)))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 0, 20)
    with pytest.raises(UnreadableImage):
        read_image_size(written(tmp_path, bytes(content)))


def test_messages_do_not_name_the_place(tmp_path):
    path = written(tmp_path, b"no image")
    with pytest.raises(UnreadableImage) as caught:
        read_image_size(path)
    assert str(tmp_path) not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image_size(str(tmp_path / "nowhere.jpg"))
    with pytest.raises(UnreadableImage, match="no regular file"):
        read_image_size(str(tmp_path))


class TestJpegHeaders:
    def test_usual_ones_need_no_library(self, tmp_path, monkeypatch):
        monkeypatch.setattr(image_size.imagesize, "get", None)
        for number, options in enumerate(({}, {"progressive": True}, {"comment": b"x" * 500})):
            size = (40 + number, 90 - number)
            assert read_image_size(written(tmp_path, image_bytes("JPEG", size, **options))) == size

    def test_a_thumbnail_is_no_header(self, tmp_path):
        thumbnail = image_bytes("JPEG", (16, 12))
        for marker in (b"\xff\xe1", b"\xff\xe2"):
            segment = marker + struct.pack(">H", len(thumbnail) + 2) + thumbnail
            content = image_bytes("JPEG", (100, 50))
            assert read_image_size(written(tmp_path, b"\xff\xd8" + segment + content[2:])) == (100, 50)

    @settings(max_examples=300, deadline=None)
    @given(position=st.integers(2, 640), value=st.integers(0, 255))
    def test_with_a_changed_byte_the_size_is_that_of_the_decoded_image(self, position, value):
        content = bytearray(image_bytes("JPEG", (48, 32)))
        content[position] = value
        with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
            file.write(content)
            file.flush()
            try:
                decoded = read_image_size(file.name, decode=True)
            except UnreadableImage:
                return
            assert read_image_size(file.name) == decoded
