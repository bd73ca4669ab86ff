"""Commands that read or convert one file: ``spec``, ``translate``, ``weights``, ``reproduce``."""

from __future__ import annotations

import json
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ddetr_mm.errors import Problem, SpecError, WeightsError
from ddetr_mm.files import write_text_whole
from ddetr_mm.outputs import protected_inputs, require_free
from ddetr_mm.spec import ExperimentSpec, default_spec_text, load_spec
from ddetr_mm.spec.own_schema import OwnSection
from ddetr_mm.tasks.session import encryption_key_of, input_files, print_notes

if TYPE_CHECKING:
    from ddetr_mm.weights import Checkpoint, Selection
    from ddetr_mm.weights.safe_read import RawFile


def run_spec(arguments: Namespace) -> None:
    """``ddetr-mm spec SUBTASK``: print the complete default spec, with a comment on every field."""
    print(default_spec_text(arguments.subtask), end="")


def run_translate(arguments: Namespace) -> None:
    """``ddetr-mm translate``: write the spec as a stand-alone mmengine config.

    Raises:
        SpecError: ``--output`` does not name a ``.py`` file.
    """
    if Path(arguments.output).suffix != ".py":
        raise SpecError(
            Problem(
                "is no name for an mmengine config", where="--output", value=arguments.output, allowed="*.py"
            )
        )
    subtask = arguments.subtask
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, subtask, require_mandatory=False)
    print_notes(loaded)
    from ddetr_mm.tasks.runner import config_source

    with protected_inputs(input_files(loaded, subtask)):
        require_free([arguments.output])
        with encryption_key_of(loaded.spec):
            text = config_source(loaded, subtask, named_checkpoint(loaded.spec, subtask))
        write_text_whole(arguments.output, text)
    print(f"written: {arguments.output}")


def named_checkpoint(spec: ExperimentSpec, subtask: str) -> str | None:
    """The checkpoint that the spec names for a subtask, if any."""
    if subtask == "train":
        return spec.train.resume_training_checkpoint_path or spec.train.pretrained_model_path
    named = getattr(spec, subtask).checkpoint
    return None if named in (None, "", "???") else named


def run_weights(arguments: Namespace) -> None:
    """``ddetr-mm weights SRC DST --to FORMAT``: convert a checkpoint and write a report of every key.

    The spec's ``encryption_key`` opens an encrypted source. The file that is written is never encrypted,
    since other tools read it. Without ``DST`` the file is described instead.

    Raises:
        SpecError: one of ``DST`` and ``--to`` is missing.
    """
    from ddetr_mm.weights import Selection, convert_checkpoint
    from ddetr_mm.weights.convert import HF_FILES
    from ddetr_mm.weights.entries import EMA_OPTION

    loaded = spec = None
    if arguments.experiment_spec:  # what describes a network, as export reads it
        loaded = load_spec(arguments.experiment_spec, (), "export", require_mandatory=False)
        spec = loaded.spec
    own = spec.ddetr_mm if spec is not None else OwnSection()
    use_ema = EMA_OPTION.get(arguments.ema, own.use_ema)
    selection = Selection(arguments.entry or own.checkpoint_entry, use_ema)
    if arguments.destination is None and arguments.to is None:
        with encryption_key_of(spec):
            print(description_text(Path(arguments.source), selection), end="")
        return
    if arguments.destination is None or arguments.to is None:
        lacking, given = ("--to", "DST") if arguments.to is None else ("DST", "--to")
        hint = "give both to convert, or neither to describe the file"
        raise SpecError(Problem(f"is not given, but {given} is", where=lacking, hint=hint))
    source, target = Path(arguments.source), Path(arguments.destination)
    report_file = target.with_name(f"{target.stem}.report.json")
    read = [source, *(source.iterdir() if source.is_dir() else ())]
    with protected_inputs([*read, *filter(None, [arguments.experiment_spec])]):
        folder_files = [target / name for name in HF_FILES] if arguments.to == "hf" else [target]
        require_free([*folder_files, report_file])
        with encryption_key_of(spec):
            names = None
            if loaded is not None:
                from ddetr_mm.tasks.runner import names_for_file

                names = names_for_file(loaded, source, selection)
            report = convert_checkpoint(
                source, target, arguments.to, spec=spec, class_names=names, selection=selection
            )
        print(report.summary())
        write_text_whole(report_file, json.dumps(report.to_dict(), indent=1) + "\n")
    print(f"written: {arguments.destination}, every key in {report_file}")


