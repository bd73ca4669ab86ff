"""Decode image files, and resize images to Pillow's pixels.

:func:`decode_image` is the one decoder of training, evaluation, inference, checks and drawings;
:func:`read_image` reads a file through it and names the file in errors. :func:`resize_like_pillow` resizes as
TAO does, :func:`resize_plain` as stock mmdet does.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

import cv2
import imagesize
import mmcv
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from mmengine import fileio
from PIL import Image
from torch.nn import functional

from ddetr_mm.compat.patches import size_refused
from ddetr_mm.datasets.image_size import UnreadableImage
from ddetr_mm.errors import DataError, Problem

PixelArray = npt.NDArray[Any]
Image8 = npt.NDArray[np.uint8]

# --- Decoding ---

MAX_TURBO_PIXELS = 2**26
"""Larger JPEGs go to OpenCV, which refuses headers that claim too much."""

_JPEG_START = b"\xff\xd8\xff"
_EXIF_START, _EXIF_WITHIN, _EXIF_ORIENTATION = b"Exif\0\0", 1 << 17, 0x0112
_REDUCED_FLAGS = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def decode_image(content: bytes, channel_order: str = "rgb") -> Image8:
    """Decode an image file to 8-bit colour, upright.

    Usual colour JPEGs are decoded by libjpeg-turbo, everything else by OpenCV, and what OpenCV cannot decode
    by Pillow. EXIF orientation is applied. Grey and palette images become colour, CMYK is converted, alpha is
    dropped, 16-bit values keep their high byte.

    Args:
        content: the file's bytes.
        channel_order: ``"rgb"`` or ``"bgr"``.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        UnreadableImage: no decoder reads it.
    """
    image = decode_jpeg(content, channel_order)
    if image is None:
        image = _decode_with_opencv(content, channel_order)
    if image is None:
        image = _decode_with_pillow(content, channel_order)
    if image is None:
        raise UnreadableImage("cannot be decoded")
    return image


def decode_jpeg(content: bytes, channel_order: str = "rgb") -> Image8 | None:
    """Decode a usual colour JPEG in two thirds of OpenCV's time, to the same pixels.

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
    if not content.startswith(_JPEG_START):
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
        content = fileio.get(path, backend_args=dict(backend_args) if backend_args else None)
    except FileNotFoundError as error:
        raise DataError(Problem("image file does not exist", path, hint=hint)) from error
    except OSError as error:
        problem = Problem(f"image file cannot be read: {error.strerror or error}", path, hint=hint)
        raise DataError(problem) from error
    refused = size_refused(*imagesize.get(io.BytesIO(content)))
    if refused:
        raise DataError(Problem(f"image file {refused}", path, hint="reduce its size, or leave it out"))
    try:
        return decode_image(content, channel_order)
    except UnreadableImage as error:
        problem = Problem(f"image file {error}", path, hint="write or copy it again")
        raise DataError(problem) from error


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


def _decode_with_opencv(content: bytes, channel_order: str) -> Image8 | None:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # an empty file, or too many pixels
        return None
    if image is not None and channel_order == "rgb":
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return None if image is None else image.astype(np.uint8, copy=False)


def _decode_with_pillow(content: bytes, channel_order: str) -> Image8 | None:
    """What OpenCV does not read, such as TIFF files that a tag rotates by a quarter."""
    try:
        image: Image8 = mmcv.imfrombytes(content, "color", channel_order, backend="pillow")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        # what Pillow's plugins raise on damaged files
        return None
    return np.ascontiguousarray(image)


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
