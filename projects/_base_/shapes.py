# The generated pictures of projects/shapes, as parts that mmdet configs put together: data for TAO's
# transforms, COCO's metrics, and the sizes of a transformer that learns from random weights on a CPU.
# The names are this file's own, so that it can stand beside any of mmdet's configs in `_base_`:
#
#     _base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "../_base_/shapes.py"]
#     train_dataloader = dict(_delete_=True, **_base_.shapes.train_dataloader)
#
# The pictures are drawn, and their labels converted, by
#
#     python projects/shapes/generate.py results/shapes/data
#     ddetr-mm convert -e configs/specs/shapes_convert.yaml

shapes_resize = dict(type="TAORandomResize", scales=[112, 128], max_size=160)
shapes_train_pipeline = [
    dict(type="TAOLoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        prob=[0.5, 0.5],
        transforms=[
            [shapes_resize],
            [
                dict(type="TAORandomResize", scales=[128, 144]),
                dict(type="TAORandomSizeCrop", min_size=96, max_size=128),
                shapes_resize,
            ],
        ],
    ),
    dict(type="TAOPackDetInputs"),
]
shapes_test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 120), keep_ratio=True, backend="pillow", size_rule="tao"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="TAOPackDetInputs"),
]

shapes_train_data = dict(
    type="SerializedCocoDataset",
    ann_file="results/shapes/coco/train",
    data_prefix=dict(img="results/shapes/data"),
    pipeline=shapes_train_pipeline,
)
shapes_val_data = dict(
    type="SerializedCocoDataset",
    ann_file="results/shapes/coco/val",
    data_prefix=dict(img="results/shapes/data"),
    test_mode=True,
    pipeline=shapes_test_pipeline,
)
shapes_test_data = dict(shapes_val_data, ann_file="results/shapes/coco/test")
shapes_loader = dict(batch_size=8, num_workers=1, persistent_workers=True)
shapes_in_order = dict(drop_last=False, sampler=dict(type="DefaultSampler", shuffle=False))

shapes = dict(
    train_dataloader=dict(
        shapes_loader, sampler=dict(type="DefaultSampler", shuffle=True), dataset=shapes_train_data
    ),
    val_dataloader=dict(shapes_loader, **shapes_in_order, dataset=shapes_val_data),
    test_dataloader=dict(shapes_loader, **shapes_in_order, dataset=shapes_test_data),
    val_evaluator=dict(type="FastCocoMetric", ann_file="results/shapes/coco/val"),
    test_evaluator=dict(type="FastCocoMetric", ann_file="results/shapes/coco/test"),
)

# Eight epochs from random weights, in which the backbone learns as fast as the rest.
shapes_schedule = dict(
    optim_wrapper=dict(
        optimizer=dict(lr=4e-4), paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0)))
    ),
    train_cfg=dict(max_epochs=8, val_interval=8),
    param_scheduler=[dict(type="MultiStepLR", begin=0, end=8, by_epoch=True, milestones=[7], gamma=0.1)],
    default_hooks=dict(logger=dict(interval=10), checkpoint=dict(interval=8)),
)
randomness = dict(seed=0)

# Sizes for Deformable DETR; the neck's in_channels depend on the backbone and are left out.
small_attention = dict(embed_dims=128, num_levels=3)
small_ffn = dict(embed_dims=128, feedforward_channels=256, ffn_drop=0.0)
small_detr = dict(
    num_queries=40,
    num_feature_levels=3,
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=small_attention, ffn_cfg=small_ffn)),
    decoder=dict(
        num_layers=3,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=128, dropout=0.0),
            cross_attn_cfg=small_attention,
            ffn_cfg=small_ffn,
        ),
    ),
    positional_encoding=dict(num_feats=64),
    bbox_head=dict(num_classes=4, embed_dims=128),
    test_cfg=dict(max_per_img=40),
)
