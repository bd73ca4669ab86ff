"""Every field of a TAO Deformable DETR spec, once, in TAO's order; :mod:`~ddetr_mm.spec.own_schema`
has the options that TAO does not have.

Each section is a pydantic model; :func:`~ddetr_mm.spec.fields.spec_field` holds a field's default, range
and documentation. The checks, the default spec and the tables of the documentation follow from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool

from ddetr_mm.spec.fields import (
    OURS,
    TAO_5_1,
    TAO_7_3,
    Form,
    Int,
    NonNegativeInt,
    PositiveInt,
    Searched,
    Section,
    section,
    spec_field,
)
from ddetr_mm.spec.own_schema import OwnConvertSection, OwnSection

Backbone = Literal[
    "resnet_50",
    "gc_vit_xxtiny",
    "gc_vit_xtiny",
    "gc_vit_tiny",
    "gc_vit_small",
    "gc_vit_base",
    "gc_vit_large",
    "gc_vit_large_384",
]
LayerPrecision = Annotated[
    str,
    Field(pattern=r"^(?i:.+:(fp32|fp16|int8))$"),
    Form("layer:precision, as in name:fp32 or *:fp16"),
]
_INFINITE = float("inf")
QuantizeDevice = Annotated[
    str, Field(pattern=r"^(cuda|cpu|trt|cuda:[0-9]+)$"), Form("cuda, cpu, trt or cuda:N")
]
FileExtension = Annotated[str, Field(pattern=r"^\.\w+$"), Form("a dot and letters, as in .jpg")]


class DistributedTask(Section):
    """GPUs and nodes of a subtask that can run on several."""

    num_gpus: PositiveInt = spec_field(
        1,
        doc="""Number of GPUs on this machine. Where it disagrees with gpu_ids, the larger number of
        GPUs is used. Without a GPU the run uses the CPU.""",
    )
    gpu_ids: list[NonNegativeInt] = spec_field(
        [0],
        filled=True,
        doc="Indices of the GPUs to use, each at most once, as the CUDA driver counts them.",
    )
    num_nodes: PositiveInt = spec_field(
        1,
        doc="Number of machines; more than 1 makes a multi-node run.",
    )


class WandbConfig(Section):
    """Reporting to Weights & Biases; acts when its package is installed and a key is configured."""

    enable: StrictBool = spec_field(
        True, doc="Report to Weights & Biases, if its package and an API key are available."
    )
    project: str = spec_field("TAO Toolkit", doc="Name of the project the run is filed under.")
    entity: str | None = spec_field(
        "", doc="User or team that owns the project; empty: the account's default."
    )
    group: str | None = spec_field("", doc="Name that groups several runs; empty: none.")
    tags: list[str] = spec_field(["training", "tao-toolkit"], doc="Tags of the run.")
    reinit: StrictBool = spec_field(False, doc="Let one process open several runs.")
    sync_tensorboard: StrictBool = spec_field(False, doc="Copy the TensorBoard events into the run.")
    save_code: StrictBool = spec_field(False, doc="Upload the source code of the main script.")
    name: str = spec_field("TAO Toolkit training experiment", doc="Name shown for the run.")
    run_id: str = spec_field("", doc="Identifier of an existing run to continue; empty: a new one.")


class ModelConfig(Section):
    """The architecture of the network and the weights of its losses."""

    pretrained_backbone_path: str | None = spec_field(
        None,
        alias="pretrained_model_path",
        doc="""File with weights for the backbone alone, loaded by name before training; null: none. It is not
        read where train.pretrained_model_path is given.
        The documentation's examples write it as pretrained_model_path, which is accepted too.""",
    )
    dld_model_dir_path: str | None = spec_field(None, doc="Folder of a model store internal to NVIDIA.")
    backbone: Backbone = spec_field("resnet_50", doc="The feature extractor.")
    num_queries: PositiveInt = spec_field(
        300,
        searched=Searched(100, 900),
        doc="Number of object queries: the most boxes one image can yield per class column.",
    )
    num_feature_levels: Int = spec_field(
        4, ge=1, le=5, doc="Number of feature maps; must equal the length of return_interm_indices."
    )
    cls_loss_coef: float = spec_field(
        2.0, ge=0.0, doc="Weight of the classification term, in the matching cost and in the loss."
    )
    bbox_loss_coef: float = spec_field(
        5.0, ge=0.0, doc="Weight of the L1 term of the boxes, in the matching cost and in the loss."
    )
    giou_loss_coef: float = spec_field(
        2.0, ge=0.0, doc="Weight of the GIoU term of the boxes, in the matching cost and in the loss."
    )
    with_box_refine: StrictBool = spec_field(
        True, doc="Let every decoder layer refine the boxes of the layer before it."
    )
    num_select: PositiveInt = spec_field(
        100,
        searched=Searched(1, 1000, at_most="model.num_queries"),
        doc="""Number of predictions kept per image: the best of num_queries x num_classes scores, so at
        most that product.""",
    )
    return_interm_indices: list[Annotated[Int, Field(ge=0, le=4)]] = spec_field(
        [1, 2, 3, 4],
        filled=True,
        doc="""Feature maps that are used, ascending: 0 to 3 are the backbone's stages (strides 4, 8, 16,
        32), 4 is one more stride-2 convolution on the last of them.""",
    )
    focal_alpha: float = spec_field(
        0.25, gt=0.0, doc="Alpha of the focal loss: the weight of the positive class."
    )
    clip_max_norm: float = spec_field(0.1, doc="Superseded by train.clip_grad_norm.")
    nheads: PositiveInt = spec_field(8, doc="Number of attention heads; must divide hidden_dim.")
    dropout_ratio: float = spec_field(
        0.3, ge=0.0, le=1.0, doc="Probability of dropping a hidden unit, everywhere in the transformer."
    )
    hidden_dim: Int = spec_field(
        256,
        ge=32,
        doc="""Width of the transformer; a multiple of 32 (group normalisation in 32 groups) and of
        nheads.""",
    )
    enc_layers: PositiveInt = spec_field(6, searched=Searched(1, 12), doc="Number of encoder layers.")
    dec_layers: PositiveInt = spec_field(6, searched=Searched(1, 12), doc="Number of decoder layers.")
    dim_feedforward: PositiveInt = spec_field(
        1024, doc="Width of the feed-forward networks in the transformer."
    )
    dec_n_points: PositiveInt = spec_field(
        4, doc="Sampling points per head and feature level in the decoder's cross-attention."
    )
    enc_n_points: PositiveInt = spec_field(
        4, doc="Sampling points per head and feature level in the encoder's self-attention."
    )
    aux_loss: StrictBool = spec_field(
        True, doc="Apply the loss after every decoder layer, not only the last."
    )
    dilation: StrictBool = spec_field(
        False, doc="Dilate ResNet's last stage instead of striding it (stride 16 in place of 32)."
    )
    train_backbone: StrictBool = spec_field(True, doc="Train the backbone; false freezes all of it.")
    loss_types: list[Literal["labels", "boxes"]] = spec_field(
        ["labels", "boxes"],
        filled=True,
        doc="The losses that are computed: labels (classification), boxes (L1 and GIoU).",
    )
    backbone_names: list[str] = spec_field(
        ["backbone.0"],
        doc="""Parameters whose TAO name contains one of these learn at train.optim.lr_backbone.""",
    )
    linear_proj_names: list[str] = spec_field(
        ["reference_points", "sampling_offsets"],
        doc="""Parameters whose TAO name contains one of these learn at
        train.optim.lr * train.optim.lr_linear_proj_mult.""",
    )
    precise_msda: StrictBool = spec_field(
        False,
        origin=TAO_7_3,
        doc="""Give the gradients of deformable attention deterministically, which is slower on a GPU; without
        it they differ in the last bits from run to run there. Sums are in full precision always.""",
    )


