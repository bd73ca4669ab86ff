"""Translates the spec section ``model`` into the config ``model``: backbone, neck, transformer, head.

The network is mmdet's Deformable DETR with the parts of :mod:`ddetr_mm.models` where TAO differs. Feature
levels 0 to 3 are the backbone's stages (strides 4 to 32); level 4 is a stride-2 convolution on the last one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec import ExperimentSpec, LoadedSpec
from ddetr_mm.spec.schema import ModelConfig

# --- parameters by TAO's names ---

ParameterNames = Mapping[str, tuple[str, ...]]
"""Every parameter of a network → its names in TAO's; none for a parameter that TAO does not have."""


def taos_parameter_names(model: dict[str, Any]) -> ParameterNames:
    """The parameters of a network by the names of TAO's checkpoints, without the prefix ``model.model.``.

    The network is built without weights; the random generator's state does not change. A module that is
    used several times is listed under each of its names, as TAO's box heads are in the decoder.

    Args:
        model: the config of a detector.
    """
    import torch
    from mmdet.registry import MODELS

    import ddetr_mm.models  # noqa: F401 - registers what the config names
    from ddetr_mm.weights.formats import TAO, TAO_PREFIX, from_canonical

    with torch.random.fork_rng(devices=[]):
        network = MODELS.build(copy.deepcopy(model))
    parameters = dict(network.named_parameters(remove_duplicate=False))
    _, trace = from_canonical(
        parameters, TAO, with_box_refine=network.with_box_refine, two_stage=network.as_two_stage
    )
    return {
        name: tuple(taos.removeprefix(TAO_PREFIX) for taos in trace.mapped.get(name, ()))
        for name in parameters
    }


def parameters_below(name: str, names: ParameterNames) -> list[str]:
    """The parameters of one of TAO's modules, or of one of the mmdet detector's where TAO has none so named.

    Args:
        name: a module or a parameter, with or without ``model.`` or ``model.model.`` in front.
        names: see :func:`taos_parameter_names`.
    """
    while name.startswith("model."):
        name = name.removeprefix("model.")

    def is_below(other: str) -> bool:
        return other == name or other.startswith(f"{name}.")

    return [ours for ours, taos in names.items() if any(map(is_below, taos))] or [*filter(is_below, names)]


def parameters_with(keyword: str, names: ParameterNames) -> list[str]:
    """The parameters whose name in TAO's optimizer contains ``keyword``."""
    return [ours for ours, taos in names.items() if any(keyword in f"model.{name}" for name in taos)]


