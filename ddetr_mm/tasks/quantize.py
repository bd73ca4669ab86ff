"""``ddetr-mm quantize``: a quantized model, compared with the float one on the validation data."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr_mm.errors import DataError, ExportError, Problem, WeightsError, printable
from ddetr_mm.files import write_text_whole
from ddetr_mm.outputs import claim, require_free, temporary_beside
from ddetr_mm.spec import ExperimentSpec, LoadedSpec, load_spec
from ddetr_mm.spec.rules import QuantizeBackend, quantize_backend
from ddetr_mm.spec.schema import DataSource, TensorQuantizationConfig
from ddetr_mm.tasks.session import Session, choose_device, open_session, require_checkpoint

if TYPE_CHECKING:
    import numpy as np
    from mmengine.config import Config

    from ddetr_mm.deploy.quantize import LayerRule
    from ddetr_mm.deploy.quantize_graph import GroupLoss
    from ddetr_mm.engine.runner import QuietRunner
    from ddetr_mm.tasks.runner import ExportedInput

REPORT_NAME, PARITY_NAME = "report.html", "parity.json"
REJECTED = ".rejected"
LATENCY_ROUNDS = 15
MODEL_KEY = "quantize.model_path"


def run(arguments: Namespace) -> None:
    """Write the quantized model, ``parity.json`` and ``report.html``.

    Raises:
        ExportError: the quantized model loses more AP than ``ddetr_mm.quantize_max_ap_drop``.
    """
    loaded = load_spec(arguments.experiment_spec, arguments.overrides, "quantize")
    settings = loaded.spec.quantize
    require_checkpoint(settings.model_path, MODEL_KEY)
    choose_quantize_device(loaded)
    with open_session(loaded, "quantize") as session:
        target = session.folder / target_name(loaded.spec)
        require_free(
            [target, rejected_file(target), session.folder / PARITY_NAME, session.folder / REPORT_NAME]
        )
        quantize(loaded, session, target)


def target_name(spec: ExperimentSpec) -> str:
    """Return the name of the quantized file: TAO's for a checkpoint, ``<source>.quant.onnx`` for a graph."""
    name, backend = quantize_backend(spec)
    if backend.writes_onnx:
        return f"{Path(str(spec.quantize.model_path)).stem}.quant.onnx"
    return f"quantized_model_{name}.pth"


def rejected_file(target: Path) -> Path:
    """Return the name of a quantized file that loses too much."""
    return target.with_name(target.name + REJECTED)


def choose_quantize_device(loaded: LoadedSpec) -> None:
    """Follow ``quantize.device``; must be called before torch is imported.

    A GPU that is missing is the CPU, with a note, as in TAO.
    """
    spec, device = loaded.spec, loaded.spec.quantize.device
    name = quantize_backend(spec)[0]
    if device == "trt" and name != "modelopt.onnx":
        log(f"note: quantize.device trt is for modelopt.onnx: {name} takes cuda")
    if device == "cpu":
        spec.ddetr_mm.device = "cpu"
    index = int(device.partition(":")[2] or 0)
    choose_device(spec, [index])
    import torch

    if not torch.cuda.is_available() and spec.ddetr_mm.device != "cpu":
        log(f"note: quantize.device {device}: there is no GPU, the CPU is used")
        spec.ddetr_mm.device = "cpu"


def log(line: str) -> None:
    """Print a line on standard error."""
    print(printable(line), file=sys.stderr)


# --- The work ---


@dataclass
class Figures:
    """What is measured of one model.

    Attributes:
        file: its path.
        size_bytes: of the file.
        ap: COCO's AP on the validation data, 0..1; None: not measured.
        ap50: the same at IoU 0.5.
        latency_ms: median time for one image; None: not measured.
    """

    file: str
    size_bytes: int
    ap: float | None = None
    ap50: float | None = None
    latency_ms: float | None = None


