# A small DINO on GCViT-xxtiny that learns the coloured shapes from random weights, on a CPU.
_base_ = ["../../configs/gcvit/dino_gcvit-xxtiny_8xb2-12e_coco.py", "../_base_/shapes.py"]

# 256 channels as in mmdet's config: its DINO decoder is made for no other number.
small_ffn = dict(feedforward_channels=256)
model = dict(
    num_queries=40,
    num_feature_levels=3,
    neck=dict(num_outs=3),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=dict(num_levels=3), ffn_cfg=small_ffn)),
    decoder=dict(num_layers=3, layer_cfg=dict(cross_attn_cfg=dict(num_levels=3), ffn_cfg=small_ffn)),
    bbox_head=dict(num_classes=4),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=40),
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
