"""What a checkpoint holds, as fields of a spec: network, classes, size and normalisation of images.

:func:`describe` is what a spec must say so that its network fits the weights. A value that the file does not
say is the default of the original release and of TAO, and listed in :attr:`Description.assumed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ddetr_mm.classes import Columns, filled_columns, named_columns
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights.checkpoint import Architecture, Checkpoint, CheckpointMeta, named_backbone
from ddetr_mm.weights.class_columns import (
    NUM_COLUMNS,
    coco_column_names,
    known_columns,
    names_by_category_id,
    numbered_by_position,
    plan_columns,
)
from ddetr_mm.weights.scheme import FIELDS

_RESNET_DEPTHS = {"resnet_18": 18, "resnet_34": 34, "resnet_101": 101, "resnet_152": 152}
_SPEC_BACKBONES = ("resnet_50", "gc_vit_")
DEFAULT_SIZES = {"test_random_resize": 800, "random_resize_max_size": 1333}
"""Sides of a test image where a file says none: those of the original release and of TAO."""
_NOT_FROM_FILES = ("init_cfg", "pretrained")
"""Arguments of a backbone that load another file."""

# --- How pictures reach the network ---

TEST_SETTINGS: dict[str, type] = {
    "test_random_resize": int,
    "random_resize_max_size": int,
    "fixed_padding": bool,
    "pad_size_divisor": int,
    "resize": str,
    "num_select": int,
    "backbone": dict,
}
"""What :attr:`~ddetr_mm.weights.checkpoint.CheckpointMeta.test_settings` may hold, by the names of a spec's
fields: the first four of ``dataset.augmentation``, ``ddetr_mm.resize``, ``model.num_select``, and
``ddetr_mm.backbone``, the config of a backbone that TAO does not have."""


def settings_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return :data:`TEST_SETTINGS` from an mmengine config, as plain data.

    Args:
        config: from :func:`ddetr_mm.weights.read.config_settings`; not trusted.
    """
    model = config.get("model")
    model = model if isinstance(model, Mapping) else {}
    found: dict[str, Any] = {}
    step = _resize_step(config)
    if step is not None:
        scale = step.get("scale", [step.get("scales"), step.get("max_size")])
        sides = [_last(side) for side in scale] if isinstance(scale, list) else []
        if len(sides) == 2 and all(isinstance(side, int) for side in sides):
            found |= {"test_random_resize": min(sides), "random_resize_max_size": max(sides)}
        if step.get("type") == "Resize" and step.get("size_rule") != "tao":
            found["resize"] = "fast"
    preprocessor = model.get("data_preprocessor")
    if isinstance(preprocessor, Mapping):
        found["fixed_padding"] = bool(preprocessor.get("pad_short_long"))
        divisor = preprocessor.get("pad_size_divisor")
        if isinstance(divisor, int) and divisor > 1:
            found["pad_size_divisor"] = divisor
    test_cfg = model.get("test_cfg")
    if isinstance(test_cfg, Mapping):
        found["num_select"] = test_cfg.get("max_per_img")
    backbone = model.get("backbone")
    if isinstance(backbone, Mapping):
        found["backbone"] = dict(backbone)
    return checked_settings(found)


def settings_of_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return :data:`TEST_SETTINGS` from an experiment spec as plain data; not trusted."""
    for key in ("experiment_spec", "experiment_config", "hparams"):  # what TAO's file wraps it in
        if isinstance(spec.get(key), Mapping):
            spec = spec[key]
    places = {
        **{name: ("dataset", "augmentation", name) for name in [*TEST_SETTINGS][:4]},
        "resize": ("ddetr_mm", "resize"),
        "num_select": ("model", "num_select"),
        "backbone": ("ddetr_mm", "backbone"),
    }
    found: dict[str, Any] = {}
    for name, keys in places.items():
        value: Any = spec
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        found[name] = value
    return checked_settings(found)


def settings_of_meta(meta: CheckpointMeta) -> dict[str, Any]:
    """Return :data:`TEST_SETTINGS` from all that a checkpoint says."""
    return checked_settings({**settings_of_spec(meta.spec or {}), **(meta.test_settings or {})})


def checked_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that have the right type and a possible value: files are not trusted."""
    kept = {
        name: found[name]
        for name, kind in TEST_SETTINGS.items()
        if type(found.get(name)) is kind and (kind is not int or 0 < found[name] <= 2**16)
    }
    if kept.get("resize", "fast") not in ("pillow", "fast"):
        del kept["resize"]
    if "backbone" in kept:
        backbone = _without_files(kept["backbone"])
        if isinstance(backbone.get("type"), str) and _names_are_plain(backbone):
            kept["backbone"] = backbone
        else:
            del kept["backbone"]
    return kept


