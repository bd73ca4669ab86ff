"""Losses, detections and refused settings of the head."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from detr_builders import assigner_config, golden, head_config, instances
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample

from ddetr_mm.errors import InputError, StackError
from ddetr_mm.models import TAODeformableDETRHead
from ddetr_mm.models.head import detection_size_hw, top_detections

SIZE_HW = (480, 640)
NAMES = {"loss_ce": "loss_cls", "loss_bbox": "loss_bbox", "loss_giou": "loss_iou"}


def build(num_classes: int = 9, test_cfg: dict | None = None, **kwargs) -> TAODeformableDETRHead:
    config = {**head_config(num_classes=num_classes), "train_cfg": {"assigner": assigner_config()}}
    return MODELS.build({**config, "test_cfg": test_cfg, **kwargs})


def reference() -> tuple[dict, torch.Tensor, torch.Tensor, list, list[dict]]:
    """The golden criterion's predictions (with gradients), objects and image sizes."""
    expected = np.load(golden("criterion.npz"))
    logits = torch.from_numpy(expected["logits"]).requires_grad_()
    boxes = torch.from_numpy(expected["boxes"]).requires_grad_()
    width_height = torch.tensor([SIZE_HW[1], SIZE_HW[0]])
    truth = []
    for image in range(logits.shape[1]):
        gt = torch.from_numpy(expected[f"gt_boxes/{image}"]).reshape(-1, 4)
        corners = torch.cat([gt[:, :2] - gt[:, 2:] / 2, gt[:, :2] + gt[:, 2:] / 2], 1)
        truth.append(instances(expected[f"labels/{image}"], (corners * width_height.repeat(2)).tolist()))
    metas = [{"img_shape": SIZE_HW, "scale_factor": (1.0, 1.0)} for _ in truth]
    return expected, logits, boxes, truth, metas


@pytest.mark.parametrize("matcher", ["scipy", "torch-linear-assignment"])
def test_losses_and_gradients_meet_tao(matcher: str) -> None:
    if matcher != "scipy":
        pytest.importorskip("torch_linear_assignment")
    expected, logits, boxes, truth, metas = reference()
    assert [len(gt.labels) for gt in truth] == [4, 0, 7], "an image without objects is among them"
    head = build(matcher=matcher)
    weights = {"loss_cls": 2.0, "loss_bbox": 5.0, "loss_iou": 2.0}
    assert list(weights.values()) == expected["coefs"].tolist()
    losses = head.loss_by_feat(logits, boxes, None, None, truth, metas)
    for theirs, ours in NAMES.items():
        for key, suffix in (("", ""), ("d0.", "_0"), ("d1.", "_1")):
            found = losses[f"{key}{ours}"].item() / weights[ours]
            assert found == pytest.approx(float(expected[f"loss/{theirs}{suffix}"]), abs=1e-4, rel=1e-6)
    total = sum(losses.values())
    assert total.item() == pytest.approx(float(expected["total"]), abs=1e-4)
    total.backward()
    np.testing.assert_allclose(logits.grad, expected["grad_logits"], atol=1e-4)
    np.testing.assert_allclose(boxes.grad, expected["grad_boxes"], atol=1e-4)


