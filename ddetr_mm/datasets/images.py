"""Decode image files, and resize images to Pillow's pixels.

:func:`decode_image` is the one decoder of training, evaluation, inference, checks, calibration and drawings;
:func:`read_image` reads a file through it and names the file in errors. :func:`to_eight_bits` is its rule for
pixels of more than 8 bits. :func:`resize_like_pillow` resizes as TAO does, :func:`resize_plain` as stock
mmdet does.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import cv2
import imagesize
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from mmengine import fileio
from PIL import Image, ImageOps
from torch.nn import functional

from ddetr_mm.compat.patches import size_refused
from ddetr_mm.datasets.image_size import UnreadableImage
from ddetr_mm.datasets.worker_state import reading
from ddetr_mm.errors import DataError, Problem

PixelArray = npt.NDArray[Any]
Image8 = npt.NDArray[np.uint8]

# --- Decoding ---

MAX_TURBO_PIXELS = 2**26
"""Larger JPEGs go to OpenCV, which refuses headers that claim too much."""

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_BITS, _TIFF_ORIENTATION, _TIFF_SHORT = 258, 274, 3
_EXIF_START, _EXIF_WITHIN, _EXIF_ORIENTATION = b"Exif\0\0", 1 << 17, 0x0112
_REDUCED_FLAGS = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def decode_image(content: bytes, channel_order: str = "rgb") -> Image8:
    """Decode an image file to 8-bit colour, upright.

    Usual colour JPEGs are decoded by libjpeg-turbo, everything else by OpenCV, and what OpenCV cannot decode
    by Pillow. EXIF orientation is applied. Grey and palette images become colour, CMYK is converted, alpha is
    dropped; more than 8 bits are scaled by :func:`to_eight_bits`. Of several pages the first one is taken.

    Args:
        content: the file's bytes.
        channel_order: ``"rgb"`` or ``"bgr"``.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        UnreadableImage: no decoder reads it, it ends too early, has too many pixels, or values that 8 bits
            cannot represent.
    """
    image = decode_jpeg(content, channel_order)
    if image is not None:
        return image
    refused = size_refused(*imagesize.get(io.BytesIO(content)))
    if refused:
        raise UnreadableImage(refused, hint="reduce its size, or leave it out")
    image_bgr = None
    if not _jpeg_cut_short(content):
        image_bgr = _decode_deep_tiff(content) if _is_deep_tiff(content) else _decode_with_opencv(content)
    if image_bgr is None:
        image_bgr = _decode_with_pillow(content)
    if image_bgr is None:
        raise UnreadableImage("cannot be decoded")
    if channel_order == "rgb":
        cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB, dst=image_bgr)
    return image_bgr


def decode_jpeg(content: bytes, channel_order: str = "rgb") -> Image8 | None:
    """Decode a usual colour JPEG in 84 to 88 % of OpenCV 5's time, to the same pixels.

    Args:
        content: the file's bytes.
        channel_order: ``"rgb"`` or ``"bgr"``.

    Returns:
        (H, W, 3) uint8; None for other files, damaged ones, those that EXIF rotates, and those of more than
        :data:`MAX_TURBO_PIXELS`.
    """
    if not content.startswith(_JPEG_START):
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
        if color_space != "YCbCr" or height * width > MAX_TURBO_PIXELS or _may_be_rotated(content):
            return None
        image: Image8 = simplejpeg.decode_jpeg(content, channel_order.upper())
    except ValueError:  # damaged; OpenCV may still read a part
        return None
    return image


def decode_jpeg_reduced_bgr(content: bytes, reduction: int) -> Image8 | None:
    """Decode a JPEG at a fraction of its size, for which the decoder computes fewer pixels.

    Args:
        content: the file's bytes.
        reduction: 2, 4 or 8.

    Returns:
        (ceil(H / reduction), ceil(W / reduction), 3) uint8 BGR, upright; None where the file is no JPEG or
        cannot be decoded.
    """
    if not content.startswith(_JPEG_START) or _jpeg_cut_short(content):
        return None
    image_bgr = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED_FLAGS[reduction])
    return None if image_bgr is None else image_bgr.astype(np.uint8, copy=False)


def read_image(
    path: str | PathLike[str], channel_order: str = "rgb", backend_args: Mapping[str, Any] | None = None
) -> Image8:
    """Read and decode an image file, see :func:`decode_image`.

    Args:
        path: the file, or a URL that mmengine's file backends know.
        channel_order: ``"rgb"`` or ``"bgr"``.
        backend_args: of the file backend.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: the file is missing, cannot be read or decoded, or has too many pixels.
    """
    path = fspath(path)
    hint = "put the file there, or leave the image out of the annotations"
    try:
        content = read_content(path, dict(backend_args) if backend_args else None)
    except UnreadableImage as error:
        raise DataError(unreadable_problem(path, error)) from error
    except FileNotFoundError as error:
        raise DataError(Problem("image file does not exist", path, hint=hint)) from error
    except OSError as error:
        problem = Problem(f"image file cannot be read: {error.strerror or error}", path, hint=hint)
        raise DataError(problem) from error
    try:
        return decode_image(content, channel_order)
    except UnreadableImage as error:
        raise DataError(unreadable_problem(path, error)) from error


def read_content(path: str, backend_args: dict[str, Any] | None = None) -> bytes:
    """Return the bytes of a file.

    Args:
        path: the file, or a URL that mmengine's file backends know.
        backend_args: of the file backend.

    Raises:
        UnreadableImage: it is a pipe, a device or a folder, which could be read from for ever.
        OSError: it cannot be read.
    """
    if "://" not in path and not backend_args and not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableImage("is no regular file", hint="put the image there, or leave it out")
    content: bytes = fileio.get(path, backend_args=backend_args)
    return content


def unreadable_problem(path: str | PathLike[str], error: UnreadableImage) -> Problem:
    """The message for an image file that :func:`decode_image` refuses."""
    return Problem(f"image file {error}", path, hint=error.hint)


@contextmanager
def image_errors_named(path: str, backend_args: Mapping[str, Any] | None = None) -> Iterator[None]:
    """A block that reads an image; what decoders raise on a bad file becomes a message that names it.

    Args:
        path: the image file that the block reads.
        backend_args: of the file backend.

    Raises:
        DataError: the file is missing, broken, or too large to be decoded.
    """
    try:
        with reading(path):
            yield
    except (OSError, AssertionError, cv2.error):
        read_image(path, backend_args=backend_args)
        raise  # the image is sound: the error has another cause


def _may_be_rotated(content: bytes) -> bool:
    """Whether EXIF rotates or mirrors a JPEG, or its orientation cannot be read."""
    if content.find(_EXIF_START, 0, _EXIF_WITHIN) < 0:
        return False
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.getexif().get(_EXIF_ORIENTATION) != 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


def _jpeg_cut_short(content: bytes) -> bool:
    """Whether a JPEG lacks its end; OpenCV 4 makes the rest grey, while Pillow refuses it if pixels lack."""
    return content.startswith(_JPEG_START) and not content[-64:].rstrip(b"\0").endswith(_JPEG_END)


def _decode_with_opencv(content: bytes) -> Image8 | None:
    try:
        image_bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:  # an empty file, or too many pixels
        return None
    if image_bgr is None:
        return None
    return image_bgr.astype(np.uint8, copy=False) if image_bgr.dtype == np.uint8 else to_eight_bits(image_bgr)


def _decode_with_pillow(content: bytes) -> Image8 | None:
    """What OpenCV does not read, such as TIFF files that a tag rotates by a quarter; BGR."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
                return _as_bgr(to_eight_bits(np.asarray(picture)))
            image_rgb = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        # what Pillow's plugins raise on damaged files
        return None
    return np.ascontiguousarray(image_rgb[:, :, ::-1])


