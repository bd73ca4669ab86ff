# Our Deformable DETR, boxes refined, on mmdet's Swin-T with its ImageNet weights.
_base_ = "mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"

custom_imports = dict(imports=["ddetr_mm.register"], allow_failed_imports=False)

model = dict(
    type="TAODeformableDETR",
    # As mmdet and the original authors have it: a prediction does not depend on its batch's padding.
    zero_padded_values=True,
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        convert_weights=True,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
            "swin_tiny_patch4_window7_224.pth",
        ),
    ),
    neck=dict(in_channels=[192, 384, 768]),
    bbox_head=dict(type="TAODeformableDETRHead"),
)
