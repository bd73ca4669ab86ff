"""Matching of queries to ground truth, and the losses, for all decoder layers and images at once.

Matching is DETR's bipartite matching (arXiv 2005.12872, section 3.1) with Deformable DETR's focal class cost.
Costs and matches are mmdet's (FocalLossCost, BBoxL1Cost, IoUCost), computed with one transfer to the host
instead of one per image and layer.

Shapes: G decoder layers, B images, Q queries, C class columns, N objects of all images together, M matched
pairs of all layers and images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmdet.models.task_modules.assigners import BBoxL1Cost, FocalLossCost, HungarianAssigner, IoUCost
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps, bbox_xyxy_to_cxcywh, get_box_tensor
from mmdet.utils import reduce_mean
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ddetr_mm.compat.versions import require
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.models.deformable_attention import host_to_device

# --- Matching ---


class NonFiniteCostError(FloatingPointError):
    """Predictions of NaN or infinity reached the matcher: training has diverged.

    Attributes:
        images: names of the affected images.
        layers: affected decoder layers, from 0.
    """

    def __init__(self, images: Sequence[str], layers: Sequence[int]) -> None:
        self.images, self.layers = list(images), list(layers)
        super().__init__(
            f"predictions are NaN or infinite for {', '.join(self.images)} (decoder layers "
            f"{self.layers}), so they cannot be matched to objects; usual causes: too high a learning "
            "rate, an overflow of fp16, or a broken checkpoint"
        )


@dataclass(frozen=True)
class MatchingCost:
    """Weights and constants of the matching cost.

    Attributes:
        class_weight, l1_weight, giou_weight: weights of the three costs, at least 0.
        alpha, gamma, eps: of the focal class cost.
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    eps: float = 1e-8

    @classmethod
    def from_assigner(cls, assigner: HungarianAssigner) -> MatchingCost:
        """Read the settings of mmdet's assigner.

        Raises:
            ValueError: it is another assigner, or has other costs than one each of FocalLossCost, BBoxL1Cost
                (``xywh``) and IoUCost (``giou``); a missing one has weight 0.
        """
        wanted = (
            "a HungarianAssigner with at most one each of FocalLossCost, BBoxL1Cost(box_format='xywh') "
            "and IoUCost(iou_mode='giou')"
        )
        if not isinstance(assigner, HungarianAssigner):
            raise ValueError(f"the head matches with {wanted}, not with {type(assigner).__name__}")
        settings: dict[str, float] = {"class_weight": 0.0, "l1_weight": 0.0, "giou_weight": 0.0}
        seen: set[type] = set()
        for cost in assigner.match_costs:
            if type(cost) is FocalLossCost and not cost.binary_input:
                settings.update(class_weight=cost.weight, alpha=cost.alpha, gamma=cost.gamma, eps=cost.eps)
            elif type(cost) is BBoxL1Cost and cost.box_format == "xywh":
                settings["l1_weight"] = cost.weight
            elif type(cost) is IoUCost and cost.iou_mode == "giou":
                settings["giou_weight"] = cost.weight
            else:
                raise ValueError(f"the head matches with {wanted}, not with {type(cost).__name__}")
            if type(cost) in seen:
                raise ValueError(f"the head matches with {wanted}; {type(cost).__name__} is there twice")
            seen.add(type(cost))
        return cls(**settings)


@dataclass(frozen=True)
class Objects:
    """The ground truth of a batch, concatenated over its images.

    Attributes:
        labels: (N,) class columns.
        boxes_cxcywh: (N, 4), 0..1 over the unpadded image, float32.
        image_index: (N,) the image of each object.
        counts: objects of every image, B integers.
        sizes_whwh: (B, 4) unpadded image sizes in pixels as (width, height, width, height).
        image_names: names of the images, for messages.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    image_index: Tensor
    counts: tuple[int, ...]
    sizes_whwh: Tensor
    image_names: tuple[str, ...]

    @classmethod
    def from_instances(cls, gt_instances: Sequence, img_metas: Sequence[dict]) -> Objects:
        """Collect mmdet's ground truth (``labels``, ``bboxes`` as xyxy pixels of ``img_shape``)."""
        labels = torch.cat([instances.labels for instances in gt_instances]).long()
        device = labels.device
        counts = tuple(len(instances.labels) for instances in gt_instances)
        index = [image for image, count in enumerate(counts) for _ in range(count)]
        image_index = host_to_device(index, device, torch.int64)
        sizes = [(*meta["img_shape"][1::-1], *meta["img_shape"][1::-1]) for meta in img_metas]
        sizes_whwh = host_to_device(sizes, device, torch.float32)
        boxes_xyxy = torch.cat([get_box_tensor(instances.bboxes) for instances in gt_instances]).float()
        boxes_cxcywh = bbox_xyxy_to_cxcywh(boxes_xyxy / sizes_whwh[image_index])
        names = tuple(
            str(meta.get("img_path") or meta.get("img_id") or f"image {image} of the batch")
            for image, meta in enumerate(img_metas)
        )
        return cls(labels, boxes_cxcywh, image_index, counts, sizes_whwh, names)


