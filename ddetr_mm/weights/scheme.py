"""What shows in no shape of the weights: attention heads, dilation, normalisation, padding, refinement.

:func:`network_scheme` reads these settings of a network, and our checkpoints carry them. :func:`compare`
holds what a file says against the network that it is loaded into: the same tensors under another setting fit
and predict something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddetr_mm.errors import Problem
from ddetr_mm.weights.checkpoint import Checkpoint

FIELDS: dict[str, str] = {
    "num_heads": "model.nheads",
    "enc_points": "model.enc_n_points",
    "dec_points": "model.dec_n_points",
    "dilation": "model.dilation",
    "input_mean": "dataset.augmentation.input_mean",
    "input_std": "dataset.augmentation.input_std",
    "zero_padded_values": "ddetr_mm.zero_padded_values",
    "with_box_refine": "model.with_box_refine",
    "aux_loss": "model.aux_loss",
}
"""Setting, as in :class:`~ddetr_mm.weights.checkpoint.CheckpointMeta` → the spec field that decides it."""

_TOLERANCE = 1e-3  # of mean and standard deviation, as a part of the pixels' range


def network_scheme(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a network, as plain data.

    Args:
        model: a Deformable DETR, not wrapped.

    Returns:
        Those of :data:`FIELDS` that the network has; mean and standard deviation as parts of the pixels'
        range, as in a spec.
    """
    found: dict[str, Any] = {}
    encoder = _attention(getattr(model, "encoder", None), "self_attn")
    decoder = _attention(getattr(model, "decoder", None), "cross_attn")
    if encoder is not None:
        found |= {"num_heads": encoder.num_heads, "enc_points": encoder.num_points}
    if decoder is not None:
        found |= {"num_heads": decoder.num_heads, "dec_points": decoder.num_points}
    dilations = getattr(getattr(model, "backbone", None), "dilations", None)
    if isinstance(dilations, Sequence):
        found["dilation"] = max(dilations) > 1
    preprocessor = getattr(model, "data_preprocessor", None)
    for name in ("mean", "std"):
        values = getattr(preprocessor, name, None)
        if isinstance(values, Tensor):
            found[f"input_{name}"] = [round(float(value) / 255, 6) for value in values.flatten()]
    for name in ("zero_padded_values", "with_box_refine"):
        if isinstance(getattr(model, name, None), bool):
            found[name] = getattr(model, name)
    aux_loss = getattr(getattr(model, "bbox_head", None), "aux_loss", None)
    if isinstance(aux_loss, bool):
        found["aux_loss"] = aux_loss
    return found


def _attention(stack: Any, name: str) -> Any:
    """Return the deformable attention of a stack's first layer, or None."""
    layers = getattr(stack, "layers", None)
    attention = getattr(layers[0], name, None) if isinstance(layers, nn.ModuleList) and len(layers) else None
    numbers = (getattr(attention, "num_heads", None), getattr(attention, "num_points", None))
    return attention if all(isinstance(number, int) for number in numbers) else None


@dataclass(frozen=True)
class Comparison:
    """What a file and a network say of the settings.

    Attributes:
        contradictions: setting → (the file's value, the network's), where the file says it.
        implied: likewise, where only the file's format implies it.
        assumed: settings of which the file says nothing → the network's value.
    """

    contradictions: dict[str, tuple[Any, Any]]
    implied: dict[str, tuple[Any, Any]]
    assumed: dict[str, Any]


def compare(checkpoint: Checkpoint, model: nn.Module) -> Comparison:
    """Compare the settings that a file carries with those of a network.

    Args:
        checkpoint: as read.
        model: not wrapped.
    """
    ours = network_scheme(model)
    contradictions: dict[str, tuple[Any, Any]] = {}
    implied: dict[str, tuple[Any, Any]] = {}
    assumed: dict[str, Any] = {}
    for name, here in ours.items():
        there = getattr(checkpoint.meta, name)
        is_said = name in checkpoint.stated
        if is_said and not _same(there, here):
            contradictions[name] = (there, here)
        elif not is_said and name == "zero_padded_values" and there != here:
            implied[name] = (there, here)
        elif not is_said:
            assumed[name] = here
    return Comparison(contradictions, implied, assumed)


