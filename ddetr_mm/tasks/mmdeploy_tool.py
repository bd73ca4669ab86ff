"""``tools/deploy.py``: mmdeploy's conversion on current torch, with standard operators or plugin nodes.

Beyond mmdeploy's own tool: a spec may replace the model config, a checkpoint of another format is converted,
the graph is simplified and compared with PyTorch before it gets its name. Sections: the command and its
steps, configs, graph and comparison, calibration images, patches of mmdeploy.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ddetr_mm.errors import ExportError, InputError, Problem, StackError
from ddetr_mm.files import allow_any_text, write_text_whole, written_whole
from ddetr_mm.tasks.mmdet_tools import SPEC_SUFFIXES, mmdet_checkpoint

TOLERANCE_BOXES_PIXELS = 0.05
TOLERANCE_SCORES = 1e-3


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: mmdeploy's arguments, with its names and defaults."""
    parser = argparse.ArgumentParser(description="Convert a detector with mmdeploy.")
    parser.add_argument("deploy_cfg", help="deploy config, e.g. configs/deploy/onnxruntime_dynamic.py")
    parser.add_argument("model_cfg", help="model config, or an experiment spec")
    parser.add_argument("checkpoint", help="checkpoint of any format")
    parser.add_argument("img", help="image used to convert the model")
    parser.add_argument("--test-img", nargs="+", help="images to draw detections on")
    parser.add_argument("--work-dir", default=str(Path.cwd()), help="folder to write to")
    parser.add_argument(
        "--calib-dataset-cfg", help="config or spec of the calibration images for int8; default: model_cfg"
    )
    parser.add_argument("--device", default="cpu", help="device of the conversion")
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    parser.add_argument("--show", action="store_true", help="show the drawn detections")
    parser.add_argument(
        "--dump-info", action="store_true", help="write deploy.json, pipeline.json, detail.json"
    )
    parser.add_argument("--quant-image-dir", help="ncnn only; no effect")
    parser.add_argument("--quant", action="store_true", help="ncnn only; no effect")
    parser.add_argument("--uri", default="192.168.1.1:60000", help="SNPE only; no effect")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Convert; returns 0, or 2 for wrong input."""
    allow_any_text()
    parsed = build_parser().parse_args(arguments)
    try:
        deploy(parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def deploy(arguments: argparse.Namespace) -> None:
    """Run the steps of the conversion.

    Raises:
        InputError: the arguments or the environment are wrong.
    """
    require_mmdeploy()
    for name in ("deploy_cfg", "model_cfg", "checkpoint", "img", "calib_dataset_cfg"):
        path = getattr(arguments, name)
        if path is not None and not Path(path).exists():
            raise ExportError(Problem("does not exist", file=path, where=name))
    from mmdeploy.utils import get_ir_config, get_root_logger

    import ddetr_mm.register  # noqa: F401 - puts our components into the registries

    get_root_logger(log_level=logging.getLevelName(arguments.log_level))
    folder = writable_folder(arguments.work_dir)
    checkpoint = mmdet_checkpoint(arguments.checkpoint, folder)
    model_cfg = model_config(arguments.model_cfg, arguments.checkpoint, folder)
    deploy_cfg = deploy_config(arguments.deploy_cfg, model_cfg)
    require_opset(deploy_cfg, arguments.deploy_cfg)
    ir_config = get_ir_config(deploy_cfg)
    target = folder / ir_config["save_file"]
    with patched_mmdeploy(ir_config["opset_version"]):
        traced = traced_config(deploy_cfg)
        write_calibration_data(traced, model_cfg, checkpoint, arguments.calib_dataset_cfg, folder)
        export_graph(traced, model_cfg, checkpoint, arguments.img, target)
        if arguments.dump_info:
            from mmdeploy.backend.sdk.export_info import export2SDK

            # mmdeploy refuses TensorRT with the CPU, though nothing is run here.
            device = "cuda:0" if is_tensorrt(deploy_cfg) else arguments.device
            # It changes the pipeline that it is given.
            described = copy.deepcopy(model_cfg)
            export2SDK(deploy_cfg, described, str(folder), pth=str(checkpoint), device=device)
        files = backend_files(deploy_cfg, target, arguments)
        for image in arguments.test_img or ():
            draw(deploy_cfg, model_cfg, files, checkpoint, image, folder, arguments)
    print("written: " + ", ".join(files))


def require_mmdeploy() -> None:
    """Check that mmdeploy can be imported.

    Raises:
        StackError: mmdeploy or a package that it needs is missing.
    """
    try:
        import mmdeploy.apis  # noqa: F401
    except ImportError as error:
        hint = "pip install --no-deps mmdeploy==1.3.1, then pip install ddetr_mm[deploy]"
        raise StackError(Problem(f"mmdeploy cannot be imported: {error}", hint=hint)) from error


def model_config(path: str, checkpoint: str, folder: Path) -> Any:
    """Read the model config, or translate a spec, with a test pipeline that mmdeploy can set to one size.

    Raises:
        ExportError: the config has no test pipeline.
    """
    from mmengine.config import Config

    if Path(path).suffix.lower() in SPEC_SUFFIXES:
        from ddetr_mm.spec import load_spec
        from ddetr_mm.tasks.runner import config_source

        loaded = load_spec(
            path, [f"export.checkpoint={checkpoint}", "export.onnx_file=end2end.onnx"], "export"
        )
        text = config_source(loaded, "export", checkpoint)
        path = str(write_text_whole(folder / f"{Path(path).stem}.py", text))
    config = Config.fromfile(path)
    if not config.get("test_pipeline"):
        raise ExportError(Problem("has no test_pipeline", file=path, hint="translate it --for export"))
    # The image fills the graph's input: there is nothing to pad.
    for key, value in (("pad_short_long", None), ("pad_size_divisor", 1)):
        if key in config.model.data_preprocessor:
            config.model.data_preprocessor[key] = value
    # mmdeploy sets the size of a step named Resize only.
    for step in config.test_pipeline:
        if step.type == "TAORandomResize":
            long, short = step.pop("max_size") or step.scales[-1], step.pop("scales")[-1]
            step.pop("backend", None)
            step.update(type="Resize", scale=(long, short), keep_ratio=True, backend="pillow")
        elif step.type == "Resize" and step.pop("size_rule", "mmdet") == "tao":
            step.backend = "pillow"
    return config


def deploy_config(path: str, model_cfg: Any) -> Any:
    """Read the deploy config, its input size taken from the test pipeline where it is not set.

    Raises:
        ExportError: neither names a size.
    """
    from mmengine.config import Config

    config = Config.fromfile(path)
    shape = config.onnx_config.get("input_shape")
    if shape is None:
        shape = next((tuple(step.scale) for step in model_cfg.test_pipeline if step.type == "Resize"), None)
        if shape is None:
            raise ExportError(
                Problem(
                    "names no input size, nor does the test pipeline",
                    file=path,
                    where="onnx_config.input_shape",
                    hint="give (width, height)",
                )
            )
        config.onnx_config.input_shape = shape
    width, height = shape
    for entry in config.backend_config.get("model_inputs") or ():
        sizes = entry.input_shapes.input
        largest = sizes.pop("max_batch", 1)
        for name, batch in (("min_shape", 1), ("opt_shape", 1), ("max_shape", largest)):
            if sizes.get(name) is None:
                sizes[name] = [batch, 3, height, width]
    return config


def writable_folder(path: str) -> Path:
    """Return a folder, created where it is missing.

    Raises:
        ExportError: it cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        hint = "name a folder you may write to"
        raise ExportError(Problem("cannot be written to", file=folder, where="--work-dir", hint=hint))
    return folder


