"""Read, check and resize images."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import imagesize
import mmcv
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine import fileio
from PIL import Image
from torch.nn import functional

from ddetr_mm.compat.patches import size_refused
from ddetr_mm.datasets.coco_table import CocoTable
from ddetr_mm.datasets.sources import CocoSource
from ddetr_mm.errors import DataError, Problem

# --- Colour JPEGs from memory to BGR pixels: in full by libjpeg-turbo itself, reduced by OpenCV ---

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


# --- Resizing images to Pillow's pixels, several times faster than Pillow ---
# The reference resizes with Pillow's bilinear filter, which averages over the shrunken area
# (antialiasing). Two implementations agree with it to one grey level and are picked by case: where
# nothing shrinks, the filter is plain bilinear interpolation, which OpenCV does fastest; where something
# shrinks, torch's antialiased resize of 8-bit images follows Pillow's arithmetic.
#
# Enlarged colour images lie in memory channel after channel and are seen as (H, W, C): OpenCV enlarges three
# grey images faster than one of three channels, torch's result lies like that anyway, and the model wants
# them so. To numpy and OpenCV such an image is one like any other.

PixelArray = npt.NDArray[Any]


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


# --- Loading image files: JPEGs by the faster of two decoders, large ones at a fraction as an option ---


@TRANSFORMS.register_module()
class TAOLoadImageFromFile(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, faster on JPEGs.

    Without ``min_short_side`` it gives exactly what mmcv's gives. Usual colour JPEGs are decoded by
    libjpeg-turbo itself (``simplejpeg``), which takes two thirds of OpenCV's time for the same pixels; all
    else by OpenCV; what OpenCV cannot decode (TIFF files that are turned by a quarter, for one) is tried
    with Pillow. EXIF orientation is applied.

    With ``min_short_side`` large JPEGs are decoded at a half, a quarter or an eighth. The decoder then
    computes fewer pixels, which for 4K images takes a third of the time. The image is still larger than
    what the augmentation makes of it, but its pixels are not the reference's: an option for training
    only. A reduced image leaves ``ori_shape`` at the full size, while ``img``, ``img_shape``, the
    boxes in ``instances``, ``scale_factor`` and ``homography_matrix`` are those of the reduced image; so
    ``LoadAnnotations`` must come after it. Recorded ``height`` and ``width`` tell the size beforehand;
    where the file disagrees with them it is decoded in full.

    Args:
        min_short_side: the decoded shorter side is at least this, pixels: the largest that a later resize
            asks for. None: always decode in full.
        kwargs: as in mmcv.
    """

    def __init__(self, *args: Any, min_short_side: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if min_short_side is not None and min_short_side < 1:
            raise ValueError(f"min_short_side must be positive or None, not {min_short_side}")
        if min_short_side is not None and (self.color_type, self.imdecode_backend) != ("color", "cv2"):
            raise ValueError("min_short_side needs color_type 'color' and imdecode_backend 'cv2'")
        self.min_short_side = min_short_side

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load; see the class."""
        if (self.color_type, self.imdecode_backend, self.file_client_args) == ("color", "cv2", None):
            content = _read(results["img_path"], self.backend_args)
            reduction = self._reduction(results)
            if reduction > 1:
                reduced = decode_jpeg_reduced_bgr(content, reduction)
                if self._put_reduced(results, reduced, reduction):
                    return results
            image = decode_jpeg_bgr(content)
            if image is not None:
                return self._put(results, image)
        try:
            loaded: dict[str, Any] | None = super().transform(results)
        except (AssertionError, cv2.error):
            image = _decode_with_pillow(results["img_path"], self.backend_args)
            if image is None or self.color_type != "color":
                raise
            return self._put(results, image)
        return loaded

    def _reduction(self, results: dict[str, Any]) -> int:
        """The largest of 1, 2, 4, 8 that leaves the shorter side long enough."""
        short = min(results.get("height") or 0, results.get("width") or 0)
        if self.min_short_side is None:
            return 1
        return max((factor for factor in (8, 4, 2) if short // factor >= self.min_short_side), default=1)

    def _put(self, results: dict[str, Any], image: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """The image and its size among the results, as mmcv leaves them."""
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results

    def _put_reduced(
        self, results: dict[str, Any], image: npt.NDArray[np.uint8] | None, reduction: int
    ) -> bool:
        """The reduced image and what goes with it; False where it is not that of the recorded size."""
        full_hw = (results["height"], results["width"])
        if image is None or image.shape[:2] != tuple(-(-side // reduction) for side in full_hw):
            return False
        height, width = image.shape[:2]
        scale_wh = (width / full_hw[1], height / full_hw[0])
        self._put(results, image)
        results["ori_shape"] = full_hw
        results["scale_factor"] = scale_wh
        results["homography_matrix"] = np.diag([*scale_wh, 1.0]).astype(np.float32)
        results["instances"] = [
            {**item, "bbox": (np.asarray(item["bbox"]) * [*scale_wh, *scale_wh]).tolist()}
            for item in results.get("instances", [])
        ]
        return True

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, min_short_side={self.min_short_side})"


def _read(path: str, backend_args: dict[str, Any] | None) -> bytes:
    """The file; empty where it cannot be read, which mmcv's way of loading then reports."""
    try:
        content: bytes = fileio.get(path, backend_args=backend_args)
    except OSError:
        return b""
    return content


def _decode_with_pillow(path: str, backend_args: dict[str, Any] | None) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) BGR, EXIF orientation applied; None where Pillow cannot decode it either."""
    try:
        content = fileio.get(path, backend_args=backend_args)
        image: npt.NDArray[np.uint8] = mmcv.imfrombytes(content, flag="color", backend="pillow")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):  # the kinds that Pillow's plugins raise on damaged files
        return None
    return image


# --- Whether the image files that annotations speak of are there and can be read ---


def unreadable_image(path: str, backend_args: Mapping[str, Any] | None = None) -> Problem | None:
    """What keeps an image from being read; None where it can be.

    Args:
        path: the image file, or a URL that mmengine's file backends know.
        backend_args: of the file backend.
    """
    hint = "put the file there, or leave the image out of the annotations"
    try:
        content = fileio.get(path, backend_args=dict(backend_args) if backend_args else None)
    except FileNotFoundError:
        return Problem("image file does not exist", path, hint=hint)
    except OSError as error:
        return Problem(f"image file cannot be read: {error.strerror or error}", path, hint=hint)
    width, height = imagesize.get(io.BytesIO(content))
    refused = size_refused(width, height)
    if refused:
        return Problem(f"image file {refused}", path, hint="make it smaller, or leave it out of the data")
    try:
        decoded = mmcv.imfrombytes(content)
    except cv2.error:  # an empty file, or a size that OpenCV refuses
        decoded = None
    if decoded is None:
        return Problem("image file cannot be decoded", path, hint="write or copy it again")
    return None


@contextmanager
def unreadable_told(path: str, backend_args: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn what image decoders raise on a bad file into one message.

    Args:
        path: the image file that the block reads.
        backend_args: of the file backend.

    Raises:
        DataError: the file is missing, broken, or too large to be decoded.
    """
    try:
        yield
    except (OSError, AssertionError, cv2.error) as error:
        problem = unreadable_image(path, backend_args)
        if problem is None:
            raise
        raise DataError(problem) from error


def missing_images(table: CocoTable, sources: Sequence[CocoSource]) -> Iterator[Problem]:
    """One problem per image that has no file, in the order of the table.

    Args:
        table: the annotations.
        sources: the sources that the table was read from.
    """
    for row in range(table.num_images):
        path = sources[int(table.source_indices[row])].image_path(table.file_name(row))
        if not Path(path).is_file():
            yield Problem("image file does not exist", path, f"image id {int(table.original_image_ids[row])}")