class DataSource(Section):
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


class InferSource(Section):
    """The images to run inference on."""

    image_dir: list[str] = spec_field(
        [], single=True, placeholder=True, doc="Folder of images, or a list of folders."
    )
    classmap: str | None = spec_field(
        None,
        doc="""Text file with one class name per line, or a JSON list or object of names and ids. Line 1 names
        category id 1; blank lines keep their id; a first line "background" names id 0. The names must be the
        checkpoint's where it has any. null: the names kept in the checkpoint.""",
    )


class AugmentationConfig(Section):
    """How images are resized, cropped, flipped, normalised and padded. Sizes are in pixels."""

    scales: list[PositiveInt] = spec_field(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        filled=True,
        doc="Lengths of the short side that training draws from.",
    )
    input_mean: list[float] = spec_field(
        [0.485, 0.456, 0.406],
        filled=True,
        doc="Mean subtracted from RGB values in 0..1: one number per channel, or one for all.",
    )
    input_std: list[Annotated[float, Field(gt=0.0)]] = spec_field(
        [0.229, 0.224, 0.225],
        filled=True,
        doc="Standard deviation RGB values in 0..1 are divided by: one per channel, or one for all.",
    )
    train_random_resize: list[PositiveInt] = spec_field(
        [400, 500, 600],
        filled=True,
        doc="Lengths of the short side drawn from before the random crop.",
    )
    horizontal_flip_prob: float = spec_field(
        0.5, ge=0.0, le=1.0, searched=Searched(0.0, 1.0), doc="Probability of mirroring a training image."
    )
    train_random_crop_min: PositiveInt = spec_field(
        384,
        searched=Searched(32, _INFINITE),
        doc="Smallest side of the random crop, at most train_random_crop_max.",
    )
    train_random_crop_max: PositiveInt = spec_field(
        600,
        searched=Searched(32, 1333, more_than="dataset.augmentation.train_random_crop_min"),
        doc="Largest side of the random crop.",
    )
    random_resize_max_size: PositiveInt = spec_field(
        1333, doc="Longest side an image may have after resizing, in training and testing."
    )
    test_random_resize: PositiveInt = spec_field(
        800, doc="Length of the short side for validation, evaluation and inference."
    )
    fixed_padding: StrictBool = spec_field(
        True,
        doc="""Pad every image to (max(scales), random_resize_max_size) in training and to
        (test_random_resize, random_resize_max_size) elsewhere, the long side following the image's own, so
        that all batches have the same size and memory use is constant.""",
    )
    fixed_random_crop: Int | None = spec_field(
        None,
        ge=32,
        doc="""Side of the square that large-scale jitter makes, a multiple of 32; replaces the resize,
        crop and fixed padding of training. null: off.""",
    )
    pad_size_divisor: PositiveInt | None = spec_field(
        None,
        origin=TAO_7_3,
        doc="""In validation, evaluation and inference, pad to multiples of this number in place of
        fixed_padding; null: no such padding.""",
    )


