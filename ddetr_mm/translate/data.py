"""Translates the spec section ``dataset``: datasets, pipelines, data loaders and the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddetr_mm.classes import Columns, number_names
from ddetr_mm.compat.config_text import Reference
from ddetr_mm.datasets.sources import class_names_of_files
from ddetr_mm.errors import DataError
from ddetr_mm.spec import ExperimentSpec
from ddetr_mm.spec.own_schema import OwnSection
from ddetr_mm.spec.schema import DataSource

Numbering = tuple[str | None, ...]
"""Class names; the one at position i has the category id i + 1."""

AUGMENTATION_KEYS = tuple(
    f"dataset.augmentation.{name}"
    for name in (
        "scales",
        "random_resize_max_size",
        "horizontal_flip_prob",
        "train_random_resize",
        "train_random_crop_min",
        "train_random_crop_max",
        "fixed_random_crop",
    )
) + ("ddetr_mm.resize",)
TEST_PIPELINE_KEYS = (
    "dataset.augmentation.test_random_resize",
    "dataset.augmentation.random_resize_max_size",
)
SAMPLERS: dict[str, dict[str, Any]] = {
    "default_sampler": dict(type="ElasticDistributedSampler"),
    "non_uniform_sampler": dict(type="ShardDistributedSampler", uneven="drop"),
    "uniform_sampler": dict(type="ShardDistributedSampler", uneven="drop", replacement=True),
}
"""TAO's samplers → their configs."""

LOADER_KEYS = (
    "dataset.batch_size",
    "dataset.workers",
    "dataset.pin_memory",
    "ddetr_mm.data_timeout_s",
    "dataset.dataset_type",
    "dataset.train_sampler",
    "dataset.num_classes",
    "ddetr_mm.keep_last_batch",
    "ddetr_mm.cover_all_images",
    "ddetr_mm.missing_images",
    "ddetr_mm.strict_annotations",
    "ddetr_mm.category_ids",
    "ddetr_mm.merge_categories",
)
_JITTER_LARGEST_SCALE = 2


def train_pipeline(spec: ExperimentSpec) -> list[dict[str, Any]]:
    """Loading, flip, then large-scale jitter or DETR's random resize and crop.

    Images stay uint8; the data preprocessor normalises them on the device.
    """
    augmentation = spec.dataset.augmentation
    pipeline: list[dict[str, Any]] = [
        load_for_training(spec),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="RandomFlip", prob=augmentation.horizontal_flip_prob),
    ]
    if augmentation.fixed_random_crop:
        pipeline.append(
            dict(
                type="LargeScaleJitter",
                size=augmentation.fixed_random_crop,
                pad=False,  # the data preprocessor pads after normalisation, with 0
                backend=spec.ddetr_mm.resize,
            )
        )
    else:
        pipeline.append(dict(type="RandomChoice", transforms=resize_choices(spec), prob=[0.5, 0.5]))
    pipeline.append(dict(type="TAOPackDetInputs"))
    return pipeline


def load_for_training(spec: ExperimentSpec) -> dict[str, Any]:
    """The loading transform; ``ddetr_mm.resize: fast`` decodes no larger than the augmentation can need."""
    augmentation = spec.dataset.augmentation
    if spec.ddetr_mm.resize != "fast":
        return dict(type="TAOLoadImageFromFile")
    if augmentation.fixed_random_crop:
        largest = _JITTER_LARGEST_SCALE * augmentation.fixed_random_crop
    else:
        largest = max(*augmentation.scales, *augmentation.train_random_resize)
    return dict(type="TAOLoadImageFromFile", min_short_side=largest)


def resize_choices(spec: ExperimentSpec) -> list[list[dict[str, Any]]]:
    """The two equally likely branches: plain multi-scale resize; resize, crop and resize again."""
    augmentation = spec.dataset.augmentation
    multi_scale = resize(spec, list(augmentation.scales), augmentation.random_resize_max_size)
    crop_first = [
        resize(spec, list(augmentation.train_random_resize), None),
        dict(
            type="TAORandomSizeCrop",
            min_size=augmentation.train_random_crop_min,
            max_size=augmentation.train_random_crop_max,
        ),
        dict(multi_scale),
    ]
    return [[multi_scale], crop_first]


