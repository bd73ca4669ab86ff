"""Quantized checkpoints, as torchao and ModelOpt save them, read without either package.

torchao's quantized tensors become plain float32 ones with the quantized values. Of ModelOpt's file the
weights are rounded as its quantizers round them, and :func:`quantize_inputs` rounds the inputs of the same
layers while the network runs. Nothing but plain data is taken from a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ddetr_mm.errors import Problem, WeightsError

INT8, E4M3, E5M2 = "int8", "fp8_e4m3fn", "fp8_e5m2"
LARGEST = {INT8: 127.0, E4M3: 448.0, E5M2: 57344.0}
"""Number format → its largest value."""

_TYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
_SMALLEST_RANGE = 2.0**-24
_AGAIN = "write it again with `ddetr-mm quantize`"


# --- Rounding ---


def round_to(values: Tensor, dtype: str, amax: Tensor) -> Tensor:
    """Round values to a number format with symmetric ranges, and return them as floats.

    Args:
        values: float tensor.
        dtype: :data:`INT8`, :data:`E4M3` or :data:`E5M2`.
        amax: largest absolute value, broadcastable to ``values``. Values beyond it are cut; a range of zero
            gives zeros.
    """
    largest = LARGEST[dtype]
    used = amax > _SMALLEST_RANGE
    scale = torch.where(
        used, largest / torch.where(used, amax, torch.ones_like(amax)), torch.zeros_like(amax)
    )
    scaled = values.float() * scale
    if dtype == INT8:
        rounded = scaled.round().clamp(-largest - 1, largest)
    else:
        rounded = scaled.clamp(-largest, largest).to(_TYPES[dtype]).float()
    back = torch.where(used, 1 / torch.where(used, scale, torch.ones_like(scale)), torch.ones_like(scale))
    return (rounded * back).to(values.dtype)


def weight_ranges(weight: Tensor, axis: int | None) -> Tensor:
    """Return the largest absolute values of a weight: one number, or one for each index of ``axis``."""
    if axis is None:
        return weight.abs().amax().reshape([1] * weight.dim())
    return weight.abs().amax(dim=[dim for dim in range(weight.dim()) if dim != axis], keepdim=True)


# --- What a file says ---


@dataclass(frozen=True)
class QuantizedLayer:
    """How one layer is quantized.

    Attributes:
        weight_dtype: number format of the weight; None: not quantized.
        weight_axis: axis with one scale an index; None: one scale.
        input_dtype: number format of the input; None: not quantized.
        input_amax: largest absolute value of the input.
    """

    weight_dtype: str | None = None
    weight_axis: int | None = None
    input_dtype: str | None = None
    input_amax: float = 0.0


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        backend: ``torchao`` or ``modelopt.pytorch``.
        layers: name of a layer, as in the file or (of a :class:`~ddetr_mm.weights.checkpoint.Checkpoint`) as
            in the network → how it is quantized.
    """

    backend: str
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of layers are quantized too."""
        return any(layer.input_dtype for layer in self.layers.values())

    def summary(self) -> str:
        """Return the quantization in one sentence."""
        dtypes = sorted({str(one.weight_dtype) for one in self.layers.values() if one.weight_dtype})
        inputs = sum(one.input_dtype is not None for one in self.layers.values())
        text = f"{len(self.layers)} layers are quantized by {self.backend} ({', '.join(dtypes) or 'inputs'})"
        return text + (f", the inputs of {inputs} of them too" if inputs else ", weights alone")


# --- torchao's tensors ---


class PlainQuantizedTensor(torch.Tensor):
    """Replaces torchao's Int8Tensor and Float8Tensor while a file is read: keeps the parts, computes nothing.

    The unpickler makes a tensor of the size that the file claims, without memory, and gives it its parts.

    Attributes:
        parts: ``qdata``, ``scale`` and so on, as in the file.
    """

    parts: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        """Keep the parts; no attribute is set by a name of the file."""
        self.parts = dict(state) if isinstance(state, Mapping) else {}

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse every operation but detaching, which the unpickler does.

        Raises:
            TypeError: another operation.
        """
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"a quantized tensor of a file cannot be used by {func}")