def samples_at_half_size(truth: list, metas: list[dict]) -> list[DetDataSample]:
    """Samples of validation: the images were resized to half, the ground truth is in original pixels."""
    found = []
    for gt, meta in zip(truth, metas, strict=True):
        height, width = meta["img_shape"]
        sample = DetDataSample(metainfo={"img_shape": (height // 2, width // 2), "scale_factor": (0.5, 0.5)})
        sample.gt_instances = gt
        found.append(sample)
    return found


def test_losses_of_validation_are_those_of_training(monkeypatch) -> None:
    _, logits, boxes, truth, metas = reference()
    head = build()
    hidden = torch.zeros(len(logits), len(truth), logits.shape[2], 32)
    monkeypatch.setattr(head, "forward", lambda *_: (logits, boxes))
    monkeypatch.setattr(head, "forward_layer", lambda layer, *_: (logits[layer], boxes[layer]))
    samples = samples_at_half_size(truth, metas)
    plain = head.predict(hidden, [None] * len(hidden), samples)
    assert head.validation_losses is None
    # No rank may wait for another: they have unequal numbers of batches.
    monkeypatch.setattr("ddetr_mm.models.losses.reduce_mean", None)
    head.validates = True
    found = head.predict(hidden, [None] * len(hidden), samples)
    monkeypatch.undo()
    halves = [{"img_shape": (SIZE_HW[0] // 2, SIZE_HW[1] // 2)} for _ in truth]
    in_halves = [instances(gt.labels, (gt.bboxes / 2).tolist()) for gt in truth]
    expected = head.loss_by_feat(logits, boxes, None, None, in_halves, halves)
    assert head.validation_losses.keys() == expected.keys() and len(expected) == 9
    for name, value in expected.items():
        assert head.validation_losses[name].item() == pytest.approx(value.item(), rel=1e-6)
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one.bboxes, other.bboxes) and torch.equal(one.scores, other.scores)


def test_predictions_that_are_not_finite_do_not_end_a_validation(monkeypatch) -> None:
    _, logits, boxes, truth, metas = reference()
    monkeypatch.setattr("ddetr_mm.models.losses.reduce_mean", None)
    losses = build().loss_by_feat(logits * float("nan"), boxes, None, None, truth, metas, in_training=False)
    assert len(losses) == 9 and all(value.isnan() for value in losses.values())


def test_a_batch_of_fillers_has_no_weight() -> None:
    _, logits, boxes, truth, metas = reference()
    truth = [gt[:0] for gt in truth]
    head = build()
    marked = [{**meta, "is_filler": True} for meta in metas]
    assert sum(head.loss_by_feat(logits, boxes, None, None, truth, metas).values()) > 0
    total = sum(head.loss_by_feat(logits, boxes, None, None, truth, marked).values())
    assert total == 0
    total.backward()
    assert not logits.grad.any() and not boxes.grad.any()


def test_detections_meet_tao() -> None:
    expected, logits, boxes, _truth, metas = reference()
    results = build(test_cfg={"max_per_img": 100}).predict_by_feat(logits, boxes, metas, rescale=True)
    for image, found in enumerate(results):
        np.testing.assert_allclose(found.scores.detach(), expected[f"post/{image}/scores"], atol=1e-4)
        np.testing.assert_array_equal(found.labels, expected[f"post/{image}/labels"])
        np.testing.assert_allclose(
            found.bboxes.detach(), expected[f"post/{image}/boxes"], atol=1e-3, rtol=1e-5
        )
        assert 0 in found.labels


def test_background_is_never_a_label() -> None:
    _expected, logits, boxes, _truth, metas = reference()
    for found in build(background_column=True).predict_by_feat(logits, boxes, metas):
        assert len(found.labels) == 100
        assert found.labels.min() == 1
        assert (found.scores.diff() <= 0).all()


def test_without_auxiliary_losses_only_the_last_layer_counts() -> None:
    _expected, logits, boxes, truth, metas = reference()
    everything = build().loss_by_feat(logits, boxes, None, None, truth, metas)
    last = build(aux_loss=False).loss_by_feat(logits, boxes, None, None, truth, metas)
    assert set(last) == {"loss_cls", "loss_bbox", "loss_iou"}
    for name, value in last.items():
        torch.testing.assert_close(value, everything[name])
    sum(last.values()).backward()
    assert logits.grad[:-1].abs().max() == 0
    assert logits.grad[-1].abs().max() > 0


def test_half_precision_predictions_are_judged_in_float32() -> None:
    _expected, logits, boxes, truth, metas = reference()
    half = build().loss_by_feat(logits.bfloat16(), boxes.bfloat16(), None, None, truth, metas)
    rounded = build().loss_by_feat(
        logits.bfloat16().float(), boxes.bfloat16().float(), None, None, truth, metas
    )
    for name, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, rounded[name])


def test_more_objects_than_queries() -> None:
    """Divided by all labelled boxes, matched or not."""
    truth = [instances([1] * 6, [[10 * i, 10, 10 * i + 30, 60] for i in range(6)])]
    metas = [{"img_shape": (100, 100)}]
    logits = torch.zeros(1, 1, 2, 9, requires_grad=True)
    boxes = torch.full((1, 1, 2, 4), 0.3, requires_grad=True)
    losses = build().loss_by_feat(logits, boxes, None, None, truth, metas)
    # Focal loss of a logit of 0: ln 2 / 4, times alpha or 1 - alpha.
    focal = np.log(2) / 4 * (2 * 0.25 + 16 * 0.75)
    assert losses["loss_cls"].item() == pytest.approx(2.0 * focal / 6, rel=1e-5)
    sum(losses.values()).backward()
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("clip", [False, True])
def test_boxes_are_clipped_only_when_asked(clip: bool) -> None:
    head = build(test_cfg={"max_per_img": 1, "clip_boxes": clip})
    logits, boxes = torch.zeros(1, 1, 1, 9), torch.tensor([[[[0.9, 0.1, 0.4, 0.4]]]])
    metas = [{"img_shape": (100, 200), "scale_factor": (0.5, 0.25)}]
    (found,) = head.predict_by_feat(logits, boxes, metas, rescale=True)
    expected = [280.0, 0.0, 400.0, 120.0] if clip else [280.0, -40.0, 440.0, 120.0]
    torch.testing.assert_close(found.bboxes, torch.tensor([expected]))
    (found,) = head.predict_by_feat(logits, boxes, metas, rescale=False)
    torch.testing.assert_close(found.bboxes, torch.tensor([expected]) * torch.tensor([0.5, 0.25, 0.5, 0.25]))


def test_prediction_uses_the_last_layer() -> None:
    torch.manual_seed(0)
    head = build(num_classes=3, num_pred_layer=2, test_cfg={"max_per_img": 4})
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(2, 1, 5, 32)
    references = [torch.rand(1, 5, 2), torch.rand(1, 5, 4), torch.rand(1, 5, 4)]
    metas = [{"img_shape": (10, 10)}]
    (expected,) = head.predict_by_feat(*head(states, references), metas)

    class Sample:
        metainfo = metas[0]

    (found,) = head.predict(states, references, [Sample()], rescale=False)
    torch.testing.assert_close(found.bboxes, expected.bboxes)
    torch.testing.assert_close(found.scores, expected.scores)


def test_missing_scale_factor_is_named() -> None:
    assert detection_size_hw({"img_shape": (10, 20)}, rescale=False) == (10, 20)
    assert detection_size_hw({"img_shape": (10, 20), "scale_factor": (0.5, 2.0)}, rescale=True) == (5, 40)
    with pytest.raises(InputError, match=r"a\.jpg.*no scale_factor.*PackDetInputs"):
        detection_size_hw({"img_shape": (10, 20), "img_path": "a.jpg"}, rescale=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True}}, "loss_cls must be FocalLoss"),
        ({"test_cfg": {"max_per_img": 0}}, "at least 1, not 0"),
        ({"matcher": "hungarian"}, "matcher must be scipy or torch-linear-assignment, not 'hungarian'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_a_matcher_that_is_not_installed_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", None)
    with pytest.raises(StackError, match=r"needs the package torch-linear-assignment.*ddetr_mm\[matcher\]"):
        build(matcher="torch-linear-assignment")


def test_training_needs_an_assigner() -> None:
    _expected, logits, boxes, truth, metas = reference()
    head = build(train_cfg=None)
    with pytest.raises(ValueError, match=r"train_cfg\.assigner"):
        head.loss_by_feat(logits, boxes, None, None, truth, metas)


def test_meets_tao() -> None:
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
