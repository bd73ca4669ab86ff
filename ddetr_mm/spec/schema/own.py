"""The ``ddetr_mm`` section: options that the reference has no field for.

Without the section every spec means what it means to the reference. Add an option as one more
``spec_field(..., origin=OURS)``; loading, checks, the default spec and the tables follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddetr_mm.spec.schema.fields import OURS, spec_field


@dataclass
class OwnSection:
    """Options of ddetr_mm itself; without them a spec means what it means to the reference."""

    backbone: dict[str, Any] | None = spec_field(
        None,
        origin=OURS,
        doc="""Configuration of any mmdet backbone (type: ResNet, depth: 18, ...), used in place of
        model.backbone; null: model.backbone decides.""",
    )
    zero_padded_values: bool | None = spec_field(
        None,
        origin=OURS,
        doc="""Zero the attention values at padded positions, so that a prediction does not depend on its
        batch's padding. null: as the checkpoint's origin demands, else false as in the reference.""",
    )
    resize: str = spec_field(
        "pillow",
        origin=OURS,
        options=("pillow", "fast"),
        doc="""How images are resized. pillow: the reference's pixels. fast: plain bilinear resizing without
        antialiasing, as stock mmdet does it; in training, JPEGs much larger than the largest size asked for
        are decoded at a half, a quarter or an eighth.""",
    )
    missing_images: str = spec_field(
        "error",
        origin=OURS,
        options=("error", "replace"),
        doc="""What training does about an image file that is missing or cannot be decoded. error: stop and
        name it; replace: name it in the log, take another image, and count how many were replaced.""",
    )
    quick_check: bool = spec_field(
        True,
        origin=OURS,
        doc="""Before training starts, look over the annotations and a sample of the image files, and stop
        where they cannot be right.""",
    )
    log_interval: int = spec_field(50, origin=OURS, ge=1, doc="Steps between two lines of the log.")
    non_finite: str = spec_field(
        "stop",
        origin=OURS,
        options=("stop", "skip"),
        doc="""What training does about a loss or gradients that are NaN or infinite. stop: end before the
        weights change; skip: leave the step out. Either way the images and the layer are named and the batch
        is saved.""",
    )
    deterministic: bool = spec_field(
        False,
        origin=OURS,
        doc="Use deterministic algorithms throughout: the same command gives the same weights.",
    )
    device: str = spec_field(
        "auto",
        origin=OURS,
        options=("auto", "cpu", "cuda"),
        doc="Where to run; auto: on a GPU if there is one.",
    )
    accumulate_steps: int = spec_field(
        1,
        origin=OURS,
        ge=1,
        doc="""Steps whose gradients are summed up before the weights change; the effective batch is
        dataset.batch_size x GPUs x this.""",
    )
    lr_scaling: str = spec_field(
        "none",
        origin=OURS,
        options=("none", "linear", "sqrt"),
        doc="""Multiply all learning rates by effective batch / lr_base_batch (linear) or by its square root
        (sqrt, usual with AdamW). none: the rates are used as they are written, as in the reference.""",
    )
    lr_base_batch: int | None = spec_field(
        None,
        origin=OURS,
        ge=1,
        doc="""The effective batch that the learning rates are meant for; null: dataset.batch_size, that is
        one GPU without accumulation.""",
    )
    attention: str = spec_field(
        "auto",
        origin=OURS,
        options=("auto", "mmcv", "triton", "torch"),
        doc="""What a GPU computes deformable attention with. mmcv: its compiled op; triton: kernels that need
        no build; torch: plain PyTorch, the slow reference, on every device; auto: mmcv's op and the Triton
        kernels are compared and timed once, and the faster one is kept, as the log tells.""",
    )
    compile: str = spec_field(
        "none",
        origin=OURS,
        options=("none", "backbone", "all"),
        doc="""What torch.compile turns into fused kernels at the first step of train, evaluate and inference:
        nothing, the backbone, or backbone, neck, encoder and decoder. Worth its minutes where images have one
        or two sizes (dataset.augmentation.fixed_padding); results differ by rounding.""",
    )
    compile_mode: str = spec_field(
        "default",
        origin=OURS,
        options=("default", "reduce-overhead", "max-autotune"),
        doc="""How torch.compile works, with ddetr_mm.compile. reduce-overhead: also as CUDA graphs, for small
        batches; max-autotune: the same, with kernels chosen by trial, which takes long.""",
    )
    predict_precision: str = spec_field(
        "fp32",
        origin=OURS,
        options=("fp32", "fp16", "bf16"),
        doc="""Precision of evaluation and inference; scores and boxes are float32 all the same. The precision
        of training is train.precision.""",
    )
    time_ledger: bool = spec_field(
        False,
        origin=OURS,
        doc="""Measure where the time of a training step goes: data, backbone, encoder, decoder, matching,
        loss, backward, optimizer, and what is left; told in the log and in time_ledger.json.""",
    )
    export_fp16: bool = spec_field(
        False,
        origin=OURS,
        doc="Also write the exported graph in half precision, as <name>.fp16.onnx with its parity report.",
    )


@dataclass
class OwnConvertSection:
    """Options of ddetr_mm itself for convert."""

    strict: bool = spec_field(
        False, origin=OURS, doc="Stop at the first bad label or image instead of listing it."
    )
    pad_shards: bool = spec_field(
        False,
        origin=OURS,
        doc="Fill short shards with repeated images, as the reference does; false: no repeats.",
    )
    num_workers: int | None = spec_field(
        None,
        origin=OURS,
        ge=0,
        doc="""Processes to use beside this one; null: as many as the cores and the number of images are
        worth.""",
    )