def whole_modules(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """The fewest modules and parameters that make up the chosen parameters.

    Args:
        chosen: some parameters of a network.
        names: all of them.

    Returns:
        A module by its name with a dot behind it; a parameter by its name.
    """
    sizes = Counter(part for name in names for part in _modules_around(name))
    chosen = list(chosen)
    found = Counter(part for name in chosen for part in _modules_around(name))
    whole = (
        next((part for part in _modules_around(name) if found[part] == sizes[part]), name) for name in chosen
    )
    return list(dict.fromkeys(whole))


def _modules_around(name: str) -> list[str]:
    """``a.b.weight`` → ``a.``, ``a.b.``."""
    return [name[: index + 1] for index, letter in enumerate(name) if letter == "."]


def nearest_names(name: str, names: ParameterNames) -> list[str]:
    """Up to three names of TAO's modules and parameters that are like ``name``."""
    known = {part.rstrip(".") for taos in names.values() for one in taos for part in _modules_around(one)}
    known.update(one for taos in names.values() for one in taos)
    return get_close_matches(name.removeprefix("model.").removeprefix("model."), sorted(known), n=3)


# --- the network ---

SOURCE_KEYS = (
    "model.backbone",
    "model.train_backbone",
    "model.dilation",
    "model.num_feature_levels",
    "model.return_interm_indices",
    "model.num_queries",
    "model.enc_layers",
    "model.dec_layers",
    "model.hidden_dim",
    "model.nheads",
    "model.enc_n_points",
    "model.dec_n_points",
    "model.dim_feedforward",
    "model.dropout_ratio",
    "model.with_box_refine",
    "model.aux_loss",
    "model.cls_loss_coef",
    "model.bbox_loss_coef",
    "model.giou_loss_coef",
    "model.focal_alpha",
    "model.num_select",
    "model.precise_msda",
    "dataset.num_classes",
    "dataset.augmentation.input_mean",
    "dataset.augmentation.input_std",
    "dataset.augmentation.fixed_padding",
    "dataset.augmentation.pad_size_divisor",
    "dataset.augmentation.test_random_resize",
    "dataset.augmentation.random_resize_max_size",
    "dataset.augmentation.scales",
    "dataset.augmentation.fixed_random_crop",
    "train.activation_checkpoint",
    "train.freeze",
    "ddetr_mm.backbone",
    "ddetr_mm.zero_padded_values",
    "ddetr_mm.attention",
    "ddetr_mm.matcher",
    "ddetr_mm.compile",
    "ddetr_mm.compile_mode",
    "ddetr_mm.predict_precision",
)

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
"""Half precisions of a spec → names of torch dtypes."""

EXPORTED_KEYS = (
    "model.num_select",
    "dataset.num_classes",
    "dataset.augmentation.input_mean",
    "dataset.augmentation.input_std",
)


def exported_detector(spec: ExperimentSpec, model: dict[str, Any]) -> dict[str, Any]:
    """An exported graph that replaces the network, with the same normalisation and choice of detections.

    Args:
        spec: a checked experiment spec.
        model: class and file of the graph.
    """
    return model | dict(
        num_classes=spec.dataset.num_classes,
        max_per_img=spec.model.num_select,
        background_column=True,
        data_preprocessor=data_preprocessor(spec, padded=False),
    )


def detector(
    spec: ExperimentSpec,
    *,
    zero_padded_values: bool,
    channels: list[int] | None = None,
    for_export: bool = False,
    train: bool = False,
    padded: bool = True,
) -> dict[str, Any]:
    """The config of the whole network.

    Args:
        spec: a checked experiment spec.
        zero_padded_values: whether attention values at padded positions are set to zero.
        channels: output channels of the stages of ``ddetr_mm.backbone``; ignored for TAO's backbones.
        for_export: leave out :func:`speed_options`, since the network will be traced.
        train: the network is trained, with the padding of training.
        padded: False where every image is resized to one size and none is padded.
    """
    model = spec.model
    checkpointing = spec.train.activation_checkpoint
    stages = backbone_stages(model)
    backbone, stage_channels = backbone_config(spec, stages, channels)
    return dict(
        type="TAODeformableDETR",
        num_queries=model.num_queries,
        num_feature_levels=model.num_feature_levels,
        with_box_refine=model.with_box_refine,
        as_two_stage=False,
        zero_padded_values=zero_padded_values,
        activation_checkpoint=checkpointing,
        frozen_modules=frozen_modules(spec),
        data_preprocessor=data_preprocessor(spec, train=train, padded=padded),
        backbone=backbone,
        neck=dict(
            type="ChannelMapper",
            in_channels=stage_channels,
            kernel_size=1,
            out_channels=model.hidden_dim,
            bias=True,
            act_cfg=None,
            norm_cfg=dict(type="GN", num_groups=32),
            num_outs=model.num_feature_levels,
        ),
        encoder=dict(num_layers=model.enc_layers, layer_cfg=encoder_layer(model)),
        decoder=dict(
            num_layers=model.dec_layers,
            return_intermediate=True,
            layer_cfg=decoder_layer(model),
            post_norm_cfg=None,
        ),
        positional_encoding=dict(
            num_feats=model.hidden_dim // 2, normalize=True, offset=-0.5, temperature=10000
        ),
        bbox_head=bbox_head(spec) | matcher(spec, train),
        train_cfg=dict(assigner=assigner(model)),
        test_cfg=dict(max_per_img=model.num_select),
        **({} if for_export else speed_options(spec)),
    )


def speed_options(spec: ExperimentSpec) -> dict[str, Any]:
    """Arguments of the detector for attention, compilation and precision that are not at their default."""
    own = spec.ddetr_mm
    options: dict[str, Any] = {}
    if own.attention != "auto":
        options["attention"] = own.attention
    if spec.model.precise_msda:
        options["deterministic_attention"] = True
    if own.compile != "none":
        options["compiled"] = own.compile
        if own.compile_mode != "default":
            options["compile_options"] = dict(mode=own.compile_mode)
    if own.predict_precision != "fp32":
        options["predict_dtype"] = DTYPES[own.predict_precision]
    return options


def frozen_modules(spec: ExperimentSpec) -> list[str]:
    """``backbone`` for a ``ddetr_mm.backbone`` without ``model.train_backbone``.

    TAO's backbones are frozen by their configs, see :func:`backbone_config`.
    """
    return ["backbone"] if spec.ddetr_mm.backbone and not spec.model.train_backbone else []


_MOST_HINTS = 10


def frozen_by_name(loaded: LoadedSpec, names: ParameterNames) -> list[str]:
    """What ``train.freeze`` names, as modules and parameters of the mmdet detector.

    Args:
        loaded: the spec.
        names: see :func:`taos_parameter_names`.

    Raises:
        SpecError: a name fits nothing; all of them are reported.
    """
    frozen: list[str] = []
    problems = []
    for index, name in enumerate(loaded.spec.train.freeze or []):
        chosen = parameters_below(name, names)
        frozen += [part.rstrip(".") for part in whole_modules(chosen, names)]
        if not chosen:
            near = nearest_names(name, names) if len(problems) < _MOST_HINTS else []
            key = f"train.freeze[{index}]"
            problems.append(
                Problem(
                    "names no part of the network",
                    file=loaded.path,
                    where=", ".join(filter(None, (key, loaded.origin.get(key)))),
                    value=name,
                    hint=f"did you mean {' or '.join(near)}?"
                    if near
                    else "give names such as backbone, transformer.encoder, input_proj",
                )
            )
    SpecError.collect(problems)
    return list(dict.fromkeys(frozen))


def backbone_stages(model: ModelConfig) -> tuple[int, ...]:
    """The backbone stages that feed the neck: all chosen levels but the extra one (index 4)."""
    return tuple(index for index in model.return_interm_indices if index < 4)


def backbone_config(
    spec: ExperimentSpec, stages: tuple[int, ...], channels: list[int] | None
) -> tuple[dict[str, Any], list[int]]:
    """The backbone and the channels of the stages it returns.

    Raises:
        ValueError: ``ddetr_mm.backbone`` is set and ``channels`` is None.
    """
    model = spec.model
    checkpointing = spec.train.activation_checkpoint
    if spec.ddetr_mm.backbone:
        if channels is None:
            raise ValueError("the channels of ddetr_mm.backbone must be looked up before translating")
        return without_unread_stages(spec.ddetr_mm.backbone), channels
    if model.backbone.startswith("gc_vit_"):
        from ddetr_mm.weights.gcvit import VARIANTS  # loads torch, which other specs need not

        variant = model.backbone.removeprefix("gc_vit_")
        config: dict[str, Any] = dict(
            type="GCViT",
            variant=variant,
            out_indices=stages,
            frozen_stages=-1 if model.train_backbone else 4,
            with_cp=checkpointing,
        )
        return config, [VARIANTS[variant].channels[stage] for stage in stages]
    config = dict(
        type="TorchvisionDilatedResNet" if model.dilation else "ResNet",
        depth=50,
        num_stages=4,
        out_indices=stages,
        # TAO never trains the stem and the first stage of a ResNet.
        frozen_stages=1 if model.train_backbone else 4,
        norm_cfg=dict(type="BN", requires_grad=False),
        norm_eval=True,
        style="pytorch",
        # True would start every residual branch at zero, and frozen norms would keep it there.
        zero_init_residual=False,
        with_cp=checkpointing,
    )
    return without_unread_stages(config), [256 * 2**stage for stage in stages]


_RESNETS = ("ResNet", "ResNetV1d", "ResNeXt", "Res2Net", "TorchvisionDilatedResNet")
"""mmdet's ResNets, which can be built without their last stages."""


def without_unread_stages(config: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's config without the stages after the last one of ``out_indices``.

    TAO does not build them either: its checkpoints lack their weights. Configs of other backbones than
    ResNets, and with plugins for each stage, are returned as they are; GCViT builds no such stage.
    """
    kind = str(config.get("type")).removeprefix("mmdet.")
    count = max(config.get("out_indices") or (3,)) + 1
    if kind not in _RESNETS or "plugins" in config or not 0 < count < config.get("num_stages", 4):
        return dict(config)
    dilated = kind == "TorchvisionDilatedResNet"
    lists = {
        "strides": (1, 2, 2, 1 if dilated else 2),
        "dilations": (1, 1, 1, 2 if dilated else 1),
        "stage_with_dcn": (False,) * 4,
    }
    changed = dict(config, num_stages=count)
    for name, usual in lists.items():
        if name in config or name != "stage_with_dcn":
            changed[name] = tuple(config.get(name, usual)[:count])
    changed["frozen_stages"] = min(config.get("frozen_stages", -1), count)
    return changed


def attention(model: ModelConfig, num_points: int) -> dict[str, Any]:
    """Config of one multi-scale deformable attention."""
    return dict(
        embed_dims=model.hidden_dim,
        num_heads=model.nheads,
        num_levels=model.num_feature_levels,
        num_points=num_points,
        dropout=model.dropout_ratio,
        batch_first=True,
    )


def feed_forward(model: ModelConfig) -> dict[str, Any]:
    """Config of a transformer layer's feed-forward network."""
    return dict(
        embed_dims=model.hidden_dim,
        feedforward_channels=model.dim_feedforward,
        ffn_drop=model.dropout_ratio,
    )


def encoder_layer(model: ModelConfig) -> dict[str, Any]:
    """Config of one encoder layer."""
    return dict(self_attn_cfg=attention(model, model.enc_n_points), ffn_cfg=feed_forward(model))


def decoder_layer(model: ModelConfig) -> dict[str, Any]:
    """Config of one decoder layer."""
    return dict(
        # Not `dropout=`, which mmcv writes into a default dict shared by all attentions.
        self_attn_cfg=dict(
            embed_dims=model.hidden_dim,
            num_heads=model.nheads,
            attn_drop=model.dropout_ratio,
            dropout_layer=dict(type="Dropout", drop_prob=model.dropout_ratio),
            batch_first=True,
        ),
        cross_attn_cfg=attention(model, model.dec_n_points),
        ffn_cfg=feed_forward(model),
    )


def bbox_head(spec: ExperimentSpec) -> dict[str, Any]:
    """Config of the prediction head and its losses; a loss that is not in ``loss_types`` has weight 0."""
    model = spec.model
    labels = float("labels" in model.loss_types)
    boxes = float("boxes" in model.loss_types)
    return dict(
        type="TAODeformableDETRHead",
        num_classes=spec.dataset.num_classes,
        embed_dims=model.hidden_dim,
        # Column 0 is the background: trained as a logit, never predicted as a label.
        background_column=True,
        aux_loss=model.aux_loss,
        sync_cls_avg_factor=True,
        loss_cls=dict(
            type="FocalLoss",
            use_sigmoid=True,
            gamma=2.0,
            alpha=model.focal_alpha,
            loss_weight=model.cls_loss_coef * labels,
        ),
        loss_bbox=dict(type="L1Loss", loss_weight=model.bbox_loss_coef * boxes),
        loss_iou=dict(type="GIoULoss", loss_weight=model.giou_loss_coef * boxes),
    )


def matcher(spec: ExperimentSpec, train: bool) -> dict[str, Any]:
    """Argument of the head for ``ddetr_mm.matcher``, in training and where it is not at its default."""
    return dict(matcher=spec.ddetr_mm.matcher) if train and spec.ddetr_mm.matcher != "scipy" else {}


def assigner(model: ModelConfig) -> dict[str, Any]:
    """Config of the Hungarian matcher; the alpha of its class cost is always 0.25, as in TAO."""
    return dict(
        type="HungarianAssigner",
        match_costs=[
            dict(type="FocalLossCost", weight=model.cls_loss_coef, alpha=0.25, gamma=2.0, eps=1e-8),
            dict(type="BBoxL1Cost", weight=model.bbox_loss_coef, box_format="xywh"),
            dict(type="IoUCost", iou_mode="giou", weight=model.giou_loss_coef),
        ],
    )


def data_preprocessor(spec: ExperimentSpec, *, train: bool = False, padded: bool = True) -> dict[str, Any]:
    """Normalisation (0..1 in the spec, 0..255 in the config) and padding.

    Args:
        spec: a checked experiment spec.
        train: also say how training pads, where that differs from validation.
        padded: False pads nothing beyond the largest image of a batch.
    """
    augmentation = spec.dataset.augmentation
    padding = test_padding(spec) if padded else _padding()
    options: dict[str, Any] = {}
    if train and train_padding(spec) != padding:
        options["train_padding"] = train_padding(spec)
    return dict(
        type="FixedPadDetDataPreprocessor",
        mean=[round(255 * value, 6) for value in three(augmentation.input_mean)],
        std=[round(255 * value, 6) for value in three(augmentation.input_std)],
        bgr_to_rgb=True,
        **padding,
        **options,
    )


def _padding(short_long: tuple[int, int] | None = None, divisor: int = 1) -> dict[str, Any]:
    return dict(pad_short_long=short_long, pad_size_divisor=divisor)


def test_padding(spec: ExperimentSpec) -> dict[str, Any]:
    """Padding of validation, evaluation and inference: to multiples, to a fixed size, or none."""
    augmentation = spec.dataset.augmentation
    if augmentation.pad_size_divisor:
        return _padding(divisor=augmentation.pad_size_divisor)
    if not augmentation.fixed_padding:
        return _padding()
    return _padding(_ordered(augmentation.test_random_resize, augmentation.random_resize_max_size))


def train_padding(spec: ExperimentSpec) -> dict[str, Any]:
    """Padding of training: to the square of ``fixed_random_crop``, to a fixed size, or none."""
    augmentation = spec.dataset.augmentation
    if augmentation.fixed_random_crop:
        return _padding((augmentation.fixed_random_crop,) * 2)
    if not augmentation.fixed_padding:
        return _padding()
    return _padding(_ordered(max(augmentation.scales), augmentation.random_resize_max_size))


def _ordered(short: int, long: int) -> tuple[int, int]:
    """Both sides, the shorter first: a spec may ask for a short side beyond ``random_resize_max_size``."""
    return min(short, long), max(short, long)


def three(values: list[float]) -> list[float]:
    """One value per colour channel; a single one is used for all three."""
    return list(values) * 3 if len(values) == 1 else list(values)
