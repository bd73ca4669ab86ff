"""Convert a checkpoint to another format, and write weights in any of the four.

:func:`convert_checkpoint` is ``ddetr-mm weights``. Sections: the conversion, writing of files, and the
configuration files of a Hugging Face model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import ddetr_mm
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.files import free_space_text, write_text_whole, written_whole
from ddetr_mm.weights.checkpoint import (
    FORMATS,
    META_KEY,
    ZERO_PADDED_VALUES,
    Architecture,
    Checkpoint,
    CheckpointMeta,
    is_unread,
    last_read_stage,
    meta_from_dict,
    missing_keys,
    named_backbone,
)
from ddetr_mm.weights.class_columns import column_ids
from ddetr_mm.weights.describe import DEFAULT_SIZES, settings_of_meta
from ddetr_mm.weights.entries import DEFAULT, Selection
from ddetr_mm.weights.formats import TABLES, KeyTrace, from_canonical
from ddetr_mm.weights.gcvit import VARIANTS, as_tao_has_it
from ddetr_mm.weights.read import read_checkpoint
from ddetr_mm.weights.report import UNREAD, LoadReport
from ddetr_mm.weights.safe_read import short_names
from ddetr_mm.weights.scheme import FIELDS

# --- Conversion ---


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    spec: Any = None,
    class_names: Sequence[str] | None = None,
    selection: Selection = DEFAULT,
) -> LoadReport:
    """Read a checkpoint of any format and write it in another.

    Values do not change: converting back gives the same bits. Differences between the formats' conventions
    (zeroed padding, meaning of class columns) are stored in the written file's metadata.

    Args:
        src: file or folder to read.
        dst: file to write; for ``hf`` a folder. ``….safetensors`` writes a safetensors file of the format.
        to: ``mmdet``, ``tao``, ``official`` or ``hf``.
        spec: the experiment spec (dataclass or mapping) of the weights: stored without secrets, and used for
            what shapes do not show (number of heads).
        class_names: a name for every column of the class head, in place of those in the file.
        selection: which of several sets of weights to read.

    Returns:
        The report of every key.

    Raises:
        WeightsError: the source cannot be read or is no whole network, or the target format cannot hold it.
            Then nothing is written.
    """
    src, dst = Path(src), Path(dst)
    if to not in FORMATS:
        raise WeightsError(Problem("is not a format", where="--to", value=to, allowed=FORMATS))
    checkpoint = read_checkpoint(src, selection=selection)
    checkpoint = _completed(checkpoint, spec_as_plain(spec), class_names)
    _check_target(checkpoint, to)
    config = hf_config(checkpoint, checkpoint.meta.spec) if to == "hf" else None

    canonical, filled, dropped = _neck_bias(checkpoint, to)
    if TABLES[to].exact:
        _fit_backbone(checkpoint, to, canonical, filled, dropped)
    tensors, trace = from_canonical(
        canonical,
        TABLES[to],
        with_box_refine=checkpoint.meta.with_box_refine,
        two_stage=checkpoint.meta.two_stage,
    )
    report = compose_report(checkpoint, trace, filled, dropped)
    report.target, report.target_format = str(dst), to
    if report.missing:
        raise WeightsError(
            Problem(
                f"is not a whole network, and nothing was written: {len(report.missing)} tensors are missing"
                f" ({short_names(report.missing)})",
                file=src,
                hint="give the file of a whole detector; a backbone alone is read as"
                " model.pretrained_backbone_path without a conversion",
            )
        )
    write_checkpoint(dst, to, tensors, checkpoint.meta, config)
    report.notes += _spec_notes(checkpoint) + _difference_notes(checkpoint, to)
    return report


def compose_report(
    checkpoint: Checkpoint, trace: KeyTrace, filled: dict[str, str], dropped: dict[str, str]
) -> LoadReport:
    """Return one report of both steps: file → canonical names → target names.

    Args:
        checkpoint: what was read, with the trace of the first step.
        trace: the trace of the second step.
        filled: canonical key → value added before the second step.
        dropped: canonical key → why it was removed before the second step.
    """
    report = LoadReport(str(checkpoint.path), source_format=checkpoint.format)
    report.unexpected = list(checkpoint.trace.unexpected)
    report.aliases = dict(checkpoint.trace.aliases)
    report.dropped = dict(checkpoint.trace.dropped)
    for key, middles in checkpoint.trace.mapped.items():
        targets = [target for middle in middles for target in trace.mapped.get(middle, [])]
        reasons = [reason for middle in middles if (reason := (dropped | trace.dropped).get(middle))]
        if targets:
            report.mapped[key] = targets
        elif reasons:
            report.dropped[key] = reasons[0]
        else:
            report.unexpected.append(key)
    report.filled = {target: value for key, value in filled.items() for target in trace.mapped[key]}
    report.missing = missing_keys(checkpoint.state_dict, checkpoint.architecture)
    report.notes = list(checkpoint.notes)
    return report


def _completed(
    checkpoint: Checkpoint, spec: dict[str, Any] | None, class_names: Sequence[str] | None
) -> Checkpoint:
    """Return the checkpoint with the caller's spec and class names."""
    meta = checkpoint.meta
    if spec is not None:
        meta = replace(meta, spec=spec)
        if "num_heads" not in checkpoint.stated:
            checkpoint = _with_heads(checkpoint, spec)
            meta = replace(meta, num_heads=checkpoint.meta.num_heads)
        unsaid = {
            name: value
            for name, value in spec_scheme(spec).items()
            if name not in checkpoint.stated and name not in ("num_heads", "with_box_refine")
        }
        meta = meta_from_dict(unsaid, meta)
        meta = replace(meta, assumed=tuple(name for name in meta.assumed if name not in spec_scheme(spec)))
    if class_names is not None:
        names = tuple(class_names)
        if meta.num_classes is not None and len(names) != meta.num_classes:
            raise WeightsError(
                Problem(
                    f"has {meta.num_classes} class columns, but {len(names)} class names were given",
                    file=checkpoint.path,
                    hint="give one name for each column, background included",
                )
            )
        meta = replace(meta, class_names=names, category_ids=column_ids(names, meta.label_mode))
    return replace(checkpoint, meta=meta)


