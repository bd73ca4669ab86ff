"""From logits and relative boxes to detections (pure function).

Shapes: B images, Q queries, C class columns, k detections of an image.
"""

from __future__ import annotations

from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor


def top_detections(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    sizes_hw: Tensor,
    max_per_image: int,
    background_column: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable (query, class) pairs of every image: sigmoid, then top-k over Q x C.

    One query may appear with several classes. Boxes may reach beyond the image, as the reference's
    do.

    Args:
        logits: (B, Q, C).
        boxes_cxcywh: (B, Q, 4), 0..1 over the unpadded image.
        sizes_hw: (B, 2) height and width that boxes are scaled to, in pixels.
        max_per_image: k; fewer when Q x C is smaller.
        background_column: whether column 0 stands for the background. Then it is left out before
            the choice, so it takes no detection's place and is never a label.

    Returns:
        scores (B, k) in 0..1 falling, labels (B, k) = class columns, boxes_xyxy (B, k, 4) in pixels.
    """
    first = int(background_column)
    logits = logits.float()[..., first:]
    num_columns = logits.shape[-1]
    flat = logits.flatten(1)
    scores, picked = flat.sigmoid().topk(min(max_per_image, flat.shape[1]), dim=1)
    labels = picked % num_columns + first
    query = picked // num_columns
    boxes = boxes_cxcywh.float().gather(1, query[..., None].expand(-1, -1, 4))
    sizes_whwh = sizes_hw.to(boxes).flip(-1).repeat(1, 2)
    return scores, labels, bbox_cxcywh_to_xyxy(boxes) * sizes_whwh[:, None]
