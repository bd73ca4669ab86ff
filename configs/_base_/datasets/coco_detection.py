# COCO 2017 as a spec's data sources describe it: labels are category ids (1 to 90), so class column 0 stays
# for the background. Training images are flipped and resized in one of two ways, as DETR does it; they stay
# 8-bit, the data preprocessor normalises them on the device.

train_sources = [
    dict(image_dir="data/coco/train2017", json_file="data/coco/annotations/instances_train2017.json")
]
val_sources = [dict(image_dir="data/coco/val2017", json_file="data/coco/annotations/instances_val2017.json")]
num_columns = 91

multi_scale = dict(
    type="TAORandomResize",
    scales=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    max_size=1333,
    backend="pillow",
)
crop_first = [
    dict(type="TAORandomResize", scales=[400, 500, 600], max_size=None, backend="pillow"),
    dict(type="TAORandomSizeCrop", min_size=384, max_size=600),
    multi_scale,
]
train_pipeline = [
    dict(type="TAOLoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[multi_scale], crop_first], prob=[0.5, 0.5]),
    dict(type="TAOPackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True, backend="pillow", size_rule="tao"),
    dict(type="LoadAnnotations", with_bbox=True),  # after the resize: boxes in the frame of the file
    dict(type="TAOPackDetInputs"),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    worker_init_fn=dict(type="signal_proof_worker_init"),
    sampler=dict(type="ElasticDistributedSampler", shuffle=True),
    batch_sampler=dict(type="ElasticBatchSampler", drop_last=True),
    dataset=dict(
        type="SerializedCocoDataset",
        sources=train_sources,
        label_mode="category_id",
        num_classes=num_columns,
        storage="shared",
        missing_images="error",
        pipeline=train_pipeline,
        test_mode=False,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    worker_init_fn=dict(type="signal_proof_worker_init"),
    sampler=dict(type="WholeBatchSampler", batch_size=4, equal_length=False),
    dataset=dict(
        type="SerializedCocoDataset",
        sources=val_sources,
        label_mode="category_id",
        num_classes=num_columns,
        storage="shared",
        missing_images="error",
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    type="FastCocoMetric", sources=val_sources, eval_class_ids=None, conf_threshold=0.0, classwise="table"
)
test_evaluator = val_evaluator
