# TAO's Deformable DETR on ResNet-50, four levels (strides 8 to 64), without refinement of boxes.
# `num_classes` counts columns of class scores: column c is category id c, column 0 the background.

attention = dict(embed_dims=256, num_heads=8, num_levels=4, num_points=4, dropout=0.1, batch_first=True)
feed_forward = dict(embed_dims=256, feedforward_channels=1024, ffn_drop=0.1)

model = dict(
    type="TAODeformableDETR",
    num_queries=300,
    num_feature_levels=4,
    with_box_refine=False,
    as_two_stage=False,
    zero_padded_values=False,  # TAO does not; weights of the original authors and of Hugging Face need True
    activation_checkpoint=False,
    frozen_modules=[],
    data_preprocessor=dict(
        type="FixedPadDetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_short_long=None,
        pad_size_divisor=1,
    ),
    backbone=dict(
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=False),
        norm_eval=True,
        style="pytorch",
        zero_init_residual=False,  # a frozen norm would keep every residual branch at zero
        with_cp=False,
    ),
    neck=dict(
        type="ChannelMapper",
        in_channels=[512, 1024, 2048],
        kernel_size=1,
        out_channels=256,
        bias=True,
        act_cfg=None,
        norm_cfg=dict(type="GN", num_groups=32),
        num_outs=4,
    ),
    encoder=dict(num_layers=6, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=feed_forward)),
    decoder=dict(
        num_layers=6,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(
                embed_dims=256,
                num_heads=8,
                attn_drop=0.1,
                dropout_layer=dict(type="Dropout", drop_prob=0.1),
                batch_first=True,
            ),
            cross_attn_cfg=attention,
            ffn_cfg=feed_forward,
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5, temperature=10000),
    bbox_head=dict(
        type="TAODeformableDETRHead",
        num_classes=91,
        embed_dims=256,
        background_column=True,
        aux_loss=True,
        sync_cls_avg_factor=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0, alpha=0.25, gamma=2.0, eps=1e-8),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=100),
)
