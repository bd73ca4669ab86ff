"""Prediction head of Deformable DETR with TAO's loss, matching and post-processing.

Shapes: G decoder layers, B images, Q queries, C class columns, k detections of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import DeformableDETRHead
from mmdet.models.losses import FocalLoss
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor
from torch.profiler import record_function

from ddetr_mm.errors import InputError, Problem
from ddetr_mm.models.deformable_attention import host_to_device, no_autocast
from ddetr_mm.models.losses import (
    MatchingCost,
    NonFiniteCostError,
    Objects,
    assign_all_layers,
    box_divisor,
    matching_costs,
    require_matcher,
    set_losses,
)
from ddetr_mm.models.transformer import place_boxes

# --- Post-processing ---


def top_detections(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    sizes_hw: Tensor,
    max_per_image: int,
    background_column: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most probable (query, class) pairs of every image: sigmoid, then top-k over Q x C.

    One query may appear with several classes. Boxes are not clipped to the image, as in TAO.

    Args:
        logits: (B, Q, C).
        boxes_cxcywh: (B, Q, 4), 0..1 over the unpadded image.
        sizes_hw: (B, 2) height and width that boxes are scaled to, in pixels.
        max_per_image: k; fewer when Q x C is smaller.
        background_column: whether column 0 is the background; it is then excluded before the top-k.

    Returns:
        scores (B, k) in 0..1, descending, labels (B, k) = class columns, boxes_xyxy (B, k, 4) in pixels.
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


# --- The head ---


@MODELS.register_module()
class TAODeformableDETRHead(DeformableDETRHead):
    """mmdet's DeformableDETRHead with TAO's behaviour.

    Parameters and their initialisation are mmdet's and TAO's: class bias at probability 0.01, last box layer
    zero, its width and height bias -2 (in the first layer only, when boxes are refined).

    Differences from mmdet: all layers and images are matched with one transfer to the host; every loss is
    divided by the number of ground-truth boxes averaged over ranks (``sync_cls_avg_factor`` has no effect);
    scores and boxes are computed in float32 under autocast; boxes are clipped to the image only with
    ``clip_boxes``; ``predict`` computes the last layer only.

    Args:
        aux_loss: whether every decoder layer gets a loss (keys ``d0.loss_cls`` …), or only the last.
        background_column: whether class column 0 is the background and never a label (columns are
            COCO category ids then).
        matcher: ``scipy`` or ``torch-linear-assignment``, see
            :func:`~ddetr_mm.models.losses.assign_all_layers`.
        **kwargs: mmdet's. ``loss_cls`` must be a FocalLoss; ``train_cfg.assigner`` a
            HungarianAssigner of FocalLossCost, BBoxL1Cost (xywh) and IoUCost (giou);
            ``test_cfg.max_per_img`` (100) is the number of detections of an image, at most queries x
            classes; ``test_cfg.clip_boxes`` (False) clips boxes to the image.

    Raises:
        ValueError: the losses, the assigner, ``matcher`` or ``max_per_img`` are not as above.
        StackError: the package of ``matcher`` is not installed.
    """

    def __init__(
        self,
        *args,
        aux_loss: bool = True,
        background_column: bool = False,
        matcher: str = "scipy",
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        require_matcher(matcher)
        self.matcher = matcher
        if not (isinstance(self.loss_cls, FocalLoss) and not self.loss_cls.activated):
            raise ValueError(f"loss_cls must be FocalLoss on logits, not {self.loss_cls}")
        self.aux_loss = aux_loss
        # NaN or infinite predictions: False raises NonFiniteCostError, True makes all losses NaN.
        self.tolerates_non_finite = False
        # Set by ValidationLossHook: whether predict() leaves the losses of its batch in validation_losses.
        self.validates = False
        self.validation_losses: dict[str, Tensor] | None = None
        self.background_column = background_column
        assigner = getattr(self, "assigner", None)
        self.matching_cost = None if assigner is None else MatchingCost.from_assigner(assigner)
        test_cfg = self.test_cfg or {}
        self.max_per_img = test_cfg.get("max_per_img", 100)
        self.clip_boxes = test_cfg.get("clip_boxes", False)
        if self.max_per_img < 1:
            raise ValueError(f"test_cfg.max_per_img must be at least 1, not {self.max_per_img}")

    def forward(self, hidden_states: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of every decoder layer.

        Args:
            hidden_states: (G, B, Q, channels).
            references: G + 1 reference points, (B, Q, 2) or (B, Q, 4), the initial one first; the
                last is not used.

        Returns:
            Logits (G, B, Q, C) and boxes (G, B, Q, 4) as (cx, cy, w, h), 0..1 over the unpadded image.
        """
        outputs = [
            self.forward_layer(layer, hidden_state, references[layer])
            for layer, hidden_state in enumerate(hidden_states)
        ]
        logits, boxes_cxcywh = zip(*outputs, strict=True)
        return torch.stack(logits), torch.stack(boxes_cxcywh)

    def forward_layer(self, layer: int, hidden_state: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, Q, C) and boxes (B, Q, 4) of one decoder layer, float32 under autocast.

        Args:
            layer: decoder layer, from 0.
            hidden_state: that layer's output, (B, Q, channels).
            reference: the reference points that went into that layer, (B, Q, 2 or 4).
        """
        branch = self.cls_branches[layer]
        with no_autocast(hidden_state.device):
            logits = branch(hidden_state.to(branch.weight.dtype))
        return logits, place_boxes(self.reg_branches[layer], hidden_state, reference)

    @record_function("loss")
    def loss(self, *args, **kwargs) -> dict[str, Tensor]:
        """Return the losses as mmdet does, see :meth:`loss_by_feat`."""
        return super().loss(*args, **kwargs)

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        enc_cls_scores: Tensor | None,
        enc_bbox_preds: Tensor | None,
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[dict],
        batch_gt_instances_ignore: None = None,
        *,
        in_training: bool = True,
    ) -> dict[str, Tensor]:
        """Match queries to ground truth and compute the weighted losses.

        Args:
            all_layers_cls_scores: (G, B, Q, C) logits.
            all_layers_bbox_preds: (G, B, Q, 4) as (cx, cy, w, h), 0..1 over the unpadded image.
            enc_cls_scores: (B, S, C) of the encoder's proposals, with two stages only.
            enc_bbox_preds: (B, S, 4), likewise.
            batch_gt_instances: ``labels`` and ``bboxes`` (xyxy, pixels of ``img_shape``) per image.
            batch_img_metas: ``img_shape``, the unpadded (height, width), and ``img_path`` if known. Losses
                are zero where all images are marked ``is_filler``.
            batch_gt_instances_ignore: not used.
            in_training: False for the losses of validation: ranks do not wait for each other, and
                predictions that are not finite give NaN.

        Returns:
            ``loss_cls``, ``loss_bbox``, ``loss_iou`` of the last layer; those of layer i < G - 1 as
            ``d{i}.loss_…``; those of the encoder's proposals as ``enc_loss_…``.

        Raises:
            NonFiniteCostError: predictions are NaN or infinite.
            DataError: a label is not a class column.
        """
        objects = Objects.from_instances(batch_gt_instances, batch_img_metas)
        first = 0 if self.aux_loss else len(all_layers_cls_scores) - 1
        logits, boxes_cxcywh = all_layers_cls_scores[first:], all_layers_bbox_preds[first:]
        losses = self._losses(logits, boxes_cxcywh, objects, in_training)
        named = {name: values[-1] for name, values in losses.items()}
        for layer in range(len(losses["loss_cls"]) - 1):
            named.update({f"d{layer}.{name}": values[layer] for name, values in losses.items()})
        if enc_cls_scores is not None:
            # Proposals are classified as object or not, in column 0, as in the original two-stage code.
            foreground = [
                InstanceData(labels=torch.zeros_like(gt.labels), bboxes=gt.bboxes)
                for gt in batch_gt_instances
            ]
            objects = Objects.from_instances(foreground, batch_img_metas)
            losses = self._losses(enc_cls_scores[None], enc_bbox_preds[None], objects, in_training)
            named.update({f"enc_{name}": values[0] for name, values in losses.items()})
        if all(meta.get("is_filler", False) for meta in batch_img_metas):
            # This rank only takes part in the collectives of an epoch's last step.
            named = {name: loss * 0 for name, loss in named.items()}
        return named

    def _losses(
        self, logits: Tensor, boxes_cxcywh: Tensor, objects: Objects, in_training: bool
    ) -> dict[str, Tensor]:
        """Match the given layers and compute their losses, each (layers,)."""
        if self.matching_cost is None:
            raise ValueError("the head cannot be trained without train_cfg.assigner")
        try:
            with record_function("matching"):
                costs = matching_costs(logits, boxes_cxcywh, objects, self.matching_cost)
                matches = assign_all_layers(costs, objects, logits.shape[-1], self.matcher)
        except NonFiniteCostError:
            if in_training and not self.tolerates_non_finite:
                raise
            if in_training:
                box_divisor(len(objects.labels), logits.device)  # the other ranks wait in its all-reduce
            lost = (logits.flatten(1).sum(-1) + boxes_cxcywh.flatten(1).sum(-1)) * float("nan")
            return dict.fromkeys(("loss_cls", "loss_bbox", "loss_iou"), lost)
        modules = (self.loss_cls, self.loss_bbox, self.loss_iou)
        return set_losses(logits, boxes_cxcywh, objects, matches, *modules, over_ranks=in_training)

    def predict(
        self,
        hidden_states: Tensor,
        references: Sequence[Tensor],
        batch_data_samples: Sequence,
        rescale: bool = True,
    ) -> list[InstanceData]:
        """Return the detections of the last decoder layer.

        Args:
            hidden_states: (G, B, Q, channels).
            references: as in :meth:`forward`.
            batch_data_samples: B samples with ``img_shape`` and, to rescale, ``scale_factor``.
            rescale: whether boxes are in pixels of the original image instead of the resized one.

        Returns:
            Per image ``bboxes`` (k, 4) xyxy, ``scores`` (k,) descending, ``labels`` (k,).

        Raises:
            InputError: with ``rescale``, a sample has no ``scale_factor``.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        if self.validates and all("gt_instances" in sample for sample in batch_data_samples):
            all_logits, all_boxes_cxcywh = self(hidden_states, references)
            truth = [resized_truth(sample.gt_instances, sample.metainfo) for sample in batch_data_samples]
            with no_autocast(all_logits.device):
                self.validation_losses = self.loss_by_feat(
                    all_logits, all_boxes_cxcywh, None, None, truth, metas, in_training=False
                )
            return self.predict_by_feat(all_logits, all_boxes_cxcywh, metas, rescale=rescale)
        last = len(hidden_states) - 1
        logits, boxes_cxcywh = self.forward_layer(last, hidden_states[last], references[last])
        return self.predict_by_feat(logits[None], boxes_cxcywh[None], metas, rescale=rescale)

    def predict_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        batch_img_metas: Sequence[dict],
        rescale: bool = False,
    ) -> list[InstanceData]:
        """Return the detections of the last given layer, see :meth:`predict`."""
        logits, boxes_cxcywh = all_layers_cls_scores[-1], all_layers_bbox_preds[-1]
        sizes = [detection_size_hw(meta, rescale) for meta in batch_img_metas]
        sizes_hw = host_to_device(sizes, logits.device, torch.float32)
        scores, labels, boxes_xyxy = top_detections(
            logits, boxes_cxcywh, sizes_hw, self.max_per_img, self.background_column
        )
        if self.clip_boxes:
            limits = sizes_hw.flip(-1).repeat(1, 2)[:, None]
            boxes_xyxy = boxes_xyxy.clamp(min=0).minimum(limits)
        return [
            InstanceData(bboxes=boxes_xyxy[image], scores=scores[image], labels=labels[image])
            for image in range(len(batch_img_metas))
        ]


