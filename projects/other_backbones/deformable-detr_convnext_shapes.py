# mmpretrain's smallest ConvNeXt, learning the coloured shapes from random weights, on a CPU.
_base_ = ["deformable-detr_convnext-t_16xb2-50e_coco.py", "../_base_/shapes.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmpretrain.ConvNeXt",
        arch="atto",
        drop_path_rate=0.1,
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[80, 160, 320], out_channels=128, num_outs=3),
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
