"""Translates an experiment spec into an mmengine config: :func:`to_config`.

The sections come in reading order: model, data, schedule, run. Their contents are in the modules
:mod:`~ddetr_mm.translate.model`, :mod:`~ddetr_mm.translate.data` and :mod:`~ddetr_mm.translate.run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddetr_mm.compat.config_text import ConfigDraft, Reference, config_text
from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec import ExperimentSpec, LoadedSpec, get_field, task_results_dir
from ddetr_mm.spec.schema import DataSource, InferSource
from ddetr_mm.translate import data, model, run

SUBTASKS = ("train", "evaluate", "inference", "export")

ChannelLookup = Callable[[dict[str, Any]], list[int]]


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """An exported graph that replaces the network.

    Attributes:
        model: class and file, as in a config: ``dict(type="OnnxDetector", onnx_file=…)``.
        input_size_wh: its input size in pixels; images are resized to it whatever their aspect ratio, as in
            TAO Deploy.
    """

    model: dict[str, Any]
    input_size_wh: tuple[int, int]


def to_config(
    loaded: LoadedSpec,
    subtask: str,
    *,
    zero_padded_values: bool | None = None,
    class_names: Sequence[str] | None = None,
    look_up_channels: ChannelLookup | None = None,
    exported: ExportedModel | None = None,
    numbering: data.Numbering | None = None,
) -> ConfigDraft:
    """Translate a spec for one subtask.

    Args:
        loaded: the result of :func:`ddetr_mm.spec.load_spec`.
        subtask: one of :data:`SUBTASKS`.
        zero_padded_values: the setting of the checkpoint, used where the spec does not set
            ``ddetr_mm.zero_padded_values``; None is False.
        class_names: the checkpoint's class names by label, for the detections of inference.
        look_up_channels: returns the output channels of a backbone config; needed where the spec sets
            ``ddetr_mm.backbone``.
        exported: for ``evaluate`` and ``inference``, an exported graph that replaces the network.
        numbering: class names that ids are numbered by; None with ``ddetr_mm.category_ids: by_name`` reads
            them from the annotation files.

    Raises:
        SpecError: the subtask has no config, or ``train.freeze`` names no part of the network.
        ValueError: the spec sets ``ddetr_mm.backbone`` and ``look_up_channels`` is missing.
    """
    if subtask not in SUBTASKS:
        raise SpecError(Problem("has no mmengine config", where="subtask", value=subtask, allowed=SUBTASKS))
    spec = loaded.spec
    zeroed = spec.ddetr_mm.zero_padded_values
    if zeroed is None:
        zeroed = bool(zero_padded_values)
    channels = None
    if spec.ddetr_mm.backbone and exported is None:
        if look_up_channels is None:
            raise ValueError("a spec with ddetr_mm.backbone needs look_up_channels")
        channels = look_up_channels(dict(spec.ddetr_mm.backbone))

    if numbering is None and subtask in ("train", "evaluate") and data.numbers_by_name(spec, subtask):
        numbering = data.numbered_names(spec, subtask)

    draft = ConfigDraft()
    draft.add("default_scope", "mmdet")
    draft.add(
        "custom_imports",
        dict(
            imports=["ddetr_mm.register", *(["ddetr_mm.deploy.detectors"] if exported else [])],
            allow_failed_imports=False,
        ),
        remark="Registers the components of ddetr_mm with mmdet.",
    )
    names = _add_network(draft, loaded, subtask, zeroed, channels, exported)
    if subtask == "inference":
        _add_inference(draft, spec, class_names, exported)
    elif subtask == "evaluate":
        _add_evaluate(draft, spec, exported, numbering)
    elif subtask == "train":
        _add_train(draft, spec, numbering, names)
    else:
        _add_export(draft, spec)
    _add_run(draft, spec, subtask, zeroed)
    return draft


def _add_network(
    draft: ConfigDraft,
    loaded: LoadedSpec,
    subtask: str,
    zeroed: bool,
    channels: list[int] | None,
    exported: ExportedModel | None,
) -> model.ParameterNames:
    """Add the section ``model``; returns the parameters by TAO's names where the spec names any."""
    spec = loaded.spec
    if exported:
        network = model.exported_detector(spec, exported.model)
    else:
        network = model.detector(
            spec,
            zero_padded_values=zeroed,
            channels=channels,
            for_export=subtask == "export",
            train=subtask == "train",
            padded=subtask != "export" and _stretched_wh(spec, subtask) is None,
        )
    names: model.ParameterNames = {}
    if subtask == "train" and (spec.train.freeze or run.needs_parameter_names(spec)):
        names = model.taos_parameter_names(network)
        named = model.frozen_by_name(loaded, names)
        network["frozen_modules"] = list(dict.fromkeys([*network["frozen_modules"], *named]))
        draft.notes += run.unmatched_keywords(spec, names)
    draft.add("model", network, model.EXPORTED_KEYS if exported else model.SOURCE_KEYS, remark="The network.")
    return names