@dataclass
class Certificate:
    """The comparison of a quantized model with its float one, as written to ``parity.json``.

    Attributes:
        backend, mode, algorithm: of the spec; ``algorithm`` as it was used.
        float_model, quantized_model: the figures of both.
        certified: whether AP was measured and the loss is within the limit.
        rejected: whether the loss is beyond it.
        reason: why it is not certified; empty where it is.
        max_ap_drop: the limit, in points of 100.
        ap_drop: loss of AP in points; negative for a gain.
        calibration_images: images that ranges were found with.
        layers: quantized layer → number formats.
        float_layers: layer that stayed in float → why.
        sensitivity: losses by group, where they were asked for.
        latency_of: what was timed.
        machine: processor and threads.
        notes: what else a reader should know.
    """

    backend: str
    mode: str
    algorithm: str | None
    float_model: Figures
    quantized_model: Figures
    max_ap_drop: float
    certified: bool = False
    rejected: bool = False
    reason: str = ""
    ap_drop: float | None = None
    calibration_images: int = 0
    layers: dict[str, str] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    sensitivity_of: str = ""
    latency_of: str = ""
    machine: str = ""
    notes: list[str] = field(default_factory=list)


def quantize(loaded: LoadedSpec, session: Session, target: Path) -> None:
    """Quantize, compare, and give the file its name, or that of a rejected one.

    Raises:
        ExportError: it loses too much AP; or the backend fails.
        WeightsError: the model is quantized already, or cannot be read.
    """
    spec = loaded.spec
    name, backend = quantize_backend(spec)
    source = Path(str(spec.quantize.model_path))
    session.status.write(f"Loading checkpoint: {source}")
    require_calibration(spec, backend)
    with temporary_beside(target) as temporary:
        if backend.writes_onnx:
            source = float_graph(loaded, session, source)
            made = _Made()
            quantize_graph(loaded, session, name, backend, source, temporary, made)
        else:
            made = quantize_network(loaded, name, backend, source, temporary)
        session.status.write("Comparing the quantized model with the float one.")
        certificate = certify(loaded, session, source, temporary, target, made)
        final = rejected_file(target) if certificate.rejected else target
        certificate.quantized_model.file = str(final)
        claim(final)
        os.replace(temporary, final)
    config = session.folder / "quantized" / "config.py"
    if config.is_file():  # it names the file that was evaluated
        text = config.read_text(encoding="utf-8")
        write_text_whole(config, text.replace(str(temporary), str(final)))
    write_reports(certificate, session.folder)
    announce(certificate, session, final)


def require_calibration(spec: ExperimentSpec, backend: QuantizeBackend) -> None:
    """Read the annotation file of the calibration data, before anything long is done.

    Raises:
        DataError: it is missing or is not COCO.
    """
    from ddetr_mm.datasets.sources import CocoSource, read_coco_sources

    source = spec.dataset.quant_calibration_data_sources
    if backend.mode == "static_ptq" and source is not None:
        read_coco_sources([CocoSource(source.image_dir, source.json_file)], annotations_required=False)


@dataclass
class _Made:
    """What a backend did; see :class:`Certificate`."""

    algorithm: str | None = None
    calibration_images: int = 0
    layers: dict[str, str] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    losses: list[GroupLoss] = field(default_factory=list)
    losses_of: str = ""
    notes: list[str] = field(default_factory=list)


def layer_rules(spec: ExperimentSpec) -> list[LayerRule]:
    """Return the entries of ``quantize.layers`` for :func:`ddetr_mm.deploy.quantize.choose_layers`."""
    from ddetr_mm.deploy.quantize import NATIVE, LayerRule

    def dtype_of(tensor: TensorQuantizationConfig | None) -> str | None:
        return None if tensor is None or tensor.dtype in ("", NATIVE) else tensor.dtype

    return [
        LayerRule(
            layer.module_name,
            dtype_of(layer.weights),
            dtype_of(layer.activations),
            layer.weights.quant_axis if layer.weights is not None else None,
            f"quantize.layers[{index}]",
        )
        for index, layer in enumerate(spec.quantize.layers or ())
    ]


