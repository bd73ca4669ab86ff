"""Quantize a network's layers: which ones, and by torchao or ModelOpt.

:func:`choose_layers` matches the patterns of a spec with names. Graphs are quantized in
:mod:`ddetr_mm.deploy.quantize_graph`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ddetr_mm.compat.versions import require
from ddetr_mm.errors import ExportError, Problem, SpecError
from ddetr_mm.weights.formats import TAO, from_canonical
from ddetr_mm.weights.quantized import E4M3, E5M2, INT8

Log = Callable[[str], None]

NATIVE = "native"

# --- Which layers ---


@dataclass(frozen=True)
class LayerRule:
    """An entry of ``quantize.layers``.

    Attributes:
        pattern: of names, see :func:`choose_layers`.
        weights: number format of the weights; None: as they are.
        activations: number format of the inputs; None: as they are.
        axis: axis of the weights with one scale an index; None: the backend's own.
        where: the spec key, for messages.
    """

    pattern: str
    weights: str | None = None
    activations: str | None = None
    axis: int | None = None
    where: str = "quantize.layers"

    @property
    def quantizes(self) -> bool:
        """Whether the entry quantizes anything."""
        return self.weights is not None or self.activations is not None


def choose_layers(
    names: Mapping[str, Sequence[str]],
    usable: Collection[str],
    rules: Sequence[LayerRule],
    skip: Sequence[str],
    *,
    known_classes: Collection[str] = (),
    log: Log = print,
) -> dict[str, LayerRule]:
    """Match patterns with the names of layers, by case.

    Args:
        names: name of a layer → its further names: those of other formats, then its class.
        usable: names of layers that the backend can quantize.
        rules: the first one that fits a layer decides.
        skip: patterns of layers that stay as they are.
        known_classes: names of classes that ``skip`` may name though the network has none.
        log: receives a note for such a pattern, and for layers that the backend leaves.

    Returns:
        Name of a layer to quantize → its rule, in the order of ``names``.

    Raises:
        SpecError: a pattern fits nothing; the message has the nearest names.
    """
    problems = []
    for where, patterns in (
        ("quantize.layers", [rule.pattern for rule in rules]),
        ("quantize.skip_names", list(skip)),
    ):
        for index, pattern in enumerate(patterns):
            if any(_fits(pattern, name, names[name]) for name in names):
                continue
            place = f"{where}[{index}]" + (".module_name" if where.endswith("layers") else "")
            if where.endswith("skip_names") and pattern in known_classes:
                log(f"note: {place}: the network has no {pattern}")
                continue
            problems.append(_unmatched(pattern, names, place))
    SpecError.collect(problems)
    chosen: dict[str, LayerRule] = {}
    left: dict[str, int] = {}
    for name, more in names.items():
        rule = next((one for one in rules if _fits(one.pattern, name, more)), None)
        if rule is None or not rule.quantizes or any(_fits(pattern, name, more) for pattern in skip):
            continue
        if name in usable:
            chosen[name] = rule
        elif more and "*" not in rule.pattern:
            left[more[-1]] = left.get(more[-1], 0) + 1
    for kind, count in left.items():
        log(f"note: {count} layers of class {kind} are left as they are: the backend does not quantize them")
    if rules and not chosen and any(rule.quantizes for rule in rules):
        raise SpecError(
            Problem(
                "quantizes no layer",
                where="quantize.layers",
                value=[rule.pattern for rule in rules],
                allowed=", ".join(list(usable)[:6]) + (" …" if len(usable) > 6 else ""),
                hint="name layers that the backend quantizes, and do not leave all of them out by skip_names",
            )
        )
    return chosen


def _fits(pattern: str, name: str, more: Sequence[str]) -> bool:
    return fnmatchcase(name, pattern) or any(fnmatchcase(one, pattern) for one in more)


def _unmatched(pattern: str, names: Mapping[str, Sequence[str]], place: str) -> Problem:
    everything = list(dict.fromkeys([*names, *(one for more in names.values() for one in more)]))
    near = get_close_matches(pattern.strip("*"), everything, n=3, cutoff=0.4)
    if not near:
        by_part = {part: name for name in everything for part in name.split(".")}
        near = [by_part[part] for part in get_close_matches(pattern.strip("*."), by_part, n=3, cutoff=0.5)]
    hint = f"the nearest: {', '.join(near)}" if near else "see `print(model)` or the nodes of the graph"
    return Problem("fits no layer", where=place, value=pattern, hint=hint)


def torch_names(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the modules of a network → their names in TAO, and their classes."""
    keys = {f"{name}.weight": torch.empty(8, 1) for name, _ in network.named_modules() if name}
    trace = from_canonical(keys, TAO, with_box_refine=True, two_stage=False)[1]
    found = {}
    for name, module in network.named_modules():
        if name:
            theirs = trace.mapped.get(f"{name}.weight", [])
            found[name] = (*(key.removesuffix(".weight") for key in theirs), type(module).__name__)
    return found


def inside_attention(network: nn.Module) -> set[str]:
    """Return the layers within torch's MultiheadAttention, whose weights it uses without calling them."""
    return {
        f"{name}.{child}"
        for name, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
        if child
    }


# --- torchao ---