@dataclass(frozen=True)
class Matches:
    """Matched pairs, sorted by layer, image and query; every layer has the same number of them.

    Attributes:
        layer, image, query, target: (M,) int64 on the predictions' device; ``target`` counts the
            objects of the whole batch.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


@torch.no_grad()
def matching_costs(logits: Tensor, boxes_cxcywh: Tensor, objects: Objects, cost: MatchingCost) -> Tensor:
    """Compute the cost of matching each object to each query of its image.

    Args:
        logits: (G, B, Q, C).
        boxes_cxcywh: (G, B, Q, 4), 0..1 over the unpadded image.
        objects: the batch's objects.
        cost: weights and constants.

    Returns:
        (G, N, Q) float32; NaN for objects whose label is not a class column.
    """
    logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
    num_classes = logits.shape[-1]
    image = objects.image_index
    column = objects.labels.clamp(0, num_classes - 1)

    probability = logits[:, image, :, column].sigmoid().transpose(0, 1)  # (G, N, Q)
    positive = -(probability + cost.eps).log() * cost.alpha * (1 - probability).pow(cost.gamma)
    negative = -(1 - probability + cost.eps).log() * (1 - cost.alpha) * probability.pow(cost.gamma)
    class_cost = positive - negative

    predicted = boxes_cxcywh[:, image]  # (G, N, Q, 4)
    wanted = objects.boxes_cxcywh[None, :, None]
    l1_cost = (predicted - wanted).abs().sum(-1)
    # In pixels, so that the constant in the divisor is negligible for small boxes.
    sizes_whwh = objects.sizes_whwh[image][None, :, None]
    giou = bbox_overlaps(
        bbox_cxcywh_to_xyxy(predicted) * sizes_whwh,
        (bbox_cxcywh_to_xyxy(wanted) * sizes_whwh).expand_as(predicted),
        mode="giou",
        is_aligned=True,
    )
    total = cost.class_weight * class_cost + cost.l1_weight * l1_cost - cost.giou_weight * giou
    return total.masked_fill((objects.labels != column)[None, :, None], torch.nan)


SCIPY, TORCH_LINEAR_ASSIGNMENT = "scipy", "torch-linear-assignment"


def require_matcher(matcher: str) -> None:
    """Check that what solves the assignment problems is known and installed.

    Raises:
        ValueError: it is neither ``scipy`` nor ``torch-linear-assignment``.
        StackError: the package is not installed.
    """
    if matcher not in (SCIPY, TORCH_LINEAR_ASSIGNMENT):
        raise ValueError(f"matcher must be {SCIPY} or {TORCH_LINEAR_ASSIGNMENT}, not {matcher!r}")
    if matcher == TORCH_LINEAR_ASSIGNMENT:
        hint = "install it: `pip install 'ddetr_mm[matcher]'`, or set ddetr_mm.matcher=scipy"
        what = f"ddetr_mm.matcher: {matcher}"
        require("torch_linear_assignment", what, package=TORCH_LINEAR_ASSIGNMENT, hint=hint)


def assign_all_layers(costs: Tensor, objects: Objects, num_classes: int, matcher: str = SCIPY) -> Matches:
    """Solve the assignment problem of every layer and image.

    Args:
        costs: (G, N, Q) of :func:`matching_costs`.
        objects: the batch's objects.
        num_classes: class columns of the model.
        matcher: ``scipy``: with one transfer to the host and one back. ``torch-linear-assignment``: where the
            costs are, unless an image has more objects than queries; among pairs of equal total cost it may
            choose others.

    Returns:
        The matches: ``min(Q, objects)`` pairs of least total cost for each layer and image.

    Raises:
        NonFiniteCostError: predictions are not finite.
        DataError: a label is not a class column.
    """
    if matcher == TORCH_LINEAR_ASSIGNMENT and 0 < max(objects.counts, default=0) <= costs.shape[-1]:
        return _assign_where_costs_are(costs, objects, num_classes)
    costs_host = costs.cpu().numpy()
    if not np.isfinite(costs_host).all():
        _explain_non_finite(costs_host, objects, num_classes)
    starts = np.cumsum([0, *objects.counts])
    pairs = [np.empty((4, 0), dtype=np.int64)]
    for layer in range(len(costs_host)):
        for image, count in enumerate(objects.counts):
            start = starts[image]
            query, target = linear_sum_assignment(costs_host[layer, start : start + count].T)
            pairs.append(
                np.stack([np.full_like(query, layer), np.full_like(query, image), query, target + start])
            )
    indices = torch.from_numpy(np.concatenate(pairs, axis=1)).to(costs.device, non_blocking=True)
    return Matches(*indices.unbind(0))


def _assign_where_costs_are(costs: Tensor, objects: Objects, num_classes: int) -> Matches:
    """:func:`assign_all_layers` by torch-linear-assignment, which solves problems of one shape at once.

    Images with fewer objects than the one with most get objects that every query costs nothing: they take
    queries that the others leave, and do not change which are the cheapest.
    """
    from torch_linear_assignment import batch_linear_assignment

    if not bool(torch.isfinite(costs).all()):
        _explain_non_finite(costs.cpu().numpy(), objects, num_classes)
    layers, total, queries = costs.shape
    image, most = objects.image_index, max(objects.counts)
    starts = host_to_device(np.cumsum([0, *objects.counts[:-1]]).tolist(), costs.device, torch.int64)
    target = torch.arange(total, device=costs.device)
    place = target - starts[image]
    padded = costs.new_zeros(layers, len(objects.counts), most, queries)
    padded[:, image, place] = costs
    solved = batch_linear_assignment(padded.flatten(0, 1)).view(layers, -1, most)
    query = solved[:, image, place]  # (G, N)
    query, order = (image * queries + query).sort(dim=1)
    layer = torch.arange(layers, device=costs.device)[:, None].expand_as(order)
    return Matches(layer.flatten(), image[order].flatten(), (query % queries).flatten(), order.flatten())


def _explain_non_finite(costs_host: np.ndarray, objects: Objects, num_classes: int) -> None:
    """Raise the error for labels out of range, or else for non-finite predictions, with the image names."""
    image_index = np.repeat(np.arange(len(objects.counts)), objects.counts)
    labels = objects.labels.cpu().numpy()
    wrong = (labels < 0) | (labels >= num_classes)
    DataError.collect(
        Problem(
            "an object's label is no class column of the model",
            file=objects.image_names[image],
            value=int(label),
            allowed=f"0 to {num_classes - 1}",
            hint="set the number of classes to the highest label plus one",
        )
        for image, label in sorted(set(zip(image_index[wrong], labels[wrong], strict=True)))
    )
    broken = ~np.isfinite(costs_host).all(-1)  # (G, N)
    raise NonFiniteCostError(
        [objects.image_names[image] for image in np.unique(image_index[broken.any(0)])],
        np.flatnonzero(broken.any(1)).tolist(),
    )


# --- Losses ---


def box_divisor(num_boxes: int, device: torch.device | str, over_ranks: bool = True) -> Tensor:
    """Return the divisor of all loss sums, as in TAO: ground-truth boxes averaged over ranks, at least 1.

    mmdet divides by matched queries, which differs when an image has more objects than queries.

    Args:
        num_boxes: of this rank's batch.
        device: of the result.
        over_ranks: whether to average over ranks, which all have to call this then.
    """
    divisor = host_to_device([num_boxes], device, torch.float32)
    return (reduce_mean(divisor) if over_ranks else divisor).clamp(min=1)


def set_losses(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    objects: Objects,
    matches: Matches,
    loss_cls: nn.Module,
    loss_bbox: nn.Module,
    loss_iou: nn.Module,
    *,
    over_ranks: bool = True,
) -> dict[str, Tensor]:
    """Compute the weighted losses of every layer, in float32.

    Args:
        logits: (G, B, Q, C).
        boxes_cxcywh: (G, B, Q, 4), 0..1 over the unpadded image.
        objects: the batch's objects.
        matches: of :func:`assign_all_layers`.
        loss_cls: mmdet's FocalLoss, with its ``loss_weight``.
        loss_bbox: mmdet's L1Loss, likewise.
        loss_iou: mmdet's GIoULoss, likewise.
        over_ranks: see :func:`box_divisor`.

    Returns:
        ``loss_cls``, ``loss_bbox`` and ``loss_iou``, each (G,).
    """
    logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
    num_layers, num_classes = logits.shape[0], logits.shape[-1]
    divisor = box_divisor(len(objects.labels), logits.device, over_ranks)

    # One-hot targets: with indices, mmdet's focal loss would need mmcv's compiled op on a GPU.
    classes = torch.zeros_like(logits)
    labels = objects.labels[matches.target]
    classes[matches.layer, matches.image, matches.query, labels] = 1.0
    class_losses = loss_cls(
        logits.reshape(-1, num_classes), classes.reshape(-1, num_classes), reduction_override="none"
    )
    losses = {"loss_cls": class_losses.reshape(num_layers, -1).sum(-1) / divisor}

    predicted = boxes_cxcywh[matches.layer, matches.image, matches.query]
    if not len(predicted):
        # Keeps the box branches in the graph, with zero gradients.
        nothing = boxes_cxcywh.flatten(1).sum(-1) * 0
        return {**losses, "loss_bbox": nothing, "loss_iou": nothing}
    wanted = objects.boxes_cxcywh[matches.target]
    sizes_whwh = objects.sizes_whwh[matches.image]
    box_losses = loss_bbox(predicted, wanted, reduction_override="none")
    iou_losses = loss_iou(
        bbox_cxcywh_to_xyxy(predicted) * sizes_whwh,
        bbox_cxcywh_to_xyxy(wanted) * sizes_whwh,
        reduction_override="none",
    )
    losses["loss_bbox"] = box_losses.reshape(num_layers, -1).sum(-1) / divisor
    losses["loss_iou"] = iou_losses.reshape(num_layers, -1).sum(-1) / divisor
    return losses
