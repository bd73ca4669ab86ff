# Twin of configs/specs/bccd_resnet50.yaml: blood cells from random weights on one GPU.
_base_ = [
    "../_base_/datasets/bccd_detection.py",
    "../_base_/models/deformable-detr_r50.py",
    "../_base_/schedules/schedule_50e.py",
    "../_base_/default_runtime.py",
]

attention = dict(dropout=0.0)
feed_forward = dict(ffn_drop=0.0)
layers = dict(self_attn_cfg=attention, ffn_cfg=feed_forward)

model = dict(
    num_queries=200,
    with_box_refine=True,
    data_preprocessor=dict(
        pad_short_long=(608, 864),
        train_padding=dict(pad_short_long=(640, 864), pad_size_divisor=1),
    ),
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=[1, 2, 3],
        # From random weights the norm layers must learn.
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
    ),
    encoder=dict(layer_cfg=layers),
    decoder=dict(
        layer_cfg=dict(
            self_attn_cfg=dict(attn_drop=0.0, dropout_layer=dict(drop_prob=0.0)),
            cross_attn_cfg=attention,
            ffn_cfg=feed_forward,
        )
    ),
    bbox_head=dict(num_classes=4),
)

optim_wrapper = dict(
    type="MixedPrecisionOptimWrapper",
    dtype="bfloat16",
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))),
)
model_wrapper_cfg = dict(find_unused_parameters=True)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[240], gamma=0.1)]
train_cfg = dict(max_epochs=300, val_interval=10)
default_hooks = dict(checkpoint=dict(interval=20))
auto_scale_lr = dict(base_batch_size=8)