def spec_scheme(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that shapes do not show (:data:`ddetr_mm.weights.scheme.FIELDS`) from a spec.

    Args:
        spec: as plain data.
    """
    found: dict[str, Any] = {}
    for name, field in FIELDS.items():
        value: Any = spec
        for key in field.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[name] = value
    return found


def _with_heads(checkpoint: Checkpoint, spec: dict[str, Any]) -> Checkpoint:
    heads = (spec.get("model") or {}).get("nheads")
    found = checkpoint.architecture
    if not isinstance(heads, int) or heads < 1 or heads == found.num_heads:
        return checkpoint
    changed = replace(
        found,
        num_heads=heads,
        enc_points=_points(checkpoint, "encoder.layers.0.self_attn", heads),
        dec_points=_points(checkpoint, "decoder.layers.0.cross_attn", heads),
    )
    return replace(checkpoint, architecture=changed, meta=replace(checkpoint.meta, num_heads=heads))


def _points(checkpoint: Checkpoint, attention: str, heads: int) -> int | None:
    weight = checkpoint.state_dict.get(f"{attention}.attention_weights.weight")
    if weight is None:
        return None
    points, rest = divmod(weight.shape[0], heads * checkpoint.architecture.num_feature_levels)
    return None if rest else points


def _check_target(checkpoint: Checkpoint, to: str) -> None:
    if to == "tao" and checkpoint.architecture.two_stage:
        raise WeightsError(
            Problem(
                "is a two-stage model, which TAO does not have",
                file=checkpoint.path,
                allowed="mmdet, official, hf",
            )
        )


def _neck_bias(checkpoint: Checkpoint, to: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Add zero biases to a neck without bias where the target needs them; remove them for mmdet."""
    canonical = dict(checkpoint.state_dict)
    filled: dict[str, str] = {}
    dropped: dict[str, str] = {}
    weights = [key for key in canonical if key.startswith("neck.") and key.endswith(".conv.weight")]
    for key in weights:
        bias = key.removesuffix("weight") + "bias"
        if bias not in canonical and to != "mmdet":
            canonical[bias] = canonical[key].new_zeros(canonical[key].shape[0])
            filled[bias] = "zeros: the source's neck has no bias"
        unwanted = to == "mmdet" and not checkpoint.meta.neck_bias and bias in canonical
        if unwanted and not bool(torch.count_nonzero(canonical[bias])):
            del canonical[bias]
            dropped[bias] = "zeros added for a neck that had no bias"
    return canonical, filled, dropped


def _fit_backbone(
    checkpoint: Checkpoint,
    to: str,
    canonical: dict[str, Tensor],
    filled: dict[str, str],
    dropped: dict[str, str],
) -> None:
    """Leave out stages of a ResNet that the target does not build, and add all of a GCViT that TAO builds.

    TAO's fine-tuning pairs the sorted keys of a file with the network's: one key too many or too few shifts
    all that follow.

    Args:
        checkpoint: what is converted.
        to: the target.
        canonical: its weights, changed in place.
        filled: receives the added keys.
        dropped: receives the keys that are left out.
    """
    last = last_read_stage({key: tuple(value.shape) for key, value in canonical.items()})
    variant = VARIANTS.get(named_backbone(checkpoint).removeprefix("gc_vit_"))
    if variant is None:
        for key in [key for key in canonical if is_unread(key, last)]:
            del canonical[key]
            dropped[key] = UNREAD
        return
    keys = {key.removeprefix("backbone.") for key in canonical if key.startswith("backbone.")}
    dtype = canonical["backbone.patch_embed.proj.weight"].dtype
    for key, value in as_tao_has_it(keys, variant).items():
        canonical[f"backbone.{key}"] = value.to(dtype) if value.is_floating_point() else value
        is_index = not value.is_floating_point()
        filled[f"backbone.{key}"] = "computed" if is_index else "initial values of a stage that is not read"


def _difference_notes(checkpoint: Checkpoint, to: str) -> list[str]:
    """Return notes on what the target's own implementation computes differently."""
    notes: list[str] = []
    if to != "mmdet" and checkpoint.meta.zero_padded_values != ZERO_PADDED_VALUES[to]:
        notes.append(
            "in batches with padding the target's own implementation gives other predictions: it"
            + (" zeroes" if ZERO_PADDED_VALUES[to] else " does not zero")
            + " attention values there, unlike the training of these weights"
        )
    if to in ("tao", "official") and checkpoint.meta.label_mode == "contiguous":
        notes.append(
            "a column of the class head is a position in the list of classes; the target's own implementation"
            " takes it as a category id (this package reads the convention from the file)"
        )
    if to == "hf" and checkpoint.meta.num_heads is None:
        notes.append(
            f"{checkpoint.architecture.num_heads} attention heads are assumed: weights show only heads x"
            " points; a spec with model.nheads decides"
        )
    return notes


def _spec_notes(checkpoint: Checkpoint) -> list[str]:
    """Return notes on differences between the given spec and the weights."""
    spec = checkpoint.meta.spec
    if spec is None:
        return []
    model, dataset = spec.get("model") or {}, spec.get("dataset") or {}
    found: Architecture = checkpoint.architecture
    # ddetr_mm.backbone replaces model.backbone.
    own_backbone = bool((spec.get("ddetr_mm") or {}).get("backbone"))
    backbone = None if own_backbone or found.backbone == "unknown" else found.backbone
    pairs = (
        ("dataset.num_classes", dataset.get("num_classes"), found.num_classes),
        ("model.num_queries", model.get("num_queries"), found.num_queries),
        ("model.num_feature_levels", model.get("num_feature_levels"), found.num_feature_levels),
        ("model.enc_layers", model.get("enc_layers"), found.enc_layers),
        ("model.dec_layers", model.get("dec_layers"), found.dec_layers),
        ("model.hidden_dim", model.get("hidden_dim"), found.hidden_dim),
        ("model.backbone", model.get("backbone"), backbone),
        *(
            (FIELDS[name], said, getattr(checkpoint.meta, name))
            for name, said in spec_scheme(spec).items()
            if name not in ("input_mean", "input_std")
        ),
    )
    return [
        f"the spec says {key} = {said}, the weights have {there}"
        for key, said, there in pairs
        if said is not None and there is not None and said != there
    ]


# --- Writing ---

_SECRET_KEYS = frozenset({"encryption_key", "api_key"})


def write_checkpoint(
    path: Path,
    format_name: str,
    tensors: Mapping[str, Tensor],
    meta: CheckpointMeta,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Write weights under the format's own names, to a temporary file that is then renamed.

    Args:
        path: a file; for ``hf`` a folder. A name ending in ``.safetensors`` gives a safetensors file of any
            format, with the metadata as text inside.
        format_name: ``mmdet``, ``tao``, ``official`` or ``hf``.
        tensors: the format's key → tensor.
        meta: stored in the file.
        hf_config: content of ``config.json``, needed for ``hf``.

    Raises:
        WeightsError: the destination cannot be written.
    """
    plain = plain_meta(meta)
    try:
        if path.suffix == ".safetensors":
            with written_whole(path) as temporary:
                metadata = {"format": "pt", META_KEY: json.dumps(plain)}
                save_file(_separate(tensors), temporary, metadata=metadata)
        elif format_name == "hf":
            plain.pop("spec", None)  # this folder is for sharing, and a spec has the user's paths
            plain["test_settings"] = settings_of_meta(meta)
            _write_hf_folder(path, tensors, {**(hf_config or {}), META_KEY: plain}, hf_preprocessor(meta))
        else:
            if path.is_dir():
                raise WeightsError(Problem("is a folder", file=path, hint="give the name of a file"))
            with written_whole(path) as temporary:
                torch.save(_container(format_name, tensors, meta, plain), temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's own writer reports a full disk as a RuntimeError.
        space = free_space_text(path.absolute(), sum(value.nbytes for value in tensors.values()))
        hint = "free some space, or check that you may write there"
        raise WeightsError(Problem(f"cannot be written: {error}{space}", file=path, hint=hint)) from error


def plain_meta(meta: CheckpointMeta) -> dict[str, Any]:
    """Return the metadata as files hold them, with the version that writes them."""
    return {**meta.to_dict(), "package_version": ddetr_mm.__version__}


def mmdet_meta(meta: CheckpointMeta) -> dict[str, Any]:
    """Return the entry ``meta`` of a checkpoint of mmdet's format."""
    about: dict[str, Any] = {"epoch": meta.epoch or 0, "iter": 0, META_KEY: plain_meta(meta)}
    if meta.class_names:
        about["dataset_meta"] = {"classes": tuple(meta.class_names)}
        if meta.category_ids:
            about["dataset_meta"]["category_ids"] = list(meta.category_ids)
    return about


def _container(
    format_name: str, tensors: Mapping[str, Tensor], meta: CheckpointMeta, plain: dict[str, Any]
) -> dict[str, Any]:
    """Return the dictionary of the format's PyTorch file: plain data and tensors only."""
    state_dict = OrderedDict((key, value.detach()) for key, value in tensors.items())
    epoch = meta.epoch or 0
    if format_name == "tao":
        return {
            "state_dict": state_dict,
            "epoch": epoch,
            "global_step": 0,
            "pytorch-lightning_version": "2.0.0",
            META_KEY: plain,
        }
    if format_name == "official":
        return {"model": state_dict, "epoch": epoch, META_KEY: plain}
    return {"meta": mmdet_meta(meta), "state_dict": state_dict}


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors requires."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, value in tensors.items():
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[key] = tensor
    return separate


HF_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")
"""The files of a Hugging Face folder."""


def _write_hf_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> None:
    def write(into: Path) -> None:
        with written_whole(into / "model.safetensors") as temporary:
            save_file(_separate(tensors), temporary, metadata={"format": "pt"})
        for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
            write_text_whole(into / name, json.dumps(content, indent=2, sort_keys=True) + "\n")

    if folder.exists() and not folder.is_dir():
        raise WeightsError(Problem("is a file, but this format is a folder", file=folder))
    if folder.exists():  # its other files are kept
        write(folder)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ddetr_mm-", dir=folder.parent) as private:
        temporary = Path(private) / "folder"  # with the mode of a new folder
        temporary.mkdir()
        write(temporary)
        os.replace(temporary, folder)


def spec_as_plain(spec: Any) -> dict[str, Any] | None:
    """Return an experiment spec as plain data for a file's metadata, without its secrets.

    Args:
        spec: a dataclass, a mapping, or None.
    """
    if spec is None:
        return None
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        spec = dataclasses.asdict(spec)
    plain = _plain(spec)
    return plain if isinstance(plain, dict) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if str(key) not in _SECRET_KEYS}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


# --- config.json and preprocessor_config.json of a Hugging Face model ---

_TIMM_NAMES = {
    "resnet_18": "resnet18",
    "resnet_34": "resnet34",
    "resnet_50": "resnet50",
    "resnet_101": "resnet101",
    "resnet_152": "resnet152",
}
_DEFAULT_PROPOSALS = 300
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def hf_config(checkpoint: Checkpoint, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the configuration from which transformers builds this network without a download.

    Args:
        checkpoint: canonical weights with their structure.
        spec: the experiment spec as plain data, for what shapes do not show (dropout, auxiliary losses).

    Raises:
        WeightsError: Hugging Face's class cannot hold the network.
    """
    found, meta = checkpoint.architecture, checkpoint.meta
    model = (spec or {}).get("model") or {}
    _check(checkpoint)
    found_classes = found.num_classes or 0
    names = meta.class_names or tuple(f"LABEL_{column}" for column in range(found_classes))
    config: dict[str, Any] = {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "activation_function": "relu",
        "auxiliary_loss": bool(model.get("aux_loss", False)),
        "d_model": found.hidden_dim,
        "decoder_attention_heads": found.num_heads,
        "decoder_ffn_dim": found.dec_feedforward,
        "decoder_layers": found.dec_layers,
        "decoder_n_points": found.dec_points,
        "dilation": bool(meta.dilation),
        "disable_custom_kernels": True,
        "dropout": model.get("dropout_ratio", 0.1),
        "encoder_attention_heads": found.num_heads,
        "encoder_ffn_dim": found.enc_feedforward,
        "encoder_layers": found.enc_layers,
        "encoder_n_points": found.enc_points,
        "id2label": {str(column): name for column, name in enumerate(names)},
        "label2id": {name: column for column, name in reversed(list(enumerate(names)))},
        "is_encoder_decoder": True,
        "num_channels": 3,
        "num_feature_levels": found.num_feature_levels,
        "num_queries": meta.num_queries or _DEFAULT_PROPOSALS,
        "position_embedding_type": "sine",
        "return_intermediate": True,
        # With tying, transformers uses one layer's branches for all: right only without refinement. With a
        # single layer it fails.
        "tie_word_embeddings": not found.with_box_refine and found.dec_layers > 1,
        "two_stage": found.two_stage,
        "two_stage_num_proposals": meta.num_queries or _DEFAULT_PROPOSALS,
        "with_box_refine": found.with_box_refine,
    }
    return config | _backbone_settings(found, config["dilation"])


def hf_preprocessor(meta: CheckpointMeta) -> dict[str, Any]:
    """Return the settings from which transformers builds the image processor of a network.

    Images are not padded to a fixed size, which would be too small for some.
    """
    settings = settings_of_meta(meta)
    return {
        "image_processor_type": "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {
            "shortest_edge": settings.get("test_random_resize", DEFAULT_SIZES["test_random_resize"]),
            "longest_edge": settings.get("random_resize_max_size", DEFAULT_SIZES["random_resize_max_size"]),
        },
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(meta.input_mean or _IMAGENET_MEAN),
        "image_std": list(meta.input_std or _IMAGENET_STD),
        "do_pad": True,
    }


def _backbone_settings(found: Architecture, dilation: bool) -> dict[str, Any]:
    """Return the settings for a ResNet of timm's and the stages that feed the neck."""
    backbone = _TIMM_NAMES[found.backbone]
    stages = [found.backbone_stage_channels.index(channels) + 1 for channels in found.neck_in_channels]
    if stages == ([2, 3, 4] if found.num_feature_levels > 1 else [4]):
        # The spelling of the published files, which every version of transformers reads.
        return {"backbone": backbone, "use_timm_backbone": True, "use_pretrained_backbone": False}
    settings = {
        "model_type": "timm_backbone",
        "backbone": backbone,
        "num_channels": 3,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": stages,
    }
    return {"backbone_config": settings | ({"output_stride": 16} if dilation else {})}


def _check(checkpoint: Checkpoint) -> None:
    """Refuse a network that Hugging Face's class does not support."""
    found = checkpoint.architecture
    if found.backbone not in _TIMM_NAMES:
        _refuse(checkpoint, f"has the backbone {found.backbone}", "its Deformable DETR takes ResNets only")
    if found.two_stage and not found.with_box_refine:
        _refuse(checkpoint, "is two-stage without box refinement", "there it needs both")
    if found.num_classes is None:
        _refuse(checkpoint, "has no class head", "convert a whole detector")
    if found.enc_points is None or found.dec_points is None:
        _refuse(
            checkpoint, "has a number of attention heads that its shapes do not show", "give its spec with -e"
        )


def _refuse(checkpoint: Checkpoint, what: str, why: str) -> NoReturn:
    raise WeightsError(Problem(f"cannot become a Hugging Face model: it {what}; {why}", file=checkpoint.path))