def _same(there: Any, here: Any) -> bool:
    if isinstance(here, list) and isinstance(there, (list, tuple)):
        return len(here) == len(there) and all(
            abs(a - b) <= _TOLERANCE for a, b in zip(here, there, strict=True)
        )
    return bool(there == here)


# Settings that only training reads.
_TRAINING = ("aux_loss",)


def refusals(checkpoint: Checkpoint, found: Comparison) -> list[Problem]:
    """Return a problem for every contradiction that changes predictions, naming the spec field."""
    return [
        Problem(
            f"the checkpoint was trained with {_in_words(name, there)}, the spec has {_in_words(name, here)}",
            file=checkpoint.path,
            where=FIELDS[name],
            value=here,
            allowed=_plain(there),
            hint="set the field to the checkpoint's value",
        )
        for name, (there, here) in found.contradictions.items()
        if name not in _TRAINING
    ]


def notes(checkpoint: Checkpoint, found: Comparison) -> list[str]:
    """Return a line for every difference, and one for all that is assumed."""
    lines = [
        f"the weights were trained with {_in_words(name, there)}, the model has {_in_words(name, here)}"
        f" ({FIELDS[name]})"
        for name, (there, here) in (found.contradictions | found.implied).items()
    ]
    assumed = {name: value for name, value in found.assumed.items() if name not in _TRAINING}
    if "num_heads" in assumed:
        # The shapes show the product: these follow.
        assumed.pop("enc_points", None)
        assumed.pop("dec_points", None)
    if assumed:
        listed = "; ".join(f"{_in_words(name, value)} ({FIELDS[name]})" for name, value in assumed.items())
        lines.append(f"assumed, since the file does not say it: {listed}")
    return lines


def _in_words(name: str, value: Any) -> str:
    if name == "zero_padded_values":
        return f"attention values at padded positions {'zeroed' if value else 'as they are'}"
    if name == "with_box_refine":
        return "box refinement" if value else "no box refinement"
    if name == "dilation":
        return f"{'a' if value else 'no'} dilated last stage of the backbone"
    if name == "aux_loss":
        return "auxiliary losses" if value else "no auxiliary losses"
    if name == "num_heads":
        return f"{value} attention heads"
    if name in ("enc_points", "dec_points"):
        return f"{value} sampling points in the {'encoder' if name == 'enc_points' else 'decoder'}"
    what = "mean" if name == "input_mean" else "standard deviation"
    return f"{what} {[round(float(number), 4) for number in value]}"


def _plain(value: Any) -> Any:
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)


# --- Refinement, as the weights show it ---


def refinement_shown(canonical: Mapping[str, Tensor]) -> bool | None:
    """Return whether boxes are refined from layer to layer, as the prediction branches show it.

    Without refinement all decoder layers share one branch; with it each has its own, which training makes
    different.

    Returns:
        None where they cannot show it: a single layer, or equal branches that were never trained.
    """
    prefix = "bbox_head.reg_branches"
    branches = sorted({key.split(".")[2] for key in canonical if key.startswith(f"{prefix}.")}, key=int)
    if len(branches) < 2:
        return None
    first = {key: value for key, value in canonical.items() if key.startswith(f"{prefix}.0.")}
    for branch in branches[1:]:
        for key, value in first.items():
            other = canonical.get(f"{prefix}.{branch}." + key.removeprefix(f"{prefix}.0."))
            if other is not None and (other.shape != value.shape or not torch.equal(other, value)):
                return True
    last = canonical.get(f"{prefix}.0.4.weight")
    # The last layer starts at zero.
    return None if last is None or not bool(torch.count_nonzero(last)) else False