def _add_train(
    draft: ConfigDraft,
    spec: ExperimentSpec,
    numbering: data.Numbering | None,
    names: model.ParameterNames,
) -> None:
    train_sources = data.plain_sources(spec.dataset.train_data_sources or [])
    val_sources = data.plain_sources(spec.dataset.val_data_sources or [])
    draft.add(
        "train_pipeline",
        data.train_pipeline(spec),
        data.AUGMENTATION_KEYS,
        "Transforms of a training image.",
    )
    draft.add(
        "test_pipeline",
        data.test_pipeline(spec),
        data.TEST_PIPELINE_KEYS,
        "Transforms of a validation image.",
    )
    train_data = data.coco_dataset(
        spec, train_sources, Reference("train_pipeline"), test_mode=False, numbering=numbering
    )
    val_data = data.coco_dataset(
        spec, val_sources, Reference("test_pipeline"), test_mode=True, numbering=numbering
    )
    if spec.train.is_dry_run:
        train_data = data.one_step_of(spec, train_data)
        val_data = data.one_step_of(spec, val_data)
    draft.add(
        "train_dataloader",
        data.dataloader(spec, train_data, train=True),
        ("dataset.train_data_sources", *data.LOADER_KEYS),
        "The data; labels are category ids, so class column 0 is the background.",
    )
    draft.add("val_dataloader", data.dataloader(spec, val_data, train=False), ("dataset.val_data_sources",))
    draft.add("test_dataloader", Reference("val_dataloader"))
    # evaluate.conf_threshold is evaluate's own: TAO validates with every prediction.
    draft.add(
        "val_evaluator",
        data.evaluator(spec, val_sources, 0.0, **data.category_options(spec, numbering)),
        ("dataset.eval_class_ids",),
        "COCO's metrics.",
    )
    draft.add("test_evaluator", Reference("val_evaluator"))
    draft.add(
        "optim_wrapper",
        run.optim_wrapper(spec, names),
        run.OPTIM_KEYS,
        "The optimizer; custom_keys scale the learning rate of parameters whose names contain a key.",
    )
    if spec.train.distributed_strategy == "fsdp":
        name, value = "runner_type", "ShardedRunner"
    else:
        name, value = "model_wrapper_cfg", run.model_wrapper(spec)
    remark = "With several ranks the network is replicated (ddp) or sharded (fsdp)."
    draft.add(name, value, ("train.distributed_strategy",), remark)
    draft.add(
        "param_scheduler",
        run.param_scheduler(spec),
        run.SCHEDULER_KEYS,
        "The schedule, in epochs.",
    )
    draft.add(
        "train_cfg",
        run.train_loop(spec),
        (
            *("train.num_epochs", "train.validation_interval", "train.is_dry_run"),
            *("ddetr_mm.max_hours", "ddetr_mm.stop_after_epoch"),
        ),
    )
    draft.add("val_cfg", dict(type="ValLoop"))
    draft.add("test_cfg", dict(type="TestLoop"))
    if spec.ddetr_mm.lr_scaling == "none":  # else a hook scales the rates already
        draft.add("auto_scale_lr", run.auto_scale_lr(spec), remark="For mmdet's train.py --auto-scale-lr.")


def _add_evaluate(
    draft: ConfigDraft,
    spec: ExperimentSpec,
    exported: ExportedModel | None,
    numbering: data.Numbering | None,
) -> None:
    sources = data.plain_sources(_test_sources(spec))
    stretch = exported.input_size_wh if exported else _stretched_wh(spec, "evaluate")
    draft.add(
        "test_pipeline",
        data.test_pipeline(spec, stretch_wh=stretch, stretch_backend="cv2" if exported else "pillow"),
        (*data.TEST_PIPELINE_KEYS, "evaluate.input_width", "evaluate.input_height"),
        "Transforms of an image.",
    )
    dataset = data.coco_dataset(
        spec, sources, Reference("test_pipeline"), test_mode=True, numbering=numbering
    )
    draft.add(
        "test_dataloader",
        data.dataloader(spec, dataset, train=False, batch_size=spec.evaluate.batch_size),
        ("dataset.test_data_sources", "evaluate.batch_size", *data.LOADER_KEYS),
        "The data; labels are category ids, so class column 0 is the background.",
    )
    folder = str(task_results_dir(spec, "evaluate"))
    options = data.category_options(spec, numbering)
    metric = data.evaluator(spec, sources, spec.evaluate.conf_threshold, results_dir=folder, **options)
    draft.add(
        "test_evaluator", metric, ("dataset.eval_class_ids", "evaluate.conf_threshold"), "COCO's metrics."
    )
    draft.add("test_cfg", dict(type="TestLoop"))


def _stretched_wh(spec: ExperimentSpec, subtask: str) -> tuple[int, int] | None:
    """The width and height that evaluation or inference resizes every image to; None keeps the ratio."""
    settings = {"evaluate": spec.evaluate, "inference": spec.inference}.get(subtask)
    if settings is None or not settings.input_width or not settings.input_height:
        return None
    return settings.input_width, settings.input_height


