"""What surrounds a run: hooks, logging, visualisation, seeds, environment."""

from __future__ import annotations

from typing import Any

from ddetr_mm.spec import ExperimentSpec

CHECKPOINT_KEYS = ("train.checkpoint_interval", "train.checkpoint_interval_unit")
SEED_KEYS = ("train.seed", "ddetr_mm.deterministic")
HOOK_KEYS = (
    "train.cudnn.benchmark",
    "train.cudnn.deterministic",
    "train.verbose",
    "train.is_dry_run",
    "train.pretrained_model_path",
    "model.pretrained_backbone_path",
)
WANDB_KEYS = tuple(
    f"wandb.{name}"
    for name in (
        "enable",
        "project",
        "entity",
        "group",
        "tags",
        "name",
        "run_id",
        "reinit",
        "sync_tensorboard",
        "save_code",
    )
)


def default_hooks(spec: ExperimentSpec, *, train: bool, zero_padded_values: bool) -> dict[str, Any]:
    """mmengine's default hooks, with the reference's checkpoint names in place of mmengine's."""
    hooks: dict[str, Any] = dict(
        timer=dict(type="IterTimerHook"),
        logger=dict(type="LoggerHook", interval=spec.ddetr_mm.log_interval),
        param_scheduler=dict(type="ParamSchedulerHook"),
        sampler_seed=dict(type="DistSamplerSeedHook"),
    )
    if train and not spec.train.is_dry_run:
        hooks["checkpoint"] = dict(
            type="TAOCheckpointHook",
            interval=spec.train.checkpoint_interval,
            unit=spec.train.checkpoint_interval_unit,
            extra_meta=dict(
                source_format="mmdet",
                label_mode="category_id",
                background_column=0,
                zero_padded_values=zero_padded_values,
            ),
        )
    else:
        hooks["checkpoint"] = None
    return hooks


def custom_hooks(spec: ExperimentSpec, *, train: bool) -> list[dict[str, Any]]:
    """Hooks of a run beyond mmengine's default ones; a dry run leaves a real run's curves alone."""
    hooks: list[dict[str, Any]] = [dict(type="ProgressHook")]
    if not train:
        return hooks
    cudnn = spec.train.cudnn
    hooks.append(dict(type="CudnnHook", benchmark=cudnn.benchmark, deterministic=cudnn.deterministic))
    pretrained = bool(spec.model.pretrained_backbone_path or spec.train.pretrained_model_path)
    hooks += [
        dict(type="StatusHook"),
        dict(type="AlarmHook", pretrained=pretrained),
        dict(type="NonFiniteHook", action=spec.ddetr_mm.non_finite),
    ]
    if not spec.train.is_dry_run:
        hooks.append(dict(type="CurvesHook"))
    if spec.train.verbose:
        hooks.append(dict(type="LearningRateHook"))
    if spec.ddetr_mm.accumulate_steps > 1:
        hooks.append(dict(type="AccumulationHook"))
    if spec.ddetr_mm.lr_scaling != "none":
        hooks.append(
            dict(
                type="ScaledLearningRateHook",
                batch_size=spec.dataset.batch_size,
                base_batch_size=spec.ddetr_mm.lr_base_batch or spec.dataset.batch_size,
                rule=spec.ddetr_mm.lr_scaling,
            )
        )
    if spec.train.distributed_strategy == "fsdp":
        hooks.append(dict(type="WholeCheckpointHook"))
    if spec.ddetr_mm.missing_images == "replace":
        hooks.append(dict(type="ReplacedImagesHook"))
    if spec.ddetr_mm.time_ledger:
        hooks.append(dict(type="TimeLedgerHook"))
    if pretrained:
        hooks.append(
            dict(
                type="PretrainedWeightsHook",
                backbone_path=spec.model.pretrained_backbone_path,
                model_path=spec.train.pretrained_model_path,
            )
        )
    return hooks


def randomness(spec: ExperimentSpec) -> dict[str, Any]:
    """Seeds for random, numpy and torch; a negative seed lets every run differ."""
    seed = spec.train.seed if spec.train.seed >= 0 else None
    return dict(seed=seed, deterministic=spec.ddetr_mm.deterministic, diff_rank_seed=False)


def environment(spec: ExperimentSpec) -> dict[str, Any]:
    """Process settings of mmengine's Runner."""
    return dict(
        mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
        dist_cfg=dict(backend="nccl"),
    )


def visualizer(spec: ExperimentSpec, *, train: bool) -> dict[str, Any]:
    """Scalars go to a JSON-lines file and to TensorBoard; those of training also to Weights & Biases."""
    backends: list[dict[str, Any]] = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    if train and spec.wandb.enable and not spec.train.is_dry_run:
        # First, because it has to see TensorBoard's writer being opened.
        backends.insert(0, wandb_backend(spec))
    return dict(type="DetLocalVisualizer", name="visualizer", vis_backends=backends)


def wandb_backend(spec: ExperimentSpec) -> dict[str, Any]:
    """The report to Weights & Biases, which stays silent where its package or an account is missing."""
    settings = spec.wandb
    return dict(
        type="WandbBackend",
        project=settings.project,
        entity=settings.entity or None,
        group=settings.group or None,
        tags=list(settings.tags),
        name=settings.name,
        run_id=settings.run_id,
        reinit=settings.reinit,
        sync_tensorboard=settings.sync_tensorboard,
        save_code=settings.save_code,
    )
