# Twin of configs/specs/deformable-detr-refine_gcvit-tiny_8xb4-50e_coco.yaml. The backbone starts from random
# weights: the published ones are for non-commercial use. Who may use them adds to the backbone
#   init_cfg=dict(type="Pretrained", checkpoint="gcvit_tiny.pth")
_base_ = [
    "../_base_/datasets/coco_detection.py",
    "../_base_/models/deformable-detr_r50.py",
    "../_base_/schedules/schedule_50e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    with_box_refine=True,
    activation_checkpoint=True,
    backbone=dict(
        _delete_=True,
        type="GCViT",
        variant="tiny",
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        with_cp=True,
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
