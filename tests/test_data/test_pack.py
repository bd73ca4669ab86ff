"""Packing equals mmdet's."""

import numpy as np
import pytest
import torch
from data_builders import random_image
from dataset_builders import config  # noqa: F401  (imports mmdet the right way round)
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes

import ddetr_mm.data.pack  # noqa: F401  (registers)


def pack(name, image, **options):
    results = {
        "img": image,
        "img_path": "x.jpg",
        "img_id": 3,
        "ori_shape": (48, 64),
        "img_shape": image.shape[:2],
        "gt_bboxes": HorizontalBoxes([[1, 2, 3, 4], [5, 6, 7, 8]]),
        "gt_bboxes_labels": np.array([4, 5]),
        "gt_ignore_flags": np.array([False, True]),
    }
    return TRANSFORMS.build({"type": name, **options})(results)


IMAGES = {
    "plain": lambda: random_image(0),
    "flipped view": lambda: random_image(0)[:, ::-1],
    "upside down": lambda: random_image(0)[::-1],
    "window": lambda: random_image(0)[5:30, 7:50],
    "grey": lambda: random_image(0)[:, :, 0],
    "one channel": lambda: random_image(0)[:, :, :1],
    "floats": lambda: random_image(0).astype(np.float32),
    "four channels": lambda: np.concatenate([random_image(0), random_image(1)[:, :, :1]], axis=2),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_same_result_as_mmdet(kind):
    options = {"meta_keys": ("img_id", "ori_shape")}
    ours = pack("TAOPackDetInputs", IMAGES[kind](), **options)
    theirs = pack("PackDetInputs", np.ascontiguousarray(IMAGES[kind]()), **options)
    assert torch.equal(ours["inputs"], theirs["inputs"])
    assert ours["inputs"].dtype == theirs["inputs"].dtype
    assert ours["inputs"].is_contiguous()
    one, other = ours["data_samples"], theirs["data_samples"]
    assert one.metainfo == other.metainfo == {"img_id": 3, "ori_shape": (48, 64)}
    assert torch.equal(one.gt_instances.bboxes.tensor, other.gt_instances.bboxes.tensor)
    assert torch.equal(one.ignored_instances.labels, other.ignored_instances.labels)


def test_the_packed_pixels_are_a_copy():
    image = random_image(0)
    packed = pack("TAOPackDetInputs", image)["inputs"]
    before = packed.clone()
    image[:] = 0
    assert torch.equal(packed, before)
