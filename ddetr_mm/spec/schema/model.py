"""The ``model`` section: the network, its losses and what it predicts."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.fields import REFERENCE_7_3, spec_field

BACKBONES = (
    "resnet_50",
    "gc_vit_xxtiny",
    "gc_vit_xtiny",
    "gc_vit_tiny",
    "gc_vit_small",
    "gc_vit_base",
    "gc_vit_large",
    "gc_vit_large_384",
)


@dataclass
class ModelConfig:
    """The architecture of the network and the weights of its losses."""

    pretrained_backbone_path: str | None = spec_field(
        None,
        doc="""File with weights for the backbone alone, loaded by name before training; null: none.
        The documentation's examples write it as pretrained_model_path, which is accepted too.""",
    )
    dld_model_dir_path: str | None = spec_field(
        None, doc="Folder of a model store inside NVIDIA; nobody else has one."
    )
    backbone: str = spec_field("resnet_50", options=BACKBONES, doc="The feature extractor.")
    num_queries: int = spec_field(
        300, ge=1, doc="Number of object queries: the most boxes one image can yield per class column."
    )
    num_feature_levels: int = spec_field(
        4, ge=1, le=5, doc="Number of feature maps; must equal the length of return_interm_indices."
    )
    cls_loss_coef: float = spec_field(
        2.0, ge=0.0, doc="Weight of the classification term, in the matching cost and in the loss."
    )
    bbox_loss_coef: float = spec_field(
        5.0, ge=0.0, doc="Weight of the L1 term of the boxes, in the matching cost and in the loss."
    )
    giou_loss_coef: float = spec_field(
        2.0, ge=0.0, doc="Weight of the GIoU term of the boxes, in the matching cost and in the loss."
    )
    with_box_refine: bool = spec_field(
        True, doc="Let every decoder layer refine the boxes of the layer before it."
    )
    num_select: int = spec_field(
        100,
        ge=1,
        doc="""Number of predictions kept per image: the best of num_queries x num_classes scores, so at
        most that product.""",
    )
    return_interm_indices: list[int] = spec_field(
        [1, 2, 3, 4],
        ge=0,
        le=4,
        doc="""Feature maps that are used, ascending: 0 to 3 are the backbone's stages (strides 4, 8, 16,
        32), 4 is one more stride-2 convolution on the last stage and needs 3.""",
    )
    focal_alpha: float = spec_field(
        0.25, gt=0.0, doc="Alpha of the focal loss: the weight of the positive class."
    )
    clip_max_norm: float = spec_field(0.1, doc="Superseded by train.clip_grad_norm.")
    nheads: int = spec_field(8, ge=1, doc="Number of attention heads; must divide hidden_dim.")
    dropout_ratio: float = spec_field(
        0.3, ge=0.0, le=1.0, doc="Probability of dropping a hidden unit, everywhere in the transformer."
    )
    hidden_dim: int = spec_field(
        256,
        ge=32,
        doc="""Width of the transformer; a multiple of 32 (group normalisation in 32 groups) and of
        nheads.""",
    )
    enc_layers: int = spec_field(6, ge=1, doc="Number of encoder layers.")
    dec_layers: int = spec_field(6, ge=1, doc="Number of decoder layers.")
    dim_feedforward: int = spec_field(
        1024, ge=1, doc="Width of the feed-forward networks in the transformer."
    )
    dec_n_points: int = spec_field(
        4, ge=1, doc="Sampling points per head and feature level in the decoder's cross-attention."
    )
    enc_n_points: int = spec_field(
        4, ge=1, doc="Sampling points per head and feature level in the encoder's self-attention."
    )
    aux_loss: bool = spec_field(True, doc="Apply the loss after every decoder layer, not only the last.")
    dilation: bool = spec_field(
        False, doc="Dilate ResNet's last stage instead of striding it (stride 16 in place of 32)."
    )
    train_backbone: bool = spec_field(True, doc="Train the backbone; false freezes all of it.")
    loss_types: list[str] = spec_field(
        ["labels", "boxes"],
        options=("labels", "boxes"),
        doc="The losses that are computed: labels (classification), boxes (L1 and GIoU).",
    )
    backbone_names: list[str] = spec_field(
        ["backbone.0"],
        doc="""Parameters whose reference name contains one of these learn at
        train.optim.lr_backbone.""",
    )
    linear_proj_names: list[str] = spec_field(
        ["reference_points", "sampling_offsets"],
        doc="""Parameters whose reference name contains one of these learn at
        train.optim.lr * train.optim.lr_linear_proj_mult.""",
    )
    precise_msda: bool = spec_field(
        False,
        origin=REFERENCE_7_3,
        doc="Compute deformable attention in full precision under mixed precision.",
    )
