"""mmdet's own ``tools/train.py``, ``tools/test.py`` and the rest, with a spec where they take a config.

The tools of the installed mmdet run unchanged. Before they start, ``ddetr_mm`` is imported (so that they
also run beside mmcv-lite), a spec among the arguments is replaced by its translation, and a checkpoint of
another format by its conversion.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr_mm.errors import InputError, Problem, StackError
from ddetr_mm.files import allow_any_text

if TYPE_CHECKING:
    from ddetr_mm.weights import Selection
    from ddetr_mm.weights.checkpoint import CheckpointMeta

SPEC_SUFFIXES = (".yaml", ".yml")
EVAL_METRIC = "analysis_tools/eval_metric"
SUBTASK_OF_TOOL = dict.fromkeys(
    (
        "test",
        "analysis_tools/analyze_results",
        "analysis_tools/confusion_matrix",
        EVAL_METRIC,
        "analysis_tools/test_robustness",
    ),
    "evaluate",
)
"""What a spec is translated for where a tool takes a config; for every other tool it is training."""
CHECKPOINT_TOOLS = ("test", "analysis_tools/test_robustness")
"""Tools whose second argument is a checkpoint."""
FUSE_RESULTS = "analysis_tools/fuse_results"


def main(tool: str) -> int:
    """Run one of mmdet's tools on the process's arguments.

    Args:
        tool: ``"train"``, ``"test"`` or another of mmdet's, see :func:`mmdet_tool`.

    Returns:
        The exit status: 0, 2 for wrong input, 130 after Ctrl-C or SIGTERM. The tool's own ``SystemExit``
        passes through.
    """
    allow_any_text()
    try:
        script = mmdet_tool(tool)
        from ddetr_mm.compat.patches import find_our_configs

        find_our_configs()  # before the tool reads a config with `_base_ = "ddetr_mm::…"`
        sys.argv = [str(script), *prepare_arguments(tool, sys.argv[1:])]
        sys.path.append(
            str(mmdet_tool("train").parents[1])
        )  # test_robustness imports another tool as `tools.…`
        with named_predictions() if tool == FUSE_RESULTS else contextlib.nullcontext():
            runpy.run_path(str(script), run_name="__main__")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "interrupted", file=sys.stderr)
        return 130
    return 0


def main_of_any() -> int:
    """Run the tool that the first argument names on the other ones; see :func:`main`."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        folder = mmdet_tool("train").parent
        names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py"))
        print("usage: run_mmdet.py TOOL [its arguments]; TOOL is one of\n  " + "\n  ".join(names))
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return main(sys.argv.pop(1).removesuffix(".py"))


def mmdet_tool(tool: str) -> Path:
    """The script inside the installed mmdet.

    Args:
        tool: its path below mmdet's ``tools`` without ``.py``: ``train``, ``analysis_tools/get_flops``.

    Raises:
        StackError: when mmdet has no such tool, or is not installed as a wheel that carries its tools.
    """
    package = importlib.util.find_spec("mmdet")
    places = [] if package is None or package.origin is None else [Path(package.origin).parent]
    for folder in places:
        for script in (folder / ".mim" / "tools" / f"{tool}.py", folder.parent / "tools" / f"{tool}.py"):
            if script.is_file():
                return script
    raise StackError(Problem(f"mmdet's tools/{tool}.py was not found", hint="pip install mmdet==3.3.0"))


@contextlib.contextmanager
def named_predictions() -> Iterator[None]:
    """Give mmdet's ``fuse_results`` the two arguments that it reads and its parser never sets.

    Its files are parsed as ``pred-results``, which no attribute can be called; it reads ``pred_results``,
    and ``models_name`` only for its length.
    """
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> argparse.Namespace:
        parsed = original(parser, *args, **kwargs)
        parsed.pred_results = parsed.models_name = getattr(parsed, "pred-results")
        return parsed

    argparse.ArgumentParser.parse_args = parse_args
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = original


def prepare_arguments(tool: str, arguments: list[str]) -> list[str]:
    """Replace a spec by its translated config, and a tested foreign checkpoint by a converted one.

    Args:
        tool: see :func:`mmdet_tool`.
        arguments: as given by the user; the config (or spec) and the checkpoint are found by position, as
            the first ones, which is how mmdet's tools document them.
    """
    prepared = list(arguments)
    if not prepared or prepared[0].startswith("-"):
        return prepared
    checkpoint = None
    if tool in CHECKPOINT_TOOLS and len(prepared) > 1 and not prepared[1].startswith("-"):
        checkpoint = prepared[1]
    folder = work_dir(prepared)
    config = selection = None
    if Path(prepared[0]).suffix.lower() in SPEC_SUFFIXES:
        selection = spec_selection(prepared[0])
        config = translate_spec(prepared[0], tool, checkpoint, folder)
        prepared[0] = str(config)
    if checkpoint is not None:
        prepared[1] = str(mmdet_checkpoint(checkpoint, folder, config, selection))
    return prepared


def spec_selection(spec_path: str) -> Selection:
    """Which of several sets of weights in a checkpoint a spec asks for."""
    from ddetr_mm.spec import load_spec
    from ddetr_mm.weights import Selection

    own = load_spec(spec_path, (), "evaluate", require_mandatory=False).spec.ddetr_mm
    return Selection(own.checkpoint_entry, own.use_ema)