def plain_tensor(value: PlainQuantizedTensor) -> tuple[Tensor, QuantizedLayer]:
    """Return the values of a quantized tensor as float32, and how they are quantized.

    Raises:
        ValueError: its parts do not belong together.
    """
    parts = value.parts
    data, scale = _plain_or_none(parts.get("qdata")), _plain_or_none(parts.get("scale"))
    zero = _plain_or_none(parts.get("zero_point"))
    if data is None or scale is None or (zero is None and parts.get("zero_point") is not None):
        raise ValueError("it lacks its values or scales")
    dtypes = {torch.int8: INT8, _TYPES[E4M3]: E4M3, _TYPES[E5M2]: E5M2}
    dtype = dtypes.get(data.dtype)
    if dtype is None or tuple(data.shape) != tuple(value.shape) or not scale.is_floating_point():
        raise ValueError(f"it holds {tuple(data.shape)} values of {data.dtype}")
    if any(parts.get(name) is not None for name in ("act_quant_kwargs", "act_pre_scale")):
        raise ValueError("its inputs are quantized, which is not read")
    for one in [scale] if zero is None else [scale, zero]:
        if one.dim() != data.dim() or any(
            size not in (1, whole) for size, whole in zip(one.shape, data.shape, strict=True)
        ):
            raise ValueError(f"its scales of {tuple(one.shape)} do not fit {tuple(data.shape)}")
    values = data.float()
    if zero is not None:
        values = values - zero.float()
    return values * scale.float(), QuantizedLayer(dtype, 0 if scale.numel() > 1 else None)


def _plain_or_none(value: Any) -> Tensor | None:
    """Return a plain tensor whose memory holds all its values; None for everything else."""
    if not isinstance(value, Tensor) or isinstance(value, PlainQuantizedTensor) or value.is_meta:
        return None
    return value if value.numel() * value.element_size() <= value.untyped_storage().nbytes() else None


def plain_content(content: Any, path: Path) -> tuple[Any, Quantization | None]:
    """Return the content of a file with plain tensors, and how it was quantized; None where it was not.

    Args:
        content: what was read of a PyTorch file.
        path: the file, for messages.

    Raises:
        WeightsError: quantized tensors or quantizers are damaged, or of a kind that is not read.
    """
    if isinstance(content, Mapping) and isinstance(content.get("modelopt_state"), Mapping):
        return _plain_modelopt(content, path)
    layers: dict[str, QuantizedLayer] = {}
    plain = _plain_torchao(content, "", layers, path)
    return (plain, Quantization("torchao", layers)) if layers else (content, None)


def _plain_torchao(
    content: Any, name: str, layers: dict[str, QuantizedLayer], path: Path, depth: int = 0
) -> Any:
    if isinstance(content, PlainQuantizedTensor):
        try:
            values, layer = plain_tensor(content)
        except ValueError as error:
            what = f"holds a quantized tensor that is not read: {name}: {error}"
            raise WeightsError(Problem(what, file=path, hint=_AGAIN)) from error
        layers[name.removesuffix(".weight")] = layer
        return values
    if depth < 4 and isinstance(content, dict) and any(map(_holds_quantized, content.values())):
        # Names as in the dictionary of the weights: the outermost key is the container's.
        return type(content)(
            (key, _plain_torchao(value, str(key), layers, path, depth + 1)) for key, value in content.items()
        )
    return content


def _holds_quantized(value: Any, depth: int = 0) -> bool:
    if isinstance(value, PlainQuantizedTensor):
        return True
    return (
        depth < 4
        and isinstance(value, dict)
        and any(_holds_quantized(one, depth + 1) for one in value.values())
    )


# --- ModelOpt's file ---

_PARTS = ("weight_quantizer", "input_quantizer", "output_quantizer")
_NUM_BITS = {8: INT8, (4, 3): E4M3}
_UNREAD = ("_block_sizes", "_bias", "_rotate", "_dynamic", "_unsigned", "_narrow_range", "_use_constant_amax")


def _plain_modelopt(content: Mapping[str, Any], path: Path) -> tuple[Any, Quantization | None]:
    weights = content.get("model_state_dict")
    if not isinstance(weights, Mapping):
        raise WeightsError(Problem("is a file of ModelOpt without model_state_dict", file=path, hint=_AGAIN))
    layers: dict[str, QuantizedLayer] = {}
    tensors = {key: value for key, value in weights.items() if not _quantizer_of(str(key))[1]}
    for name, state in _quantizers(content["modelopt_state"], path):
        layer, part = _quantizer_of(name)
        if not part or state.get("_disabled", True):
            continue
        dtype, amax = _format_of(name, part, state, weights.get(f"{name}._amax"), path)
        known = layers.get(layer, QuantizedLayer())
        if part == "input_quantizer":
            layers[layer] = replace(known, input_dtype=dtype, input_amax=float(amax))
            continue
        weight = tensors.get(f"{layer}.weight")
        if not isinstance(weight, Tensor) or not _fits(amax, weight):
            _refuse_quantizer(name, "it does not fit its layer", path)
        tensors[f"{layer}.weight"] = round_to(weight, dtype, amax.float())
        axis = 0 if amax.numel() > 1 else None
        layers[layer] = replace(known, weight_dtype=dtype, weight_axis=axis)
    rest = {key: value for key, value in content.items() if key not in ("modelopt_state", "model_state_dict")}
    plain = {"state_dict": tensors, **rest}
    return plain, Quantization("modelopt.pytorch", layers) if layers else None