class DatasetConfig(Section):
    """Images, annotations, loading and augmentation."""

    train_sampler: Literal["default_sampler", "non_uniform_sampler", "uniform_sampler"] = spec_field(
        "default_sampler",
        doc="""How samples are distributed over several GPUs. The non-default ones give each process its own
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
        None, doc="The images that quantize finds ranges with, unless mode is weight_only_ptq."
    )
    batch_size: PositiveInt = spec_field(
        4,
        searched=Searched(1, _INFINITE),
        doc="Images per GPU and step, in training, validation, evaluation and inference.",
    )
    workers: NonNegativeInt = spec_field(
        8,
        searched=Searched(1, _INFINITE, is_neutral=True),
        doc="Processes per GPU that load images; 0: the main process loads them itself.",
    )
    pin_memory: StrictBool = spec_field(True, doc="Copy batches to page-locked memory before the GPU.")
    dataset_type: Literal["serialized", "default"] = spec_field(
        "serialized",
        doc="""How annotations are held. serialized: one shared copy for all processes of a machine; default:
        every process holds its own.""",
    )
    num_classes: PositiveInt = spec_field(
        91,
        doc="""Number of class columns: the largest category id plus 1, since column 0 is the
        background.""",
    )
    eval_class_ids: list[PositiveInt] | None = spec_field(
        None, filled=True, doc="Category ids that evaluation is restricted to; null: all."
    )
    augmentation: AugmentationConfig = section(AugmentationConfig)


class CudnnConfig(Section):
    """Switches of cuDNN."""

    benchmark: StrictBool = spec_field(False, doc="Let cuDNN time its algorithms and take the fastest.")
    deterministic: StrictBool = spec_field(
        True,
        doc="""Train with deterministic algorithms, of cuDNN and of PyTorch, where there are any; others warn.
        model.precise_msda does the same for deformable attention.""",
    )


class OptimConfig(Section):
    """The optimizer and the learning-rate schedule."""

    optimizer: Literal["AdamW", "SGD"] = spec_field("AdamW", doc="The optimizer.")
    monitor_name: Literal["val_loss", "train_loss"] = spec_field(
        "val_loss",
        alias="lr_monitor",
        doc="""The value a scheduler would watch; the documentation calls it lr_monitor, which is accepted
        too.""",
    )
    lr: float = spec_field(
        2e-4,
        gt=0.0,
        searched=Searched(0.0, 0.01, open_low=True, start=1e-6, log=True),
        doc="Initial learning rate of everything outside the two groups below.",
    )
    lr_backbone: float = spec_field(
        2e-5,
        ge=0.0,
        searched=Searched(0.0, 0.001, open_low=True, start=1e-7, log=True),
        doc="Initial learning rate of the backbone; 0 leaves its weights as they are.",
    )
    lr_linear_proj_mult: float = spec_field(
        0.1,
        ge=0.0,
        searched=Searched(0.0, 1.0, open_low=True, start=1e-3, log=True),
        doc="""Factor on lr for reference points and sampling offsets; 0 leaves them as they are.""",
    )
    momentum: float = spec_field(
        0.9, ge=0.0, searched=Searched(0.0, 1.0, open_low=True, start=0.01), doc="Momentum of SGD."
    )
    weight_decay: float = spec_field(
        1e-4,
        ge=0.0,
        searched=Searched(0.0, 0.1, open_low=True, start=1e-6, log=True),
        doc="Weight decay; 0: none.",
    )
    lr_scheduler: Literal["MultiStep", "StepLR"] = spec_field(
        "MultiStep",
        doc="When the rates decay. MultiStep: at lr_steps; StepLR: every lr_step_size epochs.",
    )
    lr_steps: list[PositiveInt] = spec_field(
        [40], doc="Epochs, ascending, at which MultiStep multiplies the rates by lr_decay."
    )
    lr_step_size: PositiveInt = spec_field(
        40, searched=Searched(1, 10000), doc="Number of epochs between two decays of StepLR."
    )
    lr_decay: float = spec_field(
        0.1,
        gt=0.0,
        searched=Searched(0.0, 1.0, open_low=True, start=0.01),
        doc="Factor by which the learning rates are multiplied.",
    )


class CheckpointerConfig(Section):
    """Keeping the best checkpoints by a metric of validation, with a link dd_model_best.pth to the best."""

    enable_topk: StrictBool = spec_field(False, origin=TAO_7_3, doc="Keep the best checkpoints by a metric.")
    replace_periodic: StrictBool = spec_field(
        False,
        origin=TAO_7_3,
        doc="""Keep the best ones and the newest, which a stopped run resumes from, not those of
        every interval.""",
    )
    monitor: str | None = spec_field(
        None,
        origin=TAO_7_3,
        doc="""The metric that says which is best, a name of status.json: val_mAP, val_mAP50, val_loss,
        val_loss_cls, val_loss_bbox, val_loss_iou, train_loss; null: val_mAP50.""",
    )
    mode: Literal["min", "max"] | None = spec_field(
        None,
        origin=TAO_7_3,
        doc="""Whether a small (min) or a large (max) value of the metric is better; null: min for losses,
        else max.""",
    )
    save_top_k: PositiveInt = spec_field(1, origin=TAO_7_3, doc="How many of the best checkpoints are kept.")
    filename: str = spec_field(
        "model_best_{epoch:03d}",
        origin=TAO_7_3,
        doc="""Name of the best checkpoints. {epoch} (from 0), {step} and metrics are filled in, each with
        a number's format; a name without a folder.""",
    )
    dirpath: str | None = spec_field(
        None, origin=TAO_7_3, doc="Folder for the best checkpoints; null: the results folder."
    )
    auto_insert_metric_name: StrictBool = spec_field(
        False, origin=TAO_7_3, doc="Write the names of the fields into the file name: epoch=003."
    )


