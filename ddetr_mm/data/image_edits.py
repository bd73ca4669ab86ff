"""Resize, crop and pad a pipeline's ``results`` dict: the image, and everything that lies in it.

The keys are mmdet's: ``img`` (H, W, C), ``gt_bboxes`` (boxes or an (N, 4) xyxy array), and per box
``gt_bboxes_labels``, ``gt_ignore_flags``, ``gt_masks``; ``gt_seg_map``. Keys that are not there are
skipped.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from mmdet.structures.bbox import HorizontalBoxes

from ddetr_mm.data.geometry import crop_boxes, scale_boxes
from ddetr_mm.data.resize import RESIZE_BACKENDS

Results = dict[str, Any]
_PER_BOX_KEYS = ("gt_bboxes_labels", "gt_ignore_flags", "gt_masks", "gt_instances_ids")


def resize_results(results: Results, size_hw: tuple[int, int], backend: str) -> None:
    """Resize the image to ``size_hw`` and everything in it along.

    Sets ``img``, ``img_shape``, ``scale`` (width, height), ``scale_factor`` (new width over old, new
    height over old, of this step), ``keep_ratio`` and ``homography_matrix``; boxes are clipped to the
    image and those without area removed.
    """
    height, width = results["img"].shape[:2]
    scale_wh = (size_hw[1] / width, size_hw[0] / height)
    results["img"] = RESIZE_BACKENDS[backend](results["img"], size_hw)
    results["img_shape"] = size_hw
    results["scale"] = size_hw[::-1]
    results["scale_factor"] = scale_wh
    results["keep_ratio"] = True
    if results.get("gt_masks") is not None:
        results["gt_masks"] = results["gt_masks"].resize(size_hw)
    if results.get("gt_seg_map") is not None:
        results["gt_seg_map"] = cv2.resize(
            results["gt_seg_map"], size_hw[::-1], interpolation=cv2.INTER_NEAREST
        )
    boxes_xyxy = get_boxes(results)
    if boxes_xyxy is not None:
        keep_boxes(results, *scale_boxes(boxes_xyxy, scale_wh, size_hw))
    _compose_homography(results, np.diag([*scale_wh, 1.0]))


def crop_results(results: Results, window: tuple[int, int, int, int]) -> None:
    """Cut the image to a window (top, left, height, width) inside it, and everything in it along.

    The new ``img`` is a view of the old one. Boxes are clipped to the window and those without area
    removed, with their labels and flags.
    """
    top, left, height, width = window
    results["img"] = results["img"][top : top + height, left : left + width]
    results["img_shape"] = (height, width)
    if results.get("gt_seg_map") is not None:
        results["gt_seg_map"] = results["gt_seg_map"][top : top + height, left : left + width]
    if results.get("gt_masks") is not None and len(results["gt_masks"]):
        corners = np.array([left, top, left + width, top + height])
        results["gt_masks"] = results["gt_masks"].crop(corners)
    elif results.get("gt_masks") is not None:
        results["gt_masks"] = results["gt_masks"].resize((height, width))
    boxes_xyxy = get_boxes(results)
    if boxes_xyxy is not None:
        keep_boxes(results, *crop_boxes(boxes_xyxy, window))
    _compose_homography(results, np.array([[1.0, 0, -left], [0, 1, -top], [0, 0, 1]]))


def pad_results(
    results: Results, size_hw: tuple[int, int], pad_value: tuple[float, ...], seg_value: int = 255
) -> None:
    """Pad the image at the bottom and the right to ``size_hw``, and masks along.

    Sets ``img`` and ``pad_shape``; ``img_shape`` stays, so that what is padding remains known.

    Args:
        results: the pipeline's dict.
        size_hw: padded (height, width), at least the image's.
        pad_value: one number a channel, in the image's own channel order.
        seg_value: label of the padding in ``gt_seg_map``.
    """
    image = results["img"]
    bottom, right = size_hw[0] - image.shape[0], size_hw[1] - image.shape[1]
    if bottom or right:
        border = (0, bottom, 0, right, cv2.BORDER_CONSTANT)
        results["img"] = cv2.copyMakeBorder(image, *border, value=pad_value)
        if results.get("gt_seg_map") is not None:
            results["gt_seg_map"] = cv2.copyMakeBorder(results["gt_seg_map"], *border, value=seg_value)
        if results.get("gt_masks") is not None:
            results["gt_masks"] = results["gt_masks"].pad(size_hw)
    results["pad_shape"] = size_hw


def get_boxes(results: Results) -> npt.NDArray[np.float32] | None:
    """The boxes as (N, 4) xyxy float32; None where the dict has none.

    Raises:
        TypeError: ``gt_bboxes`` is neither horizontal boxes nor an array.
    """
    boxes = results.get("gt_bboxes")
    if boxes is None:
        return None
    if isinstance(boxes, HorizontalBoxes):
        return boxes.tensor.numpy()
    if isinstance(boxes, np.ndarray):
        return boxes.astype(np.float32, copy=False).reshape(-1, 4)
    raise TypeError(f"gt_bboxes must be HorizontalBoxes or a numpy array, not {type(boxes).__name__}")


def keep_boxes(results: Results, boxes_xyxy: npt.NDArray[np.float32], keep: npt.NDArray[np.bool_]) -> None:
    """Put new boxes in place of the old ones and drop those that are not kept, in every per-box key."""
    if not keep.all():
        boxes_xyxy = boxes_xyxy[keep]
        for key in _PER_BOX_KEYS:
            if results.get(key) is not None:
                results[key] = results[key][keep]
    if isinstance(results["gt_bboxes"], HorizontalBoxes):
        results["gt_bboxes"] = HorizontalBoxes(torch.from_numpy(boxes_xyxy), clone=False)
    else:
        results["gt_bboxes"] = boxes_xyxy


def _compose_homography(results: Results, step: npt.NDArray[np.float64]) -> None:
    """Record the step as mmdet's transforms do: original pixels to current ones, 3 x 3."""
    before = results.get("homography_matrix")
    matrix = step.astype(np.float32)
    results["homography_matrix"] = matrix if before is None else matrix @ before
