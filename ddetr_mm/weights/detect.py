"""Which format a file is in, told by its keys, and where in the file the weights stand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.weights import key_maps
from ddetr_mm.weights.key_maps import FormatTable
from ddetr_mm.weights.pickle_names import InertObject
from ddetr_mm.weights.refusals import short_names
from ddetr_mm.weights.safe_read import RawFile, refuse_encrypted

_CONTAINERS = ("state_dict", "model", "model_state_dict", "module")

_SIGNS: tuple[tuple[str, FormatTable], ...] = (
    # The first pattern that fits any key decides; order matters.
    (r"bbox_head\.transformer\.(encoder|decoder)\.layers\..+", key_maps.MMDET_2),
    (r"(model\.){1,2}transformer\.(encoder|decoder)\.layers\..+", key_maps.TAO),
    (r"transformer\.(encoder|decoder)\.layers\..+", key_maps.OFFICIAL),
    (r"model\.(encoder|decoder)\.layers\.\d+\.(self|encoder)_attn_layer_norm\..+", key_maps.HF),
    (r"(encoder|decoder)\.layers\.\d+\.(self|encoder)_attn_layer_norm\..+", key_maps.HF),
    (r"(encoder|decoder)\.layers\.\d+\.ffn\.layers\..+", key_maps.MMDET),
)


@dataclass
class FoundWeights:
    """The weights of a file with the format they are in.

    Attributes:
        state_dict: the file's own keys, wrappers' prefixes made the usual ones.
        table: the format's table.
        original_keys: key in ``state_dict`` → key in the file, where the two differ.
        extras: what else stands beside the weights (epoch, meta, args …).
    """

    state_dict: dict[str, Tensor]
    table: FormatTable
    original_keys: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


def find_weights(raw: RawFile) -> FoundWeights:
    """Find the state dict of a detector in a file and tell its format.

    Raises:
        WeightsError: when the file holds no tensors, or none of a Deformable DETR.
    """
    state_dict, extras = plain_state_dict(raw)
    stripped, original = strip_wrappers(state_dict)
    for pattern, table in _SIGNS:
        sign = re.compile(pattern)
        if not any(sign.fullmatch(key) for key in stripped):
            continue
        if table is key_maps.TAO:
            stripped, original = _tao_prefixes(stripped, original)
        elif table is key_maps.HF and not pattern.startswith("model"):
            # The bare DeformableDetrModel, saved without its detection heads.
            original = {f"model.{key}": original.get(key, key) for key in stripped}
            stripped = {f"model.{key}": value for key, value in stripped.items()}
        return FoundWeights(stripped, table, original, extras)
    raise WeightsError(_other_content(raw.path, stripped))


def plain_state_dict(raw: RawFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named tensors of a file, whatever they are of, and what stands beside them.

    Raises:
        WeightsError: when there are none, or when something else stands among them.
    """
    content = raw.payload
    if not isinstance(content, Mapping):
        kind = "a single tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        _refuse(raw.path, f"holds {kind}, not named weights", "save a state_dict")
    if content.get("state_dict_encrypted"):
        refuse_encrypted(raw.path)
    weights: Any = content
    extras: dict[str, Any] = {}
    for name in _CONTAINERS:
        if name in content and not isinstance(content[name], Tensor):
            weights = content[name]
            extras = {str(key): value for key, value in content.items() if key != name}
            break
    if isinstance(weights, (bytes, bytearray, InertObject)):
        refuse_encrypted(raw.path)
    if not isinstance(weights, Mapping) or not weights:
        shown = short_names([str(key) for key in content]) or "nothing"
        _refuse(raw.path, f"holds no weights (its entries: {shown})", "give a file of a model's weights")
    strange = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        _refuse(
            raw.path,
            f"holds no plain state dict: {short_names(strange)} "
            + ("is no tensor" if len(strange) == 1 else "are no tensors"),
            "save model.state_dict() alone",
        )
    tensors = {str(key): value for key, value in weights.items()}
    _check_storage(raw.path, tensors)
    return tensors, extras


def _check_storage(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more values than the file holds (a few bytes repeated without end)."""
    for key, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            _refuse(
                path,
                f"holds weights of a kind that is not supported: {key} ({value.layout})",
                "save them dense",
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            _refuse(
                path,
                f"claims {value.numel()} values for {key} but holds {value.untyped_storage().nbytes()} bytes",
                "do not trust this file",
            )


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Remove ``module.`` and ``_orig_mod.``, which parallel and compiled models put before every key."""
    names = {key: re.sub(r"^(module\.|_orig_mod\.)+", "", key) for key in state_dict}
    if len(set(names.values())) != len(names):
        names = {key: key for key in state_dict}
    stripped = {names[key]: value for key, value in state_dict.items()}
    return stripped, {new: old for old, new in names.items() if new != old}


def _tao_prefixes(
    state_dict: Mapping[str, Tensor], original: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give every key of the network the two prefixes of a full Lightning module."""
    renamed: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for key, value in state_dict.items():
        full = key if key.startswith(key_maps.TAO_PREFIX) else re.sub(r"^model\.", key_maps.TAO_PREFIX, key)
        renamed[full] = value
        if original.get(key, key) != full:
            names[full] = original.get(key, key)
    return renamed, names


def _refuse(path: Path, what: str, mend: str) -> NoReturn:
    raise WeightsError(Problem(what, file=path, mend=mend))


def _other_content(path: Path, state_dict: Mapping[str, Tensor]) -> Problem:
    keys = list(state_dict)
    if is_backbone_alone(state_dict):
        return Problem(
            f"holds a backbone, not a detector (its keys: {short_names(keys)})",
            file=path,
            mend="name it as model.pretrained_backbone_path",
        )
    return Problem(
        f"holds no Deformable DETR of any known format (its keys: {short_names(keys)})",
        file=path,
        allowed="mmdet's, TAO's, the original authors' and Hugging Face's",
    )


def is_backbone_alone(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of an image classifier: a ResNet or a GCViT by itself."""
    return any(
        re.fullmatch(
            r"(layer1\.0\.conv1|levels\.0\.blocks\.0\.attn\.qkv|stages\.0\.blocks\.0\.attn\.qkv)\.weight", key
        )
        for key in state_dict
    )
