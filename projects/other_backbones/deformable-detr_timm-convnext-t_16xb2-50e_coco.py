# Our Deformable DETR, boxes refined, on timm's ConvNeXt-T with its ImageNet weights: no mmpretrain needed.
# `pip install timm`, and the project's root on PYTHONPATH for the backbone beside this file.
_base_ = "mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"

custom_imports = dict(
    imports=["ddetr_mm.register", "projects.other_backbones.timm_backbone"], allow_failed_imports=False
)

model = dict(
    type="TAODeformableDETR",
    # As mmdet and the original authors have it: a prediction does not depend on its batch's padding.
    zero_padded_values=True,
    backbone=dict(
        _delete_=True,
        type="TimmFeatures",
        model_name="convnext_tiny.in12k_ft_in1k",
        out_indices=(1, 2, 3),
        pretrained=True,
        drop_path_rate=0.4,
    ),
    neck=dict(in_channels=[192, 384, 768]),
    bbox_head=dict(type="TAODeformableDETRHead"),
)
