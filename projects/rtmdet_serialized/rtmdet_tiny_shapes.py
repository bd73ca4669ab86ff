# RTMDet-tiny that learns the coloured shapes from random weights, on a CPU, straight from the folder of
# shards that `ddetr-mm convert` wrote.
_base_ = ["rtmdet_tiny_serialized_8xb32-300e_coco.py", "../_base_/shapes.py"]

# Batch norms of one process: SyncBN needs a GPU.
norm_cfg = dict(_delete_=True, type="BN")
model = dict(
    backbone=dict(norm_cfg=norm_cfg, init_cfg=None),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg, num_classes=4),
)

# RTMDet's own augmentation at the size of these pictures: mosaic and mix-up, then two epochs without.
input_size_wh = (160, 160)
grey = dict(img=(114, 114, 114))
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
crop_and_pad = [
    dict(type="RandomCrop", crop_size=input_size_wh),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Pad", size=input_size_wh, pad_val=grey),
]
train_pipeline = [
    *load,
    dict(type="CachedMosaic", img_scale=input_size_wh, max_cached_images=20, random_pop=False),
    dict(type="RandomResize", scale=(320, 320), ratio_range=(0.5, 1.5), keep_ratio=True),
    *crop_and_pad,
    dict(
        type="CachedMixUp",
        img_scale=input_size_wh,
        ratio_range=(1.0, 1.0),
        max_cached_images=10,
        random_pop=False,
        prob=0.5,
    ),
    dict(type="PackDetInputs"),
]
train_pipeline_stage2 = [
    *load,
    dict(type="RandomResize", scale=input_size_wh, ratio_range=(0.8, 1.5), keep_ratio=True),
    *crop_and_pad,
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=input_size_wh, keep_ratio=True),
    dict(type="Pad", size=input_size_wh, pad_val=grey),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs"),
]

train_dataloader = dict(_delete_=True, **_base_.shapes.train_dataloader)
val_dataloader = dict(_delete_=True, **_base_.shapes.val_dataloader)
test_dataloader = dict(_delete_=True, **_base_.shapes.test_dataloader)
val_evaluator = dict(_delete_=True, **_base_.shapes.val_evaluator)
test_evaluator = dict(_delete_=True, **_base_.shapes.test_evaluator)
train_dataloader["dataset"]["pipeline"] = train_pipeline
val_dataloader["dataset"]["pipeline"] = test_pipeline
test_dataloader["dataset"]["pipeline"] = test_pipeline

optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=8, val_interval=8, dynamic_intervals=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min=1e-4, begin=2, end=8, T_max=6, by_epoch=True),
]
custom_hooks = [
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.002, update_buffers=True, priority=49),
    dict(type="PipelineSwitchHook", switch_epoch=6, switch_pipeline=train_pipeline_stage2),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=8))
