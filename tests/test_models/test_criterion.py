from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detr_builders import head_config, instances
from mmdet.registry import MODELS

from ddetr_mm.models.criterion import box_divisor, set_losses
from ddetr_mm.models.matching import Matches, Objects


@pytest.mark.parametrize(("num_boxes", "divisor"), [(0, 1.0), (1, 1.0), (7, 7.0)])
def test_divisor_of_one_process(num_boxes: int, divisor: float) -> None:
    assert box_divisor(num_boxes, "cpu").tolist() == [divisor]


def _divisor_of_rank(rank: int, num_boxes: int, meeting: Path, results: multiprocessing.Queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    results.put(box_divisor(num_boxes, "cpu").item())
    dist.destroy_process_group()


@pytest.mark.parametrize(("counts", "divisor"), [((3, 8), 5.5), ((1, 0), 1.0)])
def test_divisor_is_averaged_over_processes(tmp_path: Path, counts, divisor: float) -> None:
    context = multiprocessing.get_context("fork")  # the children need not import mmdet again
    results = context.Queue()
    children = [
        context.Process(target=_divisor_of_rank, args=(rank, count, tmp_path / "meeting", results))
        for rank, count in enumerate(counts)
    ]
    for child in children:
        child.start()
    found = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert found == [divisor, divisor]


def test_each_layer_has_its_own_losses() -> None:
    """Two layers, of which the second matches exactly: its box losses are zero."""
    objects = Objects.from_instances(
        [instances([2], [[20, 10, 60, 30]]), instances([0], [[0, 0, 50, 50]])],
        [{"img_shape": (100, 100)}] * 2,
    )
    exact = objects.boxes_cxcywh[:, None]  # one query an image
    boxes = torch.stack([exact + 0.1, exact]).requires_grad_()
    logits = torch.zeros(2, 2, 1, 4, requires_grad=True)
    matches = Matches(
        layer=torch.tensor([0, 0, 1, 1]),
        image=torch.tensor([0, 1, 0, 1]),
        query=torch.tensor([0, 0, 0, 0]),
        target=torch.tensor([0, 1, 0, 1]),
    )
    config = head_config()
    modules = {name: MODELS.build(config[name]) for name in ("loss_cls", "loss_bbox", "loss_iou")}
    losses = set_losses(logits, boxes, objects, matches, **modules)
    torch.testing.assert_close(
        losses["loss_bbox"], torch.tensor([5.0 * 4 * 0.1, 0.0])
    )  # weight 5, 2 of 2 boxes
    assert losses["loss_iou"][0] > 0.5
    assert losses["loss_iou"][1].abs() < 1e-5
    losses["loss_cls"].sum().backward()
    wanted = torch.zeros(2, 4, dtype=torch.bool)
    wanted[0, 2] = wanted[1, 0] = True
    assert (logits.grad[:, :, 0][:, wanted] < 0).all(), "the object's class is pulled up"
    assert (logits.grad[:, :, 0][:, ~wanted] > 0).all(), "every other class is pushed down"
