# mmdet's RTMDet-tiny on annotations that all ranks and workers share, scored by compiled code.
_base_ = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"

custom_imports = dict(imports=["ddetr_mm.register"], allow_failed_imports=False)

# The type is all that changes: paths, filter and pipeline are CocoDataset's.
train_dataloader = dict(dataset=dict(type="SerializedCocoDataset"))
val_dataloader = dict(dataset=dict(type="SerializedCocoDataset"))
test_dataloader = val_dataloader

# Anew, for it always reports 1, 10 and 100 detections an image and has no argument `proposal_nums`.
val_evaluator = dict(
    _delete_=True, type="FastCocoMetric", ann_file="data/coco/annotations/instances_val2017.json"
)
test_evaluator = val_evaluator
