# Blood cells (BCCD), converted from KITTI labels by configs/specs/bccd_convert.yaml: wbc 1, rbc 2,
# platelets 3, and column 0 for the background. All else is COCO's, at the size of these images.
_base_ = "coco_detection.py"

train_sources = [dict(image_dir="data/bccd", json_file="results/bccd/coco/train")]
val_sources = [dict(image_dir="data/bccd", json_file="results/bccd/coco/val")]
num_columns = 4

multi_scale = dict(
    type="TAORandomResize",
    scales=[480, 512, 544, 576, 608, 640],
    max_size=864,
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
    dict(type="Resize", scale=(864, 608), keep_ratio=True, backend="pillow", size_rule="tao"),
    dict(type="LoadAnnotations", with_bbox=True),  # after the resize: boxes in the frame of the file
    dict(type="TAOPackDetInputs"),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    dataset=dict(sources=train_sources, num_classes=num_columns, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(batch_size=8),
    dataset=dict(sources=val_sources, num_classes=num_columns, pipeline=test_pipeline),
)
test_dataloader = val_dataloader

val_evaluator = dict(sources=val_sources)
test_evaluator = val_evaluator