def require_opset(deploy_cfg: Any, path: str) -> None:
    """Refuse an opset that the graph cannot be written in, or TensorRT cannot read.

    Raises:
        ExportError: it is below 16 without plugin nodes (no GridSample), above the exporter's largest, or
            TensorRT reads GridSample wrongly in it.
    """
    from ddetr_mm.deploy.onnx_export import MAX_OPSET, MIN_OPSET, MIN_PLUGIN_OPSET
    from ddetr_mm.deploy.onnx_file import linear_sampling_note

    plugin = deploy_cfg.codebase_config.get("attention", "standard") != "standard"
    lowest, opset = MIN_PLUGIN_OPSET if plugin else MIN_OPSET, deploy_cfg.onnx_config.opset_version
    if not lowest <= opset <= MAX_OPSET:
        raise ExportError(
            Problem(
                "cannot be written",
                file=path,
                where="onnx_config.opset_version",
                value=opset,
                allowed=f"{lowest} to {MAX_OPSET}",
            )
        )
    if is_tensorrt(deploy_cfg) and not plugin and (note := linear_sampling_note(opset)):
        where = "onnx_config.opset_version"
        raise ExportError(Problem(note, file=path, where=where, value=opset, allowed="17 to 19"))


def is_tensorrt(deploy_cfg: Any) -> bool:
    """Return whether a deploy config is for TensorRT."""
    return bool(deploy_cfg.backend_config.type == "tensorrt")


