"""Read a file of any format into a :class:`~ddetr_mm.weights.checkpoint.Checkpoint`.

:func:`find_weights` recognises the format by its keys; :func:`read_checkpoint` renames them and completes the
metadata. No code of a file is run.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.files import parse_json
from ddetr_mm.weights import formats, layouts
from ddetr_mm.weights.checkpoint import (
    META_KEY,
    ZERO_PADDED_VALUES,
    Architecture,
    Checkpoint,
    CheckpointMeta,
    channel_values,
    infer_architecture,
    meta_from_dict,
)
from ddetr_mm.weights.class_columns import (
    NUM_COLUMNS,
    coco_column_names,
    column_ids,
    with_label_convention,
)
from ddetr_mm.weights.describe import settings_of_config, settings_of_spec
from ddetr_mm.weights.entries import (
    DEFAULT,
    Choice,
    Entry,
    Selection,
    check_storage,
    choose,
    is_finite,
    is_odd,
    tensor_entries,
)
from ddetr_mm.weights.formats import HF, FormatTable, KeyTrace, to_canonical
from ddetr_mm.weights.layouts import Found, find_backbones, find_prefixes
from ddetr_mm.weights.other_networks import other_network, refusal
from ddetr_mm.weights.pickle_names import InertObject
from ddetr_mm.weights.quantized import named_as
from ddetr_mm.weights.safe_read import RawFile, read_raw, short_names
from ddetr_mm.weights.scheme import FIELDS, refinement_shown

# --- Weights at a URL ---

_SCHEMES = ("http", "https")


def local_file(location: str | os.PathLike[str]) -> Path:
    """Return a path, or for a URL that of its copy in torch's cache folder, downloaded once.

    Unlike torch.hub and mmengine this does not unpickle what it downloads.

    Args:
        location: a path, or an http(s) URL.

    Raises:
        WeightsError: the URL has another scheme, or cannot be downloaded.
    """
    url = os.fspath(location)
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise WeightsError(
            Problem(
                f"weights cannot be fetched by {parts.scheme}://",
                file=url,
                allowed="a file, a folder, or an http(s) URL",
                hint="download the file and give its path",
            )
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    mark = hashlib.blake2b(url.encode(), digest_size=4).hexdigest()
    target = folder / f"{mark}-{Path(unquote(parts.path)).name or 'weights'}"
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except OSError as error:  # a URLError is one
            raise WeightsError(
                Problem(f"cannot be downloaded: {error}", file=url, hint="check the address and the network")
            ) from error
    return target


# --- Settings from the config text of an mmdet checkpoint ---

_MAX_CHARACTERS = 4_000_000


def config_settings(text: Any) -> dict[str, Any]:
    """Return the assignments of a config text as plain data.

    Only literals, ``dict(...)`` calls, lists and tuples are read; the rest is None. Nothing is executed.

    Args:
        text: Python source of a flattened mmengine config; other types give an empty result.
    """
    if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
        return {}
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # An unreadable config only gives no hints.
        return {}
    return {
        target.id: _plain(statement.value)
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def model_settings(text: Any) -> dict[str, Any]:
    """Return the assignment ``model = dict(...)`` of a config text, see :func:`config_settings`."""
    value = config_settings(text).get("model")
    return value if isinstance(value, dict) else {}


def _plain(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _plain(node.operand)
        return -value if isinstance(value, (int, float)) else None
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_plain(key): _plain(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _plain(keyword.value) for keyword in node.keywords if keyword.arg}
    return None


# --- Format of a file ---


@dataclass
class FoundWeights:
    """The weights of a file and their format.

    Attributes:
        state_dict: the keys of the network as its format usually has them → tensor.
        table: the format's table.
        original_keys: key in ``state_dict`` → key in the file, where the two differ.
        extras: the other entries of the file (epoch, meta, args …).
        foreign: keys of the file that are not the network's.
        set_aside: key of the file → why it is not needed.
        notes: which of several sets of weights was read, and where it was.
        entry: see :class:`~ddetr_mm.weights.checkpoint.Checkpoint`.
    """

    state_dict: dict[str, Tensor]
    table: FormatTable
    original_keys: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    set_aside: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    entry: str = ""


def find_weights(raw: RawFile, selection: Selection = DEFAULT) -> FoundWeights:
    """Find the weights of a detector in a file, and their format.

    Args:
        raw: the file.
        selection: which of several sets of weights to read.

    Raises:
        WeightsError: the file holds no tensors, none of a Deformable DETR, or no set as selected.
    """
    entries = tensor_entries(raw)
    choice = choose(raw, entries, _detectors_in, selection)
    problem = _other_network_in(raw, entries, choice)
    if choice is None or problem is not None:
        raise WeightsError(problem or Problem("holds no Deformable DETR", file=raw.path))
    found = choice.candidate.found
    table = found.layout.table or formats.MMDET
    usual_prefix = ""
    if table is formats.OFFICIAL and _is_taos(found.prefix):
        table, usual_prefix = formats.TAO, formats.TAO_PREFIX
    usual_names = {key: name for name, key in found.names.items()}
    result = FoundWeights({}, table, extras=_extras(raw.payload), notes=choice.notes)
    is_usual = found.prefix == "" or table is formats.TAO
    result.entry = choice.candidate.entry.name if is_usual else choice.candidate.name
    backbone = _backbone_names(choice, table)
    for name, (entry, key) in choice.members.items():
        usual = backbone.get(name) or usual_prefix + _usual_name(name, key, usual_names, choice)
        if usual in result.state_dict:
            result.set_aside[key] = f"repeats {result.original_keys.get(usual, usual)}"
            continue
        result.state_dict[usual] = entry.tensors[key]
        if usual != key:
            result.original_keys[usual] = key
    _set_aside(choice, result)
    if not is_usual:
        result.notes.append(f"the network is below '{found.prefix}', with {found.layout.name}")
    return result


def _detectors_in(entry: Entry) -> list[Found]:
    """Return what may be detectors in a dictionary: names with layers of a transformer among them."""
    found = find_prefixes(entry.keys, layouts.DETECTORS)
    return [one for one in found if any(".layers." in name for name in one.names)]


def _is_taos(prefix: str) -> bool:
    """Return whether the original's names have the prefix that TAO's wrappers give them."""
    return prefix == "model." or prefix.endswith(formats.TAO_PREFIX)


def _usual_name(name: str, key: str, usual_names: Mapping[str, str], choice: Choice) -> str:
    """Return a name below the prefix in the spelling of the layout's table."""
    if key in usual_names:
        return usual_names[key]
    # Names of the weights that an average leaves out, and of modules that are not the network's.
    return choice.candidate.found.layout.usual_name(name) or name


