from __future__ import annotations

import numpy as np
import pytest
import torch
from detr_builders import golden

from ddetr_mm.models.postprocess import top_detections


def test_meets_the_reference() -> None:
    expected = np.load(golden("criterion.npz"))
    logits, boxes = torch.from_numpy(expected["logits"][-1]), torch.from_numpy(expected["boxes"][-1])
    sizes = torch.tensor([[480, 640]] * len(logits))
    scores, labels, boxes_xyxy = top_detections(logits, boxes, sizes, max_per_image=100)
    for image in range(len(logits)):
        np.testing.assert_allclose(scores[image], expected[f"post/{image}/scores"], atol=1e-4)
        np.testing.assert_array_equal(labels[image], expected[f"post/{image}/labels"])
        np.testing.assert_allclose(boxes_xyxy[image], expected[f"post/{image}/boxes"], atol=1e-3, rtol=1e-5)


def test_background_takes_no_place_and_is_no_label() -> None:
    logits = torch.tensor([[[9.0, 1.0, 0.0], [8.0, -1.0, 2.0]]])  # the background would win twice
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.25, 0.5, 0.1, 0.4]]])
    sizes = torch.tensor([[100, 200]])
    scores, labels, boxes_xyxy = top_detections(logits, boxes, sizes, 3, background_column=True)
    assert labels.tolist() == [[2, 1, 2]]
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.0, 0.0]]).sigmoid())
    torch.testing.assert_close(
        boxes_xyxy, torch.tensor([[[40.0, 30, 60, 70], [80, 40, 120, 60], [80, 40, 120, 60]]])
    )
    _scores, labels, _boxes = top_detections(logits, boxes, sizes, 2)
    assert labels.tolist() == [[0, 0]]


@pytest.mark.parametrize(("background", "kept"), [(False, 6), (True, 4)])
def test_never_more_than_queries_times_classes(background: bool, kept: int) -> None:
    logits, boxes = torch.randn(1, 2, 3), torch.rand(1, 2, 4)
    scores, labels, boxes_xyxy = top_detections(logits, boxes, torch.ones(1, 2), 300, background)
    assert scores.shape == labels.shape == (1, kept)
    assert boxes_xyxy.shape == (1, kept, 4)