def resize(spec: ExperimentSpec, scales: list[int], max_size: int | None) -> dict[str, Any]:
    """A resize of the shorter side to one of ``scales``, the longer side bounded by ``max_size``."""
    return dict(type="TAORandomResize", scales=scales, max_size=max_size, backend=spec.ddetr_mm.resize)


def test_pipeline(
    spec: ExperimentSpec,
    *,
    stretch_wh: tuple[int, int] | None = None,
    with_annotations: bool = True,
    stretch_backend: str = "pillow",
) -> list[dict[str, Any]]:
    """Loading and one fixed resize.

    Args:
        spec: a checked experiment spec.
        stretch_wh: resize to exactly this width and height instead of keeping the aspect ratio.
        with_annotations: also load the ground truth, in pixels of the original image.
        stretch_backend: ``pillow``, as TAO's training code, or ``cv2``, as TAO Deploy.
    """
    augmentation = spec.dataset.augmentation
    if stretch_wh is None:
        # Named Resize, as tools that set the size of a test pipeline (SAHI, mmdeploy) look for it.
        step = dict(
            type="Resize",
            scale=(augmentation.random_resize_max_size, augmentation.test_random_resize),
            keep_ratio=True,
            backend=spec.ddetr_mm.resize,
            size_rule="tao",
        )
    else:
        step = dict(type="Resize", scale=stretch_wh, keep_ratio=False, backend=stretch_backend)
    pipeline: list[dict[str, Any]] = [dict(type="LoadImageFromFile"), step]
    if with_annotations:
        pipeline.append(dict(type="LoadAnnotations", with_bbox=True))
    return [*pipeline, dict(type="TAOPackDetInputs")]


def numbers_by_name(spec: ExperimentSpec, subtask: str, trained_by_name: bool = False) -> bool:
    """Whether the data of a subtask get category ids by the names of their classes.

    Args:
        spec: a checked experiment spec.
        subtask: evaluation follows the checkpoint where the spec does not say.
        trained_by_name: whether the checkpoint was trained so.
    """
    own = spec.ddetr_mm.category_ids
    return own == "by_name" or (own is None and subtask == "evaluate" and trained_by_name)


def numbered_names(spec: ExperimentSpec, subtask: str, known: Columns | None = None) -> Numbering:
    """The class names that ``ddetr_mm.category_ids: by_name`` numbers from 1.

    Args:
        spec: a checked experiment spec.
        subtask: evaluation keeps the numbers of the checkpoint.
        known: the classes of the checkpoint's columns, where it has any.

    Raises:
        DataError: an annotation file that the subtask reads is missing or is not COCO; others are skipped.
    """
    if subtask != "train" and known is not None and any(name is not None for name in known):
        last = max(column for column, name in enumerate(known) if name is not None)
        return tuple(known[1 : last + 1])
    dataset = spec.dataset
    test = [dataset.test_data_sources] if dataset.test_data_sources else []
    by_split = dict(train=dataset.train_data_sources, val=dataset.val_data_sources, test=test)
    needed = ("train", "val") if subtask == "train" else ("test",) if test else ("val",)
    lists: list[tuple[str, ...]] = []
    for split, sources in by_split.items():
        try:
            lists += class_names_of_files(plain_sources(sources or []))
        except DataError:
            if split in needed:
                raise
    return number_names(lists)


def category_options(spec: ExperimentSpec, numbering: Numbering | None) -> dict[str, Any]:
    """Arguments of dataset and metric for category ids that are not at their default."""
    options: dict[str, Any] = {}
    if numbering is not None:
        options["numbered_names"] = list(numbering)
    if spec.ddetr_mm.merge_categories:
        options["merge_categories"] = True
    return options