def _test_sources(spec: ExperimentSpec) -> list[DataSource]:
    """The test source, or the validation sources where the spec has no test data."""
    if spec.dataset.test_data_sources:
        return [spec.dataset.test_data_sources]
    return list(spec.dataset.val_data_sources or [])


def _add_inference(
    draft: ConfigDraft,
    spec: ExperimentSpec,
    class_names: Sequence[str] | None,
    exported: ExportedModel | None,
) -> None:
    settings = spec.inference
    stretch = exported.input_size_wh if exported else _stretched_wh(spec, "inference")
    backend = "cv2" if exported else "pillow"
    steps = data.test_pipeline(spec, stretch_wh=stretch, with_annotations=False, stretch_backend=backend)
    keys = (*data.TEST_PIPELINE_KEYS, "inference.input_width", "inference.input_height")
    draft.add("test_pipeline", steps, keys, "Transforms of an image.")
    infer_source = spec.dataset.infer_data_sources or InferSource()
    dataset = dict(
        type="ImageFolderDataset",
        folders=list(infer_source.image_dir),
        unreadable="error" if spec.ddetr_mm.strict_images else "skip",
        metainfo=dict(classes=tuple(class_names)) if class_names else None,
        pipeline=Reference("test_pipeline"),
    )
    draft.add(
        "test_dataloader",
        data.dataloader(spec, dataset, train=False, batch_size=settings.batch_size),
        (
            "dataset.infer_data_sources",
            "ddetr_mm.strict_images",
            "inference.batch_size",
            "dataset.batch_size",
            "dataset.workers",
            "ddetr_mm.data_timeout_s",
        ),
    )
    draft.add(
        "test_evaluator",
        dict(
            type="DetectionWriter",
            output_dir=str(task_results_dir(spec, "inference")),
            folders=list(infer_source.image_dir),
            conf_threshold=settings.conf_threshold,
            color_map=dict(settings.color_map) if settings.color_map else None,
            # Not given: by the picture's size.
            outline_width=settings.outline_width if "outline_width" in settings.model_fields_set else None,
            per_sequence=settings.is_internal,
            class_names_file=infer_source.classmap,
        ),
        tuple(
            f"inference.{name}" for name in ("conf_threshold", "color_map", "outline_width", "is_internal")
        ),
        remark="Writes label files and annotated images.",
    )
    draft.add("test_cfg", dict(type="TestLoop"))


def _add_export(draft: ConfigDraft, spec: ExperimentSpec) -> None:
    settings = spec.export
    stretch = (settings.input_width, settings.input_height)
    steps = data.test_pipeline(spec, stretch_wh=stretch, with_annotations=False)
    draft.add(
        "test_pipeline", steps, ("export.input_width", "export.input_height"), "Transforms of an image."
    )


def _add_run(draft: ConfigDraft, spec: ExperimentSpec, subtask: str, zeroed: bool) -> None:
    train = subtask == "train"
    folder = task_results_dir(spec, subtask)
    draft.add(
        "default_hooks",
        run.default_hooks(spec, train=train, zero_padded_values=zeroed),
        run.CHECKPOINT_KEYS if train else (),
        "Hooks, logging and seeds.",
    )
    draft.add(
        "custom_hooks",
        run.custom_hooks(spec, subtask),
        run.HOOK_KEYS if train else run.FLOAT_KEYS if subtask in run.FLOAT_SUBTASKS else (),
    )
    draft.add(
        "visualizer",
        run.visualizer(spec, train=train),
        run.WANDB_KEYS if train else (),
    )
    draft.add("randomness", run.randomness(spec), run.SEED_KEYS)
    draft.add("env_cfg", run.environment(spec))
    draft.add("log_processor", dict(type="LogProcessor", window_size=50, by_epoch=True))
    draft.add("log_level", "INFO")
    draft.add("work_dir", str(folder), ("results_dir",))
    draft.add("load_from", None)
    draft.add("resume", False)


def spec_config_text(loaded: LoadedSpec, draft: ConfigDraft, subtask: str) -> str:
    """The draft as Python source, with the spec fields of each section and their origins as comments."""

    def describe(key: str) -> str:
        origin = loaded.origin.get(key) or next(
            (f"{where} and below" for path, where in loaded.origin.items() if path.startswith(key + ".")),
            "default",
        )
        return f"{key} = {_plain(get_field(loaded.spec, key))!r} ({origin})"

    title = [
        f"Config for `{subtask}`, translated from the spec {Path(loaded.path).name}.",
        "Complete in itself: for mmengine.Config.fromfile, mmdet's tools and init_detector.",
        "Comments above each section list the spec fields it was made from and where they were set.",
    ]
    return config_text(draft, title=title, describe=describe)


def _plain(value: Any) -> Any:
    """A value of the spec for a comment: sections as dicts."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump() if isinstance(value, DataSource | InferSource) else value
