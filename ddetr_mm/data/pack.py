"""Packing of samples for the model, with a fast way to channel-first pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmdet.datasets.transforms import PackDetInputs
from mmdet.registry import TRANSFORMS

from ddetr_mm.data.resize import split_planes


@TRANSFORMS.register_module()
class TAOPackDetInputs(PackDetInputs):
    """mmdet's ``PackDetInputs``, which turns (H, W, 3) pixels into (3, H, W) about five times faster.

    Same arguments, same result; anything but 8-bit images of three channels goes mmdet's way.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Pack; see mmdet's class."""
        image = results.get("img")
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
            # seen as (H, W, 3) again, so that mmdet's own transposition finds nothing left to copy
            results["img"] = np.ascontiguousarray(split_planes(image)).transpose(1, 2, 0)
        return super().transform(results)
