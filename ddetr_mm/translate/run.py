"""Translates the spec sections ``train`` and ``wandb``: optimizer, schedule, loops, hooks, logging, seeds."""

from __future__ import annotations

from typing import Any

from ddetr_mm.spec import ExperimentSpec
from ddetr_mm.translate.model import ParameterNames, parameters_with, whole_modules

# --- optimizer, schedule and loops ---

OPTIM_KEYS = (
    "train.optim.optimizer",
    "train.optim.lr",
    "train.optim.lr_backbone",
    "train.optim.lr_linear_proj_mult",
    "train.optim.weight_decay",
    "train.optim.momentum",
    "train.clip_grad_norm",
    "train.precision",
    "ddetr_mm.accumulate_steps",
    "model.backbone_names",
    "model.linear_proj_names",
)
SCHEDULER_KEYS = (
    "train.optim.lr_scheduler",
    "train.optim.lr_steps",
    "train.optim.lr_step_size",
    "train.optim.lr_decay",
)


SAME_IN_BOTH = {
    "backbone": "backbone",
    "backbone.0": "backbone",
    "reference_points": "reference_points",
    "sampling_offsets": "sampling_offsets",
}
"""Part of TAO's parameter names → the part of ours that selects the same parameters."""


def needs_parameter_names(spec: ExperimentSpec) -> bool:
    """Whether the groups of learning rates depend on the network's parameters."""
    return not SAME_IN_BOTH.keys() >= {*spec.model.backbone_names, *spec.model.linear_proj_names}


def _keys_of(keywords: list[str], names: ParameterNames) -> list[str]:
    """Parts of our parameter names that select what ``keywords`` select in TAO."""
    keys: list[str] = []
    for keyword in keywords:
        if keyword in SAME_IN_BOTH:
            keys.append(SAME_IN_BOTH[keyword])
        else:
            keys += whole_modules(parameters_with(keyword, names), names)
    return keys


def unmatched_keywords(spec: ExperimentSpec, names: ParameterNames) -> list[str]:
    """One line for each name of a group of learning rates that no parameter contains."""
    return [
        f"model.{field}: no parameter's name contains {keyword!r}"
        for field in ("backbone_names", "linear_proj_names")
        for keyword in getattr(spec.model, field)
        if not _keys_of([keyword], names)
    ]


def optim_wrapper(spec: ExperimentSpec, names: ParameterNames | None = None) -> dict[str, Any]:
    """The optimizer with TAO's three groups of learning rates.

    The groups are selected by parts of parameter names: the backbone, the linear projections (sampling
    offsets and reference points), and all others.

    Args:
        spec: a checked experiment spec.
        names: the network's parameters; needed where :func:`needs_parameter_names`.
    """
    optim = spec.train.optim
    optimizer = dict(type=optim.optimizer, lr=optim.lr, weight_decay=optim.weight_decay)
    if optim.optimizer == "SGD":
        optimizer["momentum"] = optim.momentum
    # Saves about 0.15 s a step on a CPU. Not with a loss scaler: the fused step is also called with
    # gradients that the scaler skips.
    optimizer["fused"] = spec.train.precision != "fp16"
    groups = {
        key: dict(lr_mult=optim.lr_linear_proj_mult)
        for key in _keys_of(spec.model.linear_proj_names, names or {})
    }
    groups |= {
        key: dict(lr_mult=optim.lr_backbone / optim.lr)
        for key in _keys_of(spec.model.backbone_names, names or {})
    }
    wrapper: dict[str, Any] = dict(type="OptimWrapper", optimizer=optimizer)
    if spec.train.precision != "fp32":
        wrapper["type"] = "MixedPrecisionOptimWrapper"
        wrapper["dtype"] = {"fp16": "float16", "bf16": "bfloat16"}[spec.train.precision]
    if spec.train.clip_grad_norm > 0:
        wrapper["clip_grad"] = dict(max_norm=spec.train.clip_grad_norm, norm_type=2)
    if spec.ddetr_mm.accumulate_steps > 1:
        wrapper["accumulative_counts"] = spec.ddetr_mm.accumulate_steps
    wrapper["paramwise_cfg"] = dict(custom_keys=groups)
    return wrapper


def param_scheduler(spec: ExperimentSpec) -> list[dict[str, Any]]:
    """The learning-rate schedule, in epochs."""
    optim = spec.train.optim
    if optim.lr_scheduler == "StepLR":
        return [dict(type="StepLR", by_epoch=True, step_size=optim.lr_step_size, gamma=optim.lr_decay)]
    return [dict(type="MultiStepLR", by_epoch=True, milestones=list(optim.lr_steps), gamma=optim.lr_decay)]


def auto_scale_lr(spec: ExperimentSpec) -> dict[str, Any]:
    """The batch on all GPUs that the rates are meant for; ``train.py --auto-scale-lr`` of mmdet reads it."""
    batch = spec.dataset.batch_size * spec.train.num_gpus * spec.train.num_nodes
    return dict(enable=False, base_batch_size=spec.ddetr_mm.lr_base_batch or batch)


def model_wrapper(spec: ExperimentSpec) -> dict[str, Any]:
    """The wrapper of the network with several ranks.

    ``device_ids`` is None, since the network is on its device already. Unused parameters are searched only
    where there can be any: without auxiliary losses, and in a backbone of ``ddetr_mm.backbone``.
    """
    may_be_unused = not spec.model.aux_loss or spec.ddetr_mm.backbone is not None
    return dict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=may_be_unused,
    )


def train_loop(spec: ExperimentSpec) -> dict[str, Any]:
    """The training loop; validation runs every ``validation_interval`` epochs and after the last one.

    A dry run has one epoch of one step and validates.
    """
    dry = spec.train.is_dry_run
    loop: dict[str, Any] = dict(
        type="ResumableTrainLoop",
        max_epochs=1 if dry else spec.train.num_epochs,
        val_interval=1 if dry else spec.train.validation_interval,
    )
    if spec.ddetr_mm.max_hours is not None and not dry:
        loop["max_hours"] = spec.ddetr_mm.max_hours
    if spec.ddetr_mm.stop_after_epoch is not None and not dry:
        loop["stop_after_epoch"] = spec.ddetr_mm.stop_after_epoch
    return loop


# --- hooks, logging, seeds and environment ---

CHECKPOINT_KEYS = (
    "train.checkpoint_interval",
    "train.checkpoint_interval_unit",
    "train.checkpointer.replace_periodic",
)
SEED_KEYS = ("train.seed", "ddetr_mm.deterministic")
FLOAT_KEYS = ("ddetr_mm.tf32",)
FLOAT_SUBTASKS = ("train", "evaluate", "inference")
HOOK_KEYS = (
    *FLOAT_KEYS,
    "train.cudnn.benchmark",
    "train.cudnn.deterministic",
    "train.verbose",
    "train.is_dry_run",
    "train.pretrained_model_path",
    "model.pretrained_backbone_path",
    "ddetr_mm.checkpoint_entry",
    "ddetr_mm.use_ema",
    "ddetr_mm.validation_loss",
    "ddetr_mm.validation_pictures",
    "train.checkpointer.enable_topk",
    "train.checkpointer.monitor",
    "train.checkpointer.mode",
    "train.checkpointer.save_top_k",
    "train.checkpointer.filename",
    "train.checkpointer.dirpath",
    "train.checkpointer.auto_insert_metric_name",
    "ddetr_mm.keep_best",
    "ddetr_mm.early_stopping.patience",
    "ddetr_mm.early_stopping.monitor",
    "ddetr_mm.early_stopping.mode",
    "ddetr_mm.early_stopping.min_delta",
    "ddetr_mm.ema",
    "ddetr_mm.ema_momentum",
    "ddetr_mm.resume_optimizer",
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
    """mmengine's default hooks, with TAO's checkpoint names."""
    hooks: dict[str, Any] = dict(
        timer=dict(type="IterTimerHook"),
        logger=dict(type="LoggerHook", interval=spec.ddetr_mm.log_interval),
        param_scheduler=dict(type="ParamSchedulerHook"),
        sampler_seed=dict(type="DistSamplerSeedHook"),
        # Draws where mmdet's test.py is asked to, with --show or --show-dir.
        visualization=dict(type="DetVisualizationHook"),
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
                **({"numbered_by_name": True} if spec.ddetr_mm.category_ids == "by_name" else {}),
            ),
        )
        if spec.train.checkpointer.enable_topk and spec.train.checkpointer.replace_periodic:
            hooks["checkpoint"]["max_keep"] = 1  # what a stopped run resumes from
    else:
        hooks["checkpoint"] = None
    return hooks


def custom_hooks(spec: ExperimentSpec, subtask: str) -> list[dict[str, Any]]:
    """Hooks beyond mmengine's default ones; a dry run draws no curves, so that those of a real run stay."""
    train = subtask == "train"
    hooks: list[dict[str, Any]] = [dict(type="ProgressHook")]
    if subtask in FLOAT_SUBTASKS:
        hooks.append(dict(type="TF32Hook", tf32=spec.ddetr_mm.tf32))
    if not train:
        return hooks
    cudnn = spec.train.cudnn
    hooks.append(dict(type="CudnnHook", benchmark=cudnn.benchmark, deterministic=cudnn.deterministic))
    pretrained = bool(spec.model.pretrained_backbone_path or spec.train.pretrained_model_path)
    hooks += [
        dict(type="ResumeHook", optimizer=spec.ddetr_mm.resume_optimizer),
        dict(type="StatusHook"),
        dict(type="AlarmHook", pretrained=pretrained),
        dict(type="NonFiniteHook", action=spec.ddetr_mm.non_finite),
    ]
    if spec.ddetr_mm.validation_loss:
        hooks.append(dict(type="ValidationLossHook"))
    if spec.ddetr_mm.validation_pictures:
        hooks.append(dict(type="ValidationPicturesHook", pictures=spec.ddetr_mm.validation_pictures))
    if not spec.train.is_dry_run:
        hooks.append(dict(type="CurvesHook"))
        hooks += selection_hooks(spec)
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
    if spec.ddetr_mm.profile:
        hooks.append(dict(type="StepProfilerHook"))
    if pretrained:
        whole = spec.train.pretrained_model_path
        hooks.append(
            dict(
                type="PretrainedWeightsHook",
                backbone_path=None if whole else spec.model.pretrained_backbone_path,
                model_path=whole,
                **weights_selection(spec),
            )
        )
    return hooks


def selection_hooks(spec: ExperimentSpec) -> list[dict[str, Any]]:
    """Averaged weights, early stopping and the best checkpoints."""
    hooks: list[dict[str, Any]] = []
    own, chosen = spec.ddetr_mm, spec.train.checkpointer
    if own.ema:
        hooks.append(dict(type="AveragedWeightsHook", momentum=own.ema_momentum))
    if own.early_stopping.patience is not None:
        hooks.append(dict(type="ResumableEarlyStoppingHook", **own.early_stopping.model_dump()))
    if chosen.enable_topk:
        options = chosen.model_dump(exclude={"enable_topk", "replace_periodic"})
        options["monitor"] = chosen.monitor or "val_mAP50"
        options["dirpath"] = chosen.dirpath or None
        hooks.append(dict(type="BestCheckpointHook", **options))
    elif own.keep_best:
        hooks.append(dict(type="BestCheckpointHook"))
    return hooks


def weights_selection(spec: ExperimentSpec) -> dict[str, Any]:
    """Which set of a checkpoint's weights is read, as far as the spec says it."""
    own = spec.ddetr_mm
    entry = {} if own.checkpoint_entry is None else {"entry": own.checkpoint_entry}
    return entry if own.use_ema == "auto" else {**entry, "use_ema": own.use_ema}


def randomness(spec: ExperimentSpec) -> dict[str, Any]:
    """Seeds for random, numpy and torch; a negative seed is a random one."""
    seed = spec.train.seed if spec.train.seed >= 0 else None
    return dict(seed=seed, deterministic=spec.ddetr_mm.deterministic, diff_rank_seed=False)


def environment(spec: ExperimentSpec) -> dict[str, Any]:
    """Process settings of mmengine's Runner."""
    return dict(
        mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
        dist_cfg=dict(backend="nccl"),
    )


def visualizer(spec: ExperimentSpec, *, train: bool) -> dict[str, Any]:
    """Scalars go to a JSON-lines file and TensorBoard, and in training to Weights & Biases."""
    backends: list[dict[str, Any]] = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    if train and spec.wandb.enable and not spec.train.is_dry_run:
        # First, since it must be set up before TensorBoard's writer is opened.
        backends.insert(0, wandb_backend(spec))
    return dict(type="DetLocalVisualizer", name="visualizer", vis_backends=backends)


def wandb_backend(spec: ExperimentSpec) -> dict[str, Any]:
    """The Weights & Biases backend; without its package or an account it only logs a warning."""
    settings = spec.wandb
    return dict(
        type="WandbBackend",
        announce=bool(settings.model_fields_set),  # TAO's default asks for reports, most users never did
        project=settings.project,
        entity=settings.entity or None,
        group=settings.group or None,
        tags=list(settings.tags),
        run_name=settings.name,
        run_id=settings.run_id,
        reinit=settings.reinit,
        sync_tensorboard=settings.sync_tensorboard,
        save_code=settings.save_code,
    )