def traced_config(deploy_cfg: Any) -> Any:
    """Return the deploy config to trace with: ONNX Runtime's rewriters for every backend.

    mmdeploy's rewriters for TensorRT write operators of its own library where standard ones exist, and need a
    GPU. The attention's plugin is chosen by our own rewriter.
    """
    traced = deploy_cfg.copy()
    traced.backend_config = dict(type="onnxruntime")
    return traced


def export_graph(deploy_cfg: Any, model_cfg: Any, checkpoint: Path, image: str, target: Path) -> None:
    """Run mmdeploy's export, simplify the graph and compare it with PyTorch on the image.

    Raises:
        ExportError: they disagree; nothing is written then.
    """
    import onnx
    from mmdeploy.apis import torch2onnx

    from ddetr_mm.deploy.onnx_export import simplify
    from ddetr_mm.deploy.onnx_file import check_file

    with written_whole(target) as temporary:
        torch2onnx(
            image, str(target.parent), temporary.name, deploy_cfg, model_cfg, str(checkpoint), device="cpu"
        )
        model, simplification = simplify(onnx.load(str(temporary)))
        onnx.save(model, str(temporary))
        nodes = check_file(temporary)
        agreement = compare(deploy_cfg, model_cfg, checkpoint, image, temporary)
        print(f"{nodes} nodes ({simplification}); {agreement}", file=sys.stderr)


def compare(deploy_cfg: Any, model_cfg: Any, checkpoint: Path, image: str, onnx_file: Path) -> str:
    """Run PyTorch and the graph on an image; returns their agreement in words.

    Raises:
        ExportError: a difference is beyond :data:`TOLERANCE_BOXES_PIXELS` or :data:`TOLERANCE_SCORES`.
    """
    import torch
    from mmdeploy.apis.utils import build_task_processor

    processor = build_task_processor(model_cfg, deploy_cfg, "cpu")
    model = processor.build_pytorch_model(str(checkpoint)).eval()
    data, inputs = processor.create_input(image, deploy_cfg.onnx_config.input_shape, model.data_preprocessor)
    with torch.no_grad():
        expected = model.predict(inputs, data["data_samples"], rescale=False)[0].pred_instances
    runtime, forward = graph_runner(onnx_file)
    dets, labels = forward(inputs.numpy())
    scores = float((torch.from_numpy(dets[0, :, 4]) - expected.scores).abs().max())
    same = torch.from_numpy(labels[0]) == expected.labels
    boxes = (
        float((torch.from_numpy(dets[0, :, :4]) - expected.bboxes)[same].abs().max()) if same.any() else 0.0
    )
    # The order of equal scores may differ, and with it their labels and boxes.
    if scores > TOLERANCE_SCORES or boxes > TOLERANCE_BOXES_PIXELS or same.float().mean() < 0.9:
        raise ExportError(
            Problem(
                "mmdeploy's graph does not compute what PyTorch computes",
                value=f"scores differ by {scores:.3g}, boxes by {boxes:.3g} px, "
                f"{same.float().mean():.0%} equal labels",
                allowed=f"{TOLERANCE_SCORES}, {TOLERANCE_BOXES_PIXELS} px, 90%",
            )
        )
    return f"{runtime} against PyTorch: scores within {scores:.1e}, boxes within {boxes:.1e} px"


