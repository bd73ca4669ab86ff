"""Loading image files: JPEGs by the faster of two decoders, large ones at a fraction as an option."""

from __future__ import annotations

from typing import Any

import cv2
import mmcv
import numpy as np
import numpy.typing as npt
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine import fileio
from PIL import Image

from ddetr_mm.data.jpeg import decode_jpeg_bgr, decode_jpeg_reduced_bgr


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