def quantize_torchao(network: nn.Module, rules: Mapping[str, LayerRule]) -> dict[str, Tensor]:
    """Quantize weights of linear layers with torchao, one scale for each output.

    Args:
        network: changed in place.
        rules: name of a linear layer → its rule.

    Returns:
        The state dict, with torchao's tensors.

    Raises:
        StackError: torchao is missing.
    """
    with quiet():
        torchao = require_extra("torchao.quantization", "torchao")
    int8 = torchao.Int8WeightOnlyConfig()
    configs = {
        INT8: int8,
        E4M3: torchao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e4m3fn),
        E5M2: torchao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    }
    for dtype, config in configs.items():
        names = {name for name, rule in rules.items() if rule.weights == dtype}
        if names:
            with quiet():
                torchao.quantize_(network, config, filter_fn=lambda _, name, chosen=names: name in chosen)
    return dict(network.state_dict())


# --- ModelOpt ---

_BITS = {INT8: 8, E4M3: (4, 3)}


def quantize_modelopt(
    network: nn.Module,
    rules: Mapping[str, LayerRule],
    algorithm: str,
    calibrate: Callable[[], None],
) -> tuple[dict[str, Any], list[str]]:
    """Quantize weights and inputs of layers with ModelOpt, ranges from calibration.

    Args:
        network: in eval mode; changed in place.
        rules: name of a layer → its rule.
        algorithm: ``max`` or ``minmax`` (the same for symmetric ranges) or ``entropy``, of the inputs; the
            ranges of weights are their largest values.
        calibrate: runs the network over the calibration images.

    Returns:
        What ModelOpt saves (``modelopt_state`` and ``model_state_dict``, plain data and tensors), and the
        layers that no image reached, which stay as they are.

    Raises:
        StackError: ModelOpt is missing.
        ExportError: no image reached a quantized layer.
    """
    with quiet():
        quantization = require_extra("modelopt.torch.quantization", "nvidia-modelopt")
        saving = require_extra("modelopt.torch.opt", "nvidia-modelopt")
        calibration = require_extra("modelopt.torch.quantization.model_calib", "nvidia-modelopt")
    config: list[dict[str, Any]] = [dict(quantizer_name="*", enable=False)]
    for name, rule in rules.items():
        if rule.weights is not None:
            axis = 0 if rule.axis == 0 or (rule.axis is None and rule.weights == INT8) else None
            config.append(_quantizer(f"{name}.weight_quantizer", rule.weights, axis, "max"))
        if rule.activations is not None:
            calibrator = "histogram" if algorithm == "entropy" else "max"
            config.append(_quantizer(f"{name}.input_quantizer", rule.activations, None, calibrator))
    for name in rules:
        _as_plain_layer(network.get_submodule(name))
    with quiet(), torch.no_grad():
        if algorithm == "entropy":
            quantization.quantize(network, dict(quant_cfg=config, algorithm=None))
            calibration.enable_stats_collection(network)
            _collect_weights(network)
            calibrate()
            _finish_by_entropy(network)
        else:
            loop = (lambda _: calibrate()) if any(rule.activations for rule in rules.values()) else None
            quantization.quantize(network, dict(quant_cfg=config, algorithm="max"), loop)
        lost = _disable_unreached(network, rules)
        state = saving.modelopt_state(network)
    if len(lost) == len(rules):
        what = f"no calibration image reached a quantized layer: {', '.join(lost[:3])}"
        raise ExportError(Problem(what, where="quantize.layers"))
    return dict(modelopt_state=state, model_state_dict=dict(network.state_dict())), lost


def _disable_unreached(network: nn.Module, rules: Mapping[str, LayerRule]) -> list[str]:
    """Leave layers whose inputs have no range as they are; returns their names."""
    lost = []
    for name, rule in rules.items():
        module = network.get_submodule(name)
        if rule.activations is not None and getattr(module.input_quantizer, "_amax", None) is None:
            module.input_quantizer.disable()
            module.weight_quantizer.disable()
            lost.append(name)
    return lost


def _as_plain_layer(module: nn.Module) -> None:
    """Make a layer of mmcv, which adds nothing with today's torch, torch's own, which ModelOpt knows."""
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(module, kind) and type(module).__module__.startswith("mmcv."):
            module.__class__ = kind


def _quantizer(name: str, dtype: str, axis: int | None, calibrator: str) -> dict[str, Any]:
    return dict(
        quantizer_name=name,
        cfg=dict(num_bits=_BITS[dtype], axis=axis, calibrator=calibrator),
        enable=True,
    )


def _collect_weights(network: nn.Module) -> None:
    for module in network.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            quantizer(module.weight)


def _finish_by_entropy(network: nn.Module) -> None:
    """Set the ranges of inputs by the divergence of their histograms, those of weights by their maxima."""
    for name, module in network.named_modules():
        calibrator = getattr(module, "_calibrator", None)
        if calibrator is None or not getattr(module, "is_enabled", False):
            continue
        if name.endswith("input_quantizer"):
            if getattr(calibrator, "_calib_hist", None) is not None:
                module.load_calib_amax("entropy")
        else:
            module.load_calib_amax()
        module.enable_quant()
        module.disable_calib()


# --- What every backend shares ---


def require_extra(module: str, package: str) -> Any:
    """Import a package of the extra ``quantize``.

    Raises:
        StackError: it is not installed.
    """
    return require(module, "quantizing with it", package=package, hint="pip install 'ddetr-mm[quantize]'")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's progress bars, prints and warnings off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
