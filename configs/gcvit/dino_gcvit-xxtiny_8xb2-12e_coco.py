# mmdet's DINO, four scales, on GCViT-xxtiny: `python tools/train.py` this file, or any mmdet tool
# after `import ddetr_mm`. Only what differs from the ResNet-50 config stands here.
_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"

custom_imports = dict(imports=["ddetr_mm.register"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="GCViT",
        variant="xxtiny",
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        # init_cfg=dict(type="Pretrained", checkpoint="gcvit_xxtiny.pth"),  # timm's, TAO's or the authors'
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