def _backbone_names(choice: Choice, table: FormatTable) -> dict[str, str]:
    """Return the backbone's names below the prefix → their usual spelling in the format's table."""
    rest = {name: name for name in choice.members if re.match(r"(model\.)?backbone\.", name)}
    found = find_backbones(rest)
    if not found:
        return {}
    template = next(str(rule.theirs) for rule in table.rules if rule.ours == "backbone.{rest}")
    return {key: template.format(rest=name) for name, key in found[0].names.items()}


def _set_aside(choice: Choice, result: FoundWeights) -> None:
    """Sort the keys of the dictionary that are not below the prefix."""
    others = [one for one in choice.others if one.entry is choice.candidate.entry]
    for key in choice.unused:
        bare = choice.candidate.entry.keys[key]
        if any(bare.startswith(one.found.prefix) for one in others):
            result.set_aside[key] = "another set of weights in the file"
        else:
            result.foreign.append(key)


def _extras(content: Any) -> dict[str, Any]:
    """Return the entries of a file that are no weights."""
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value for key, value in content.items() if not isinstance(value, Tensor)}


def _other_network_in(raw: RawFile, entries: list[Entry], choice: Choice | None) -> Problem | None:
    """Return the problem with a file whose network is no Deformable DETR; None where it is one."""
    if choice is None:
        entry, found = max(entries, key=lambda one: len(one.tensors)), None
        keys = entry.keys
    else:
        entry, found = choice.candidate.entry, choice.candidate.found
        members = {key for _entry, key in choice.members.values()}
        keys = {key: bare for key, bare in entry.keys.items() if key in members}
    network = other_network(keys, found)
    if network is not None and network.startswith("a network"):
        # Its name may show outside the part that was found.
        network = other_network(entry.keys, None) or network
    kind = raw.config.get("model_type")
    if raw.kind == "hf_folder" and kind != "deformable_detr":
        problem = refusal(raw.path, entry.tensors, entry.keys, network or "another network")
        what = f"describes a model of type {kind!r}; only deformable_detr can be read"
        return replace(problem, what=what, file=raw.path / "config.json")
    if found is None or network is not None:
        return refusal(raw.path, entry.tensors, entry.keys, network)
    return None