class TrainConfig(DistributedTask):
    """The training run."""

    seed: Int = spec_field(
        1234,
        ge=-1,
        doc="""Seed of all random numbers; -1: a new one for every run, which is written to the
        log.""",
    )
    cudnn: CudnnConfig = section(CudnnConfig)
    num_epochs: PositiveInt = spec_field(10, doc="Number of passes over the training data.")
    checkpoint_interval: PositiveInt = spec_field(
        1, doc="Epochs (or steps, see the next field) between two checkpoints."
    )
    checkpoint_interval_unit: Literal["epoch", "step"] = spec_field(
        "epoch", doc="Unit of checkpoint_interval."
    )
    validation_interval: PositiveInt = spec_field(1, doc="Epochs between two validations.")
    resume_training_checkpoint_path: str | None = spec_field(
        None,
        doc="""Checkpoint to resume from; null: dd_model_latest.pth in the results folder, if it is
        there.""",
    )
    results_dir: str | None = spec_field(
        None, doc="Folder for the results of training; null: results_dir/train."
    )
    freeze: list[str] | None = spec_field(
        [],
        doc="""Modules whose weights are frozen, by their TAO names (backbone, transformer.encoder,
        transformer.decoder.layers.0.linear1, input_proj.3, ...).""",
    )
    pretrained_model_path: str | None = spec_field(
        None, doc="Checkpoint whose weights training starts from, loaded by name; null: none."
    )
    clip_grad_norm: float = spec_field(
        0.1, ge=0.0, doc="Largest L2 norm of the gradient; larger ones are scaled down. 0: no clipping."
    )
    is_dry_run: StrictBool = spec_field(
        False, doc="Run one step of training and of validation only, to see that everything works."
    )
    optim: OptimConfig = section(OptimConfig)
    precision: Literal["fp32", "fp16", "bf16"] = spec_field(
        "fp32",
        doc="""Number format: fp32; fp16, mixed with loss scaling; or bf16 (ours), mixed without it, faster on
        GPUs and on CPUs that multiply bfloat16 in hardware, which check reports.""",
    )
    distributed_strategy: Literal["ddp", "fsdp"] = spec_field(
        "ddp",
        doc="How several GPUs share the work: ddp copies the model to each, fsdp shards it.",
    )
    activation_checkpoint: StrictBool = spec_field(
        True, doc="Recompute activations in the backward pass instead of keeping them: less memory."
    )
    verbose: StrictBool = spec_field(False, doc="Print every change of the learning rates.")
    input_width: PositiveInt | None = spec_field(None, doc="Width of the network's input, in pixels.")
    input_height: PositiveInt | None = spec_field(None, doc="Height of the network's input, in pixels.")
    checkpointer: CheckpointerConfig = section(CheckpointerConfig, origin=TAO_7_3)


