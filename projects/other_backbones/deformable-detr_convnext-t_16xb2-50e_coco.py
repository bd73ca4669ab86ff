# Our Deformable DETR, boxes refined, on mmpretrain's ConvNeXt-T with its ImageNet weights.
# `pip install mmpretrain==1.2.0` first; README.md here tells what it does not run beside.
_base_ = "mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"

custom_imports = dict(imports=["ddetr_mm.register", "mmpretrain.models"], allow_failed_imports=False)

model = dict(
    type="TAODeformableDETR",
    # As mmdet and the original authors have it: a prediction does not depend on its batch's padding.
    zero_padded_values=True,
    backbone=dict(
        _delete_=True,
        type="mmpretrain.ConvNeXt",
        arch="tiny",
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        out_indices=(1, 2, 3),
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://download.openmmlab.com/mmclassification/v0/convnext/downstream/"
            "convnext-tiny_3rdparty_32xb128-noema_in1k_20220301-795e9634.pth",
            prefix="backbone.",
        ),
    ),
    neck=dict(in_channels=[192, 384, 768]),
    bbox_head=dict(type="TAODeformableDETRHead"),
)
