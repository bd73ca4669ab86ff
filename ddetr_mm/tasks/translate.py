"""``ddetr-mm translate``: the spec as a stand-alone mmengine config."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.files import write_text_whole
from ddetr_mm.spec import ExperimentSpec, load_spec
from ddetr_mm.tasks.session import encryption_key_of, say_notes


def run(arguments: Namespace) -> None:
    """Write the config for one subtask.

    Raises:
        SpecError: ``--output`` is no ``.py`` file.
    """
    if Path(arguments.output).suffix != ".py":
        raise SpecError(
            Problem(
                "is no name for an mmengine config", where="--output", value=arguments.output, allowed="*.py"
            )
        )
    subtask = arguments.subtask
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, subtask, require_mandatory=False)
    say_notes(loaded)
    from ddetr_mm.tasks.runner import config_source

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