class EvaluateConfig(DistributedTask):
    """COCO metrics of a checkpoint on dataset.test_data_sources."""

    checkpoint: str | None = spec_field(None, placeholder=True, doc="Checkpoint (or .onnx file) to evaluate.")
    trt_engine: str | None = spec_field(
        None, doc="TensorRT engine to evaluate in place of the checkpoint; null: none."
    )
    results_dir: str | None = spec_field(
        None, doc="Folder for the results of evaluate; null: results_dir/evaluate."
    )
    batch_size: Int = spec_field(-1, ge=-1, doc="Images per step; -1: dataset.batch_size.")
    input_width: PositiveInt | None = spec_field(
        None,
        doc="""Width images are resized to, without padding, in pixels; needs input_height too. null: the
        aspect ratio is kept.""",
    )
    input_height: PositiveInt | None = spec_field(
        None, doc="Height images are resized to, in pixels; see input_width."
    )
    conf_threshold: float = spec_field(
        0.0,
        ge=0.0,
        doc="""Predictions with a score below this (0..1) are left out of evaluate; 0: all count. Validation
        in training counts all.""",
    )


class InferenceConfig(DistributedTask):
    """Detections on dataset.infer_data_sources, as drawings and KITTI label files."""

    checkpoint: str | None = spec_field(None, placeholder=True, doc="Checkpoint (or .onnx file) to run.")
    trt_engine: str | None = spec_field(
        None, doc="TensorRT engine to run in place of the checkpoint; null: none."
    )
    results_dir: str | None = spec_field(
        None, doc="Folder for the results of inference; null: results_dir/inference."
    )
    batch_size: Int = spec_field(-1, ge=-1, doc="Images per step; -1: dataset.batch_size.")
    color_map: dict[str, str] | None = spec_field(
        None,
        doc="""Colour of the boxes by class name (person: red). Boxes of a class that is not listed are
        written to the label files, not drawn. null: every class gets a colour.""",
    )
    conf_threshold: float = spec_field(
        0.5, ge=0.0, doc="Predictions with a score below this (0..1) are left out."
    )
    is_internal: StrictBool = spec_field(
        False, doc="Write into one sub-folder per folder two levels above the image."
    )
    input_width: Int | None = spec_field(
        None,
        ge=32,
        doc="""Width images are resized to, in pixels; needs input_height too. null: the aspect
        ratio is kept.""",
    )
    input_height: Int | None = spec_field(
        None, ge=32, doc="Height images are resized to, in pixels; see input_width."
    )
    outline_width: PositiveInt = spec_field(3, doc="Thickness of the drawn boxes, in pixels.")


