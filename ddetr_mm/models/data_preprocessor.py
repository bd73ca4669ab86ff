"""Normalise, then pad every image to a fixed size, as the reference does.

The reference pads after normalisation, so padding is exactly 0, the mean colour; and the target
lies or stands as the image does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.utils.misc import samplelist_boxtype2tensor
from mmdet.registry import MODELS
from torch import Tensor


def fixed_padded_size_hw(
    size_hw: tuple[int, int], short_long: tuple[int, int] | None, divisor: int = 1
) -> tuple[int, int]:
    """The size an image is padded to.

    Args:
        size_hw: height and width of the image, in pixels.
        short_long: the target's short and long side, the long one along the image's long side (a
            square image is treated as lying); None = the image's own size.
        divisor: both sides are rounded up to a multiple of it.

    Returns:
        Height and width, never below the image's: an image beyond the target is not cropped.
    """
    height, width = size_hw
    if short_long is not None:
        short, long = short_long
        target_height, target_width = (long, short) if height > width else (short, long)
        height, width = max(height, target_height), max(width, target_width)
    return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


@MODELS.register_module()
class FixedPadDetDataPreprocessor(DetDataPreprocessor):
    """mmdet's DetDataPreprocessor that pads every image to a fixed size first.

    A batch of lying and standing images is padded to the larger of both on each side. ``img_shape``
    stays the unpadded size, and boxes stay as they are: padding lies at the right and the bottom.

    Args:
        pad_short_long: short and long side of the target, in pixels, e.g. ``(800, 1333)``; None
            pads to the batch's maximum only, as mmdet does. A larger image is never cropped; its
            batch grows.
        **kwargs: mmdet's; ``pad_size_divisor`` applies to the target too.

    Raises:
        ValueError: if the short side is longer than the long one, or not positive.
    """

    def __init__(self, *args, pad_short_long: Sequence[int] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if pad_short_long is not None:
            short, long = pad_short_long
            if not 0 < short <= long:
                raise ValueError(f"pad_short_long must be (short, long), both positive: {pad_short_long}")
            pad_short_long = (int(short), int(long))
        self.pad_short_long = pad_short_long

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise, pad and stack a batch.

        Args:
            data: ``inputs``, B tensors (3, h, w) or one (B, 3, h, w), 0..255; ``data_samples``, B
                samples or None.
            training: whether ``batch_augments`` and the padding of masks apply.

        Returns:
            ``inputs`` (B, 3, H, W) float32 and ``data_samples`` with ``batch_input_shape`` = (H, W)
            and ``pad_shape``, each image's own padded size.
        """
        data = self.cast_data(data)
        images, samples = data["inputs"], data.get("data_samples")
        pad_shapes = self._get_pad_shape({"inputs": images})
        batch_shape = tuple(max(sides) for sides in zip(*pad_shapes, strict=True))
        inputs = self._normalise_and_stack(images, batch_shape)
        if samples is not None:
            for sample, pad_shape in zip(samples, pad_shapes, strict=True):
                sample.set_metainfo({"batch_input_shape": batch_shape, "pad_shape": pad_shape})
            if self.boxtype2tensor:
                samplelist_boxtype2tensor(samples)
            if self.pad_mask and training:
                self.pad_gt_masks(samples)
            if self.pad_seg and training:
                self.pad_gt_sem_seg(samples)
        if training and self.batch_augments is not None:
            for augment in self.batch_augments:
                inputs, samples = augment(inputs, samples)
        return {"inputs": inputs, "data_samples": samples}

    def _get_pad_shape(self, data: dict) -> list[tuple[int, int]]:
        """Each image's padded (height, width)."""
        return [
            fixed_padded_size_hw(tuple(image.shape[-2:]), self.pad_short_long, self.pad_size_divisor)
            for image in data["inputs"]
        ]

    def _normalise_and_stack(self, images: Sequence[Tensor] | Tensor, size_hw: tuple[int, int]) -> Tensor:
        """(B, channels, H, W) float32: each image normalised at the top left, padding elsewhere."""
        batch = torch.full(
            (len(images), images[0].shape[0], *size_hw), float(self.pad_value), device=images[0].device
        )
        for row, image in zip(batch, images, strict=True):
            if self._channel_conversion:
                image = image[[2, 1, 0]]
            image = image.float()
            if self._enable_normalize:
                image = (image - self.mean) / self.std
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch
