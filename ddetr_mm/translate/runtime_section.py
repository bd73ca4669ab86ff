"""What surrounds a run: hooks, logging, visualisation, seeds, environment."""

from __future__ import annotations

from typing import Any

from ddetr_mm.spec import ExperimentSpec

CHECKPOINT_KEYS = ("train.checkpoint_interval", "train.checkpoint_interval_unit")
SEED_KEYS = ("train.seed", "train.cudnn.deterministic", "ddetr_mm.deterministic")


def default_hooks(spec: ExperimentSpec, *, train: bool, zero_padded_values: bool) -> dict[str, Any]:
    """mmengine's default hooks, with the reference's checkpoint names in place of mmengine's."""
    hooks: dict[str, Any] = dict(
        timer=dict(type="IterTimerHook"),
        logger=dict(type="LoggerHook", interval=spec.ddetr_mm.log_interval),
        param_scheduler=dict(type="ParamSchedulerHook"),
        sampler_seed=dict(type="DistSamplerSeedHook"),
    )
    if train:
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
    """Hooks of a run beyond mmengine's default ones."""
    hooks: list[dict[str, Any]] = [dict(type="ProgressHook")]
    if not train:
        return hooks
    pretrained = bool(spec.model.pretrained_backbone_path or spec.train.pretrained_model_path)
    hooks += [
        dict(type="StatusHook"),
        dict(type="AlarmHook", pretrained=pretrained),
        dict(type="CurvesHook"),
        dict(type="NonFiniteHook", action=spec.ddetr_mm.non_finite),
    ]
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
        cudnn_benchmark=spec.train.cudnn.benchmark,
        mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
        dist_cfg=dict(backend="nccl"),
    )


def visualizer() -> dict[str, Any]:
    """Scalars go to a JSON-lines file and to TensorBoard."""
    return dict(
        type="DetLocalVisualizer",
        name="visualizer",
        vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
    )