def evaluating(
    loaded: LoadedSpec, sources: Sequence[DataSource] | None, path: Path, folder: Path
) -> LoadedSpec:
    """Return the spec of an evaluation of a file.

    Args:
        loaded: the spec of quantize.
        sources: the data.
        path: checkpoint or graph.
        folder: for the results.
    """
    spec = loaded.spec.model_copy(deep=True)
    spec.dataset.test_data_sources = None
    spec.dataset.val_data_sources = list(sources or [])
    spec.evaluate.checkpoint, spec.evaluate.trt_engine = str(path), None
    spec.evaluate.results_dir = str(folder)
    spec.evaluate.gpu_ids, spec.evaluate.num_gpus = [0], 1
    spec.ddetr_mm.compile, spec.ddetr_mm.predict_precision = "none", "fp32"
    return replace(loaded, spec=spec, subtask="evaluate")


# --- Calibration ---


def calibration_config(loaded: LoadedSpec, path: Path, folder: Path) -> tuple[Config, ExportedInput | None]:
    """Return the config of a validation of the calibration data, and what the file of a graph says.

    Args:
        loaded: the spec; its ``dataset.quant_calibration_data_sources`` is read.
        path: the model that will see them, which decides their size.
        folder: of the results.
    """
    from mmengine.config import Config

    from ddetr_mm.tasks.runner import config_source, exported_input, register_scope

    source = loaded.spec.dataset.quant_calibration_data_sources
    copied = evaluating(loaded, [source], path, folder)
    exported = exported_input(str(path), where="quantize")
    checkpoint = None if exported else str(path)
    config = Config.fromstring(config_source(copied, "evaluate", checkpoint, exported), ".py")
    register_scope(config)
    return config, exported