def coco_dataset(
    spec: ExperimentSpec,
    sources: list[dict[str, str]],
    pipeline: Reference,
    *,
    test_mode: bool,
    numbering: Numbering | None = None,
) -> dict[str, Any]:
    """Config of the annotated dataset; labels are category ids, as are the class columns.

    ``ddetr_mm.missing_images`` holds for training only: a validation or test replaces no image.
    """
    return dict(
        type="SerializedCocoDataset",
        sources=sources,
        label_mode="category_id",
        num_classes=spec.dataset.num_classes,
        storage="shared" if spec.dataset.dataset_type == "serialized" else "process",
        missing_images="error" if test_mode else spec.ddetr_mm.missing_images,
        **({"strict_annotations": True} if spec.ddetr_mm.strict_annotations else {}),
        **category_options(spec, numbering),
        pipeline=pipeline,
        test_mode=test_mode,
    )


def one_step_of(spec: ExperimentSpec, dataset: dict[str, Any]) -> dict[str, Any]:
    """The dataset cut to one step on all GPUs, for a dry run."""
    ranks = spec.train.num_gpus * spec.train.num_nodes
    return dataset | dict(indices=spec.dataset.batch_size * ranks)


DATA_TIMEOUT_S = OwnSection().data_timeout_s
"""The limit of :class:`ddetr_mm.engine.runner.QuietRunner` where a config says none."""


def dataloader(
    spec: ExperimentSpec, dataset: dict[str, Any], *, train: bool, batch_size: int = -1
) -> dict[str, Any]:
    """Config of a dataloader.

    In validation and test, ranks share whole batches, so that the number of ranks does not change the
    results, and no image is repeated; only a sharded model (fsdp) needs equally many batches on each rank.

    Args:
        spec: a checked experiment spec.
        dataset: config of the dataset.
        train: use the training samplers, shuffled.
        batch_size: images per batch; -1 for ``dataset.batch_size``.
    """
    workers = spec.dataset.workers
    images_per_batch = spec.dataset.batch_size if batch_size < 1 else batch_size
    loader: dict[str, Any] = dict(
        batch_size=images_per_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=spec.dataset.pin_memory,
        drop_last=False,
        worker_init_fn=dict(type="signal_proof_worker_init"),
    )
    if workers and spec.ddetr_mm.data_timeout_s != DATA_TIMEOUT_S:
        loader["timeout"] = spec.ddetr_mm.data_timeout_s
    if train:
        loader["sampler"] = dict(train_sampler(spec), shuffle=True)
        loader["batch_sampler"] = dict(
            type="ElasticBatchSampler", drop_last=not spec.ddetr_mm.keep_last_batch
        )
    else:
        sharded = spec.train.distributed_strategy == "fsdp"
        loader["sampler"] = dict(type="WholeBatchSampler", batch_size=images_per_batch, equal_length=sharded)
    return dict(loader, dataset=dataset)


def train_sampler(spec: ExperimentSpec) -> dict[str, Any]:
    """Config of the sampler; ``train_sampler`` has an effect with ``dataset_type: default`` only."""
    selectable = spec.dataset.dataset_type == "default"
    sampler = SAMPLERS[spec.dataset.train_sampler if selectable else "default_sampler"]
    if spec.ddetr_mm.cover_all_images and sampler["type"] == "ShardDistributedSampler":
        return dict(type="ShardDistributedSampler", uneven="repeat")
    return sampler


def plain_sources(sources: Sequence[DataSource]) -> list[dict[str, str]]:
    """The spec's data sources as plain dicts for a config."""
    return [dict(image_dir=source.image_dir, json_file=source.json_file) for source in sources]


def evaluator(
    spec: ExperimentSpec, sources: list[dict[str, str]], conf_threshold: float, **extra: Any
) -> dict[str, Any]:
    """Config of the COCO metric over the given sources."""
    return dict(
        type="FastCocoMetric",
        sources=sources,
        eval_class_ids=list(spec.dataset.eval_class_ids) if spec.dataset.eval_class_ids else None,
        conf_threshold=conf_threshold,
        **({"strict_annotations": True} if spec.ddetr_mm.strict_annotations else {}),
        classwise="table",
        **extra,
    )
