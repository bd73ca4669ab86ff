# A small two-stage Deformable DETR that learns the coloured shapes from random weights, on a CPU.
_base_ = ["deformable-detr-refine-twostage_tao_r50_16xb2-50e_coco.py", "../_base_/shapes.py"]

model = dict(
    data_preprocessor=dict(pad_short_long=None),
    # ResNet-18 of half width; its norms must learn, for there are no pretrained ones.
    backbone=dict(
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_cfg=dict(requires_grad=True),
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256], out_channels=128, num_outs=3),
    **_base_.small_detr,
)
train_dataloader = dict(_delete_=True, **_base_.shapes.train_dataloader)
val_dataloader = dict(_delete_=True, **_base_.shapes.val_dataloader)
test_dataloader = dict(_delete_=True, **_base_.shapes.test_dataloader)
val_evaluator = dict(_delete_=True, **_base_.shapes.val_evaluator)
test_evaluator = dict(_delete_=True, **_base_.shapes.test_evaluator)

optim_wrapper = _base_.shapes_schedule.optim_wrapper
train_cfg = _base_.shapes_schedule.train_cfg
param_scheduler = _base_.shapes_schedule.param_scheduler
default_hooks = _base_.shapes_schedule.default_hooks