def graph_runner(onnx_file: Path) -> tuple[str, Callable[[Any], tuple[Any, Any]]]:
    """Return a graph's runtime in words, and the graph as a function of images (N, 3, H, W): dets and labels.

    Raises:
        ExportError: the plugin would refuse a plugin node.
    """
    import onnx
    import onnxruntime

    from ddetr_mm.deploy.plugin import plugin_graph_forward, plugin_nodes, require_plugin_contract

    model = onnx.load(str(onnx_file))
    if plugin_nodes(model):
        require_plugin_contract(model)
        return "onnxruntime, plugin nodes in numpy,", plugin_graph_forward(model)
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return "onnxruntime", lambda images: session.run(["dets", "labels"], {name: images})


def backend_files(deploy_cfg: Any, target: Path, arguments: argparse.Namespace) -> list[str]:
    """What the backend runs: the graph itself, or an engine that mmdeploy builds from it.

    Raises:
        StackError: TensorRT is needed and not installed; the graph is written.
    """
    if not is_tensorrt(deploy_cfg):
        return [str(target)]
    from ddetr_mm.deploy.tensorrt import require_tensorrt

    try:
        require_tensorrt()
    except StackError as error:
        problem = error.problems[0]
        raise StackError(
            Problem(f"{target} is written, its engine is not: {problem.what}", hint=problem.hint)
        ) from error
    from mmdeploy.apis.utils import to_backend

    return list(
        to_backend(
            "tensorrt",
            [str(target)],
            work_dir=str(target.parent),
            deploy_cfg=deploy_cfg,
            log_level=logging.getLevelName(arguments.log_level),
            device=arguments.device,
        )
    )


def draw(
    deploy_cfg: Any,
    model_cfg: Any,
    files: list[str],
    checkpoint: Path,
    image: str,
    folder: Path,
    arguments: argparse.Namespace,
) -> None:
    """Draw the detections of the backend and of PyTorch, as mmdeploy's tool does."""
    from mmdeploy.apis import visualize_model
    from mmdeploy.utils import Backend, get_backend

    for backend, model in ((get_backend(deploy_cfg), files), (Backend.PYTORCH, [str(checkpoint)])):
        output = folder / f"output_{backend.value}_{Path(image).stem}.jpg"
        visualize_model(
            model_cfg, deploy_cfg, model, image, arguments.device, backend, str(output), arguments.show
        )


# --- Calibration images for int8 engines ---

LOADERS = ("val_dataloader", "test_dataloader")


def write_calibration_data(
    deploy_cfg: Any, model_cfg: Any, checkpoint: Path, dataset_cfg: str | None, folder: Path
) -> Path | None:
    """Write the HDF5 file that ``calib_config`` of the deploy config names; nothing where it names none.

    It holds one array (1, 3, H, W) for each image, resized and normalised, as mmdeploy's builder reads them.

    Args:
        deploy_cfg: from :func:`traced_config`, so that no GPU is needed.
        model_cfg: the model config.
        checkpoint: the model's weights.
        dataset_cfg: a config or spec whose validation (else test) images are used; None for those of the
            model config.
        folder: the folder to write to.

    Returns:
        The file, or None.

    Raises:
        ExportError: ``dataset_cfg`` is given and the deploy config does no calibration, or no images are
            named.
        StackError: h5py is missing.
    """
    from mmdeploy.apis import create_calib_input_data
    from mmdeploy.utils import get_calib_filename

    name = get_calib_filename(deploy_cfg)
    if name is None:
        if dataset_cfg is None:
            return None
        raise ExportError(
            Problem(
                "has no effect: the deploy config does no calibration",
                where="--calib-dataset-cfg",
                value=dataset_cfg,
                hint="leave it out, or use configs/deploy/tensorrt_int8.py",
            )
        )
    if importlib.util.find_spec("h5py") is None:
        raise StackError(Problem("mmdeploy keeps calibration images in HDF5", hint="pip install h5py"))
    images = images_config(model_cfg, dataset_cfg, checkpoint, deploy_cfg.onnx_config.input_shape)
    with written_whole(folder / name, locked=False) as temporary:  # HDF5 locks it itself
        create_calib_input_data(
            str(temporary),
            deploy_cfg,
            model_cfg,
            str(checkpoint),
            dataset_cfg=images,
            dataset_type="val",
            device="cpu",
        )
    return folder / name


