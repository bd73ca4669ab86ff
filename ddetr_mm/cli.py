"""The ``ddetr-mm`` command: arguments in, one task called, exit status out.

This module imports nothing heavy, so that ``-h`` answers at once. Exit status: 0 done, 2 wrong input,
130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ddetr_mm import __version__
from ddetr_mm.compat.patches import without_unused_imports
from ddetr_mm.compat.versions import raise_deferred
from ddetr_mm.errors import InputError, RankFailure
from ddetr_mm.files import END_SIGNALS, allow_any_text
from ddetr_mm.outputs import protected_inputs


@dataclass(frozen=True)
class Command:
    """One subcommand: what ``-h`` says, and the function of a module that does it."""

    name: str
    summary: str
    module: str
    takes_spec: bool = True
    function: str = "run"


COMMANDS = (
    Command("convert", "turn KITTI folders into sharded COCO JSON", "ddetr_mm.tasks.convert"),
    Command("train", "train, validate, write checkpoints; resumes by itself", "ddetr_mm.tasks.train"),
    Command("evaluate", "COCO metrics of a checkpoint", "ddetr_mm.tasks.evaluate"),
    Command(
        "inference",
        "label files and annotated images for folders of images",
        "ddetr_mm.tasks.evaluate",
        function="run_inference",
    ),
    Command(
        "predict",
        "annotated pictures and videos from a checkpoint alone, without a spec",
        "ddetr_mm.tasks.predict",
        takes_spec=False,
    ),
    Command("export", "ONNX, checked against PyTorch before it is left there", "ddetr_mm.tasks.export"),
    Command(
        "gen_trt_engine",
        "a TensorRT engine from ONNX, checked before it is left there",
        "ddetr_mm.tasks.gen_trt_engine",
    ),
    Command(
        "quantize",
        "an INT8 or FP8 model from a checkpoint or ONNX file, compared with it on the validation data",
        "ddetr_mm.tasks.quantize",
    ),
    Command(
        "automl",
        "search for better values of the spec's fields: many training runs, one study",
        "ddetr_mm.tasks.automl",
    ),
    Command(
        "translate",
        "the spec as a stand-alone mmengine config",
        "ddetr_mm.tasks.inspect",
        function="run_translate",
    ),
    Command(
        "compare",
        "runs side by side: differing spec fields, curves, AP by class",
        "ddetr_mm.tasks.compare",
        takes_spec=False,
    ),
    Command("check", "prove spec and data before a long run", "ddetr_mm.tasks.check"),
    Command(
        "weights",
        "describe a checkpoint, or write it in another of four formats",
        "ddetr_mm.tasks.inspect",
        takes_spec=False,
        function="run_weights",
    ),
    Command(
        "reproduce",
        "repeat the step of a batch that training saved because its loss was not finite",
        "ddetr_mm.tasks.inspect",
        takes_spec=False,
        function="run_reproduce",
    ),
    Command(
        "install-ops",
        "build and install mmcv with its compiled ops",
        "ddetr_mm.compat.install_ops",
        takes_spec=False,
    ),
    Command(
        "spec",
        "print the full default spec with a comment on every field",
        "ddetr_mm.tasks.inspect",
        takes_spec=False,
        function="run_spec",
    ),
)

INTERRUPTED = 130
"""Exit status after Ctrl-C and SIGTERM."""

WITHOUT_STACK = ("compare", "install-ops", "spec")
"""Commands that work where mmcv or mmdet is missing or does not fit."""

LAUNCHED_VARIABLE = (
    "DDETR_MM_LAUNCHER_PID"  # as in ddetr_mm.engine.distributed, which this module may not import
)

CONFIG_SUBTASKS = ("train", "evaluate", "inference", "export")
SPEC_SUBTASKS = (
    *("convert", "train", "evaluate", "inference", "export", "gen_trt_engine", "quantize"),
    "automl",
)


_EPILOGS = {
    "convert": """needs: input_source, data_root, image_dir_name, label_dir_name, results_dir
results: results_dir: COCO shards, stats.txt, warnings.json, dataset.yaml

examples:
  ddetr-mm convert -e convert.yaml
  ddetr-mm convert -e convert.yaml input_source=sequences.txt data_root=/data results_dir=/data/coco
""",
    "train": """needs: dataset.train_data_sources, dataset.val_data_sources
