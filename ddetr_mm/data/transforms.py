"""The reference's augmentations as mmdet transforms; each works alone in any mmdet pipeline.

All randomness comes from numpy's global generator, as in mmdet, so that a seeded worker repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmdet.registry import TRANSFORMS

from ddetr_mm.data.geometry import (
    divisible_size_hw,
    fit_size_hw,
    fixed_pad_size_hw,
    resize_size_hw,
)
from ddetr_mm.data.image_edits import Results, crop_results, pad_results, resize_results
from ddetr_mm.data.load import TAOLoadImageFromFile
from ddetr_mm.data.pack import TAOPackDetInputs
from ddetr_mm.data.resize import RESIZE_BACKENDS

__all__ = [
    "FixedPad",
    "LargeScaleJitter",
    "TAOLoadImageFromFile",
    "TAOPackDetInputs",
    "TAORandomResize",
    "TAORandomSizeCrop",
]

IMAGENET_MEAN_BGR = (104.0, 116.0, 124.0)
"""The mean colour of ImageNet in 8 bits: about 0 after normalisation."""


@TRANSFORMS.register_module()
class TAORandomResize(BaseTransform):
    """Resize the shorter side to one of several lengths, keeping the aspect ratio.

    Required keys: ``img``. Modified: ``img``, ``img_shape``, ``gt_bboxes`` and what belongs to the boxes,
    ``gt_seg_map``. Added: ``scale``, ``scale_factor`` (width, height), ``keep_ratio``,
    ``homography_matrix``.

    Args:
        scales: lengths of the shorter side, pixels; one is drawn uniformly. One length makes it the
            fixed resize of validation.
        max_size: bound of the longer side, pixels; None for none. See
            :func:`~ddetr_mm.data.geometry.resize_size_hw`.
        backend: ``'pillow'``, the reference's antialiased pixels to one grey level; ``'fast'``, plain
            bilinear interpolation as in stock mmdet, which differs where the image shrinks.
    """

    def __init__(
        self, scales: int | Sequence[int], max_size: int | None = None, backend: str = "pillow"
    ) -> None:
        self.scales = [scales] if isinstance(scales, int) else list(scales)
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"scales must be one or several positive lengths, not {scales}")
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size must be positive or None, not {max_size}")
        _check_backend(backend)
        self.max_size = max_size
        self.backend = backend

    @cache_randomness
    def _draw_scale(self) -> int:
        if len(self.scales) == 1:  # nothing to draw: validation leaves the generator alone
            return self.scales[0]
        return self.scales[np.random.randint(len(self.scales))]

    def transform(self, results: Results) -> Results:
        """Resize; see the class."""
        height, width = results["img"].shape[:2]
        size_hw = resize_size_hw(height, width, self._draw_scale(), self.max_size)
        resize_results(results, size_hw, self.backend)
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(scales={self.scales}, max_size={self.max_size}, backend={self.backend!r})"
        )


@TRANSFORMS.register_module()
class TAORandomSizeCrop(BaseTransform):
    """Cut out a window of random size at a random place.

    Width and height are drawn independently and uniformly from ``min_size`` to ``max_size``, bounded by
    the image: a side shorter than ``min_size`` is kept whole. Boxes are clipped to the window, those
    without area removed; an image without boxes is a valid outcome.

    Required keys: ``img``. Modified: ``img``, ``img_shape``, ``gt_bboxes`` and what belongs to the boxes,
    ``gt_seg_map``. Added: ``homography_matrix``.

    Args:
        min_size: shortest side, pixels.
        max_size: longest side, pixels.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        if not 1 <= min_size <= max_size:
            raise ValueError(
                f"1 <= min_size <= max_size must hold, not min_size={min_size}, max_size={max_size}"
            )
        self.min_size = min_size
        self.max_size = max_size

    @cache_randomness
    def _draw_fractions(self) -> tuple[float, float, float, float]:
        width, height, left, top = np.random.random_sample(4).tolist()
        return width, height, left, top

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw a window (top, left, height, width) for an image of the given size."""
        at_width, at_height, at_left, at_top = self._draw_fractions()
        crop_h = _pick(at_height, min(self.min_size, height), min(self.max_size, height))
        crop_w = _pick(at_width, min(self.min_size, width), min(self.max_size, width))
        return _pick(at_top, 0, height - crop_h), _pick(at_left, 0, width - crop_w), crop_h, crop_w

    def transform(self, results: Results) -> Results:
        """Crop; see the class."""
        crop_results(results, self.window(*results["img"].shape[:2]))
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(min_size={self.min_size}, max_size={self.max_size})"


@TRANSFORMS.register_module()
class LargeScaleJitter(BaseTransform):
    """Resize by a large random factor, cut to a square, pad what is missing.

    The longer side becomes a random multiple of ``size``; where the image is larger than ``size`` a
    window at a random place is cut out; the rest of the square is padded at the bottom and right.
    Source: "Simple Copy-Paste", https://arxiv.org/abs/2012.07177.

    Required keys: ``img``. Modified: ``img``, ``img_shape``, ``gt_bboxes`` and what belongs to the boxes,
    ``gt_seg_map``. Added: ``scale``, ``scale_factor``, ``keep_ratio``, ``homography_matrix``, with padding
    ``pad_shape``.

    Args:
        size: side of the square, pixels.
        ratio_range: smallest and largest multiple of ``size``.
        pad: pad to the square. Off where the data preprocessor pads after normalisation, as
            ``FixedPadDetDataPreprocessor(pad_short_long=(size, size))`` does. ``img_shape`` stays the size
            without padding either way.
        pad_value: colour of the padding, in the image's channel order.
        backend: see :class:`TAORandomResize`.
    """

    def __init__(
        self,
        size: int,
        ratio_range: tuple[float, float] = (0.1, 2.0),
        pad: bool = True,
        pad_value: Sequence[float] = IMAGENET_MEAN_BGR,
        backend: str = "pillow",
    ) -> None:
        if size < 1 or not 0 < ratio_range[0] <= ratio_range[1]:
            raise ValueError(f"size must be positive and ratio_range ascending, not {size}, {ratio_range}")
        _check_backend(backend)
        self.size = size
        self.ratio_range = ratio_range
        self.pad = pad
        self.pad_value = tuple(pad_value)
        self.backend = backend

    @cache_randomness
    def _draw(self) -> tuple[float, float, float]:
        ratio = np.random.uniform(*self.ratio_range)
        top, left = np.random.random_sample(2).tolist()
        return ratio, top, left

    def transform(self, results: Results) -> Results:
        """Resize, crop, pad; see the class."""
        ratio, at_top, at_left = self._draw()
        height, width = results["img"].shape[:2]
        height, width = fit_size_hw(height, width, ratio * self.size)
        resize_results(results, (height, width), self.backend)
        crop_h, crop_w = min(height, self.size), min(width, self.size)
        if (crop_h, crop_w) != (height, width):
            top, left = _pick(at_top, 0, height - crop_h), _pick(at_left, 0, width - crop_w)
            crop_results(results, (top, left, crop_h, crop_w))
        if self.pad:
            pad_results(results, (self.size, self.size), self.pad_value)
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(size={self.size}, ratio_range={self.ratio_range}, pad={self.pad}, "
            f"pad_value={self.pad_value}, backend={self.backend!r})"
        )


@TRANSFORMS.register_module()
class FixedPad(BaseTransform):
    """Pad at the bottom and right to a fixed size, the long side along the image's own.

    ``img_shape`` stays the size without padding, so that mmdet's detection transformers mask the padding
    out; ``pad_shape`` is the padded size. An image that is larger already keeps that side.

    Required keys: ``img``. Modified: ``img``, ``gt_masks``, ``gt_seg_map``. Added: ``pad_shape``.

    Args:
        short_long: (short, long) side of the padded image, pixels: a portrait image becomes
            ``long`` high and ``short`` wide.
        size_divisor: pad further, or only, to a multiple of this.
        pad_value: colour of the padding, in the image's channel order. The default is about 0 after
            normalisation; exactly 0 is what ``FixedPadDetDataPreprocessor`` gives.
    """

    def __init__(
        self,
        short_long: tuple[int, int] | None = None,
        size_divisor: int | None = None,
        pad_value: Sequence[float] = IMAGENET_MEAN_BGR,
    ) -> None:
        if short_long is None and size_divisor is None:
            raise ValueError("give short_long, size_divisor or both")
        self.short_long = short_long
        self.size_divisor = size_divisor
        self.pad_value = tuple(pad_value)

    def transform(self, results: Results) -> Results:
        """Pad; see the class."""
        height, width = results["img"].shape[:2]
        if self.short_long is not None:
            height, width = fixed_pad_size_hw(height, width, self.short_long)
        if self.size_divisor is not None:
            height, width = divisible_size_hw(height, width, self.size_divisor)
        results.setdefault("img_shape", results["img"].shape[:2])
        pad_results(results, (height, width), self.pad_value)
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(short_long={self.short_long}, size_divisor={self.size_divisor}, "
            f"pad_value={self.pad_value})"
        )


def _pick(fraction: float, low: int, high: int) -> int:
    """The integer in [low, high] at a fraction in [0, 1): uniform when the fraction is."""
    return low + int(fraction * (high - low + 1))


def _check_backend(backend: str) -> None:
    if backend not in RESIZE_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(RESIZE_BACKENDS)}, not {backend!r}")
