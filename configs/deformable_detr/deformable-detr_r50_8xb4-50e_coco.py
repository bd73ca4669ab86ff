# Twin of configs/specs/deformable-detr_r50_8xb4-50e_coco.yaml.
#   tools/dist_train.sh configs/deformable_detr/deformable-detr_r50_8xb4-50e_coco.py 8
_base_ = [
    "../_base_/datasets/coco_detection.py",
    "../_base_/models/deformable-detr_r50.py",
    "../_base_/schedules/schedule_50e.py",
    "../_base_/default_runtime.py",
]

custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="TF32Hook", tf32=True),
    dict(type="CudnnHook", benchmark=False, deterministic=True),
    dict(type="ResumeHook", optimizer="from_checkpoint"),
    dict(type="StatusHook"),
    dict(type="AlarmHook", pretrained=True),
    dict(type="NonFiniteHook", action="stop"),
    dict(type="ValidationLossHook"),
    dict(type="CurvesHook"),
    dict(type="BestCheckpointHook"),
    # torchvision's weights, read without running code from the file; fetch them once:
    #   curl -L -o pretrained/resnet50-0676ba61.pth https://download.pytorch.org/models/resnet50-0676ba61.pth
    dict(type="PretrainedWeightsHook", backbone_path="pretrained/resnet50-0676ba61.pth", model_path=None),
]
