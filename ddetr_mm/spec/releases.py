"""Keys of other releases of TAO: hints for old and moved ones; newer ones are taken at their default.

:func:`suggest_key` gives the hint for every key that is not one of the spec.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ddetr_mm.spec.fields import Section, all_paths, nearest
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.yaml_source import Branch, Leaf, Listing, Tree

_WANDB_ENVIRONMENT = "it is read from the environment: {}=…"

MOVED: dict[type, dict[str, str]] = {
    ConvertSpec: {
        "output_dir": "results_dir",
        "output_path": "results_dir",
        "output_filename": "results_dir",
        "root_dir": "data_root",
        "root_directory_path": "data_root",
        "image_dir": "image_dir_name",
        "images_dir": "image_dir_name",
        "label_dir": "label_dir_name",
        "labels_dir": "label_dir_name",
        "mapping": "mapping_path",
        "class_mapping": "mapping_path",
        "extension": "image_extension",
        "sequences": "input_source",
    },
    ExperimentSpec: {
        "output_dir": "results_dir",
        "key": "encryption_key",
        "enc_key": "encryption_key",
        "encode_key": "encryption_key",
        "resume_training_checkpoint_path": "train.resume_training_checkpoint_path",
        "pretrained_model_path": "train.pretrained_model_path",
        "train.resume": "train.resume_training_checkpoint_path",
        "train.load_from": "train.pretrained_model_path",
        "train.epochs": "train.num_epochs",
        "train.max_epochs": "train.num_epochs",
        "train.val_interval": "train.validation_interval",
        "train.output_dir": "train.results_dir",
        "train.lr_steps": "train.optim.lr_steps",
        "train.grad_clip": "train.clip_grad_norm",
        "train.accumulate_grad_batches": "ddetr_mm.accumulate_steps",
        "train.workers": "dataset.workers",
        "train.batch_size": "dataset.batch_size",
        "train.optim.type": "train.optim.optimizer",
        "train.optim.scheduler": "train.optim.lr_scheduler",
        "train.optim.lr_milestones": "train.optim.lr_steps",
        "dataset.num_workers": "dataset.workers",
        "dataset.workers_per_gpu": "dataset.workers",
        "dataset.samples_per_gpu": "dataset.batch_size",
        "dataset.train_dataset": "dataset.train_data_sources",
        "dataset.train_sources": "dataset.train_data_sources",
        "dataset.train_dataset_sources": "dataset.train_data_sources",
        "dataset.val_dataset": "dataset.val_data_sources",
        "dataset.val_sources": "dataset.val_data_sources",
        "dataset.test_dataset": "dataset.test_data_sources",
        "dataset.test_sources": "dataset.test_data_sources",
        "dataset.inference_data_sources": "dataset.infer_data_sources",
        "dataset.infer_sources": "dataset.infer_data_sources",
        "dataset.infer_data_sources.class_map": "dataset.infer_data_sources.classmap",
        "dataset.classmap": "dataset.infer_data_sources.classmap",
        "dataset.augmentation.mean": "dataset.augmentation.input_mean",
        "dataset.augmentation.std": "dataset.augmentation.input_std",
        "model.pretrained_path": "model.pretrained_backbone_path",
        "model.num_classes": "dataset.num_classes",
        "evaluate.model_path": "evaluate.checkpoint",
        "evaluate.model": "evaluate.checkpoint",
        "evaluate.threshold": "evaluate.conf_threshold",
        "inference.model_path": "inference.checkpoint",
        "inference.model": "inference.checkpoint",
        "inference.threshold": "inference.conf_threshold",
        "export.model_path": "export.checkpoint",
        "export.model": "export.checkpoint",
        "export.output_file": "export.onnx_file",
        "export.output_path": "export.onnx_file",
        "export.target_opset": "export.opset_version",
        "export.opset": "export.opset_version",
        "gen_trt_engine.model_path": "gen_trt_engine.onnx_file",
        "gen_trt_engine.engine_file": "gen_trt_engine.trt_engine",
        "gen_trt_engine.data_type": "gen_trt_engine.tensorrt.data_type",
        "gen_trt_engine.workspace_size": "gen_trt_engine.tensorrt.workspace_size",
        "gen_trt_engine.max_workspace_size": "gen_trt_engine.tensorrt.workspace_size",
        "gen_trt_engine.cal_image_dir": "gen_trt_engine.tensorrt.calibration.cal_image_dir",
        "gen_trt_engine.cal_cache_file": "gen_trt_engine.tensorrt.calibration.cal_cache_file",
        "gen_trt_engine.tensorrt.max_workspace_size": "gen_trt_engine.tensorrt.workspace_size",
        "wandb.enabled": "wandb.enable",
        "wandb.id": "wandb.run_id",
        "wandb.resume": "wandb.run_id",
        "wandb.run_name": "wandb.name",
        "wandb.experiment": "wandb.name",
        "wandb.team": "wandb.entity",
        "wandb.user": "wandb.entity",
        "wandb.username": "wandb.entity",
        "wandb.project_name": "wandb.project",
    },
}
"""Kind of spec → key of an older release, or of another tool → the field that has its meaning."""

NOT_HERE: dict[str, str] = {
    "wandb.api_key": _WANDB_ENVIRONMENT.format("WANDB_API_KEY"),
    "wandb.key": _WANDB_ENVIRONMENT.format("WANDB_API_KEY"),
    "wandb.mode": _WANDB_ENVIRONMENT.format("WANDB_MODE"),
    "wandb.base_url": _WANDB_ENVIRONMENT.format("WANDB_BASE_URL"),
    "wandb.notes": _WANDB_ENVIRONMENT.format("WANDB_NOTES"),
    "wandb.job_type": _WANDB_ENVIRONMENT.format("WANDB_JOB_TYPE"),
    "wandb.dir": "its files are in the results folder: train.results_dir",
    "wandb.log_model": "checkpoints are not uploaded",
    "clearml": "runs are reported to Weights & Biases: the section wandb",
    "prune": "Deformable DETR has no such subtask",
    "distill": "Deformable DETR has no such subtask",
    "dataset_convert": "convert has a spec of its own: `ddetr-mm spec convert` prints it",
    "convert": "convert has a spec of its own: `ddetr-mm spec convert` prints it",
}
"""Key of an experiment that no field has the meaning of → what to do instead."""

NOT_READ: dict[str, str] = {
    "automl": "is not read: `ddetr-mm automl` reads ddetr_mm.automl",
}
"""Section of TAO's templates that is taken with a note, whatever it holds → the note."""

