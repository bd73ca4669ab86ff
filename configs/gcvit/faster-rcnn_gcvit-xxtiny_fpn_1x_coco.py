# mmdet's Faster R-CNN with FPN on GCViT-xxtiny: `python tools/train.py` this file, or any mmdet tool
# after `import ddetr_mm`. Only what differs from the ResNet-50 config stands here.
_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["ddetr_mm.register"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="GCViT",
        variant="xxtiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        # init_cfg=dict(type="Pretrained", checkpoint="gcvit_xxtiny.pth"),  # timm's, TAO's or the authors'
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

# A transformer: AdamW, and no decay on norms and position tables.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys=dict(
            norm=dict(decay_mult=0.0),
            relative_position_bias_table=dict(decay_mult=0.0),
        )
    ),
)