def work_dir(arguments: list[str]) -> Path:
    """The tool's ``--work-dir``, by default ``work_dirs/<name of the config>`` as in mmdet."""
    for position, argument in enumerate(arguments):
        if argument == "--work-dir" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
        if argument.startswith("--work-dir="):
            return Path(argument.partition("=")[2])
    return Path("work_dirs") / Path(arguments[0]).stem


def translate_spec(spec_path: str, tool: str, checkpoint: str | None, folder: Path) -> Path:
    """Write the spec's config into ``folder`` under the spec's name and return its path."""
    from ddetr_mm.files import write_text_whole
    from ddetr_mm.spec import load_spec
    from ddetr_mm.tasks.runner import config_source

    subtask = SUBTASK_OF_TOOL.get(tool, "train")
    overrides = [f"evaluate.checkpoint={checkpoint}"] if checkpoint else []
    loaded = load_spec(spec_path, overrides, subtask, require_mandatory=tool in ("train", *CHECKPOINT_TOOLS))
    if loaded.spec.encryption_key:
        from ddetr_mm.weights.encryption import use_encryption_key

        use_encryption_key(loaded.spec.encryption_key)  # for the tool that runs in this process afterwards
    named = checkpoint or loaded.spec.train.pretrained_model_path
    source = config_source(loaded, subtask, named)
    if tool == EVAL_METRIC:  # it scores the test data with val_evaluator, which an evaluation has no use for
        source += "\nval_evaluator = test_evaluator\n"
    return write_text_whole(folder / f"{Path(spec_path).stem}.py", source)


def mmdet_checkpoint(
    path: str, folder: Path, spec_config: Path | None = None, selection: Selection | None = None
) -> Path:
    """A checkpoint that mmengine loads: the given one, or a conversion of it in ``folder``.

    Args:
        path: the checkpoint, a path or URL.
        folder: where a conversion goes.
        spec_config: the config of a spec, if that is what will run: its class columns are category ids and
            its neck has biases, which mmengine would not care about.
        selection: which of several sets of weights to read.

    Raises:
        WeightsError: when the file is no checkpoint, or none of the spec's network.
    """
    from ddetr_mm.weights import Selection, convert_checkpoint, inspect_checkpoint
    from ddetr_mm.weights.read import local_file
    from ddetr_mm.weights.safe_read import read_raw

    path = str(local_file(path))
    converted = folder / f"{Path(path).stem}_mmdet.pth"
    payload = read_raw(path).payload
    meta = payload.get("meta") if isinstance(payload, dict) else None
    # What mmengine wrote it reads, whichever detector it holds.
    if spec_config is None and isinstance(meta, dict) and "mmengine_version" in meta:
        return Path(path)
    selection = selection or Selection()
    info = inspect_checkpoint(path, selection)
    fits = info.meta.label_mode == "category_id" and info.meta.neck_bias
    # What mmengine reads by itself: mmdet's names in the dictionary that it looks into.
    is_plain = info.format == "mmdet" and info.entry in ("", "state_dict")
    if spec_config is not None and not (fits and is_plain and classes_agree(info.meta, spec_config)):
        return fitted_checkpoint(path, spec_config, converted, selection)
    if is_plain:
        return Path(path)
    report = convert_checkpoint(path, converted, "mmdet", selection=selection)
    print(report.summary(), file=sys.stderr)
    return converted


def classes_agree(meta: CheckpointMeta, spec_config: Path) -> bool:
    """Whether a checkpoint's class columns are those of a spec's test data, as far as it names them."""
    from ddetr_mm.classes import compare_columns
    from ddetr_mm.weights.class_columns import known_columns

    known = known_columns(meta)
    if known is None:
        return True
    found = compare_columns(known, test_classes(spec_config))
    return bool(found.shared) and not found.clashes


def test_classes(spec_config: Path) -> tuple[str | None, ...]:
    """The class of every column of a translated config's test data."""
    from mmdet.registry import DATASETS
    from mmengine.config import Config

    import ddetr_mm.register  # noqa: F401 - before mmdet
    from ddetr_mm.tasks.runner import data_columns, register_scope

    config = Config.fromfile(str(spec_config))
    register_scope(config)
    return data_columns(DATASETS.build(config.test_dataloader.dataset).metainfo)


def fitted_checkpoint(
    path: str, spec_config: Path, converted: Path, selection: Selection | None = None
) -> Path:
    """Load a checkpoint into a spec's network, classes by the names of its test data, and save that."""
    from dataclasses import replace

    from mmdet.registry import MODELS
    from mmengine.config import Config

    import ddetr_mm.register  # noqa: F401 - before mmdet
    from ddetr_mm.classes import filled_columns
    from ddetr_mm.tasks.runner import load_checkpoint, register_scope
    from ddetr_mm.weights import Selection, inspect_checkpoint
    from ddetr_mm.weights.convert import write_checkpoint

    config = Config.fromfile(str(spec_config))
    register_scope(config)
    classes = test_classes(spec_config)
    model = MODELS.build(config.model)
    selection = selection or Selection()
    load_checkpoint(model, path, where="checkpoint", class_names=classes, selection=selection)
    meta = replace(
        inspect_checkpoint(path, selection).meta,
        label_mode="category_id",
        background_column=0,
        num_classes=len(classes),
        class_names=filled_columns(classes),
        category_ids=tuple(None if name is None else column for column, name in enumerate(classes)),
        neck_bias=True,
    )
    write_checkpoint(converted, "mmdet", model.state_dict(), meta)
    return converted
