# What surrounds a run: hooks, logs, seeds. The folder of results is chosen by the tool (`--work-dir`).

default_scope = "mmdet"
custom_imports = dict(imports=["ddetr_mm.register"], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook"),
    checkpoint=dict(
        type="TAOCheckpointHook",
        interval=1,
        unit="epoch",
        # What a reader of the weights must know; model.zero_padded_values stands here once more.
        extra_meta=dict(
            source_format="mmdet", label_mode="category_id", background_column=0, zero_padded_values=False
        ),
    ),
)
custom_hooks = [
    dict(type="ProgressHook"),
    dict(type="TF32Hook", tf32=True),
    dict(type="CudnnHook", benchmark=False, deterministic=True),
    dict(type="ResumeHook", optimizer="from_checkpoint"),
    dict(type="StatusHook"),
    dict(type="AlarmHook", pretrained=False),
    dict(type="NonFiniteHook", action="stop"),
    dict(type="ValidationLossHook"),
    dict(type="CurvesHook"),
    dict(type="BestCheckpointHook"),
]

visualizer = dict(
    type="DetLocalVisualizer",
    name="visualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
)
randomness = dict(seed=1234, deterministic=False, diff_rank_seed=False)
env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl"))
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
log_level = "INFO"
load_from = None
resume = False