results: results_dir/train: checkpoints (dd_model_latest.pth), status.json, curves.html, config.py

examples:
  ddetr-mm train -e spec.yaml
  ddetr-mm train -e spec.yaml train.num_epochs=20 train.optim.lr=1e-4 results_dir=results/second
""",
    "evaluate": """needs: evaluate.checkpoint, dataset.test_data_sources
results: results_dir/evaluate: results.json, predictions.json, report.html

examples:
  ddetr-mm evaluate -e spec.yaml evaluate.checkpoint=results/train/dd_model_latest.pth
  ddetr-mm evaluate -e spec.yaml evaluate.checkpoint=model.onnx results_dir=results/onnx
""",
    "inference": """needs: inference.checkpoint, dataset.infer_data_sources
results: results_dir/inference: labels/ (KITTI), images_annotated/, skipped.json

examples:
  ddetr-mm inference -e spec.yaml inference.checkpoint=model.pth
  ddetr-mm inference -e spec.yaml inference.checkpoint=model.pth inference.conf_threshold=0.3
""",
    "predict": """results: DIR: predictions.json, images_annotated/, videos_annotated/, labels/

examples:
  ddetr-mm predict model.pth image.jpg
  ddetr-mm predict model.onnx photos/ clip.mp4 --conf 0.3 --classes person --out found
""",
    "export": """needs: export.checkpoint, export.onnx_file
results: the ONNX file, <name>.parity.json beside it; results_dir/export: status.json

examples:
  ddetr-mm export -e spec.yaml export.checkpoint=model.pth export.onnx_file=model.onnx
  ddetr-mm export -e spec.yaml export.checkpoint=model.pth export.onnx_file=model.onnx --force
""",
    "gen_trt_engine": """needs: gen_trt_engine.onnx_file (and trt_engine to keep the engine)
results: the engine; results_dir/gen_trt_engine: status.json, the parity report

examples:
  ddetr-mm gen_trt_engine -e spec.yaml gen_trt_engine.onnx_file=m.onnx gen_trt_engine.trt_engine=m.engine
  ddetr-mm gen_trt_engine -e spec.yaml gen_trt_engine.onnx_file=m.onnx gen_trt_engine.tensorrt.data_type=FP16
""",
    "quantize": """needs: quantize.model_path, quantize.layers (onnxruntime: not), for static_ptq
  dataset.quant_calibration_data_sources
results: results_dir/quantize: the quantized model, parity.json, report.html

examples:
  ddetr-mm quantize -e spec.yaml quantize.model_path=model.pth
  ddetr-mm quantize -e spec.yaml quantize.backend=onnxruntime quantize.mode=static_ptq
""",
    "automl": """needs: dataset.train_data_sources, dataset.val_data_sources; searched: ddetr_mm.automl
results: results_dir/automl: best_spec.yaml, best.pth, automl.html, trial_NNN/ (spec.yaml, train/)

examples:
  ddetr-mm automl -e spec.yaml
  ddetr-mm automl -e spec.yaml ddetr_mm.automl.algorithm=bohb ddetr_mm.automl.max_trials=40
""",
    "translate": """results: CONFIG, for mmengine.Config.fromfile, mmdet's tools and init_detector

examples:
  ddetr-mm translate -e spec.yaml -o config.py
  ddetr-mm translate -e spec.yaml -o test.py --for evaluate evaluate.checkpoint=model.pth
""",
    "compare": """RUN: a results folder of train or evaluate, or the folder above both
results: tables on the terminal, FILE (one HTML file)

examples:
  ddetr-mm compare results/first results/second
  ddetr-mm compare results/first/train results/second/train -o both.html
""",
    "check": """results: the report on the terminal, check.json in the subtask's results folder

examples:
  ddetr-mm check -e spec.yaml
  ddetr-mm check -e spec.yaml --for evaluate --full evaluate.checkpoint=model.pth
""",
    "weights": """results: on the terminal without DST; else DST and <name>.report.json: where every key went

examples:
  ddetr-mm weights model.pth
  ddetr-mm weights model.pth mmdet.pth --to mmdet
""",
    "reproduce": """results: on the terminal: the first module whose output is not finite

examples:
  ddetr-mm reproduce results/train/non_finite_step_120.pth
  ddetr-mm reproduce batch.pth --config results/train/config.py -e spec.yaml