def calibration_batches(loaded: LoadedSpec, path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield batches of calibration images, transformed as those of a validation.

    Args:
        loaded: the spec; its ``dataset.quant_calibration_data_sources`` is read.
        path: the model that will see them, which decides their size.
        folder: of the results.

    Raises:
        DataError: the data cannot be read, or hold no image.
    """
    config, exported = calibration_config(loaded, path, folder)
    yield from _batches(config, exported, loaded.spec.ddetr_mm.quantize_images)


def _batches(config: Config, exported: ExportedInput | None, most: int) -> Iterator[dict[str, Any]]:
    """Yield batches of at most so many images, evenly spread over the data."""
    import numpy as np
    from torch.utils.data import DataLoader, Subset

    from ddetr_mm.tasks.runner import QuietRunner

    config.test_dataloader.num_workers = 0
    config.test_dataloader.persistent_workers = False
    config.test_dataloader.pop("timeout", None)
    loader = QuietRunner.build_dataloader(config.test_dataloader, seed=0)
    count = len(loader.dataset)
    if not count:
        raise DataError(Problem("holds no image", where="dataset.quant_calibration_data_sources.json_file"))
    rows = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
    subset = Subset(loader.dataset, rows.tolist())
    size = exported.signature.batch_size if exported and exported.signature else None
    batch_size = size or min(loader.batch_sampler.batch_size, 8)
    yield from DataLoader(subset, batch_size, collate_fn=loader.collate_fn)


def graph_batches(loaded: LoadedSpec, path: Path, folder: Path) -> Iterator[np.ndarray]:
    """Yield calibration images as inputs of a graph: normalised, of its size and batch."""
    import numpy as np
    from mmdet.registry import MODELS

    config, exported = calibration_config(loaded, path, folder)
    if exported is None or exported.signature is None:
        raise WeightsError(Problem("is not an exported graph", file=path, where=MODEL_KEY))
    preprocessor = MODELS.build(config.model.data_preprocessor)
    for data in _batches(config, exported, loaded.spec.ddetr_mm.quantize_images):
        images = preprocessor(data, False)["inputs"].numpy()
        size = exported.signature.batch_size
        if size and len(images) < size:  # the last one: its images again, as zeros would widen the ranges
            images = np.resize(images, (size, *images.shape[1:]))
        yield np.ascontiguousarray(images, np.float32)


# --- Checkpoints ---


def quantize_network(
    loaded: LoadedSpec, name: str, backend: QuantizeBackend, source: Path, temporary: Path
) -> _Made:
    """Quantize a checkpoint by torchao or ModelOpt and write it.

    Raises:
        WeightsError: it is quantized already, or does not fit the spec.
        SpecError: a pattern fits no layer.
    """
    import torch
    from torch import nn

    from ddetr_mm.deploy import quantize as engine
    from ddetr_mm.tasks.runner import build_model, weights_selection
    from ddetr_mm.weights import inspect_checkpoint, to_category_ids
    from ddetr_mm.weights.convert import mmdet_meta

    spec = loaded.spec
    selection = weights_selection(spec)
    checkpoint = inspect_checkpoint(source, selection)
    if checkpoint.quantization is not None:
        hint = "name the checkpoint that it was made from"
        raise WeightsError(Problem("is quantized already", file=source, where=MODEL_KEY, hint=hint))
    folder = temporary.parent
    copied = evaluating(loaded, spec.dataset.val_data_sources, source, folder)
    network, _ = build_model(copied, "evaluate", str(source), where=MODEL_KEY)
    network.to("cpu" if spec.ddetr_mm.device == "cpu" else "cuda")
    kinds = (nn.Linear,) if name == "torchao" else (nn.Linear, nn.Conv2d)
    inside = engine.inside_attention(network)
    usable = {
        key for key, module in network.named_modules() if isinstance(module, kinds) and key not in inside
    }
    classes = {key for key in vars(nn) if isinstance(getattr(nn, key), type)}
    rules = layer_rules(spec)
    if not backend.algorithms:
        rules = [replace(rule, activations=None) for rule in rules]
    chosen = engine.choose_layers(
        engine.torch_names(network),
        usable,
        rules,
        spec.quantize.skip_names or [],
        known_classes=classes,
        log=log,
    )
    made = _Made(layers={key: _formats(rule) for key, rule in chosen.items()})
    if name == "torchao":
        content: dict[str, Any] = {"state_dict": engine.quantize_torchao(network, chosen)}
        made.notes.append("evaluate, inference and export read the quantized weights and compute in float32")
    else:
        made.algorithm = spec.quantize.algorithm or backend.algorithms[0]
        made.notes.append(
            "evaluate and inference round weights and inputs as the quantized network does, in float32"
        )

        def calibrate() -> None:
            for data in calibration_batches(loaded, source, folder):
                network.test_step(data)
                made.calibration_images += len(data["inputs"])

        content, lost = engine.quantize_modelopt(network, chosen, made.algorithm, calibrate)
        if lost:
            log(f"note: {len(lost)} layers that no image reaches stay in float: {', '.join(lost[:3])}")
        made.float_layers = dict.fromkeys(lost, "no image reaches it")
        made.layers = {key: value for key, value in made.layers.items() if key not in lost}
    moved = to_category_ids(checkpoint, network.bbox_head.num_classes).meta
    content["meta"] = mmdet_meta(replace(moved, source_format="mmdet"))
    torch.save(content, temporary)
    return made


def _formats(rule: LayerRule) -> str:
    return f"weights {rule.weights or 'native'}, inputs {rule.activations or 'native'}"


# --- Graphs ---


def float_graph(loaded: LoadedSpec, session: Session, source: Path) -> Path:
    """Return the graph to quantize: the given one, or that of the given checkpoint, exported first.

    Raises:
        ExportError: the graph has plugin nodes, which only TensorRT runs, or is quantized already.
    """
    if source.suffix.lower() != ".onnx":
        from ddetr_mm.tasks.export import export

        spec = loaded.spec.model_copy(deep=True)
        target = session.folder / f"{source.stem}.onnx"
        spec.export.checkpoint, spec.export.onnx_file = str(source), str(target)
        spec.export.on_cpu, spec.export.serialize_nvdsinfer, spec.ddetr_mm.export_fp16 = True, False, False
        export(replace(loaded, spec=spec, subtask="export"), session)
        source = target
    import onnx

    from ddetr_mm.deploy.onnx_file import read_signature
    from ddetr_mm.deploy.plugin import plugin_nodes
    from ddetr_mm.deploy.quantize_graph import quantized_nodes

    read_signature(source, where=MODEL_KEY)
    model = onnx.load(str(source), load_external_data=False)
    if plugin_nodes(model):
        what, hint = "has nodes of TensorRT's plugin, which calibration cannot run", "export.on_cpu=true"
        raise ExportError(Problem(what, file=source, where=MODEL_KEY, hint=f"export it with {hint}"))
    if quantized_nodes(model):
        hint = "name the float graph that it was made from"
        raise ExportError(Problem("has Q/DQ nodes already", file=source, where=MODEL_KEY, hint=hint))
    return source


def quantize_graph(
    loaded: LoadedSpec,
    session: Session,
    name: str,
    backend: QuantizeBackend,
    source: Path,
    temporary: Path,
    made: _Made,
) -> None:
    """Quantize a graph by onnxruntime or ModelOpt and write it.

    Raises:
        SpecError: a pattern fits no layer.
        ExportError: the backend fails.
    """
    import onnx

    from ddetr_mm.deploy import quantize_graph as engine
    from ddetr_mm.deploy.quantize import choose_layers

    spec, kwargs = loaded.spec, dict(loaded.spec.quantize.backend_kwargs or {})
    model = onnx.load(str(source))
    layers = engine.graph_layers(model)
    rules = layer_rules(spec)
    names = {node.name: layers.names.get(node.name, (node.op_type,)) for node in model.graph.node}
    if rules:
        chosen = choose_layers(names, layers.names, rules, spec.quantize.skip_names or [], log=log)
        nodes = list(chosen)
        formats = {key: rule.weights or rule.activations or "int8" for key, rule in chosen.items()}
    else:
        from ddetr_mm.deploy.quantize import LayerRule

        every = [LayerRule("*", "int8", "int8")]
        chosen = choose_layers(names, layers.names, every, spec.quantize.skip_names or [], log=log)
        nodes = [key for key in chosen if name != "onnxruntime" or key not in layers.sensitive]
        made.float_layers = {key: why for key, why in layers.sensitive.items() if key not in nodes}
        formats = dict.fromkeys(nodes, "int8")
    algorithm = spec.quantize.algorithm or backend.algorithms[0]
    made.algorithm = algorithm
    images = 0

    def batches() -> Iterator[np.ndarray]:
        nonlocal images
        for batch in graph_batches(loaded, source, session.folder):
            images += len(batch)
            yield batch

    if name == "modelopt.onnx":
        mode = kwargs.get("quantize_mode") or {"fp8_e4m3fn": "fp8"}.get(next(iter(formats.values())), "int8")
        listed = [] if algorithm == "rtn_dq" else list(batches())
        prepared = temporary.with_suffix(".named.onnx")
        try:
            onnx.save(model, str(prepared))
            engine.quantize_by_modelopt(
                prepared,
                temporary,
                nodes,
                listed,
                mode=mode,
                algorithm=algorithm,
                device=spec.quantize.device if spec.ddetr_mm.device != "cpu" else "cpu",
                high_precision_dtype=kwargs.get("high_precision_dtype", "fp32"),
                block_size=kwargs.get("block_size"),
            )
        finally:
            prepared.unlink(missing_ok=True)
        formats = dict.fromkeys(nodes, mode)
    else:
        options = {key: value for key, value in kwargs.items() if not key.startswith("sensitivity")}
        quantizer = engine.StaticQuantizer(model, engine.StaticOptions(method=algorithm, **options))
        quantizer.calibrate(batches())
        if kwargs.get("sensitivity"):
            nodes = sensitive_nodes(loaded, session, source, quantizer, nodes, layers.groups, made)
        quantizer.write(nodes, temporary)
    made.calibration_images = images
    made.layers = {key: formats.get(key, "int8") for key in nodes}


def sensitive_nodes(
    loaded: LoadedSpec,
    session: Session,
    source: Path,
    quantizer: Any,
    nodes: list[str],
    groups: dict[str, str],
    made: _Made,
) -> list[str]:
    """Return the layers to quantize after a pass over the groups of layers.

    Each group is quantized alone. Then groups go back to float, those that cost most first, until the loss of
    AP of all others together is within ``ddetr_mm.quantize_max_ap_drop``.
    """
    import tempfile

    from ddetr_mm.deploy.quantize_graph import group_losses, output_error

    limit = loaded.spec.ddetr_mm.quantize_max_ap_drop
    most = int((loaded.spec.quantize.backend_kwargs or {}).get("sensitivity_images", 200))
    count = validation_count(loaded)
    before = measure_ap(loaded, session, source, "float") if count else None
    float_ap = before[0] if before else None

    def ap_loss(path: Path) -> float:
        found = measure_ap(loaded, session, path, "group")
        return 100 * (float_ap - found[0]) if found and float_ap is not None else 0.0

    if float_ap is not None and count <= most:
        made.losses_of, loss = "loss of AP in points", ap_loss
    else:
        made.losses_of = "root mean square difference of the logits"
        some = list(islice(graph_batches(loaded, source, session.folder), 4))
        loss = output_error(source, some)
    made.losses = group_losses(nodes, groups, quantizer.write, loss, log)
    if float_ap is None:
        log("note: without validation data no group is put back to float")
        return nodes
    kept = list(nodes)
    with tempfile.TemporaryDirectory(prefix="ddetr_mm_") as folder:
        path = Path(folder) / "all.onnx"
        for one in [*made.losses, None]:
            quantizer.write(kept, path)
            total = ap_loss(path)
            if total <= limit or one is None:
                break
            log(f"sensitivity: all others together lose {total:.2f} points: {one.group} stays in float")
            back = [key for key in kept if groups[key] == one.group]
            made.float_layers |= dict.fromkeys(back, f"sensitivity: group {one.group}")
            kept = [key for key in kept if groups[key] != one.group]
            if not kept:
                raise ExportError(
                    Problem(
                        "no group of layers can be quantized within the limit",
                        where="ddetr_mm.quantize_max_ap_drop",
                    )
                )
    return kept


# --- The certificate ---


def validation_count(loaded: LoadedSpec) -> int:
    """Return the number of validation images; 0, with a note, where there are no usable data."""
    from ddetr_mm.datasets.sources import CocoSource, read_coco_sources

    sources = [CocoSource(one.image_dir, one.json_file) for one in loaded.spec.dataset.val_data_sources or []]
    if not sources:
        return 0
    try:
        return len(read_coco_sources(sources, annotations_required=False).image_ids)
    except DataError as error:
        log(f"note: dataset.val_data_sources cannot be used: {error}")
        return 0


def measure_ap(loaded: LoadedSpec, session: Session, path: Path, name: str) -> tuple[float, float] | None:
    """Evaluate a file on the validation data; returns AP and AP at IoU 0.5, None where AP is undefined."""
    return precision_of(evaluating_runner(loaded, session, path, name))


def precision_of(runner: QuietRunner) -> tuple[float, float] | None:
    """Run an evaluation; returns AP and AP at IoU 0.5, None where AP is undefined."""
    metrics = runner.test()
    found = metrics["coco/bbox_mAP"], metrics["coco/bbox_mAP_50"]
    return found if found[0] >= 0 else None


def evaluating_runner(loaded: LoadedSpec, session: Session, path: Path, name: str) -> QuietRunner:
    """Return the Runner that evaluates a file on the validation data, its results in a folder ``name``."""
    from ddetr_mm.tasks.runner import build_predicting_runner

    folder = session.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    copied = evaluating(loaded, loaded.spec.dataset.val_data_sources, path, folder)
    return build_predicting_runner(copied, "evaluate", folder)


def certify(
    loaded: LoadedSpec, session: Session, source: Path, quantized: Path, target: Path, made: _Made
) -> Certificate:
    """Measure AP, size and latency of both models."""
    spec, name = loaded.spec, quantize_backend(loaded.spec)[0]
    found = Certificate(
        backend=name,
        mode=quantize_backend(spec)[1].mode,
        algorithm=made.algorithm,
        float_model=Figures(str(source), source.stat().st_size if source.is_file() else 0),
        quantized_model=Figures(str(target), quantized.stat().st_size),
        max_ap_drop=spec.ddetr_mm.quantize_max_ap_drop,
        calibration_images=made.calibration_images,
        layers=made.layers,
        float_layers=made.float_layers,
        sensitivity=[asdict(one) for one in made.losses],
        sensitivity_of=made.losses_of,
        machine=machine(),
        notes=made.notes,
    )
    if not validation_count(loaded):
        found.reason = "there are no validation data: give dataset.val_data_sources"
        return found
    runners = {}
    pairs = (("float", source, found.float_model), ("quantized", quantized, found.quantized_model))
    for folder, path, figures in pairs:
        runners[folder] = runner = evaluating_runner(loaded, session, path, folder)
        figures.ap, figures.ap50 = precision_of(runner) or (None, None)
    times = latencies(runners["float"], runners["quantized"])
    found.float_model.latency_ms, found.quantized_model.latency_ms = times
    found.latency_of = f"one validation image, median of {LATENCY_ROUNDS}, the two models in turn"
    if found.float_model.ap is None or found.quantized_model.ap is None:
        found.reason = "AP is undefined: the validation data hold no boxes"
        return found
    found.ap_drop = 100 * (found.float_model.ap - found.quantized_model.ap)
    found.rejected = found.ap_drop > found.max_ap_drop
    found.certified = not found.rejected
    if found.rejected:
        found.reason = f"AP falls by {found.ap_drop:.2f} points, the limit is {found.max_ap_drop:g}"
    return found


def latencies(first: QuietRunner, second: QuietRunner) -> tuple[float, float]:
    """Return the median time of each Runner's model for one image, in ms, measured in turn.

    Graphs are timed alone, networks with the choice of their detections.
    """
    import torch

    calls = [_timed_call(runner) for runner in (first, second)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for call in calls:
            call()
        for _ in range(LATENCY_ROUNDS):
            for call, found in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                found.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _timed_call(runner: QuietRunner) -> Callable[[], Any]:
    import torch

    from ddetr_mm.weights.load import unwrapped

    model = unwrapped(runner.model)
    dataset = runner.test_dataloader.dataset
    data = runner.test_dataloader.collate_fn([dataset[0]])
    ready = model.data_preprocessor(data, False)
    if hasattr(model, "run_graph"):
        images = model._filled(ready["inputs"].cpu().numpy())
        return lambda: model.run_graph(images)

    def call() -> None:
        model.predict(ready["inputs"], ready["data_samples"], rescale=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def machine() -> str:
    """Return the processor, the threads and the load of this machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}"