def _without_files(value: Any) -> Any:
    """Return plain data without the arguments that load another file, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_files(one) for key, one in value.items() if key not in _NOT_FROM_FILES}
    return [_without_files(one) for one in value] if isinstance(value, (list, tuple)) else value


def _names_are_plain(value: Any) -> bool:
    """Return whether every ``type`` is a plain name: mmengine imports what a dotted one names."""
    if isinstance(value, Mapping):
        named = value.get("type", "")
        return isinstance(named, str) and "." not in named and all(map(_names_are_plain, value.values()))
    return all(map(_names_are_plain, value)) if isinstance(value, list) else True


def _resize_step(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the step of the test pipeline that resizes."""
    for name in ("test_dataloader", "val_dataloader"):
        loader = config.get(name)
        dataset = loader.get("dataset") if isinstance(loader, Mapping) else None
        steps = dataset.get("pipeline") if isinstance(dataset, Mapping) else None
        for step in steps if isinstance(steps, list) else ():
            if isinstance(step, Mapping) and step.get("type") in ("Resize", "TAOResize", "TAORandomResize"):
                return step
    return None


def _last(side: Any) -> Any:
    return side[-1] if isinstance(side, list) and side else side


# --- A checkpoint in the fields of a spec ---


@dataclass(frozen=True)
class Description:
    """A checkpoint's network in the fields of a spec.

    Attributes:
        spec: sections ``model``, ``dataset`` and ``ddetr_mm`` as plain data.
        class_names: the class of every column of the network that ``spec`` describes; None where the file
            names no classes.
        two_stage: whether the encoder proposes the boxes, which no field of a spec says.
        assumed: what the file does not say: field → the value that is taken.
    """

    spec: dict[str, dict[str, Any]]
    class_names: tuple[str, ...] | None
    two_stage: bool
    assumed: dict[str, Any]


def describe(checkpoint: Checkpoint) -> Description:
    """Describe the network of a checkpoint in the fields of a spec.

    Args:
        checkpoint: from :func:`ddetr_mm.weights.read_checkpoint`.

    Raises:
        WeightsError: the network has a backbone or sizes that no spec can say.
    """
    meta, found = checkpoint.meta, checkpoint.architecture
    assumed = {FIELDS[name]: _assumed_value(name, checkpoint) for name in meta.assumed if name in FIELDS}
    assumed.pop(FIELDS["aux_loss"], None)  # of training alone
    if found.two_stage or "with_box_refine" not in meta.assumed:
        assumed.pop(FIELDS["with_box_refine"], None)
    columns = num_columns(checkpoint)
    settings = settings_of_meta(meta)
    model: dict[str, Any] = {}
    own: dict[str, Any] = {"zero_padded_values": meta.zero_padded_values}
    backbone = named_backbone(checkpoint)
    if backbone.startswith(_SPEC_BACKBONES):
        model["backbone"] = backbone
        if meta.dilation:
            model["dilation"] = True
    else:
        own["backbone"] = settings.get("backbone") or _resnet(checkpoint)
        assumed.pop(FIELDS["dilation"], None)
    model |= _transformer(checkpoint)
    model["num_select"] = min(settings.get("num_select", 100), model["num_queries"] * columns)
    augmentation = {name: settings[name] for name in [*TEST_SETTINGS][:4] if name in settings}
    for name, value in DEFAULT_SIZES.items():
        if name not in augmentation:
            augmentation[name] = assumed[f"dataset.augmentation.{name}"] = value
    for name in ("input_mean", "input_std"):
        values = getattr(meta, name)
        if values is not None:
            augmentation[name] = list(values)
    if "resize" in settings:
        own["resize"] = settings["resize"]
    return Description(
        spec={
            "model": model,
            "dataset": {"num_classes": columns, "augmentation": augmentation},
            "ddetr_mm": own,
        },
        class_names=names_by_category_id(meta, columns, path=checkpoint.path),
        two_stage=found.two_stage,
        assumed=assumed,
    )


def with_class_names(checkpoint: Checkpoint, listed: Columns) -> Checkpoint:
    """Return a checkpoint that names no classes with those of a class map.

    Args:
        checkpoint: as read.
        listed: the classes by category id, None for the background and gaps, as
            :func:`ddetr_mm.classes.read_class_map` gives them. For a head without a background column the
            names count from its first column.

    Raises:
        WeightsError: the number of names does not fit the columns of the class head.
    """
    meta, columns = checkpoint.meta, checkpoint.meta.num_classes or 0
    names = [name for name in listed if name is not None]
    if meta.label_mode == "contiguous" and len(names) == columns:
        return replace(checkpoint, meta=replace(meta, class_names=tuple(names)))
    if len(listed) > columns:
        raise WeightsError(
            Problem(
                f"has {columns} class columns; {len(names)} classes are named",
                file=checkpoint.path,
                hint="name the classes that it was trained on, in the order of their ids",
            )
        )
    full = filled_columns(listed, columns)
    changed = replace(meta, class_names=full, label_mode="category_id", background_column=0)
    return replace(checkpoint, meta=changed)