def _quantizer_of(name: str) -> tuple[str, str]:
    """Return the layer and the part that a quantizer, or a buffer of one, belongs to; empty for others."""
    words = name.split(".")
    for index, word in enumerate(words):
        if word in _PARTS:
            return ".".join(words[:index]), word
    return name, ""


def _quantizers(state: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name and the settings of every quantizer of ModelOpt's state."""
    modes = state.get("modelopt_state_dict")
    found: Any = None
    for entry in modes if isinstance(modes, list) else []:
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[1], Mapping):
            continue
        if entry[0] not in ("quantize", "max_calibrate", "_no_calibrate"):
            what = f"was changed by ModelOpt's {str(entry[0])[:40]!r}, which is not read"
            raise WeightsError(Problem(what, file=path, allowed="quantization with static ranges"))
        metadata = entry[1].get("metadata")
        if isinstance(metadata, Mapping) and isinstance(metadata.get("quantizer_state"), Mapping):
            found = metadata["quantizer_state"]
    if found is None:
        raise WeightsError(Problem("is a file of ModelOpt without quantizers", file=path, hint=_AGAIN))
    for name, one in found.items():
        if isinstance(one, Mapping):
            yield str(name), one


def _format_of(name: str, part: str, state: Mapping[str, Any], ranges: Any, path: Path) -> tuple[str, Tensor]:
    """Return the number format and the ranges of an enabled quantizer."""
    bits = state.get("_num_bits")
    dtype = _NUM_BITS.get(tuple(bits) if isinstance(bits, (list, tuple)) else bits)
    odd = [key for key in _UNREAD if state.get(key)]
    if part == "output_quantizer" or dtype is None or odd:
        _refuse_quantizer(name, f"{', '.join(odd) or f'num_bits {bits}'} is not read", path)
    amax = _plain_or_none(ranges)
    if amax is None or not amax.is_floating_point() or not bool(torch.isfinite(amax).all()):
        _refuse_quantizer(name, "it has no range", path)
    if bool((amax < 0).any()) or (part == "input_quantizer" and amax.numel() != 1):
        _refuse_quantizer(name, "its range is not one of this kind", path)
    return dtype, amax


def _fits(amax: Tensor, weight: Tensor) -> bool:
    if amax.numel() == 1:
        return True
    return amax.dim() == weight.dim() and tuple(amax.shape) == (weight.shape[0], *[1] * (weight.dim() - 1))


def _refuse_quantizer(name: str, why: str, path: Path) -> NoReturn:
    raise WeightsError(Problem(f"holds a quantizer that is not read: {name}: {why}", file=path, hint=_AGAIN))


# --- The network ---


def named_as(quantization: Quantization, mapped: Mapping[str, list[str]], path: Path) -> Quantization:
    """Return a quantization with the network's names.

    Args:
        quantization: with the file's.
        mapped: key of the file → keys of the network.
        path: the file, for messages.

    Raises:
        WeightsError: inputs of a layer are quantized that is not the network's.
    """
    ends = {
        key.removesuffix(".weight"): targets for key, targets in mapped.items() if key.endswith(".weight")
    }
    layers: dict[str, QuantizedLayer] = {}
    for name, layer in quantization.layers.items():
        targets = ends.get(name) or next(
            (value for key, value in ends.items() if key.endswith(f".{name}")), []
        )
        if not targets and layer.input_dtype:
            _refuse_quantizer(name, "the network has no such layer", path)
        layers |= {target.removesuffix(".weight"): layer for target in targets}
    return replace(quantization, layers=layers)


def quantize_inputs(network: nn.Module, quantization: Quantization) -> int:
    """Have a network round the inputs of its quantized layers; returns their number.

    Args:
        network: has the rounded weights.
        quantization: with the network's names.

    Raises:
        WeightsError: the network lacks a layer.
    """
    modules = dict(network.named_modules())
    count = 0
    for name, layer in quantization.layers.items():
        if layer.input_dtype is None:
            continue
        module = modules.get(name)
        if module is None:
            raise WeightsError(Problem(f"quantizes the inputs of {name}, which the network does not have"))
        amax = torch.tensor(layer.input_amax)
        module.register_forward_pre_hook(partial(_round_input, layer.input_dtype, amax))
        count += 1
    network.quantization = quantization  # type: ignore[assignment]
    return count


def _round_input(dtype: str, amax: Tensor, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    values = inputs[0]
    if torch.onnx.is_in_onnx_export() and dtype == INT8:
        scale = max(float(amax), _SMALLEST_RANGE) / LARGEST[INT8]
        return (torch.fake_quantize_per_tensor_affine(values, scale, 0, -128, 127), *inputs[1:])
    return (round_to(values, dtype, amax.to(values.device)), *inputs[1:])
