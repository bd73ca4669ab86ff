"""Copy a batch to the device, normalise, then pad every image to a fixed size, as TAO does.

Padding after normalisation is exactly 0, the mean colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.utils.misc import samplelist_boxtype2tensor
from mmdet.registry import MODELS
from mmdet.structures.bbox import BaseBoxes
from mmengine.structures import BaseDataElement
from torch import Tensor

from ddetr_mm.datasets.geometry import divisible_size_hw, fixed_pad_size_hw

# --- Copies to a device ---

_ALIGNMENT = 16
"""Bytes; a tensor's place in a buffer is a multiple of it, as every dtype needs it."""


def copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of the host to a device in one transfer, which the host does not wait for.

    Each transfer of its own would make the host wait, or cost a launch: a batch has dozens of small ones.

    Args:
        tensors: of any dtypes and shapes; those that are on a device already stay there.
        device: where to.

    Returns:
        The copies in the order of the tensors: parts of one buffer, contiguous.
    """
    places, size = [], 0
    for tensor in tensors:
        places.append(size)
        if tensor.device.type == "cpu":
            size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    # Page-locked memory is what makes the transfer asynchronous; its allocator keeps it until then.
    host = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for tensor, place in zip(tensors, places, strict=True):
        if tensor.device.type == "cpu":
            _part(host, tensor, place).copy_(tensor)
    moved = host.to(device, non_blocking=True)
    return [
        _part(moved, tensor, place) if tensor.device.type == "cpu" else tensor.to(device)
        for tensor, place in zip(tensors, places, strict=True)
    ]


def _part(buffer: Tensor, tensor: Tensor, place: int) -> Tensor:
    """The part of a buffer of bytes that begins at ``place``, as a tensor like the given one."""
    size = tensor.numel() * tensor.element_size()
    return buffer[place : place + size].view(tensor.dtype).view(tensor.shape)


def tensors_of(data: Any) -> Iterator[Tensor]:
    """All tensors in a batch's samples, boxes included, in a fixed order; masks of mmdet are not tensors."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, BaseBoxes):
        yield data.tensor
    elif isinstance(data, BaseDataElement):
        for _, value in data.items():
            yield from tensors_of(value)
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from tensors_of(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from tensors_of(value)


def _with_tensors(data: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, which are taken in the order of :func:`tensors_of`."""
    if isinstance(data, Tensor):
        return next(tensors)
    if isinstance(data, BaseBoxes):
        return type(data)(next(tensors), clone=False)
    if isinstance(data, BaseDataElement):
        made = data.new()
        for name, value in data.items():
            made.set_data({name: _with_tensors(value, tensors)})
        return made
    if isinstance(data, Mapping):
        return type(data)({name: _with_tensors(value, tensors) for name, value in data.items()})
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_with_tensors(value, tensors) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(_with_tensors(value, tensors) for value in data)
    return data


# --- The preprocessor ---


@MODELS.register_module()
class FixedPadDetDataPreprocessor(DetDataPreprocessor):
    """mmdet's DetDataPreprocessor that pads every image to a fixed size first, with two copies a batch.

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
        self._copied: tuple[dict, dict] | None = None

    def copy_to_device(self, data: dict) -> dict:
        """Copy a batch to the device: one transfer for the images, one for everything else.

        Args:
            data: as :meth:`forward` gets it; it is not changed.

        Returns:
            The same with all tensors on the device.
        """
        if self.device.type == "cpu":
            return self.cast_data(data)
        images = {"inputs": data["inputs"]}
        others = {name: value for name, value in data.items() if name != "inputs"}
        copied = {}
        for part in (images, others):
            copied |= _with_tensors(part, iter(copy_together(list(tensors_of(part)), self.device)))
        return {name: copied[name] for name in data}

    def take_copied(self, data: dict, copied: dict) -> None:
        """Use a copy that was made before when :meth:`forward` gets this batch next.

        Args:
            data: the batch.
            copied: what :meth:`copy_to_device` gave for it.
        """
        self._copied = (data, copied)

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
        before, self._copied = self._copied, None
        data = before[1] if before is not None and before[0] is data else self.copy_to_device(data)
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
                image = image.flip(0)  # no list of indices, which would be copied to the device
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