class ExportConfig(Section):
    """An ONNX file from a checkpoint."""

    results_dir: str | None = spec_field(None, doc="Folder for the log of export; null: results_dir/export.")
    gpu_id: NonNegativeInt = spec_field(0, doc="Index of the GPU to use, if there is one.")
    checkpoint: str | None = spec_field(None, placeholder=True, doc="Checkpoint to export.")
    onnx_file: str | None = spec_field(None, placeholder=True, doc="Path of the .onnx file to write.")
    on_cpu: StrictBool = spec_field(
        True,
        doc="""Form of deformable attention. true: standard ONNX operators only (GridSample; opset raised to
        16 or more); false: a node of TensorRT's plugin.""",
    )
    input_channel: Literal[1, 3] = spec_field(3, ge=1, doc="Channels of the input; the network takes 3.")
    input_width: PositiveInt = spec_field(960, doc="Width of the input, in pixels; fixed in the graph.")
    input_height: PositiveInt = spec_field(544, doc="Height of the input, in pixels; fixed in the graph.")
    opset_version: PositiveInt = spec_field(12, doc="ONNX operator set; below 16, on_cpu raises it to 17.")
    batch_size: Int | None = spec_field(
        -1, ge=-1, doc="Batch size fixed in the graph; -1 or null: any, decided at run time."
    )
    verbose: StrictBool = spec_field(False, doc="Print the exporter's own messages.")
    format: Literal["onnx", "xdl"] = spec_field("onnx", doc="Format of the file; onnx is written.")
    serialize_nvdsinfer: StrictBool = spec_field(
        False, doc="Write labels.txt and nvdsinfer_config.yaml for DeepStream next to the file."
    )


class CalibrationConfig(Section):
    """Calibration of an INT8 engine; the fields are used only with data_type: INT8."""

    cal_image_dir: list[str] = spec_field(
        [],
        single=True,
        placeholder=True,
        doc="Folders searched, with all below them, for calibration images.",
    )
    cal_cache_file: str | None = spec_field(
        None,
        placeholder=True,
        doc="Calibration cache: used if the file is there, written otherwise.",
    )
    cal_batch_size: PositiveInt = spec_field(1, doc="Images per calibration batch.")
    cal_batches: PositiveInt = spec_field(1, doc="Number of calibration batches.")


class TensorrtConfig(Section):
    """How TensorRT builds the engine."""

    workspace_size: NonNegativeInt = spec_field(1024, doc="Most memory a TensorRT tactic may use, in MiB.")
    min_batch_size: PositiveInt = spec_field(
        1, doc="Smallest batch the engine takes; used for an ONNX file of dynamic batch size."
    )
    opt_batch_size: PositiveInt = spec_field(1, doc="Batch the engine is tuned for.")
    max_batch_size: PositiveInt = spec_field(1, doc="Largest batch the engine takes.")
    layers_precision: list[LayerPrecision] | None = spec_field(
        [],
        doc="Precision of single layers, each as layer:precision; * matches any part of a name.",
    )
    data_type: Literal["FP32", "FP16", "INT8"] = spec_field("FP32", doc="Precision of the engine.")
    calibration: CalibrationConfig = section(CalibrationConfig)