# --- More than 8 bits ---

PEAK_SHARE = 0.001
"""Share of the values, at either end, that may be outliers: hot and dead pixels."""

LEAST_LEVELS = 8
"""Grey levels that the values of an image with more than 8 bits must cover."""

_DEPTHS = (8, 10, 12, 14, 16, 20, 24, 32)
_MEASURED_VALUES = 1 << 20


def to_eight_bits(values: PixelArray) -> Image8:
    """Scale pixels of more than 8 bits by the range that the image uses.

    The depth of an image is the smallest of 8, 10, 12, 14, 16, 20, 24 and 32 bits that holds all but a
    thousandth of its values: 12-bit data in a 16-bit file count as 12 bits. Its highest 8 bits are kept, so
    full 16-bit data keep their high byte. Floating point values up to 1 are taken as the range 0 to 1, larger
    ones as integers; what is not finite becomes 0.

    Args:
        values: (H, W) or (H, W, C), integers or floating point.

    Returns:
        Same shape, uint8.

    Raises:
        UnreadableImage: negative values, no finite value, or values so close to each other that fewer than
            :data:`LEAST_LEVELS` grey levels would be left of them.
    """
    if values.dtype == np.uint8:
        return values
    floating = values.dtype.kind == "f"
    if floating:
        finite = np.isfinite(values)
        if not finite.any():
            raise UnreadableImage("has no finite value")
        values = np.where(finite, values, 0)
    low, high = _value_range(values)
    unit = floating and high <= 1
    step = 1 / 255 if unit else float(2 ** (_depth_of(high) - 8))
    _refuse_lost_values(low, high, step, floating)
    if unit:
        return np.asarray(np.clip(np.rint(values * 255.0), 0, 255).astype(np.uint8))
    return np.asarray(np.clip(values // values.dtype.type(step), 0, 255).astype(np.uint8))


def _value_range(values: PixelArray) -> tuple[float, float]:
    """Smallest and largest value without :data:`PEAK_SHARE` at either end, from evenly spread pixels."""
    flat = np.sort(values.reshape(-1)[:: max(1, values.size // _MEASURED_VALUES)])
    left_out = int(len(flat) * PEAK_SHARE)
    return float(flat[left_out]), float(flat[len(flat) - 1 - left_out])


def _depth_of(high: float) -> int:
    """The bits that hold a value.

    Raises:
        UnreadableImage: more than 32.
    """
    found = next((bits for bits in _DEPTHS if high < 2**bits), None)
    if found is None:
        raise UnreadableImage(f"has values up to {high:.6g}, more than 32 bits hold")
    return found


def _refuse_lost_values(low: float, high: float, step: float, floating: bool) -> None:
    """Refuse values of which 8 bits keep next to nothing; ``step`` is the size of a grey level."""
    hint = "stretch the values, in all images alike, and write 8 or 16 bits"
    if low < -step:
        raise UnreadableImage(f"has negative values, down to {low:.6g}", hint=hint)
    levels = (high - low) / step
    if 0 < levels < LEAST_LEVELS and (floating or high - low >= 4 * LEAST_LEVELS):
        raise UnreadableImage(
            f"has values from {low:.6g} to {high:.6g}, of which 8 bits keep {int(levels) + 1} grey levels",
            hint=hint,
        )


@dataclass(frozen=True)
class _TiffTag:
    """An entry of a TIFF file's first page: its first number (offsets are followed), and where that is."""

    value: int
    place: int


def _tiff_tags(content: bytes) -> dict[int, _TiffTag]:
    """The 16-bit entries of a TIFF file's first page; none where the file is damaged."""
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    count_format, entry_bytes, field_at, offset_format = ("Q", 20, 12, "Q") if big else ("H", 12, 8, "I")
    try:
        (page,) = struct.unpack_from(order + offset_format, content, 8 if big else 4)
        (count,) = struct.unpack_from(order + count_format, content, page)
        first = page + struct.calcsize(count_format)
        found = {}
        for start in range(first, first + min(count, 4096) * entry_bytes, entry_bytes):
            tag, kind = struct.unpack_from(order + "HH", content, start)
            (number,) = struct.unpack_from(order + offset_format, content, start + 4)
            if kind != _TIFF_SHORT:
                continue
            place = start + field_at
            if number * 2 > struct.calcsize(offset_format):  # longer than its field, which is an offset then
                (place,) = struct.unpack_from(order + offset_format, content, place)
            found[tag] = _TiffTag(struct.unpack_from(order + "H", content, place)[0], place)
        return found
    except struct.error:
        return {}  # the decoders refuse it


def _is_deep_tiff(content: bytes) -> bool:
    if not content.startswith(_TIFF_STARTS):
        return False
    bits = _tiff_tags(content).get(_TIFF_BITS)
    return bits is not None and bits.value > 8


def _decode_deep_tiff(content: bytes) -> Image8 | None:
    """A TIFF of more than 8 bits, which OpenCV decodes only unchanged; BGR, upright.

    Versions of OpenCV differ in what they do about the orientation: it is taken out before, applied after.
    """
    orientation = _tiff_tags(content).get(_TIFF_ORIENTATION)
    data = np.frombuffer(content, np.uint8).copy()
    if orientation is not None:
        data[orientation.place : orientation.place + 2] = (1, 0) if content[:2] == b"II" else (0, 1)
    try:
        values = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None:
        return None
    if values.ndim == 3:  # without alpha
        values = values[:, :, :3] if values.shape[2] >= 3 else values[:, :, 0]
    return _as_bgr(_upright(to_eight_bits(values), orientation.value if orientation else 1))


def _upright(image: Image8, orientation: int) -> Image8:
    """Apply an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def _as_bgr(image: Image8) -> Image8:
    """A grey (H, W) or coloured (H, W, 3) image as contiguous (H, W, 3)."""
    return np.ascontiguousarray(image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2))


# --- Resizing ---
# TAO resizes with Pillow's bilinear filter, which averages over the area when it shrinks (antialiasing). Two
# implementations agree with it to one grey level: where nothing shrinks, OpenCV's plain bilinear
# interpolation (fastest); otherwise torch's antialiased resize of 8-bit images.
#
# Enlarged colour images are planar in memory and seen as (H, W, C): OpenCV enlarges three grey images faster
# than one of three channels, torch's result is planar anyway, and the model wants (C, H, W).


def resize_like_pillow(image_hwc: PixelArray, size_hw: tuple[int, int]) -> PixelArray:
    """Resize with antialiased bilinear interpolation.

    Args:
        image_hwc: (H, W) or (H, W, C), uint8 or floating point. Channel order does not matter.
        size_hw: new (height, width), pixels.

    Returns:
        A new array (or the input itself where the size is the same), same type. For uint8 each value is
        within one grey level of Pillow's ``Image.resize(..., Image.Resampling.BILINEAR)``.
    """
    height, width = image_hwc.shape[:2]
    if (height, width) == size_hw:
        return image_hwc
    if size_hw[0] >= height and size_hw[1] >= width:
        return resize_plain(image_hwc, size_hw)
    image_hwc = contiguous(image_hwc)
    channels_last = image_hwc if image_hwc.ndim == 3 else image_hwc[:, :, None]
    batch = torch.from_numpy(channels_last).permute(2, 0, 1)[None]
    resized = functional.interpolate(
        batch, size=size_hw, mode="bilinear", align_corners=False, antialias=True
    )
    result: PixelArray = resized[0].permute(1, 2, 0).numpy()
    return result if image_hwc.ndim == 3 else result[:, :, 0]


def resize_plain(image_hwc: PixelArray, size_hw: tuple[int, int]) -> PixelArray:
    """Resize with plain bilinear interpolation (OpenCV), without antialiasing.

    Faster than :func:`resize_like_pillow`, and different from it where the image shrinks: thin
    structures alias. This is what stock mmdet does.

    Args:
        image_hwc: (H, W) or (H, W, C), uint8 or floating point.
        size_hw: new (height, width), pixels.

    Returns:
        A new array (or the input itself where the size is the same), same type.
    """
    if image_hwc.shape[:2] == size_hw:
        return image_hwc
    if image_hwc.strides[0] <= 0 or image_hwc.strides[1] <= 0:  # a window is fine for OpenCV, a flip is not
        image_hwc = contiguous(image_hwc)
    enlarged = size_hw[0] * size_hw[1] >= image_hwc.shape[0] * image_hwc.shape[1]
    if enlarged and image_hwc.ndim == 3 and image_hwc.shape[2] == 3:
        planes_chw = np.empty((3, *size_hw), image_hwc.dtype)
        for plane, target in zip(split_planes(image_hwc), planes_chw, strict=True):
            cv2.resize(plane, size_hw[::-1], dst=target, interpolation=cv2.INTER_LINEAR)
        return planes_chw.transpose(1, 2, 0)
    resized = cv2.resize(image_hwc, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    return resized if resized.ndim == image_hwc.ndim else resized[:, :, None]


def split_planes(image_hwc: PixelArray) -> PixelArray:
    """(3, H, W) of an (H, W, 3) image, each row of a plane in one piece; no copy where it is so already."""
    planes_chw = image_hwc.transpose(2, 0, 1)
    if planes_chw.strides[2] == planes_chw.itemsize and planes_chw.strides[1] > 0:
        return planes_chw
    height, width = image_hwc.shape[:2]
    result = np.empty((3, height, width), image_hwc.dtype)
    cv2.split(contiguous(image_hwc), [result[0], result[1], result[2]])
    return result


def contiguous(image_hwc: PixelArray) -> PixelArray:
    """The same pixels in C order; no copy where they are already.

    A horizontal flip by mmcv is a view that runs backwards; OpenCV copies it some twenty times faster
    than numpy (and than its own conversion of such an array).
    """
    if image_hwc.flags.c_contiguous:
        return image_hwc
    if image_hwc.ndim == 3 and image_hwc.strides[1] < 0 and image_hwc[:, ::-1].flags.c_contiguous:
        flipped = cv2.flip(image_hwc[:, ::-1], 1)
        return flipped.reshape(image_hwc.shape)
    return np.ascontiguousarray(image_hwc)


RESIZE_BACKENDS: dict[str, Callable[[PixelArray, tuple[int, int]], PixelArray]] = {
    "pillow": resize_like_pillow,
    "fast": resize_plain,
}
