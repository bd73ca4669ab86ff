"""Matching and losses, against mmdet and on several ranks."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detr_builders import assigner_config, head_config, instances
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData

from ddetr_mm.errors import DataError
from ddetr_mm.models.losses import (
    Matches,
    MatchingCost,
    NonFiniteCostError,
    Objects,
    assign_all_layers,
    box_divisor,
    matching_costs,
    set_losses,
)

SIZES_HW = [(48, 64), (100, 33), (20, 20)]
COST = MatchingCost(2.0, 5.0, 2.0, eps=1e-12)


def metas(count: int) -> list[dict]:
    return [{"img_shape": SIZES_HW[image], "img_path": f"{image}.jpg"} for image in range(count)]


def random_truth(rng: np.random.Generator, count: int, image: int, num_classes: int) -> InstanceData:
    height, width = SIZES_HW[image]
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * [width, height]
    return instances(rng.integers(0, num_classes, count), corners.reshape(count, 4))


def scene(seed: int, counts: list[int], num_queries: int, num_classes: int = 5, layers: int = 2):
    rng = np.random.default_rng(seed)
    truth = [random_truth(rng, count, image, num_classes) for image, count in enumerate(counts)]
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, len(counts), num_queries)
    logits = torch.randn(*shape, num_classes, generator=generator)
    boxes = torch.rand(*shape, 4, generator=generator)
    return logits, boxes, truth


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    num_queries=st.integers(1, 9),
)
def test_matches_are_those_of_mmdet(seed: int, counts: list[int], num_queries: int) -> None:
    """Every layer and image, also with more objects than queries and images without objects."""
    logits, boxes, truth = scene(seed, counts, num_queries)
    objects = Objects.from_instances(truth, metas(len(counts)))
    costs = matching_costs(logits, boxes, objects, COST)
    matches = assign_all_layers(costs, objects, num_classes=5)
    assigner = TASK_UTILS.build(assigner_config())
    starts = np.cumsum([0, *counts])
    for layer in range(len(logits)):
        for image in range(len(counts)):
            height, width = SIZES_HW[image]
            predicted = InstanceData(
                scores=logits[layer, image],
                bboxes=bbox_cxcywh_to_xyxy(boxes[layer, image])
                * torch.tensor([width, height, width, height]),
            )
            theirs = assigner.assign(predicted, truth[image], {"img_shape": (height, width)}).gt_inds
            mine = torch.zeros(num_queries, dtype=torch.int64)
            here = (matches.layer == layer) & (matches.image == image)
            mine[matches.query[here]] = matches.target[here] - int(starts[image]) + 1
            assert torch.equal(mine, theirs.clamp(min=0))
    assert len(matches.layer) == len(logits) * sum(min(count, num_queries) for count in counts)
    assert (matches.layer.diff() >= 0).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    num_queries=st.integers(1, 9),
)
def test_the_packages_matches_are_those_of_scipy(seed: int, counts: list[int], num_queries: int) -> None:
    """Also with different numbers of objects, more objects than queries, and images without objects.

    Random costs have no ties, so the cheapest pairs are unique.
    """
    pytest.importorskip("torch_linear_assignment")
    generator = torch.Generator().manual_seed(seed)
    image_index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    objects = replace(
        Objects.from_instances([random_truth(np.random.default_rng(0), 1, 0, 5)], metas(1)),
        counts=tuple(counts),
        image_index=image_index,
    )
    costs = torch.randn(3, sum(counts), num_queries, generator=generator)
    theirs = assign_all_layers(costs, objects, 5)
    mine = assign_all_layers(costs, objects, 5, matcher="torch-linear-assignment")
    for name in ("layer", "image", "query", "target"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_costs_are_those_of_mmdet() -> None:
    logits, boxes, truth = scene(1, [3], num_queries=4, layers=1)
    objects = Objects.from_instances(truth, metas(1))
    costs = matching_costs(logits, boxes, objects, COST)
    height, width = SIZES_HW[0]
    predicted = InstanceData(
        scores=logits[0, 0],
        bboxes=bbox_cxcywh_to_xyxy(boxes[0, 0]) * torch.tensor([width, height, width, height]),
    )
    parts = [
        cost(predicted, truth[0], {"img_shape": (height, width)})
        for cost in TASK_UTILS.build(assigner_config()).match_costs
    ]
    torch.testing.assert_close(costs[0].T, sum(parts), rtol=1e-4, atol=1e-5)


def test_objects_are_relative_to_their_image() -> None:
    truth = [
        instances([4], [[16, 12, 32, 36]]),
        instances([], []),
        instances([1, 0], [[0, 0, 20, 20], [5, 5, 15, 10]]),
    ]
    objects = Objects.from_instances(truth, metas(3))
    assert objects.counts == (1, 0, 2)
    assert objects.image_index.tolist() == [0, 2, 2]
    assert objects.labels.tolist() == [4, 1, 0]
    assert objects.sizes_whwh.tolist() == [[64, 48, 64, 48], [33, 100, 33, 100], [20, 20, 20, 20]]
    torch.testing.assert_close(
        objects.boxes_cxcywh,
        torch.tensor([[0.375, 0.5, 0.25, 0.5], [0.5, 0.5, 1, 1], [0.5, 0.375, 0.5, 0.25]]),
    )
    unnamed = Objects.from_instances(truth[:1], [{"img_shape": (48, 64)}])
    assert unnamed.image_names == ("image 0 of the batch",)


def test_half_precision_predictions_are_matched_in_float32() -> None:
    logits, boxes, truth = scene(2, [4, 2], num_queries=8)
    objects = Objects.from_instances(truth, metas(2))
    half = matching_costs(logits.half(), boxes.half(), objects, COST)
    assert half.dtype == torch.float32
    expected = matching_costs(logits.half().float(), boxes.half().float(), objects, COST)
    torch.testing.assert_close(half, expected, rtol=0, atol=0)


MATCHERS = ["scipy", "torch-linear-assignment"]


def skip_without(matcher: str) -> None:
    if matcher != "scipy":
        pytest.importorskip(matcher.replace("-", "_"))


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_predictions_name_images_and_layers(bad: float, matcher: str) -> None:
    skip_without(matcher)
    logits, boxes, truth = scene(3, [2, 1, 2], num_queries=5, layers=3)
    boxes[1, 2, 0, 0] = bad
    objects = Objects.from_instances(truth, metas(3))
    costs = matching_costs(logits, boxes, objects, COST)
    with pytest.raises(
        NonFiniteCostError, match=r"NaN or infinite for 2\.jpg \(decoder layers \[1\]\)"
    ) as error:
        assign_all_layers(costs, objects, 5, matcher)
    assert error.value.images == ["2.jpg"]
    assert error.value.layers == [1]


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("label", [5, -1])
def test_labels_beyond_the_columns_name_the_image(label: int, matcher: str) -> None:
    skip_without(matcher)
    logits, boxes, truth = scene(4, [2, 1], num_queries=5)
    truth[1].labels[0] = label
    objects = Objects.from_instances(truth, metas(2))
    costs = matching_costs(logits, boxes, objects, COST)
    with pytest.raises(DataError, match=f"1.jpg.*no class column.*got {label}.*0 to 4"):
        assign_all_layers(costs, objects, 5, matcher)


def test_settings_come_from_the_assigner() -> None:
    config = assigner_config()
    config["match_costs"][0].update(alpha=0.4, gamma=1.5, eps=1e-8)
    assert MatchingCost.from_assigner(TASK_UTILS.build(config)) == MatchingCost(2.0, 5.0, 2.0, 0.4, 1.5, 1e-8)
    config["match_costs"] = config["match_costs"][1:2]
    assert MatchingCost.from_assigner(TASK_UTILS.build(config)) == MatchingCost(0.0, 5.0, 0.0)


@pytest.mark.parametrize(
    "cost",
    [
        {"type": "ClassificationCost"},
        {"type": "BBoxL1Cost", "box_format": "xyxy"},
        {"type": "IoUCost", "iou_mode": "iou"},
        {"type": "FocalLossCost", "binary_input": True},
        {"type": "FocalLossCost"},  # a second one
    ],
)
def test_other_assigners_are_refused(cost: dict) -> None:
    config = assigner_config()
    config["match_costs"].append(cost)
    with pytest.raises(ValueError, match="at most one each of FocalLossCost"):
        MatchingCost.from_assigner(TASK_UTILS.build(config))
    with pytest.raises(ValueError, match="not with MaxIoUAssigner"):
        MatchingCost.from_assigner(
            TASK_UTILS.build({"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.5})
        )


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
