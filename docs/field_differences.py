"""Fields for which TAO's documentation and its schema differ, and the value used here.

The documentation decides defaults, and the wider of two ranges is accepted. A range that the documentation
gives as ``>0`` has no upper end. Where something else was chosen, the last column gives the reason. Fields
that are not listed have the default and range of TAO's schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ABSENT: Any = "(not given)"


@dataclass(frozen=True)
class Difference:
    """One field on which the two sources differ.

    Attributes:
        path: the field; ``convert:`` starts those of a convert spec.
        documentation: the value in the documentation.
        schema: the value in TAO's schema.
        ours: the value used here.
        why: the reason, where the rule above does not apply.
    """

    path: str
    documentation: Any
    schema: Any
    ours: Any
    why: str = ""


DEFAULTS: tuple[Difference, ...] = (
    Difference("results_dir", "/results", "", "/results"),
    Difference("model.num_select", 100, 300, 100),
    Difference("export.on_cpu", True, False, True, "the table says true, the example above it false"),
    Difference("export.input_width", 960, 640, 960),
    Difference("export.input_height", 544, 640, 544),
    Difference("export.opset_version", 12, 17, 12),
    Difference(
        "gen_trt_engine.trt_engine",
        ABSENT,
        "???",
        None,
        "null is valid and means a temporary file, so the field need not be filled in",
    ),
    Difference("convert:num_shards", 32, 20, 32),
    Difference(
        "convert:image_extension",
        ABSENT,
        ".jpg",
        None,
        "the documentation's example leaves it out; every common image type counts until it is set",
    ),
)

_ONE = "at least 1"
_LIST_ITEM = "a size, an index or an epoch below this has no meaning"

RANGES: tuple[Difference, ...] = (
    Difference("model.num_queries", ">0", "100 to 900", _ONE),
    Difference("model.num_select", ">0", "1 to 1000", _ONE),
    Difference(
        "model.return_interm_indices",
        "0 to 4",
        ABSENT,
        "at least 0, at most 4",
        "any ascending choice is accepted, not only the documentation's five",
    ),
    Difference("model.nheads", ABSENT, ABSENT, _ONE, "a count"),
    Difference(
        "model.hidden_dim", ABSENT, ABSENT, "at least 32", "group normalisation needs a multiple of 32"
    ),
    Difference("model.enc_layers", ">0", "1 to 12", _ONE),
    Difference("model.dec_layers", ">0", "1 to 12", _ONE),
    Difference("dataset.workers", ">0", _ONE, "at least 0", "0 loads in the main process, as in PyTorch"),
    Difference("dataset.eval_class_ids", ABSENT, ABSENT, _ONE, "0 is the background"),
    Difference("dataset.augmentation.scales", ABSENT, ABSENT, _ONE, _LIST_ITEM),
    Difference("dataset.augmentation.train_random_resize", ABSENT, ABSENT, _ONE, _LIST_ITEM),
    Difference("dataset.augmentation.input_std", ABSENT, ABSENT, "more than 0", "it is divided by"),
    Difference("dataset.augmentation.train_random_crop_min", ">0", "at least 32", _ONE),
    Difference("dataset.augmentation.train_random_crop_max", ">0", "32 to 1333", _ONE),
    Difference("dataset.augmentation.test_random_resize", ">0", "at least 32", _ONE),
    Difference(
        "dataset.augmentation.fixed_random_crop",
        "divisible by 32",
        _ONE,
        "at least 32",
        "the smallest number that is divisible by 32",
    ),
    Difference(
        "dataset.augmentation.horizontal_flip_prob",
        ">=0",
        "0 to 1",
        "at least 0, at most 1",
        "no larger number is a probability",
    ),
    Difference("train.gpu_ids", ABSENT, ABSENT, "at least 0", _LIST_ITEM),
    Difference("evaluate.gpu_ids", ABSENT, ABSENT, "at least 0", _LIST_ITEM),
    Difference("inference.gpu_ids", ABSENT, ABSENT, "at least 0", _LIST_ITEM),
    Difference("train.clip_grad_norm", ">=0", ">0", "at least 0"),
    Difference("train.optim.lr", ">0", "0 to 0.01, >0", "more than 0"),
    Difference(
        "train.optim.lr_backbone",
        ">0",
        "0 to 0.001, >0",
        "at least 0",
        "the schema's range starts at 0, which keeps the backbone as it is",
    ),
    Difference(
        "train.optim.lr_linear_proj_mult",
        ">0",
        "0 to 1, >0",
        "at least 0",
        "the schema's range starts at 0, which keeps these layers as they are",
    ),
    Difference(
        "train.optim.momentum",
        ">0",
        "0 to 1, >0",
        "at least 0",
        "the schema's range starts at 0, which is SGD without momentum",
    ),
    Difference(
        "train.optim.weight_decay",
        ">0",
        "0 to 0.1, >0",
        "at least 0",
        "the schema's range starts at 0, which is no decay",
    ),
    Difference("train.optim.lr_steps", ABSENT, ABSENT, _ONE, _LIST_ITEM),
    Difference("train.optim.lr_step_size", ">0", "1 to 10000", _ONE),
    Difference("train.optim.lr_decay", ">0", "0 to 1, >0", "more than 0"),
    Difference("evaluate.conf_threshold", ">=0", ABSENT, "at least 0"),
    Difference("inference.conf_threshold", ">=0", ABSENT, "at least 0"),
    Difference("export.gpu_id", ABSENT, ABSENT, "at least 0", "an index"),
    Difference("export.input_width", ">0", "at least 32", _ONE),
    Difference("export.input_height", ">0", "at least 32", _ONE),
    Difference("convert:val_split", ABSENT, "at least 0", "at least 0, at most 100", "it is in percent"),
    Difference("convert:num_shards", ">0", "at least 0", _ONE, "no data can be written to no file"),
)

OPTIONS: tuple[Difference, ...] = (
    Difference("model.loss_types", ABSENT, ABSENT, "labels, boxes", "the losses there are"),
    Difference("train.precision", "fp32, fp16", "fp16, fp32", "fp32, fp16, bf16", "bf16 is ours"),
    Difference(
        "quantize.backend",
        ABSENT,
        "modelopt.pytorch, torchao, modelopt.onnx",
        "modelopt.pytorch, torchao, modelopt.onnx, onnxruntime",
        "onnxruntime is ours",
    ),
    Difference(
        "quantize.algorithm",
        ABSENT,
        "minmax, max, entropy, awq_clip, awq_lite, awq_full, rtn_dq",
        "minmax, max, entropy, awq_clip, awq_lite, awq_full, rtn_dq, percentile",
        "percentile is ours, of onnxruntime",
    ),
    Difference(
        "quantize.device", ABSENT, "^(cuda|cpu|trt|cuda:[0-9]+)$", "cuda, cpu, trt or cuda:N", "a pattern"
    ),
    Difference(
        "convert:partition_mode", ABSENT, ABSENT, "random, sequence", "the modes there are; null: neither"
    ),
)
