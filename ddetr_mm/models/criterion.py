"""The set loss of Deformable DETR, for all decoder layers at once (pure functions over tensors).

Sums over classes, boxes and queries are divided by the number of labelled boxes, averaged over
ranks, at least 1: the reference's divisor for all three losses (mmdet divides by matched queries,
which differs when an image has more objects than there are queries).

Shapes: G decoder layers, B images, Q queries, C class columns, M matched pairs.
"""

from __future__ import annotations

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from .deformable_attention import host_to_device
from .matching import Matches, Objects


def box_divisor(num_boxes: int, device: torch.device | str) -> Tensor:
    """What loss sums are divided by: ``num_boxes`` of this rank averaged over ranks, at least 1."""
    return reduce_mean(host_to_device([num_boxes], device, torch.float32)).clamp(min=1)


def set_losses(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    objects: Objects,
    matches: Matches,
    loss_cls: nn.Module,
    loss_bbox: nn.Module,
    loss_iou: nn.Module,
) -> dict[str, Tensor]:
    """Weighted losses of every layer, in float32.

    Args:
        logits: (G, B, Q, C).
        boxes_cxcywh: (G, B, Q, 4), 0..1 over the unpadded image.
        objects: the batch's objects.
        matches: which query answers for which object, in every layer.
        loss_cls: mmdet's FocalLoss, with its ``loss_weight``.
        loss_bbox: mmdet's L1Loss, likewise.
        loss_iou: mmdet's GIoULoss, likewise.

    Returns:
        ``loss_cls``, ``loss_bbox`` and ``loss_iou``, each (G,).
    """
    logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
    num_layers, num_classes = logits.shape[0], logits.shape[-1]
    divisor = box_divisor(len(objects.labels), logits.device)

    # One-hot targets: given indices, mmdet's focal loss would need mmcv's compiled op on a GPU.
    classes = torch.zeros_like(logits)
    labels = objects.labels[matches.target]
    classes[matches.layer, matches.image, matches.query, labels] = 1.0
    class_losses = loss_cls(
        logits.reshape(-1, num_classes), classes.reshape(-1, num_classes), reduction_override="none"
    )
    losses = {"loss_cls": class_losses.reshape(num_layers, -1).sum(-1) / divisor}

    predicted = boxes_cxcywh[matches.layer, matches.image, matches.query]
    if not len(predicted):
        # Keeps the box branches in the graph: their gradients are zero, not missing.
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
