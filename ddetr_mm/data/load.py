"""Loading image files, with scaled decoding of large JPEGs as a fast option."""

from __future__ import annotations

from typing import Any

import cv2
import mmcv
import numpy as np
import numpy.typing as npt
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine import fileio

_REDUCED_FLAGS = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_JPEG_START = b"\xff\xd8"


@TRANSFORMS.register_module()
class TAOLoadImageFromFile(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile`` that can decode large JPEGs at a half, a quarter or an eighth.

    The JPEG decoder then computes fewer pixels, which for 4K images takes a third of the time. The image
    is still larger than what the augmentation makes of it, but its pixels are not the reference's: an
    option for training only. EXIF orientation is applied either way.

    Without ``min_short_side`` it gives exactly what mmcv's gives. What OpenCV cannot decode (TIFF files
    that are turned by a quarter, for one) is tried with Pillow.

    With it, a reduced image leaves ``ori_shape`` at the full size, while ``img``, ``img_shape``, the
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
        reduction = self._reduction(results)
        if reduction > 1 and self._load_reduced(results, reduction):
            return results
        try:
            loaded: dict[str, Any] | None = super().transform(results)
        except (AssertionError, cv2.error):
            image = _decode_with_pillow(results["img_path"], self.backend_args)
            if image is None or self.color_type != "color":
                raise
            results["img"] = image.astype(np.float32) if self.to_float32 else image
            results["img_shape"] = results["ori_shape"] = image.shape[:2]
            return results
        return loaded

    def _reduction(self, results: dict[str, Any]) -> int:
        """The largest of 1, 2, 4, 8 that leaves the shorter side long enough."""
        short = min(results.get("height") or 0, results.get("width") or 0)
        if self.min_short_side is None:
            return 1
        return max((factor for factor in (8, 4, 2) if short // factor >= self.min_short_side), default=1)

    def _load_reduced(self, results: dict[str, Any], reduction: int) -> bool:
        """Decode a JPEG reduced; False where it is none, or not of the recorded size."""
        try:
            content = fileio.get(results["img_path"], backend_args=self.backend_args)
        except OSError:
            return False  # the full way reports it as mmcv does
        if not content.startswith(_JPEG_START):
            return False
        image = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED_FLAGS[reduction])
        full_hw = (results["height"], results["width"])
        if image is None or image.shape[:2] != tuple(-(-side // reduction) for side in full_hw):
            return False
        height, width = image.shape[:2]
        scale_wh = (width / full_hw[1], height / full_hw[0])
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = (height, width)
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


def _decode_with_pillow(path: str, backend_args: dict[str, Any] | None) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) BGR, EXIF orientation applied; None where Pillow cannot decode it either."""
    try:
        content = fileio.get(path, backend_args=backend_args)
        image: npt.NDArray[np.uint8] = mmcv.imfrombytes(content, flag="color", backend="pillow")
    except (OSError, ValueError, SyntaxError):  # the kinds that Pillow's plugins raise on damaged files
        return None
    return image