""",
    "install-ops": """results: mmcv with its compiled ops in this environment, in place of mmcv-lite

examples:
  ddetr-mm install-ops
  ddetr-mm install-ops --jobs 4
""",
    "spec": """results: on the terminal

examples:
  ddetr-mm spec train > spec.yaml
  ddetr-mm spec convert
""",
}
"""What ``-h`` of each command says below its arguments."""


def build_parser() -> argparse.ArgumentParser:
    """The argument parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="ddetr-mm",
        description="NVIDIA TAO's Deformable DETR workflow on MMDetection: TAO specs in, mmengine runs out.",
        epilog="`ddetr-mm COMMAND -h` lists a command's own arguments.",
    )
    parser.add_argument("--version", action="version", version=f"ddetr-mm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[:1].upper() + command.summary[1:] + ".",
            epilog=_EPILOGS[command.name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.takes_spec:
            _add_spec_arguments(sub)
        _OWN_ARGUMENTS.get(command.name, lambda _: None)(sub)
        sub.add_argument("--debug", action="store_true", help="show tracebacks for wrong input too")
        sub.set_defaults(task=(command.module, command.function))
    return parser


def _add_spec_argument(parser: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    """Add ``-e`` with its long name, and the one that TAO's command has."""
    names = ("-e", "--experiment_spec", "--experiment_spec_file")
    parser.add_argument(*names, dest="experiment_spec", required=required, metavar="SPEC", help=text)


def _add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    _add_spec_argument(parser, "the experiment spec, a YAML file", required=True)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="fields to set over the spec, e.g. train.optim.lr=1e-4",
    )


def _add_translate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", required=True, metavar="CONFIG", help="the config file to write (.py)"
    )
    parser.add_argument(
        "--for",
        dest="subtask",
        choices=CONFIG_SUBTASKS,
        default="train",
        help="what the config is for (default: train)",
    )
    _add_replace_argument(parser)


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--for",
        dest="subtask",
        choices=SPEC_SUBTASKS,
        default="train",
        help="what will be run (default: train)",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--full", action="store_true", help="look at every image, not at a sample")
    depth.add_argument("--quick", action="store_true", help="spec, annotations and files only, no network")
    parser.add_argument(
        "--accept",
        action="append",
        metavar="KIND",
        help="accept a suspicion, by the name it is reported under; may be given several times",
    )
    _add_replace_argument(parser)


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="results folders, at least two")
    parser.add_argument(
        "-o",
        "--output",
        default="compare.html",
        metavar="FILE",
        help="the page to write (default: compare.html)",
    )
    _add_replace_argument(parser)


def _add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, or a Hugging Face model folder")
    text = "file to write; a folder for --to hf; without it SRC is described"
    parser.add_argument("destination", metavar="DST", nargs="?", help=text)
    parser.add_argument("--to", choices=("mmdet", "tao", "official", "hf"), help="format to write")
    _add_spec_argument(parser, "the spec the checkpoint belongs to")
    _add_selection_arguments(parser)
    _add_replace_argument(parser)


def _add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--entry", metavar="PATH", help="which set of weights, as in the spec field ddetr_mm.checkpoint_entry"
    )
    parser.add_argument(
        "--ema",
        choices=("auto", "true", "false"),
        help="averaged weights, as in the spec field ddetr_mm.use_ema (default: auto)",
    )


def _add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint of any format, ONNX file or TensorRT engine")
    add(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="image, video, folder of images, pattern such as 'shots/*.jpg', or number of a camera",
    )
    add("--out", metavar="DIR", default="results/predict", help="results folder (default: %(default)s)")
    add(
        "--conf", type=float, default=0.5, help="leave out detections of a lower score (default: %(default)s)"
    )
    add("--classes", metavar="NAME", action="append", help="keep this class only; may be given several times")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=_positive, default=1, help="images at once (default: 1)")
    add(
        "--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the network (default: fp32)"
    )
    add(
        "--size",
        type=_positive,
        nargs=2,
        metavar=("SHORT", "LONG"),
        help="shorter and longest side that images are resized to (default: as the file says, else 800 1333)",
    )
    add("--save-txt", action="store_true", help="also write a KITTI label file for each image")
    add(
        "--show-labels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw classes and scores beside the boxes (default: yes)",
    )
    add(
        "--class-names",
        metavar="FILE",
        help="for a file that names no classes: a text file, a name a line; coco; or numbers",
    )
    _add_selection_arguments(parser)
    add("--key-file", metavar="FILE", help="file with the key of an encrypted checkpoint")
    _add_replace_argument(parser)