def coco_columns(count: int) -> tuple[str | None, ...]:
    """Return COCO's classes by column for a head of ``count`` columns.

    Args:
        count: 91 for category ids, 80 for positions.

    Raises:
        WeightsError: another number of columns.
    """
    columns = named_columns(coco_column_names())
    named = [name for name in columns if name is not None]
    if count not in (NUM_COLUMNS, len(named)):
        raise WeightsError(
            Problem(
                "is no number of COCO's class columns",
                value=count,
                allowed=f"{NUM_COLUMNS} (category ids) or {len(named)} (positions)",
            )
        )
    return columns if count == NUM_COLUMNS else (None, *named)


def num_columns(checkpoint: Checkpoint) -> int:
    """Return the class columns of a spec's network for a checkpoint: category ids, background included.

    Raises:
        WeightsError: the file has no class head.
    """
    meta = checkpoint.meta
    if meta.num_classes is None:
        raise WeightsError(Problem("has no class head", file=checkpoint.path))
    if not numbered_by_position(meta):
        return meta.num_classes
    ids = [number for number in meta.category_ids or () if number is not None and number > 0]
    if len(ids) == meta.num_classes:
        return max(ids) + 1
    coco = plan_columns(named_columns(coco_column_names()), meta.class_names or ())
    if meta.class_names and len(meta.class_names) > 1 and not coco.fresh:
        return NUM_COLUMNS
    return meta.num_classes + 1


def names_classes(meta: CheckpointMeta) -> bool:
    """Return whether a checkpoint names its classes."""
    return known_columns(meta) is not None


def _transformer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of ``model`` below the backbone.

    Raises:
        WeightsError: what the file holds cannot be said in these fields.
    """
    found, meta = checkpoint.architecture, checkpoint.meta
    levels = found.return_interm_indices
    if levels is None:
        levels = _levels_of_config(checkpoint)
    if found.enc_feedforward != found.dec_feedforward:
        widths = (found.enc_feedforward, found.dec_feedforward)
        raise _unsayable(checkpoint, "different feed-forward widths in encoder and decoder", widths)
    points = (meta.enc_points or found.enc_points, meta.dec_points or found.dec_points)
    if None in points:
        shown = f"{found.num_heads} heads"
        raise _unsayable(checkpoint, "a number of sampling points that its heads do not divide", shown)
    return {
        "num_feature_levels": found.num_feature_levels,
        "return_interm_indices": list(levels),
        "num_queries": found.num_queries or meta.num_queries or 300,
        "enc_layers": found.enc_layers,
        "dec_layers": found.dec_layers,
        "hidden_dim": found.hidden_dim,
        "nheads": meta.num_heads or found.num_heads,
        "enc_n_points": points[0],
        "dec_n_points": points[1],
        "dim_feedforward": found.enc_feedforward,
        "with_box_refine": found.with_box_refine,
    }


def _resnet(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return ``ddetr_mm.backbone`` for a ResNet that TAO does not have."""
    found: Architecture = checkpoint.architecture
    depth = _RESNET_DEPTHS.get(found.backbone)
    if depth is None:
        raise WeightsError(
            Problem(
                "has a backbone that is not known by its keys",
                file=checkpoint.path,
                allowed="ResNet-18, 34, 50, 101, 152, GCViT",
                hint="use an mmdet config with this backbone, and mmdet.apis.init_detector",
            )
        )
    stages = tuple(index for index in found.return_interm_indices or (1, 2, 3) if index < 4)
    norm = {"type": "BN", "requires_grad": False}
    return {
        "type": "ResNet",
        "depth": depth,
        "out_indices": list(stages),
        "norm_cfg": norm,
        "norm_eval": True,
        "style": "pytorch",
    }


def _levels_of_config(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return ``model.return_interm_indices`` for the backbone of a config.

    Raises:
        WeightsError: the file has no such config, or it has another number of levels.
    """
    found, settings = checkpoint.architecture, checkpoint.meta.test_settings or {}
    stages = (checked_settings(settings).get("backbone") or {}).get("out_indices")
    if not isinstance(stages, (list, tuple)) or any(stage not in range(4) for stage in stages):
        raise _unsayable(checkpoint, "feature levels of another neck", found.neck_in_channels)
    if len(stages) != len(found.neck_in_channels) or found.num_extra_levels > 1:
        raise _unsayable(checkpoint, "feature levels of another neck", found.neck_in_channels)
    return (*stages, *(4,) * found.num_extra_levels)


def _unsayable(checkpoint: Checkpoint, what: str, value: Any) -> WeightsError:
    return WeightsError(Problem(f"has {what}, which no spec can say", file=checkpoint.path, value=value))


def _assumed_value(name: str, checkpoint: Checkpoint) -> Any:
    meta, found = checkpoint.meta, checkpoint.architecture
    usual = {"input_mean": [0.485, 0.456, 0.406], "input_std": [0.229, 0.224, 0.225], "dilation": False}
    value = getattr(meta, name, None)
    if value is None:
        value = getattr(found, name, usual.get(name))
    return usual.get(name) if value is None else value