def resized_truth(gt_instances: InstanceData, img_meta: dict) -> InstanceData:
    """Return the ground truth of validation, in pixels of the original image, in those of ``img_shape``.

    Raises:
        InputError: ``scale_factor`` is missing.
    """
    original_hw = detection_size_hw(img_meta, rescale=True)
    boxes_xyxy = get_box_tensor(gt_instances.bboxes)
    factors = [new / old for new, old in zip(img_meta["img_shape"][:2], original_hw, strict=True)]
    factors_xyxy = host_to_device([*factors[::-1], *factors[::-1]], boxes_xyxy.device, torch.float32)
    return InstanceData(labels=gt_instances.labels, bboxes=boxes_xyxy * factors_xyxy)


def detection_size_hw(img_meta: dict, rescale: bool) -> tuple[float, float]:
    """Return height and width in pixels that relative boxes of an image are scaled to.

    Args:
        img_meta: ``img_shape`` (height, width) and ``scale_factor`` (width, height).
        rescale: whether to undo the resizing.

    Raises:
        InputError: with ``rescale``, ``scale_factor`` is missing.
    """
    height, width = img_meta["img_shape"][:2]
    if not rescale:
        return height, width
    scale_factor = img_meta.get("scale_factor")
    if scale_factor is None:
        raise InputError(
            Problem(
                "boxes cannot be scaled back to the original image: the sample has no scale_factor",
                file=img_meta.get("img_path"),
                hint="add 'scale_factor' to the meta_keys of PackDetInputs, or predict with rescale=False",
            )
        )
    return height / float(scale_factor[1]), width / float(scale_factor[0])
