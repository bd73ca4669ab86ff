"""Commands that read or convert one file: ``spec``, ``translate``, ``weights``, ``reproduce``."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.files import write_text_whole
from ddetr_mm.outputs import protected_inputs, require_free
from ddetr_mm.spec import ExperimentSpec, default_spec_text, load_spec
from ddetr_mm.spec.own_schema import OwnSection
from ddetr_mm.tasks.session import encryption_key_of, input_files, print_notes


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
    since other tools read it.
    """
    from ddetr_mm.weights import Selection, convert_checkpoint
    from ddetr_mm.weights.convert import HF_FILES

    loaded = spec = None
    if arguments.experiment_spec:  # what describes a network, as export reads it
        loaded = load_spec(arguments.experiment_spec, (), "export", require_mandatory=False)
        spec = loaded.spec
    own = spec.ddetr_mm if spec is not None else OwnSection()
    use_ema = {"auto": "auto", "true": True, "false": False}.get(arguments.ema, own.use_ema)
    selection = Selection(arguments.entry or own.checkpoint_entry, use_ema)
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
