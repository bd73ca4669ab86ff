"""Width and height of an image as it is shown, from the file's header.

Usual JPEG headers are read here, others by ``imagesize``. Where that leaves a doubt (a rare format, a
rotation in a PNG or WebP file, a file that does not end like an image), Pillow decodes the image: slow, exact
and rare. Sizes are those after EXIF rotation, as in Pillow's ``ImageOps.exif_transpose``.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import imagesize
from PIL import Image

from ddetr_mm.compat.patches import size_refused

IMAGE_EXTENSIONS: tuple[str, ...] = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
)
"""Extensions of image files, in lower case."""

_HEAD_BYTES = 2048
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Tables, comments, and application data other than EXIF (APP1).
_JPEG_PLAIN_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE))
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TIFF_OFFSETS_AND_COUNTS = ((273, 279), (324, 325))


class ImageSize(NamedTuple):
    """Size in pixels of an image as shown."""

    width: int
    height: int


@dataclass
class UnreadableImage(Exception):
    """The file is no image that can be decoded.

    Attributes:
        reason: what is wrong.
        truncated: the file ends before the image does.
        hint: what the user can do.
    """

    reason: str
    truncated: bool = False
    hint: str = "write or copy it again"

    def __str__(self) -> str:
        return self.reason


def read_image_size(path: str, *, decode: bool = False) -> ImageSize:
    """Size of the image in ``path``.

    Without ``decode`` only the header and the end of the file are read: a file cut short is found, damage in
    its middle is not.

    Args:
        path: a jpg, png, bmp, webp or tiff file; other formats that Pillow reads work too, slowly.
        decode: decode every pixel with Pillow, which refuses damage that OpenCV decodes to grey.

    Raises:
        UnreadableImage: not an image, damaged, cut short, of absurd size, or the file cannot be opened.
    """
    size = _decoded_size(path) if decode else _size_of_file(path)
    refused = size_refused(size.width, size.height)
    if refused:
        raise UnreadableImage(refused)
    return size


def _size_of_file(path: str) -> ImageSize:
    try:
        # Without waiting: a pipe would keep it here for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnreadableImage("is no regular file", hint="put the image there, or leave it out")
            size = _size_from_header(path, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from error
    return size or _decoded_size(path)


def _size_from_header(path: str, descriptor: int) -> ImageSize | None:
    """The size, or None where the image has to be decoded."""
    head = os.read(descriptor, _HEAD_BYTES)
    num_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    if head.startswith(b"\xff\xd8"):
        whole = num_bytes > 4 and os.pread(descriptor, 2, num_bytes - 2) == b"\xff\xd9"
        return (_jpeg_size(head) or _library_size(path)) if whole else None
    if head.startswith(_PNG_SIGNATURE):
        whole = _png_is_plain_and_whole(descriptor, num_bytes)
    elif head.startswith(b"BM"):
        whole = _bmp_is_whole(head, num_bytes)
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        whole = _webp_is_plain_and_whole(head, num_bytes)
    elif head[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_size(path, num_bytes)
    else:
        whole = False
    return _library_size(path) if whole else None


def _library_size(source: str | io.BytesIO) -> ImageSize | None:
    width, height = imagesize.get(source)
    return ImageSize(width, height) if width > 0 and height > 0 else None


def _jpeg_size(head: bytes) -> ImageSize | None:
    """Size from a JPEG's frame header; None where the segments up to the scan are not all in ``head``.

    Also None where there are EXIF data: they may rotate the image.
    """
    size = None
    position = 2
    while position + 9 <= len(head) and head[position] == 0xFF:
        marker = head[position + 1]
        if marker == _JPEG_SCAN:
            return size
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", head, position + 5)
            if not (height and width):
                return None  # the height comes later in the file
            size = ImageSize(width, height)
        elif marker not in _JPEG_PLAIN_SEGMENTS:
            return None
        position += 2 + (head[position + 2] << 8 | head[position + 3])
    return None


def _png_is_plain_and_whole(descriptor: int, num_bytes: int) -> bool:
    """Follow the chain of chunks to its end; False where Pillow has to look for a rotation."""
    position = len(_PNG_SIGNATURE)
    while position + 12 <= num_bytes:
        head = os.pread(descriptor, 28, position)
        (length,) = struct.unpack_from(">I", head)
        kind = head[4:8]
        if kind == b"IEND":
            return True
        if kind == b"eXIf" or (
            kind in (b"tEXt", b"zTXt", b"iTXt") and head[8:].startswith(b"Raw profile type exi")
        ):
            return False
        position += length + 12
    return False


def _bmp_is_whole(head: bytes, num_bytes: int) -> bool:
    if len(head) < 30:
        return False
    header_bytes, width, height, _, bits = struct.unpack_from("<IiiHH", head, 14)
    (pixels_at,) = struct.unpack_from("<I", head, 10)
    if header_bytes < 40 or bits < 16 or width <= 0:
        return False  # old or run-length encoded: has to be decoded
    row_bytes = (width * bits + 31) // 32 * 4
    return pixels_at + row_bytes * abs(height) <= num_bytes


def _webp_is_plain_and_whole(head: bytes, num_bytes: int) -> bool:
    (length,) = struct.unpack_from("<I", head, 4)
    if length + 8 > num_bytes or len(head) < 32:
        return False
    kind = head[12:16]
    if kind == b"VP8X":
        return not head[20] & 0x08  # the flag of an EXIF chunk
    if kind == b"VP8 ":
        # Two scaling bits share each 16-bit size; where one is set the plain number is wrong.
        return not (head[27] | head[29]) & 0xC0
    return kind == b"VP8L"


def _tiff_size(path: str, num_bytes: int) -> ImageSize | None:
    """Size by Pillow's lazy open, where all strips or tiles are inside the file."""
    try:
        with _opened(path) as image:
            tags = image.tag_v2  # type: ignore[attr-defined]
            for offsets_tag, counts_tag in _TIFF_OFFSETS_AND_COUNTS:
                offsets, counts = tags.get(offsets_tag), tags.get(counts_tag)
                if offsets and counts and len(offsets) == len(counts):
                    if max(start + count for start, count in zip(offsets, counts, strict=True)) > num_bytes:
                        return None
                    return _turned(tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT], tags.get(_EXIF_ORIENTATION))
    except Exception:  # damaged: reported by the decoder
        return None
    return None


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open an image without Pillow's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            yield image


def _turned(width: int, height: int, orientation: int | None) -> ImageSize:
    return ImageSize(height, width) if orientation in _QUARTER_TURNS else ImageSize(width, height)


def _decoded_size(path: str) -> ImageSize:
    if os.path.exists(path) and not os.path.isfile(path):
        raise UnreadableImage("is no regular file", hint="put the image there, or leave it out")
    try:
        with _opened(path) as image:
            image.load()  # also turns a TIFF, whose orientation is gone afterwards
            size = _turned(image.width, image.height, image.getexif().get(_EXIF_ORIENTATION))
    except Exception as error:  # Pillow's plugins raise many kinds on damaged files
        reason = str(error).replace(f" {path!r}", "").replace(path, "file") or type(error).__name__
        truncated = any(
            word in reason.lower() for word in ("truncated", "too small", "premature", "end of file")
        )
        raise UnreadableImage(f"cannot be decoded: {reason}", truncated) from error
    return size
