"""The ``dataset`` section: where images and annotations are, and how images are prepared."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.fields import REFERENCE_7_3, section, spec_field


@dataclass
class DataSource:
    """One set of images with its COCO annotations."""

    image_dir: str = spec_field(
        "", placeholder=True, doc="Folder that file_name in the annotations is relative to."
    )
    json_file: str = spec_field(
        "",
        placeholder=True,
        doc="""COCO annotation file, a glob over the shards of one (/data/seq-shard-*.json), or a folder
        of shards.""",
    )


@dataclass
class InferSource:
    """The images to run inference on."""

    image_dir: list[str] = spec_field(
        [], single=True, placeholder=True, doc="Folder of images, or a list of folders."
    )
    classmap: str | None = spec_field(
        None,
        doc="""Text file with one class name per line; line 1 names category id 1. null: the names kept
        in the checkpoint.""",
    )


@dataclass
class AugmentationConfig:
    """How images are resized, cropped, flipped, normalised and padded. Sizes are in pixels."""

    scales: list[int] = spec_field(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        ge=1,
        doc="Lengths of the short side that training draws from.",
    )
    input_mean: list[float] = spec_field(
        [0.485, 0.456, 0.406],
        doc="Mean subtracted from RGB values in 0..1: one number per channel, or one for all.",
    )
    input_std: list[float] = spec_field(
        [0.229, 0.224, 0.225],
        gt=0.0,
        doc="Standard deviation RGB values in 0..1 are divided by: one per channel, or one for all.",
    )
    train_random_resize: list[int] = spec_field(
        [400, 500, 600],
        ge=1,
        doc="Lengths of the short side drawn from before the random crop.",
    )
    horizontal_flip_prob: float = spec_field(
        0.5, ge=0.0, le=1.0, doc="Probability of mirroring a training image."
    )
    train_random_crop_min: int = spec_field(
        384, ge=1, doc="Smallest side of the random crop, at most train_random_crop_max."
    )
    train_random_crop_max: int = spec_field(600, ge=1, doc="Largest side of the random crop.")
    random_resize_max_size: int = spec_field(
        1333, ge=1, doc="Longest side an image may have after resizing, in training and testing."
    )
    test_random_resize: int = spec_field(
        800, ge=1, doc="Length of the short side for validation, evaluation and inference."
    )
    fixed_padding: bool = spec_field(
        True,
        doc="""Pad every image to (max(scales), random_resize_max_size), the long side following the
        image's own, so that all batches have the same size and memory use stays level.""",
    )
    fixed_random_crop: int | None = spec_field(
        None,
        ge=32,
        doc="""Side of the square that large-scale jitter yields, a multiple of 32; replaces the resize
        and crop of training. null: off.""",
    )
    pad_size_divisor: int | None = spec_field(
        None,
        ge=1,
        origin=REFERENCE_7_3,
        doc="Pad the sides of a batch to multiples of this number; null: no such padding.",
    )


@dataclass
class DatasetConfig:
    """Images, annotations, loading and augmentation."""

    train_sampler: str = spec_field(
        "default_sampler",
        options=("default_sampler", "non_uniform_sampler", "uniform_sampler"),
        doc="""How samples are dealt out to several GPUs. The non-default ones give each process its own
        shards, and act only with dataset_type: default.""",
    )
    train_data_sources: list[DataSource] | None = spec_field(
        None, single=True, doc="The training data: a list of image folders with their annotations."
    )
    val_data_sources: list[DataSource] | None = spec_field(
        None, single=True, doc="The data that training is validated on, in the same form."
    )
    test_data_sources: DataSource | None = spec_field(
        None, doc="The data for evaluate: one image folder with its annotations."
    )
    infer_data_sources: InferSource | None = spec_field(None, doc="The images for inference.")
    quant_calibration_data_sources: DataSource | None = spec_field(
        None, doc="The data for calibrating a quantized model."
    )
    batch_size: int = spec_field(
        4, ge=1, doc="Images per GPU and step, in training, validation, evaluation and inference."
    )
    workers: int = spec_field(
        8, ge=0, doc="Processes per GPU that load images; 0: the main process loads them itself."
    )
    pin_memory: bool = spec_field(True, doc="Copy batches to page-locked memory before the GPU.")
    dataset_type: str = spec_field(
        "serialized",
        options=("serialized", "default"),
        doc="""How annotations are held. serialized: one shared copy for all processes of a machine; default:
        every process holds its own.""",
    )
    num_classes: int = spec_field(
        91,
        ge=1,
        doc="""Number of class columns: the largest category id plus 1, since column 0 is the
        background.""",
    )
    eval_class_ids: list[int] | None = spec_field(
        None, ge=1, doc="Category ids that evaluation is restricted to; null: all."
    )
    augmentation: AugmentationConfig = section(AugmentationConfig)
