"""Import ddetr_mm before mmdet, so that mmcv-lite's missing ops are replaced."""

import ddetr_mm  # noqa: F401