def detector_format(entry: Entry) -> str | None:
    """Return the format of the Deformable DETR in a dictionary, None where it holds none."""
    for found in _detectors_in(entry)[:1]:
        if other_network(entry.keys, found) is None and found.layout.table is not None:
            is_taos = found.layout.table is formats.OFFICIAL and _is_taos(found.prefix)
            return "tao" if is_taos else found.layout.table.name
    return None


# --- From a file to a checkpoint ---


def read_checkpoint(
    path: str | Path, *, check_finite: bool = True, selection: Selection = DEFAULT
) -> Checkpoint:
    """Read a detector's checkpoint of any format.

    Args:
        path: a TAO ``.pth``, an original release, an mmdet ``.pth``, a safetensors file of one of these, or
            a Hugging Face folder.
        check_finite: refuse weights that hold NaN or infinity.
        selection: which of several sets of weights to read.

    Returns:
        The weights under canonical names. Tensors may be memory-mapped, copy on write: changing them does not
        change the file.

    Raises:
        WeightsError: the file cannot be read safely, is not a Deformable DETR, or has broken weights.
    """
    raw = read_raw(path)
    found = find_weights(raw, selection)
    _check_members(raw.path, found)
    canonical, trace = to_canonical(found.state_dict, found.table)
    _name_as_in_file(trace, found)
    trace.unexpected += found.foreign
    trace.dropped |= found.set_aside
    if not canonical:
        raise WeightsError(Problem("holds no key that fits a Deformable DETR", file=path))
    if raw.kind != "torch" or found.table is HF:
        _restore_shared_branches(canonical, trace)
    refuse_odd(raw.path, canonical)
    if check_finite:
        refuse_non_finite(raw.path, canonical)
    meta, architecture, notes, stated = _interpret(raw, found, canonical, trace)
    meta = replace(meta, assumed=tuple(sorted(set(FIELDS) - stated)))
    notes = [*found.notes, *notes]
    if trace.differing_aliases:
        notes.append(
            f"{len(trace.differing_aliases)} repeated keys differ from what they repeat"
            f" ({short_names(trace.differing_aliases, 2)}); the values under the main names are used"
        )
    quantization = raw.quantization
    if quantization is not None:
        notes.append(quantization.summary())
        quantization = named_as(quantization, trace.mapped, raw.path)
    return Checkpoint(
        canonical,
        found.table.name,
        meta,
        architecture,
        raw.path,
        trace,
        notes,
        stated,
        found.entry,
        quantization,
    )


def inspect_checkpoint(path: str | Path, selection: Selection = DEFAULT) -> Checkpoint:
    """Read a checkpoint for its format, metadata and architecture, without checking its weights.

    PyTorch files are memory-mapped: little more than their index is read.

    Raises:
        WeightsError: as :func:`read_checkpoint`, except that non-finite weights are not noticed.
    """
    return read_checkpoint(path, check_finite=False, selection=selection)


def _check_members(path: Path, found: FoundWeights) -> None:
    """Check the form of the network's tensors; odd ones that are not the network's are set aside.

    Raises:
        WeightsError: one of the network is not dense, real and covered by the file.
    """
    odd = {key: value for key, value in found.state_dict.items() if is_odd(value)}
    named = dict.fromkeys(odd, torch.zeros(1, 1))
    ours = set(to_canonical(named, found.table)[1].mapped) if odd else set()
    check_storage(path, {key: value for key, value in odd.items() if key in ours})
    for key in set(odd) - ours:
        del found.state_dict[key]
        found.foreign.append(found.original_keys.get(key, key))


def refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with NaN or infinity.

    Raises:
        WeightsError: names their keys.
    """
    broken = [key for key, value in tensors.items() if not is_finite(value)]
    if broken:
        raise WeightsError(
            Problem(
                f"holds weights that are NaN or infinite: {short_names(broken)}",
                file=path,
                hint="the run that wrote it had diverged: use an earlier checkpoint",
            )
        )


_WHOLE_NUMBERS = ("num_batches_tracked", "relative_position_index", "relative_coords_table")
"""Endings of keys whose values are no weights."""


def refuse_odd(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no weights: single numbers, empty ones, whole numbers and truth values.

    Raises:
        WeightsError: names their keys and what they are.
    """
    odd = {}
    for key, value in tensors.items():
        if key.endswith(_WHOLE_NUMBERS):
            continue
        if value.numel() == 0 or value.dim() == 0:
            odd[key] = "empty" if value.numel() == 0 else "a single number"
        elif not value.is_floating_point():
            odd[key] = str(value.dtype).removeprefix("torch.")
    if odd:
        key, kind = next(iter(odd.items()))
        raise WeightsError(
            Problem(
                f"holds {len(odd)} tensors of the network that are no weights: {key} is {kind}",
                file=path,
                value=short_names(list(odd)),
                allowed="floating point tensors of the network's shapes",
                hint="save the weights again, or use another checkpoint",
            )
        )


def _name_as_in_file(trace: KeyTrace, found: FoundWeights) -> None:
    """Replace unwrapped keys in a trace by the file's own."""
    names = found.original_keys
    if not names:
        return
    trace.mapped = {names.get(key, key): targets for key, targets in trace.mapped.items()}
    trace.unexpected = [names.get(key, key) for key in trace.unexpected]
    trace.aliases = {names.get(key, key): names.get(target, target) for key, target in trace.aliases.items()}
    trace.differing_aliases = [names.get(key, key) for key in trace.differing_aliases]


def _restore_shared_branches(canonical: dict[str, Tensor], trace: KeyTrace) -> None:
    """Give every decoder layer its prediction branches where the file has only the first of equal ones.

    safetensors files hold no tensor twice, so Hugging Face omits branches that repeat the first.
    """
    layers = {key.split(".")[2] for key in canonical if key.startswith("decoder.layers.")}
    count = len(layers) + ("memory_trans_fc.weight" in canonical)
    sources = {target: key for key, targets in trace.mapped.items() for target in targets}
    for kind in ("cls", "reg"):
        prefix = f"bbox_head.{kind}_branches"
        first = {key: value for key, value in canonical.items() if key.startswith(f"{prefix}.0.")}
        for index in range(1, count):
            for key, value in first.items():
                target = f"{prefix}.{index}." + key.removeprefix(f"{prefix}.0.")
                if target not in canonical:
                    canonical[target] = value
                    trace.mapped[sources[key]].append(target)


