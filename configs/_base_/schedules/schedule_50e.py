# 50 epochs, rates a tenth from epoch 40 on; the rate is meant for 32 images a step.
# Backbone, reference points and sampling offsets learn at a tenth of it.

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(
        custom_keys=dict(
            reference_points=dict(lr_mult=0.1),
            sampling_offsets=dict(lr_mult=0.1),
            backbone=dict(lr_mult=0.1),
        )
    ),
)
model_wrapper_cfg = dict(
    type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False, find_unused_parameters=False
)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[40], gamma=0.1)]

train_cfg = dict(type="ResumableTrainLoop", max_epochs=50, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=32)
