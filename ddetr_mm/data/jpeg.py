"""Colour JPEGs from memory to BGR pixels: in full by libjpeg-turbo itself, reduced by OpenCV."""

from __future__ import annotations

import io

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

JPEG_START = b"\xff\xd8\xff"
MAX_PIXELS = 2**26
"""Larger images are left to OpenCV, which has a limit of its own against headers that claim too much."""

_COLOUR = "YCbCr"
_EXIF_START, _EXIF_WITHIN, _EXIF_ORIENTATION = b"Exif\0\0", 1 << 17, 0x0112
_REDUCED_FLAGS = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def decode_jpeg_bgr(content: bytes) -> npt.NDArray[np.uint8] | None:
    """All pixels of a colour JPEG, the same as OpenCV's and Pillow's, in two thirds of OpenCV's time.

    Args:
        content: the file.

    Returns:
        (H, W, 3) uint8 BGR; None where the file is left to other decoders: no JPEG, damaged, not in the
        usual colours, turned by its EXIF orientation, over :data:`MAX_PIXELS`.
    """
    if not content.startswith(JPEG_START):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours != _COLOUR or height * width > MAX_PIXELS or _is_turned(content):
            return None
        image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "BGR")
    except ValueError:  # how the decoder refuses a file; OpenCV may still make something of it
        return None
    return image


def _is_turned(content: bytes) -> bool:
    """Whether EXIF asks for the image to be turned or mirrored, or does not plainly say upright."""
    if content.find(_EXIF_START, 0, _EXIF_WITHIN) < 0:
        return False
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.getexif().get(_EXIF_ORIENTATION) != 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True  # not to be understood here: another decoder decides


def decode_jpeg_reduced_bgr(content: bytes, reduction: int) -> npt.NDArray[np.uint8] | None:
    """A JPEG at a half, a quarter or an eighth of its size, for which the decoder computes fewer pixels.

    Args:
        content: the file.
        reduction: 2, 4 or 8.

    Returns:
        (ceil(H / reduction), ceil(W / reduction), 3) uint8 BGR, turned as EXIF says; None where OpenCV
        cannot decode it, or it is no JPEG.
    """
    if not content.startswith(JPEG_START):
        return None
    image_bgr = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED_FLAGS[reduction])
    return None if image_bgr is None else image_bgr.astype(np.uint8, copy=False)
