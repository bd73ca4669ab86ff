"""The ``train`` section: schedule, optimizer, precision and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ddetr_mm.spec.schema.common import DistributedTask
from ddetr_mm.spec.schema.fields import REFERENCE_7_3, section, spec_field


@dataclass
class CudnnConfig:
    """Switches of cuDNN."""

    benchmark: bool = spec_field(False, doc="Let cuDNN time its algorithms and take the fastest.")
    deterministic: bool = spec_field(True, doc="Restrict cuDNN to deterministic algorithms.")


@dataclass
class OptimConfig:
    """The optimizer and the learning-rate schedule."""

    optimizer: str = spec_field("AdamW", options=("AdamW", "SGD"), doc="The optimizer.")
    monitor_name: str = spec_field(
        "val_loss",
        options=("val_loss", "train_loss"),
        doc="""The value a scheduler would watch; the documentation calls it lr_monitor, which is accepted
        too.""",
    )
    lr: float = spec_field(
        2e-4, gt=0.0, doc="Initial learning rate of everything outside the two groups below."
    )
    lr_backbone: float = spec_field(
        2e-5, ge=0.0, doc="Initial learning rate of the backbone; 0 leaves its weights as they are."
    )
    lr_linear_proj_mult: float = spec_field(
        0.1,
        ge=0.0,
        doc="""Factor on lr for reference points and sampling offsets; 0 leaves them as they are.""",
    )
    momentum: float = spec_field(0.9, ge=0.0, doc="Momentum of SGD.")
    weight_decay: float = spec_field(1e-4, ge=0.0, doc="Weight decay; 0: none.")
    lr_scheduler: str = spec_field(
        "MultiStep",
        options=("MultiStep", "StepLR"),
        doc="When the rates decay. MultiStep: at lr_steps; StepLR: every lr_step_size epochs.",
    )
    lr_steps: list[int] = spec_field(
        [40], ge=1, doc="Epochs, ascending, at which MultiStep multiplies the rates by lr_decay."
    )
    lr_step_size: int = spec_field(40, ge=1, doc="Number of epochs between two decays of StepLR.")
    lr_decay: float = spec_field(0.1, gt=0.0, doc="Factor by which the learning rates are multiplied.")


@dataclass
class CheckpointerConfig:
    """Keeping the best checkpoints."""

    enable_topk: bool = spec_field(False, origin=REFERENCE_7_3, doc="Keep the best checkpoints by a metric.")
    replace_periodic: bool = spec_field(
        False, origin=REFERENCE_7_3, doc="Keep only the best ones, not those of every interval."
    )
    monitor: str | None = spec_field(None, origin=REFERENCE_7_3, doc="The metric that says which is best.")
    mode: str | None = spec_field(
        None,
        origin=REFERENCE_7_3,
        options=("min", "max"),
        doc="Whether a small (min) or a large (max) value of the metric is better.",
    )
    save_top_k: int = spec_field(
        1, ge=1, origin=REFERENCE_7_3, doc="How many of the best checkpoints are kept."
    )
    filename: str = spec_field(
        "model_best_{epoch:03d}", origin=REFERENCE_7_3, doc="Name pattern of the best checkpoints."
    )
    dirpath: str | None = spec_field(
        None, origin=REFERENCE_7_3, doc="Folder for the best checkpoints; null: the results folder."
    )
    auto_insert_metric_name: bool = spec_field(
        False, origin=REFERENCE_7_3, doc="Add the metric's name to the file name."
    )


@dataclass
class TrainConfig(DistributedTask):
    """The training run."""

    seed: int = spec_field(
        1234,
        ge=-1,
        doc="""Seed of all random numbers; -1: a new one for every run, which is written to the
        log.""",
    )
    cudnn: CudnnConfig = section(CudnnConfig)
    num_epochs: int = spec_field(10, ge=1, doc="Number of passes over the training data.")
    checkpoint_interval: int = spec_field(
        1, ge=1, doc="Epochs (or steps, see the next field) between two checkpoints."
    )
    checkpoint_interval_unit: str = spec_field(
        "epoch", options=("epoch", "step"), doc="Unit of checkpoint_interval."
    )
    validation_interval: int = spec_field(1, ge=1, doc="Epochs between two validations.")
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
        doc="""Modules whose weights stay as they are, by the reference's names (backbone,
        transformer.encoder, input_proj, ...).""",
    )
    pretrained_model_path: str | None = spec_field(
        None, doc="Checkpoint whose weights training starts from, loaded by name; null: none."
    )
    clip_grad_norm: float = spec_field(
        0.1, ge=0.0, doc="Largest L2 norm of the gradient; larger ones are scaled down. 0: no clipping."
    )
    is_dry_run: bool = spec_field(
        False, doc="Run one step of training and of validation only, to see that everything works."
    )
    optim: OptimConfig = section(OptimConfig)
    precision: str = spec_field(
        "fp32",
        options=("fp32", "fp16", "bf16"),
        doc="Number format: fp32; fp16, mixed with loss scaling; or bf16 (ours), mixed without it.",
    )
    distributed_strategy: str = spec_field(
        "ddp",
        options=("ddp", "fsdp"),
        doc="How several GPUs share the work: ddp copies the model to each, fsdp shards it.",
    )
    activation_checkpoint: bool = spec_field(
        True, doc="Recompute activations in the backward pass instead of keeping them: less memory."
    )
    verbose: bool = spec_field(False, doc="Print every change of the learning rates.")
    input_width: int | None = spec_field(None, ge=1, doc="Width of the network's input, in pixels.")
    input_height: int | None = spec_field(None, ge=1, doc="Height of the network's input, in pixels.")
    checkpointer: CheckpointerConfig = section(CheckpointerConfig, origin=REFERENCE_7_3)