class GenTrtEngineConfig(Section):
    """A TensorRT engine from an ONNX file."""

    results_dir: str | None = spec_field(
        None, doc="Folder for the log and the parity report; null: results_dir/gen_trt_engine."
    )
    gpu_id: NonNegativeInt = spec_field(0, doc="Index of the GPU the engine is built on and for.")
    onnx_file: str | None = spec_field(None, placeholder=True, doc="The .onnx file to build from.")
    trt_engine: str | None = spec_field(
        None,
        doc="Path of the engine to write; null: a temporary file, which only shows that the build works.",
    )
    timing_cache: str | None = spec_field(
        None, doc="File in which TensorRT keeps kernel timings between builds; null: none."
    )
    batch_size: Int = spec_field(-1, ge=-1, doc="Batch size; the ONNX file decides it. -1: any.")
    verbose: StrictBool = spec_field(False, doc="Print TensorRT's own messages.")
    tensorrt: TensorrtConfig = section(TensorrtConfig)
    input_channel: Int = spec_field(3, origin=TAO_5_1, doc="Channels of the input.")
    input_width: Int = spec_field(960, origin=TAO_5_1, doc="Width of the input, in pixels.")
    input_height: Int = spec_field(544, origin=TAO_5_1, doc="Height of the input, in pixels.")
    opset_version: Int = spec_field(12, origin=TAO_5_1, doc="ONNX operator set.")


class TensorQuantizationConfig(Section):
    """How the weights, or the inputs, of a layer are quantized."""

    dtype: str = spec_field(
        "",
        doc="""Number format: int8, fp8_e4m3fn, fp8_e5m2, or native, which leaves them as they are; empty:
        native. Which a backend takes is on the page Quantize.""",
    )
    observer_or_fake_quant: str = spec_field(
        "", doc="Name of an observer; quantize.algorithm chooses how ranges are found."
    )
    quant_axis: Int | None = spec_field(
        None,
        doc="""Axis of the weights with a scale of its own per index: 0, the output channels. null: 0 for
        int8, one scale for all of fp8 weights (torchao: always 0). Inputs have one scale: null.""",
    )
    observer_or_fake_quant_kwargs: dict[str, Any] | None = spec_field({}, doc="Arguments of the observer.")


class LayerQuantizationConfig(Section):
    """How the layers that a pattern names are quantized."""

    module_name: str = spec_field(
        "",
        doc="""Pattern (*, ?, [abc]; case matters) for the qualified name of a layer, here or in TAO, or its
        class (Linear, Conv2d); of an ONNX file, the node's name or operator. The first entry that fits
        decides.""",
    )
    weights: TensorQuantizationConfig | None = spec_field(None, doc="Their weights; null: not quantized.")
    activations: TensorQuantizationConfig | None = spec_field(
        None, doc="Their inputs; null: not quantized. A Q/DQ graph quantizes them with the weights."
    )


class QuantizeConfig(Section):
    """A quantized model from a checkpoint or an ONNX file, compared with it on the validation data."""

    backend: Literal["modelopt.pytorch", "torchao", "modelopt.onnx", "onnxruntime"] | None = spec_field(
        "torchao",
        doc="""What quantizes. torchao and modelopt.pytorch write a .pth, modelopt.onnx and onnxruntime a
        Q/DQ ONNX file; onnxruntime is ours. null: torchao.""",
    )
    mode: Literal["static_ptq", "weight_only_ptq"] | None = spec_field(
        "weight_only_ptq",
        doc="""How much is quantized. static_ptq: weights and inputs, with ranges from calibration images;
        weight_only_ptq: weights alone, torchao's only mode. null: the backend's mode.""",
    )
    algorithm: (
        Literal["minmax", "max", "entropy", "awq_clip", "awq_lite", "awq_full", "rtn_dq", "percentile"] | None
    ) = spec_field(
        "minmax",
        doc="""How ranges are found. modelopt.pytorch: minmax, max, entropy; modelopt.onnx: max, entropy, and
        with backend_kwargs {quantize_mode: int4} the four others; onnxruntime: minmax, entropy, percentile
        (ours); torchao reads none. null: the backend's first.""",
    )
    layers: list[LayerQuantizationConfig] | None = spec_field(
        [],
        doc="""Which layers are quantized, and how. TAO's backends quantize nothing without an entry;
        onnxruntime then takes every convolution and linear layer but the parts that suffer.""",
    )
    skip_names: list[str] | None = spec_field(
        [], doc="Patterns, as in module_name, of layers that stay as they are."
    )
    model_path: str | None = spec_field(
        "", doc="Checkpoint of any format, or .onnx file, to quantize; modelopt.onnx needs an .onnx file."
    )
    results_dir: str | None = spec_field(
        "", doc="Folder for the quantized model and its report; empty: results_dir/quantize."
    )
    backend_kwargs: dict[str, Any] | None = spec_field(
        {},
        doc="""Further arguments of the backend, listed on the page Quantize: of onnxruntime sensitivity: true
        and percentile; of modelopt.onnx quantize_mode and high_precision_dtype.""",
    )
    device: QuantizeDevice = spec_field(
        "cuda",
        doc="""Where calibration runs. trt is for modelopt.onnx, others take it for cuda; without a GPU it is
        the CPU.""",
    )