# --- What a file of weights holds ---

_KINDS = {
    "torch": "a PyTorch file",
    "pickle": "a pickle of arrays",
    "numpy": "a NumPy archive",
    "safetensors": "a safetensors file",
    "hf_folder": "a Hugging Face folder",
}
_NAMES = {
    "mmdet": "mmdet's names",
    "tao": "TAO's names",
    "official": "the original authors' names",
    "hf": "Hugging Face's names",
}
_MOST_NAMES = 12


def description_text(path: Path, selection: Selection) -> str:
    """Describe a file of weights: comments, then the sections of a spec for its network.

    Args:
        path: a checkpoint of any format, a backbone's weights, or an exported ONNX graph.
        selection: which of several sets of weights.

    Returns:
        YAML that may be pasted into a spec.

    Raises:
        WeightsError: the file holds nothing that can be used, or is broken.
    """
    from ddetr_mm.weights import read_checkpoint
    from ddetr_mm.weights.describe import describe
    from ddetr_mm.weights.safe_read import read_raw

    if path.suffix == ".onnx":
        return _as_comments(_graph_lines(path))
    raw = read_raw(path)
    try:
        checkpoint = read_checkpoint(path, selection=selection)
    except WeightsError as error:
        problem = error.problems[0]
        if "model.pretrained_backbone_path" not in (problem.hint or ""):
            raise
        lines = [f"{path}: {problem.what}", f"used as: {problem.hint}"]
        return _as_comments(lines)
    lines = [f"{path}: {_origin(raw, checkpoint)}", *_network_lines(checkpoint)]
    found, refused = None, None
    try:
        found = describe(checkpoint)
    except WeightsError as error:
        refused = error.problems[0].what
    lines += [f"note: {note}" for note in checkpoint.notes]
    if found is not None and found.assumed:
        shown = ", ".join(f"{key}={value}" for key, value in sorted(found.assumed.items()))
        lines.append(f"not said by the file, taken as: {shown}")
    if found is not None and found.two_stage:
        refused = "is a two-stage network"
    if found is None or refused is not None:
        lines.append(f"no spec can say its network: it {refused}; use it in an mmdet config (--to mmdet)")
    lines.append(f"used as: {'; '.join(_uses(path, checkpoint, refused is None))}")
    text = _as_comments(lines)
    if found is None or refused is not None:
        return text
    return text + yaml.safe_dump(found.spec, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _as_comments(lines: list[str]) -> str:
    wrapper = textwrap.TextWrapper(110, initial_indent="# ", subsequent_indent="#   ")
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return "".join(f"{line}\n" for text in lines for line in wrapper.wrap(text))


def _origin(raw: RawFile, checkpoint: Checkpoint) -> str:
    """Say what kind of file it is, whose names it has, and what wrote it."""
    from ddetr_mm.weights.encryption import is_encrypted
    from ddetr_mm.weights.read import own_metadata

    content = raw.payload if isinstance(raw.payload, Mapping) else {}
    parts = [_KINDS[raw.kind] + (", encrypted" if is_encrypted(raw.path) else "")]
    parts.append(f"with {_NAMES[checkpoint.format]}")
    meta = content.get("meta")
    own = own_metadata(raw)
    writers = {
        "mmengine": meta.get("mmengine_version") if isinstance(meta, Mapping) else None,
        "PyTorch Lightning": content.get("pytorch-lightning_version"),
        "ddetr-mm": own.get("package_version") or (own and "(of an earlier version)"),
    }
    parts += [f"written by {name} {version}" for name, version in writers.items() if version]
    if checkpoint.meta.source_format != checkpoint.format:
        parts.append(f"converted from {_NAMES.get(checkpoint.meta.source_format, 'other names')}")
    if checkpoint.meta.epoch is not None:
        parts.append(f"epoch {checkpoint.meta.epoch}")
    return ", ".join(parts)


def _network_lines(checkpoint: Checkpoint) -> list[str]:
    """Say what the network is, its size, precision and classes."""
    from ddetr_mm.weights.checkpoint import named_backbone
    from ddetr_mm.weights.class_columns import known_columns

    found, meta = checkpoint.architecture, checkpoint.meta
    distinct = {value.data_ptr(): value for value in checkpoint.state_dict.values() if value.numel()}
    count = sum(value.numel() for value in distinct.values() if value.is_floating_point())
    precisions = Counter(str(value.dtype)[6:] for value in distinct.values() if value.is_floating_point())
    shown = [name if len(precisions) == 1 else f"{name} ({number})" for name, number in precisions.items()]
    scheme = "box refinement" if found.with_box_refine else "no refinement"
    scheme = "two-stage" if found.two_stage else scheme
    backbone = named_backbone(checkpoint)
    lines = [
        f"network: Deformable DETR on {'another backbone' if backbone == 'unknown' else backbone}, {scheme},"
        f" {found.num_feature_levels} levels, {count / 1e6:.1f} million values in {', '.join(shown)}"
    ]
    columns = known_columns(meta)
    how = "category ids" if meta.label_mode == "category_id" else "positions in a list of classes"
    names = [f"{column} {name}" for column, name in enumerate(columns or ()) if name is not None]
    listed = ", ".join(names[:_MOST_NAMES]) + (" …" if len(names) > _MOST_NAMES else "")
    lines.append(f"classes: {meta.num_classes} columns by {how}: {listed or 'the file names none'}")
    return lines


def _uses(path: Path, checkpoint: Checkpoint, is_sayable: bool) -> list[str]:
    """List the spec fields and commands that take the file."""
    from ddetr_mm.weights.load import require_resumable

    uses = ["model.pretrained_backbone_path"]
    if is_sayable:
        predicting = "evaluate.checkpoint, inference.checkpoint, export.checkpoint, ddetr-mm predict"
        uses = [predicting, "train.pretrained_model_path", *uses]
        try:
            require_resumable(path, where="")
            uses.append("train.resume_training_checkpoint_path")
        except WeightsError:
            uses.append("not to resume a run: it holds weights alone, or another trainer's state")
    return uses


def _graph_lines(path: Path) -> list[str]:
    from ddetr_mm.deploy.onnx_file import read_signature

    graph = read_signature(path)
    height, width = graph.input_size_hw
    batch = "any batch" if graph.batch_size is None else f"batches of {graph.batch_size}"
    names = ", ".join((graph.class_names or ())[:_MOST_NAMES]) or "the file names none"
    return [
        f"{path}: an exported ONNX graph of a Deformable DETR",
        f"input: {width} x {height} pixels (width x height), {batch}",
        f"classes: {graph.num_classes} columns: {names}",
        "used as: evaluate.checkpoint, inference.checkpoint, gen_trt_engine.onnx_file, ddetr-mm predict",
    ]


# --- reproduce ---


def run_reproduce(arguments: Namespace) -> None:
    """``ddetr-mm reproduce BATCH``: repeat a step whose loss or gradients were not finite.

    Prints the module whose output is the first that is not finite.

    Raises:
        SpecError: the run's config does not exist.
    """
    spec = None
    if arguments.experiment_spec:
        spec = load_spec(arguments.experiment_spec, (), "train", require_mandatory=False).spec
    batch_file = Path(arguments.batch)
    config_file = Path(arguments.config or batch_file.with_name("config.py"))
    if not config_file.is_file():
        raise SpecError(
            Problem("the run's config does not exist", file=config_file, hint="name it: --config CONFIG")
        )
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config

    import ddetr_mm.register  # noqa: F401 - registers what the config names
    from ddetr_mm.engine.non_finite import find_first_non_finite, load_batch
    from ddetr_mm.tasks.runner import register_scope

    with encryption_key_of(spec):
        saved = load_batch(batch_file)
    config = Config.fromfile(str(config_file))
    register_scope(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MODELS.build(config.model)
    model.load_state_dict(saved["state_dict"])
    model.to(device).train()
    if hasattr(getattr(model, "bbox_head", None), "tolerates_non_finite"):
        model.bbox_head.tolerates_non_finite = True
    about = saved["about"]
    dtype = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16}.get(about["precision"])
    autocast = torch.autocast(device, dtype) if dtype else nullcontext()
    finding = find_first_non_finite(model, saved["batch"], saved["rng_state"], autocast)
    print(f"{about['what']} in step {about['step']}, {about['precision']}, on {device}")
    print("images: " + ", ".join(about["images"]))
    print(finding)