def _add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("batch", metavar="BATCH", help="a non_finite_step_*.pth of a training run")
    parser.add_argument("--config", help="the run's config (default: config.py beside the batch)")
    _add_spec_argument(parser, "the spec, for its encryption_key")


def _add_install_ops_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=_positive, help="parallel compiler jobs (default: the number of cores)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# What argparse calls the type in its message.
_positive.__name__ = "number of at least 1"


def _add_spec_command_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subtask", choices=SPEC_SUBTASKS, help="the subtask to print the spec for")


def _add_force_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace the output file if it exists")


def _add_replace_argument(parser: argparse.ArgumentParser) -> None:
    text = "replace files that no earlier run wrote, but never a file that is read"
    parser.add_argument("--force", action="store_true", help=text)


_OWN_ARGUMENTS = {
    "train": _add_replace_argument,
    "evaluate": _add_replace_argument,
    "inference": _add_replace_argument,
    "export": _add_force_argument,
    "gen_trt_engine": _add_force_argument,
    "quantize": _add_replace_argument,
    "automl": _add_replace_argument,
    "translate": _add_translate_arguments,
    "check": _add_check_arguments,
    "compare": _add_compare_arguments,
    "predict": _add_predict_arguments,
    "weights": _add_weights_arguments,
    "reproduce": _add_reproduce_arguments,
    "install-ops": _add_install_ops_arguments,
    "spec": _add_spec_command_arguments,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    allow_any_text()
    arguments = build_parser().parse_args(argv)
    try:
        with signals_interrupt(), without_unused_imports():
            return _run(arguments)
    except KeyboardInterrupt as interruption:
        if os.environ.get("RANK", "0") == "0":  # one of several processes reports it
            print(str(interruption) or "interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.command not in WITHOUT_STACK:
            raise_deferred()
        module, function = arguments.task
        task = getattr(importlib.import_module(module), function)
        session = importlib.import_module("ddetr_mm.tasks.session")
        force = getattr(arguments, "force", False)
        with session.machine_failures_as_errors(), protected_inputs((), force=force), safe_children():
            task(arguments)
    except RankFailure as failure:
        if failure.details:
            print(failure.details, file=sys.stderr)
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_status
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _failed(error, arguments.debug)
    return 0


SAFE_PATH_VARIABLE = "PYTHONSAFEPATH"
"""Keeps the current folder off the path of a Python that starts, from Python 3.11 on."""


@contextmanager
def safe_children() -> Iterator[None]:
    """Have every Python that is started within the block import nothing from the current folder.

    This reaches those that libraries start; see also :func:`ddetr_mm.files.python_module`.
    """
    before = os.environ.get(SAFE_PATH_VARIABLE)
    os.environ[SAFE_PATH_VARIABLE] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH_VARIABLE]
        else:
            os.environ[SAFE_PATH_VARIABLE] = before


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does, so that a task can clean up and report its end.

    Nothing is changed outside the main thread, where Python allows no handlers, and for a signal that is
    ignored, as SIGHUP is under ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(f"interrupted by {signal.Signals(number).name}")

    before = {}
    for number in END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before.setdefault(number, signal.signal(number, interrupt))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failed(error: Exception, debug: bool) -> int:
    """Print a failure, or record it for the process that started this rank; returns the exit status.

    Raises:
        Exception: the error itself, where it is not wrong input but a defect of this package.
    """
    reported_by_launcher = False
    if LAUNCHED_VARIABLE in os.environ:
        from ddetr_mm.engine.distributed import recorded_for_launcher

        reported_by_launcher = recorded_for_launcher(error, debug)
    if not isinstance(error, InputError):
        if reported_by_launcher:
            return 1
        raise error
    if not reported_by_launcher:
        if debug:
            traceback.print_exception(error)
        _print_problems(error)
    return error.exit_status


def _print_problems(error: InputError) -> None:
    """Print all problems as one message, on standard error."""
    if len(error.problems) == 1:
        print(f"error: {error.problems[0]}", file=sys.stderr)
        return
    print(f"error: {len(error.problems)} problems", file=sys.stderr)
    for problem in error.problems:
        print(f"  - {problem}", file=sys.stderr)