def _interpret(
    raw: RawFile, found: FoundWeights, canonical: dict[str, Tensor], trace: KeyTrace
) -> tuple[CheckpointMeta, Architecture, list[str], frozenset[str]]:
    """Return metadata, architecture, notes, and the settings that the file itself says.

    What it does not say is completed by its format's conventions.
    """
    format_name = found.table.name
    notes: list[str] = []
    hints = {name: value for name, value in _hints(raw, found).items() if value is not None}
    own = own_metadata(raw)
    refine = hints.get("with_box_refine")
    if isinstance(own.get("with_box_refine"), bool):
        refine = own["with_box_refine"]
    if refine is None and "refine" in trace.used_alias:
        refine = True
    if refine is None:
        refine = refinement_shown(canonical)
    heads = _count(own.get("num_heads")) or _count(hints.get("num_heads"))
    architecture = infer_architecture(canonical, with_box_refine=refine, num_heads=heads)
    columns = architecture.num_classes
    names = _class_names(raw, found, columns, notes)
    meta = CheckpointMeta(
        source_format=format_name,
        zero_padded_values=hints.get("zero_padded_values", ZERO_PADDED_VALUES[format_name]),
        label_mode="contiguous",
        num_classes=columns,
        class_names=names,
        with_box_refine=architecture.with_box_refine,
        two_stage=architecture.two_stage,
        neck_bias=architecture.neck_bias,
        num_heads=heads,
        enc_points=_count(hints.get("enc_points")),
        dec_points=_count(hints.get("dec_points")),
        dilation=hints.get("dilation"),
        input_mean=channel_values(hints.get("input_mean")),
        input_std=channel_values(hints.get("input_std")),
        num_queries=architecture.num_queries or _count(hints.get("num_queries")),
        epoch=_epoch(found.extras),
        test_settings=hints.get("test_settings") or None,
    )
    described = found.extras.get("meta")
    described = described.get("dataset_meta") if isinstance(described, Mapping) else None
    ids = described.get("category_ids") if isinstance(described, Mapping) else None
    meta = with_label_convention(meta, format_name, ids)
    meta = meta_from_dict(own, meta)
    meta = replace(meta, num_classes=columns)
    if meta.class_names is not None and columns is not None and len(meta.class_names) != columns:
        notes.append(f"{len(meta.class_names)} class names for {columns} columns: the names are not used")
        meta = replace(meta, class_names=None, category_ids=None)
    if meta.category_ids is None:
        meta = replace(meta, category_ids=column_ids(meta.class_names, meta.label_mode))
    return meta, architecture, [*notes, *architecture.notes], _stated(meta, own, hints, refine)


def _stated(
    meta: CheckpointMeta, own: Mapping[str, Any], hints: Mapping[str, Any], refine: bool | None
) -> frozenset[str]:
    """Return the settings that the file says, not its format alone."""
    stated = {name for name in FIELDS if getattr(meta, name) is not None} - {*meta.assumed}
    if not isinstance(own.get("zero_padded_values"), bool) and "zero_padded_values" not in hints:
        stated.discard("zero_padded_values")
    if refine is None and not meta.two_stage:
        stated.discard("with_box_refine")
    return frozenset(stated)


def _count(value: Any) -> int | None:
    """Return a positive integer from an untrusted file, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def own_metadata(raw: RawFile) -> Mapping[str, Any]:
    """Return the metadata of a file written by this package, as it is in the file; empty for others.

    Raises:
        WeightsError: it is damaged.
    """
    content = raw.payload if isinstance(raw.payload, Mapping) else {}
    candidates: list[Any] = [content.get(META_KEY), raw.config.get(META_KEY)]
    meta = content.get("meta")
    if isinstance(meta, Mapping):
        candidates.append(meta.get(META_KEY))
    text = raw.metadata.get(META_KEY)
    if text:
        try:
            candidates.append(parse_json(text))
        except ValueError as error:
            raise WeightsError(Problem(f"has damaged metadata: {error}", file=raw.path)) from error
    return next((dict(found_meta) for found_meta in candidates if isinstance(found_meta, Mapping)), {})


def _hints(raw: RawFile, found: FoundWeights) -> dict[str, Any]:
    """Return settings from a format's own metadata, see :data:`ddetr_mm.weights.scheme.FIELDS`."""
    if raw.config:
        return _hf_hints(raw)
    hints: dict[str, Any] = {}
    arguments = found.extras.get("args")
    if isinstance(arguments, InertObject) and isinstance(arguments.state, Mapping):
        hints |= _arguments_hints(arguments.state)
    elif isinstance(arguments, Mapping):
        hints |= _arguments_hints(arguments)
    meta = found.extras.get("meta")
    if isinstance(meta, Mapping):
        config = config_settings(meta.get("cfg") or meta.get("config"))
        if isinstance(config.get("model"), Mapping):
            hints |= _config_hints(config["model"])
            hints["test_settings"] = settings_of_config(config)
    hyper = found.extras.get("hyper_parameters")
    if isinstance(hyper, Mapping):
        hints["test_settings"] = settings_of_spec(hyper)
    return hints