def images_config(
    model_cfg: Any, dataset_cfg: str | None, checkpoint: Path, input_shape: tuple[int, int]
) -> Any:
    """Return a config whose ``val_dataloader`` gives the calibration images at the graph's size.

    Args:
        model_cfg: the model config, whose test pipeline is used.
        dataset_cfg: see :func:`write_calibration_data`.
        checkpoint: the weights for which a spec is translated.
        input_shape: width and height of the graph's input.

    Raises:
        ExportError: the config has no such data loader.
    """
    from mmengine.config import Config

    if dataset_cfg is None:
        named, source = "model_cfg", model_cfg
    elif Path(dataset_cfg).suffix.lower() in SPEC_SUFFIXES:
        named, source = dataset_cfg, Config.fromstring(spec_source(dataset_cfg, checkpoint), ".py")
    else:
        named, source = dataset_cfg, Config.fromfile(dataset_cfg)
    loader = next((source[key] for key in LOADERS if source.get(key)), None)
    if loader is None:
        raise ExportError(
            Problem(
                "names no images for the calibration",
                file=named,
                allowed=" or ".join(LOADERS),
                hint="give --calib-dataset-cfg",
            )
        )
    steps = [step.to_dict() for step in model_cfg.test_pipeline]
    for step in steps:
        if step["type"] == "Resize":
            step.update(scale=tuple(input_shape), keep_ratio=False)
    loader.dataset.pipeline = steps
    loader.num_workers, loader.persistent_workers = 0, False
    return Config(dict(val_dataloader=loader.to_dict()))


def spec_source(spec: str, checkpoint: Path) -> str:
    """Translate a spec for ``evaluate``."""
    from ddetr_mm.spec import load_spec
    from ddetr_mm.tasks.runner import config_source

    loaded = load_spec(spec, [f"evaluate.checkpoint={checkpoint}"], "evaluate")
    return config_source(loaded, "evaluate", str(checkpoint))


# --- Patches of mmdeploy 1.3.1 for current torch ---

FIRST_OPSET_WITH_GRID_SAMPLE = 16


@contextmanager
def patched_mmdeploy(opset: int) -> Iterator[None]:
    """Patch mmdeploy inside the block.

    Args:
        opset: the opset to write; from 16 on ``grid_sampler`` becomes ONNX's GridSample, not mmdeploy's
            operator.
    """
    with ExitStack() as stack:
        stack.enter_context(_old_exporter())
        stack.enter_context(_list_of_wrapped_functions())
        if opset >= FIRST_OPSET_WITH_GRID_SAMPLE:
            stack.enter_context(_standard_grid_sample())
        yield


@contextmanager
def _old_exporter() -> Iterator[None]:
    """Export with ``dynamo=False``: torch 2.9 changed the default, which mmdeploy's rewriters do not fit."""
    import torch

    original = torch.onnx.export
    if "dynamo" not in inspect.signature(original).parameters:
        yield
        return

    @functools.wraps(original)
    def export(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{"dynamo": False, **kwargs})

    torch.onnx.export = export
    try:
        yield
    finally:
        torch.onnx.export = original


@contextmanager
def _list_of_wrapped_functions() -> Iterator[None]:
    """Give mmdeploy the list that torch's table of fx-wrapped functions once was; tracing does not use it."""
    from mmdeploy.core.rewriters import function_rewriter

    original = function_rewriter._wrapped_fns_to_patch
    if isinstance(original, list):
        yield
        return
    function_rewriter._wrapped_fns_to_patch = []
    try:
        yield
    finally:
        function_rewriter._wrapped_fns_to_patch = original


@contextmanager
def _standard_grid_sample() -> Iterator[None]:
    """Remove mmdeploy's record of ``grid_sampler``, so that torch exports GridSample."""
    import mmdeploy.pytorch  # noqa: F401 - registers the record
    from mmdeploy.core import SYMBOLIC_REWRITER

    records = SYMBOLIC_REWRITER._registry._rewrite_records
    taken = records.pop("grid_sampler", None)
    try:
        yield
    finally:
        if taken is not None:
            records["grid_sampler"] = taken