NEWER: dict[str, Any] = {
    "clearml.project": "TAO Toolkit",
    "clearml.task": "train",
    "clearml.deferred_init": False,
    "clearml.reuse_last_task_id": False,
    "clearml.continue_last_task": False,
    "clearml.tags": ["tao-toolkit"],
    "dataset.remap_mscoco_category": False,
    "dataset.augmentation.distortion_prob": 0.0,
    "evaluate.is_quantized": False,
    "inference.is_quantized": False,
    "export.is_quantized": False,
    "model.train_backbone_norm": False,
    "train.enable_ema": False,
    "train.num_sanity_val_steps": 0,
    "train.deterministic": False,
}
"""Key of a newer TAO, or of another of its networks → its default, at which it changes nothing."""


_ASKS_A_MODEL = "it asks a language model in TAO; the nearest here is bayesian"

OPTIONS_OF_TAO: dict[str, dict[str, str]] = {
    "ddetr_mm.automl.algorithm": {
        "bfbo": "the nearest is bayesian",
        "dehb": "the nearest is bohb",
        "hyperband_es": "the nearest is hyperband",
        "pbt": "the nearest is asha",
        **dict.fromkeys(("llm", "hybrid", "autoresearch"), _ASKS_A_MODEL),
    },
}
"""Field → options that TAO's has besides, in lower case, and the hint for each."""


def newer_default(root: type[Section], path: str, tree: Tree) -> bool:
    """Whether a key is one of a newer TAO, and a spec gives its default.

    Args:
        root: the model of the spec.
        path: dotted path of the key.
        tree: what is given; a section counts where all its keys do.
    """
    if root is not ExperimentSpec:
        return False
    if isinstance(tree, Branch):
        known = any(one.startswith(f"{path}.") for one in NEWER)
        return known and all(newer_default(root, f"{path}.{key}", item) for key, item in tree.items.items())
    if path not in NEWER:
        return False
    given = (
        [item.value for item in tree.items if isinstance(item, Leaf)] if isinstance(tree, Listing) else None
    )
    value = tree.value if isinstance(tree, Leaf) else given
    return value is None or value in ("", []) or value == NEWER[path]


def suggest_key(root: type[Section], prefix: str, key: str, siblings: Iterable[str]) -> str | None:
    """A hint for an unknown key: its name in another section, a similar sibling, or a similar name elsewhere.

    Args:
        root: the model of the spec.
        prefix: dotted path of the section the key is in, with a trailing dot, or empty.
        key: the unknown key.
        siblings: the valid keys of that section.
    """
    moved = MOVED.get(root, {}).get(prefix + key)
    if moved is not None:
        return f"did you mean {moved}?"
    if root is ExperimentSpec and prefix + key in NOT_HERE:
        return NOT_HERE[prefix + key]
    if root is ExperimentSpec and prefix + key in NOT_READ:
        return f"it {NOT_READ[prefix + key]}"
    if prefix + key in NEWER:
        return "it is a key of another TAO; leave it out"
    paths = all_paths(root)
    same_name = [path for path in paths if path.rpartition(".")[2] == key]
    if same_name:
        return "did you mean " + " or ".join(same_name[:3]) + "?"
    close = nearest(key, siblings)
    if close:
        return f"did you mean {prefix}{close}?"
    other = ConvertSpec if root is ExperimentSpec else ExperimentSpec
    if not prefix and key in all_paths(other):
        kind = "convert" if other is ConvertSpec else "train, evaluate, inference or export"
        return f"this key belongs to the spec of {kind}"
    last = {path.rpartition(".")[2]: path for path in paths}
    close = nearest(key, last)
    return f"did you mean {last[close]}?" if close else None