class ExperimentSpec(Section):
    """Everything that the subtasks other than convert read."""

    model_name: str | None = spec_field(None, doc="A name of your own for the model; null: none.")
    encryption_key: str | None = spec_field(
        None, secret=True, doc="Key that encrypts and decrypts checkpoints; null: no encryption."
    )
    results_dir: str | None = spec_field(
        "/results",
        doc="""Folder for all results: each subtask writes to a sub-folder of its own name, unless its
        own results_dir says otherwise.""",
    )
    wandb: WandbConfig = section(WandbConfig)
    model: ModelConfig = section(ModelConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    train: TrainConfig = section(TrainConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    inference: InferenceConfig = section(InferenceConfig)
    export: ExportConfig = section(ExportConfig)
    gen_trt_engine: GenTrtEngineConfig = section(GenTrtEngineConfig)
    quantize: QuantizeConfig = section(QuantizeConfig)
    ddetr_mm: OwnSection = section(OwnSection, origin=OURS)


class ConvertSpec(Section):
    """KITTI folders to sharded COCO annotation files."""

    input_source: str | None = spec_field(
        None, doc="Text file that lists one sequence folder per line, relative to data_root if given."
    )
    data_root: str | None = spec_field(
        None, doc="Folder the listed sequences are relative to; null: the lines are used as they are."
    )
    results_dir: str | None = spec_field(
        None, placeholder=True, doc="Folder the annotation files are written to."
    )
    image_dir_name: str | None = spec_field(None, doc="Folder of the images inside a sequence folder.")
    label_dir_name: str | None = spec_field(
        None, doc="Folder of the KITTI label files inside a sequence folder."
    )
    val_split: Int = spec_field(
        0,
        ge=0,
        le=100,
        doc="Percent of the images that go to validation (fold 0); acts with partition_mode: random.",
    )
    num_shards: PositiveInt = spec_field(32, doc="Number of annotation files per sequence and partition.")
    num_partitions: PositiveInt = spec_field(1, doc="Number of folds the data is divided into.")
    partition_mode: Literal["random", "sequence"] | None = spec_field(
        None,
        doc="""How folds are made. null: none; random: 2 folds of images, drawn at random; sequence: whole
        sequences are assigned to the folds.""",
    )
    image_extension: FileExtension | None = spec_field(
        None,
        doc="The only file extension that counts as an image; null: every common one.",
    )
    mapping_path: str | None = spec_field(
        None, doc="JSON file with an object of label name to category name; null: the default mapping."
    )
    ddetr_mm: OwnConvertSection = section(OwnConvertSection, origin=OURS)


Spec = ExperimentSpec | ConvertSpec

SUBTASKS = (
    *("convert", "train", "evaluate", "inference", "export", "gen_trt_engine", "quantize"),
    "automl",
)


def root_of(subtask: str | None) -> type[ExperimentSpec] | type[ConvertSpec]:
    """The model of a subtask's spec (an experiment for None)."""
    return ConvertSpec if subtask == "convert" else ExperimentSpec
