"""Normalise, then pad every image to a fixed size, as TAO does.

Padding after normalisation is exactly 0, the mean colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.utils.misc import samplelist_boxtype2tensor
from mmdet.registry import MODELS
from torch import Tensor

from ddetr_mm.datasets.geometry import divisible_size_hw, fixed_pad_size_hw


@MODELS.register_module()
class FixedPadDetDataPreprocessor(DetDataPreprocessor):
    """mmdet's DetDataPreprocessor that pads every image to a fixed size first.

    The long side of the target lies along the image's long side. A batch of landscape and portrait images is
    padded to the larger of both on each side. ``img_shape`` stays the unpadded size, and boxes do not change:
    padding is at the right and the bottom.

    Args:
        pad_short_long: short and long side of the target, in pixels, e.g. ``(800, 1333)``; None pads to the
            batch's maximum only, as mmdet does. A larger image is not cropped; its batch becomes larger.
        train_padding: ``pad_short_long`` and ``pad_size_divisor`` of training, where it pads otherwise than
            validation and test; one that is missing is None or 1.
        **kwargs: mmdet's; ``pad_size_divisor`` applies to the target too.

    Raises:
        ValueError: the short side is longer than the long one, or not positive.
    """

    def __init__(
        self,
        *args,
        pad_short_long: Sequence[int] | None = None,
        train_padding: dict | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pad_short_long = _short_long(pad_short_long)
        if train_padding is not None:
            unknown = sorted(set(train_padding) - {"pad_short_long", "pad_size_divisor"})
            if unknown:
                raise ValueError(
                    f"train_padding takes pad_short_long and pad_size_divisor, not {', '.join(unknown)}"
                )
            train_padding = dict(
                pad_short_long=_short_long(train_padding.get("pad_short_long")),
                pad_size_divisor=train_padding.get("pad_size_divisor", 1),
            )
        self.train_padding = train_padding

    def forward(self, data: dict, training: bool = False) -> dict:
        """Normalise, pad and stack a batch.

        Args:
            data: ``inputs``, B tensors (3, h, w) or one (B, 3, h, w), 0..255; ``data_samples``, B
                samples or None.
            training: whether to pad by ``train_padding``, apply ``batch_augments`` and pad masks.

        Returns:
            ``inputs`` (B, 3, H, W) float32 and ``data_samples`` with ``batch_input_shape`` = (H, W)
            and ``pad_shape``, each image's own padded size.
        """
        data = self.cast_data(data)
        images, samples = data["inputs"], data.get("data_samples")
        pad_shapes = self._get_pad_shape({"inputs": images}, training)
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

    def _get_pad_shape(self, data: dict, training: bool = False) -> list[tuple[int, int]]:
        """Return each image's padded (height, width)."""
        short_long, divisor = self.pad_short_long, self.pad_size_divisor
        if training and self.train_padding is not None:
            short_long = self.train_padding["pad_short_long"]
            divisor = self.train_padding["pad_size_divisor"]
        sizes_hw = [tuple(image.shape[-2:]) for image in data["inputs"]]
        if short_long is not None:
            sizes_hw = [fixed_pad_size_hw(*size_hw, short_long) for size_hw in sizes_hw]
        return [divisible_size_hw(*size_hw, divisor) for size_hw in sizes_hw]

    def _normalise_and_stack(self, images: Sequence[Tensor] | Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Return (B, channels, H, W) float32: each image normalised at the top left, padding elsewhere."""
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


def _short_long(pad_short_long: Sequence[int] | None) -> tuple[int, int] | None:
    """The target as two integers.

    Raises:
        ValueError: the short side is longer than the long one, or not positive.
    """
    if pad_short_long is None:
        return None
    short, long = pad_short_long
    if not 0 < short <= long:
        raise ValueError(f"pad_short_long must be (short, long), both positive: {pad_short_long}")
    return int(short), int(long)
