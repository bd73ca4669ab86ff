"""Importing ddetr_mm before mmdet: it answers for mmcv's compiled ops where there are none."""

import ddetr_mm  # noqa: F401
