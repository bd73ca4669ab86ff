"""Resizing images to Pillow's pixels, several times faster than Pillow.

The reference resizes with Pillow's bilinear filter, which averages over the shrunken area
(antialiasing). Two implementations agree with it to one grey level and are picked by case: where
nothing shrinks, the filter is plain bilinear interpolation, which OpenCV does fastest; where something
shrinks, torch's antialiased resize of 8-bit images follows Pillow's arithmetic.

Enlarged colour images lie in memory channel after channel and are seen as (H, W, C): OpenCV enlarges three
grey images faster than one of three channels, torch's result lies like that anyway, and the model wants
them so. To numpy and OpenCV such an image is one like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Image = npt.NDArray[Any]


def resize_like_pillow(image_hwc: Image, size_hw: tuple[int, int]) -> Image:
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
    result: Image = resized[0].permute(1, 2, 0).numpy()
    return result if image_hwc.ndim == 3 else result[:, :, 0]


def resize_plain(image_hwc: Image, size_hw: tuple[int, int]) -> Image:
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


def split_planes(image_hwc: Image) -> Image:
    """(3, H, W) of an (H, W, 3) image, each row of a plane in one piece; no copy where it is so already."""
    planes_chw = image_hwc.transpose(2, 0, 1)
    if planes_chw.strides[2] == planes_chw.itemsize and planes_chw.strides[1] > 0:
        return planes_chw
    height, width = image_hwc.shape[:2]
    result = np.empty((3, height, width), image_hwc.dtype)
    cv2.split(contiguous(image_hwc), [result[0], result[1], result[2]])
    return result


def contiguous(image_hwc: Image) -> Image:
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


RESIZE_BACKENDS: dict[str, Callable[[Image, tuple[int, int]], Image]] = {
    "pillow": resize_like_pillow,
    "fast": resize_plain,
}
