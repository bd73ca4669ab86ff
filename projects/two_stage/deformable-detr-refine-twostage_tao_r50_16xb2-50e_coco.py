# Two-stage Deformable DETR: mmdet's config with `as_two_stage=True`, our network and TAO's pipeline.
_base_ = "mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py"

custom_imports = dict(imports=["ddetr_mm.register"], allow_failed_imports=False)

model = dict(
    type="TAODeformableDETR",
    # As mmdet and the original authors have it, whose weights then mean the same here.
    zero_padded_values=True,
    data_preprocessor=dict(type="FixedPadDetDataPreprocessor", pad_short_long=(800, 1333)),
    bbox_head=dict(type="TAODeformableDETRHead"),
)

resize = dict(
    type="TAORandomResize", scales=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], max_size=1333
)
train_pipeline = [
    dict(type="TAOLoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        prob=[0.5, 0.5],
        transforms=[
            [resize],
            [
                dict(type="TAORandomResize", scales=[400, 500, 600]),
                dict(type="TAORandomSizeCrop", min_size=384, max_size=600),
                resize,
            ],
        ],
    ),
    dict(type="TAOPackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True, backend="pillow", size_rule="tao"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="TAOPackDetInputs"),
]
train_dataloader = dict(dataset=dict(type="SerializedCocoDataset", pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type="SerializedCocoDataset", pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type="FastCocoMetric")
test_evaluator = val_evaluator