def _hf_hints(raw: RawFile) -> dict[str, Any]:
    config = raw.config
    queries = "two_stage_num_proposals" if config.get("two_stage") else "num_queries"
    return {
        "with_box_refine": bool(config.get("with_box_refine", False)),
        "num_heads": config.get("encoder_attention_heads", 8),
        "enc_points": config.get("encoder_n_points", 4),
        "dec_points": config.get("decoder_n_points", 4),
        "dilation": _hf_dilation(config),
        "num_queries": config.get(queries, 300),
        "input_mean": raw.preprocessor.get("image_mean"),
        "input_std": raw.preprocessor.get("image_std"),
    }


def _arguments_hints(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from the command line that the original's file keeps."""
    names = {"num_heads": "nheads", "enc_points": "enc_n_points", "dec_points": "dec_n_points"}
    hints = {name: _count(arguments.get(theirs)) for name, theirs in names.items()}
    hints["num_queries"] = _count(arguments.get("num_queries"))
    flags = {
        name: arguments[name]
        for name in ("dilation", "with_box_refine")
        if isinstance(arguments.get(name), bool)
    }
    return {**hints, **flags}


def _config_hints(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from the model of an mmdet config; defaults of mmdet's classes included."""
    hints: dict[str, Any] = {}
    if isinstance(model.get("with_box_refine"), bool):
        hints["with_box_refine"] = model["with_box_refine"]
    if "num_queries" in model:
        hints["num_queries"] = model["num_queries"]
    if model.get("type") == "TAODeformableDETR":
        hints["zero_padded_values"] = bool(model.get("zero_padded_values", False))
    elif model.get("type") == "DeformableDETR":
        hints["zero_padded_values"] = True
    backbone = model.get("backbone")
    if isinstance(backbone, Mapping):
        hints["dilation"] = backbone.get("type") == "TorchvisionDilatedResNet"
    for side, attention in (("encoder", "self_attn_cfg"), ("decoder", "cross_attn_cfg")):
        found: Any = model
        for key in (side, "layer_cfg", attention):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            hints[f"{side[:3]}_points"] = _count(found.get("num_points", 4))
            hints["num_heads"] = _count(found.get("num_heads", 8))
    preprocessor = model.get("data_preprocessor")
    for name in ("mean", "std"):
        values = channel_values(preprocessor.get(name)) if isinstance(preprocessor, Mapping) else None
        if values is not None:
            hints[f"input_{name}"] = [value / 255 for value in values]
    return hints


def _hf_dilation(config: Mapping[str, Any]) -> bool:
    """Return the dilation by name, or from the stride of the backbone's last stage."""
    backbone = config.get("backbone_config")
    stride = backbone.get("output_stride") if isinstance(backbone, Mapping) else None
    return bool(config.get("dilation", False)) or stride == 16


def _class_names(
    raw: RawFile, found: FoundWeights, columns: int | None, notes: list[str]
) -> tuple[str, ...] | None:
    """Return one name for each column, from where the format keeps them."""
    if found.table.name == "hf":
        return _hf_names(raw.config, columns)
    meta = found.extras.get("meta")
    if isinstance(meta, Mapping):
        described = meta.get("dataset_meta")
        names = described.get("classes") if isinstance(described, Mapping) else None
        names = names or meta.get("CLASSES")
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return tuple(names)
    if found.table.name == "official" and columns == NUM_COLUMNS:
        notes.append("91 columns are taken for COCO's category ids")
        return coco_column_names()
    return None


def _hf_names(config: Mapping[str, Any], columns: int | None) -> tuple[str, ...] | None:
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or columns is None or len(labels) != columns:
        return None
    names = [labels.get(str(column)) for column in range(columns)]
    # transformers writes LABEL_0, LABEL_1 … where no names were given.
    if any(not isinstance(name, str) for name in names) or names == [f"LABEL_{i}" for i in range(columns)]:
        return None
    return tuple(str(name) for name in names)


def _epoch(extras: Mapping[str, Any]) -> int | None:
    meta = extras.get("meta")
    for place in (extras, meta if isinstance(meta, Mapping) else {}):
        epoch = place.get("epoch")
        if isinstance(epoch, int) and not isinstance(epoch, bool):
            return epoch
    return None