# --- Reports ---


def write_reports(certificate: Certificate, folder: Path) -> None:
    """Write ``parity.json`` and ``report.html``."""
    content = asdict(certificate)
    write_text_whole(folder / PARITY_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text_whole(folder / REPORT_NAME, report_page(certificate))


def report_page(certificate: Certificate) -> str:
    """Return the report of a quantization as an HTML page."""
    from ddetr_mm.html_page import facts, heading, number, page, paragraph, table

    one, other = certificate.float_model, certificate.quantized_model
    rows = [
        [
            "float",
            number(one.ap),
            number(one.ap50),
            number(one.size_bytes / 2**20, 2),
            number(one.latency_ms, 1),
        ],
        [
            certificate.backend,
            number(other.ap),
            number(other.ap50),
            number(other.size_bytes / 2**20, 2),
            number(other.latency_ms, 1),
        ],
    ]
    verdict = verdict_text(certificate)
    settings = {
        "float model": one.file,
        "quantized model": other.file,
        "mode": certificate.mode,
        "algorithm": certificate.algorithm or "none",
        "calibration images": str(certificate.calibration_images),
        "machine": certificate.machine,
    }
    parts = [
        heading("Quantization", 1),
        paragraph(verdict, "alarm" if certificate.rejected else "" if certificate.certified else "note"),
        table(["model", "AP", "AP50", "size, MiB", "latency, ms"], rows, name="Both models"),
        *([paragraph(f"Latency: {certificate.latency_of}.", "quiet")] if certificate.latency_of else []),
        facts(settings),
        *(paragraph(note, "quiet") for note in certificate.notes),
    ]
    if certificate.sensitivity:
        losses = [
            [entry["group"], number(entry["num_layers"]), number(entry["loss"], 4)]
            for entry in certificate.sensitivity
        ]
        parts += [
            heading("Sensitivity"),
            paragraph(f"Each group quantized alone: {certificate.sensitivity_of}."),
            table(["group", "layers", "loss"], losses, name="Sensitivity", sortable=True),
        ]
    layers = [[name, formats] for name, formats in certificate.layers.items()]
    layers += [[name, f"float: {why}"] for name, why in certificate.float_layers.items()]
    parts += [heading("Layers"), table(["layer", "format"], layers, name="Layers", names=(0, 1))]
    return page("Quantization", parts)


def verdict_text(certificate: Certificate) -> str:
    """Return the result of the comparison in one sentence."""
    one, other = certificate.float_model, certificate.quantized_model
    if not certificate.certified and not certificate.rejected:
        return f"Not certified: {certificate.reason}."
    text = f"AP {one.ap:.3f} in float, {other.ap:.3f} quantized"
    if certificate.rejected:
        return f"Rejected: {text}; {certificate.reason}."
    return f"Certified: {text}; the limit is a loss of {certificate.max_ap_drop:g} points."


def announce(certificate: Certificate, session: Session, final: Path) -> None:
    """Print the result.

    Raises:
        ExportError: the quantized model is rejected.
    """
    one, other = certificate.float_model, certificate.quantized_model
    if certificate.ap_drop is not None:
        kpi = dict(float_mAP=str(one.ap), quantized_mAP=str(other.ap))
        session.status.write("Quantized model compared.", kpi=kpi)
    if certificate.rejected:
        raise ExportError(
            Problem(
                f"loses too much: AP falls from {one.ap:.3f} to {other.ap:.3f}",
                file=final,
                where="ddetr_mm.quantize_max_ap_drop",
                value=f"{certificate.ap_drop:.2f} points",
                allowed=f"at most {certificate.max_ap_drop:g}",
                hint="leave layers out by quantize.skip_names, give more calibration images, or set backend"
                " onnxruntime with backend_kwargs {sensitivity: true}",
            )
        )
    log(verdict_text(certificate))
    if other.latency_ms is not None and one.latency_ms is not None:
        log(
            f"size {one.size_bytes / 2**20:.1f} -> {other.size_bytes / 2**20:.1f} MiB, "
            f"latency {one.latency_ms:.1f} -> {other.latency_ms:.1f} ms"
        )
    print(f"written: {final}")
