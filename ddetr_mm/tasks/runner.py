"""From a loaded spec to an mmengine Runner, and a checkpoint of any format into its model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from torch import nn

import ddetr_mm.register  # noqa: F401 - puts our components into the registries
from ddetr_mm.classes import (
    UNKNOWN,
    Columns,
    filled_columns,
    named_columns,
    read_class_map,
    require_same_names,
)
from ddetr_mm.datasets.sources import read_coco_sources
from ddetr_mm.deploy.onnx_file import GraphSignature, read_signature
from ddetr_mm.engine.detections import CLASSMAP_KEY
from ddetr_mm.engine.distributed import is_first_rank, is_rank
from ddetr_mm.engine.runner import QuietRunner
from ddetr_mm.errors import DataError, printable
from ddetr_mm.files import write_text_whole
from ddetr_mm.models.backbones import fuse_norms
from ddetr_mm.spec import ExperimentSpec, LoadedSpec
from ddetr_mm.spec.readers import ENGINE_SUFFIXES, is_exported
from ddetr_mm.translate import spec_config_text, to_config
from ddetr_mm.translate.data import Numbering, numbered_names, numbers_by_name
from ddetr_mm.translate.to_config import ExportedModel
from ddetr_mm.weights import (
    Selection,
    fill_model,
    inspect_checkpoint,
    names_by_category_id,
    read_checkpoint,
    to_category_ids,
)
from ddetr_mm.weights.class_columns import head_columns, known_columns, numbered_by_position
from ddetr_mm.weights.entries import DEFAULT
from ddetr_mm.weights.load import unwrapped

CONFIG_NAME = "config.py"
CATEGORY_IDS_NAME = "category_ids.json"
"""Class name to category id, where ids are numbered by name."""


def look_up_channels(backbone_cfg: dict[str, Any]) -> list[int]:
    """Output channels of a backbone that the spec brings, by building it."""
    from ddetr_mm.models.backbones import feature_channels

    return feature_channels(backbone_cfg)


@dataclass(frozen=True)
class ExportedInput:
    """An exported graph that replaces the network, its class names, and all that its file says."""

    translated: ExportedModel
    class_names: Sequence[str] | None
    signature: GraphSignature | None = None


def exported_input(
    onnx_file: str | None, trt_engine: str | None = None, *, where: str
) -> ExportedInput | None:
    """The exported graph that a spec names, or None where it names a checkpoint.

    Args:
        onnx_file: the subtask's ``checkpoint``.
        trt_engine: the subtask's ``trt_engine``, which goes before the checkpoint.
        where: the subtask, for messages.

    Raises:
        WeightsError: when the file is not what its name says.
        StackError: when the runtime is not installed.
    """
    if not trt_engine and onnx_file and Path(onnx_file).suffix in ENGINE_SUFFIXES:
        trt_engine = onnx_file
    if trt_engine:
        from ddetr_mm.deploy.tensorrt import read_engine_signature

        engine = read_engine_signature(trt_engine, where=f"{where}.trt_engine")
        model = dict(type="TensorrtDetector", engine_file=str(trt_engine))
        return ExportedInput(ExportedModel(model, engine.input_size_hw[::-1]), engine.class_names, engine)
    if not onnx_file or Path(onnx_file).suffix != ".onnx":
        return None
    signature = read_signature(onnx_file, where=f"{where}.checkpoint")
    model = dict(type="OnnxDetector", onnx_file=str(onnx_file))
    return ExportedInput(
        ExportedModel(model, signature.input_size_hw[::-1]), signature.class_names, signature
    )


def config_source(
    loaded: LoadedSpec, subtask: str, checkpoint: str | None = None, exported: ExportedInput | None = None
) -> str:
    """The translated config as Python text.

    Args:
        loaded: the spec.
        subtask: what the config is for.
        checkpoint: a checkpoint the run will start from; its origin decides whether padded attention
            values are zeroed, unless the spec says, and its class names go into the config.
        exported: a graph that replaces the network.
    """
    zeroed = names = None
    if exported is not None:
        names = exported.class_names
    elif checkpoint and Path(checkpoint).exists() and not is_exported(checkpoint):
        info = inspect_checkpoint(checkpoint, weights_selection(loaded.spec))
        zeroed, names = info.meta.zero_padded_values, info.meta.class_names
        if subtask == "inference":
            names = names_by_category_id(info.meta, loaded.spec.dataset.num_classes, path=checkpoint)
    if subtask == "inference" and (checkpoint or exported):
        names = predicted_names(loaded, subtask, names)
    draft = to_config(
        loaded,
        subtask,
        zero_padded_values=zeroed,
        class_names=names,
        look_up_channels=look_up_channels,
        exported=exported.translated if exported else None,
        numbering=category_numbering(loaded, subtask, checkpoint, exported),
    )
    if is_first_rank():
        for note in draft.notes:
            print(f"warning: {printable(note)}", file=sys.stderr)
    return spec_config_text(loaded, draft, subtask)


def category_numbering(
    loaded: LoadedSpec, subtask: str, checkpoint: str | None = None, exported: ExportedInput | None = None
) -> Numbering | None:
    """Class names whose positions give the category ids of a subtask's data, from 1; None for the files' ids.

    Args:
        loaded: the spec.
        subtask: ``train`` reads the names from the annotation files; ``evaluate`` takes the checkpoint's.
        checkpoint: what the subtask starts from.
        exported: a graph that replaces the network.

    Raises:
        DataError: an annotation file is missing or is not COCO.
    """
    if subtask not in ("train", "evaluate"):
        return None
    columns, by_name = None, False
    if exported is not None:
        columns = named_columns(exported.class_names or ())
    elif subtask == "evaluate" and checkpoint and Path(checkpoint).exists() and not is_exported(checkpoint):
        meta = inspect_checkpoint(checkpoint, weights_selection(loaded.spec)).meta
        by_name = bool(meta.numbered_by_name)
        columns = known_columns(meta) if meta.label_mode == "category_id" else None
    if not numbers_by_name(loaded.spec, subtask, by_name):
        return None
    return numbered_names(loaded.spec, subtask, columns)


def category_ids_text(numbering: Numbering) -> str:
    """The content of :data:`CATEGORY_IDS_NAME`."""
    ids = {name: number for number, name in enumerate(numbering, start=1) if name is not None}
    return json.dumps({"category_ids": ids}, indent=2, ensure_ascii=False) + "\n"


def predicted_names(loaded: LoadedSpec, subtask: str, known: Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names for the results of a subtask, by class column.

    Args:
        loaded: the spec.
        subtask: ``inference`` or ``export``.
        known: the names that the checkpoint or graph carries.

    Returns:
        These where it carries any, compared with the class map in inference. Else those of
        ``val_data_sources``, of ``train_data_sources`` or of the class map; an inference with a class map
        uses that alone. None, with a warning, where nothing names the classes.

    Raises:
        DataError: the class map contradicts the names, or cannot be read.
    """
    spec = loaded.spec
    infer_source, num_columns = spec.dataset.infer_data_sources, spec.dataset.num_classes
    path = infer_source.classmap if infer_source is not None else None
    columns = named_columns(known or ())
    is_known = any(name is not None for name in columns)
    listed = None
    if path and not (is_known and subtask == "export"):
        listed = read_class_map(path, where=CLASSMAP_KEY)
        padded = (*columns, *(None,) * (num_columns - len(columns)))
        require_same_names(listed, padded, path=str(path), where=CLASSMAP_KEY)
    if is_known:
        return tuple(known or ())
    if listed is not None and subtask == "inference":
        return None
    names, origin = names_of_data(spec)
    if names is None and listed is not None:
        names, origin = listed, CLASSMAP_KEY
    if is_first_rank():
        if names is None:
            print(
                "warning: neither the checkpoint nor the spec's data name the classes: labels have numbers, "
                f"and files of an export {UNKNOWN!r}; give dataset.val_data_sources or "
                "dataset.infer_data_sources.classmap",
                file=sys.stderr,
            )
        else:
            print(f"note: the checkpoint names no classes; the names come from {origin}", file=sys.stderr)
    return None if names is None else filled_columns(names, num_columns)


def names_for_file(loaded: LoadedSpec, path: str | Path, selection: Selection) -> tuple[str, ...] | None:
    """Class names for a checkpoint that carries none, see :func:`predicted_names`; None where it has some.

    Args:
        loaded: the spec that the checkpoint belongs to.
        path: the checkpoint.
        selection: which of several sets of weights is meant.
    """
    meta = inspect_checkpoint(path, selection).meta
    fits = meta.num_classes == loaded.spec.dataset.num_classes
    if known_columns(meta) is not None or numbered_by_position(meta) or not fits:
        return None
    return predicted_names(loaded, "export", None)


def names_of_data(spec: ExperimentSpec) -> tuple[tuple[str | None, ...] | None, str]:
    """The classes of a spec's validation data, else training data, by category id; and the key of the data.

    Data that cannot be read, or whose ids do not fit the class columns, name nothing; the reason is printed.
    With ``ddetr_mm.category_ids: by_name`` the names of all data are numbered, as training numbers them.
    """
    num_columns = spec.dataset.num_classes
    if numbers_by_name(spec, "export"):
        try:
            columns = (None, *numbered_names(spec, "train"))
        except DataError as error:
            print(f"note: the data cannot name the classes: {error}", file=sys.stderr)
            return None, ""
        if len(columns) <= num_columns:
            return columns, "the data, by ddetr_mm.category_ids: by_name"
        print(
            f"note: the data cannot name the classes: they have {len(columns) - 1}, which do not fit "
            f"dataset.num_classes {num_columns}",
            file=sys.stderr,
        )
        return None, ""
    for split in ("val", "train"):
        key = f"dataset.{split}_data_sources"
        sources = getattr(spec.dataset, f"{split}_data_sources") or []
        if not sources:
            continue
        try:
            table = read_coco_sources(
                [dict(image_dir=one.image_dir, json_file=one.json_file) for one in sources],
                annotations_required=False,
                storage="shared",
                merge_categories=spec.ddetr_mm.merge_categories,
            )
        except DataError as error:
            print(f"note: {key} cannot name the classes: {error}", file=sys.stderr)
            continue
        found = table.category_names
        if found and all(0 <= number < num_columns for number in found):
            return tuple(found.get(number) if number else None for number in range(max(found) + 1)), key
        print(
            f"note: {key} cannot name the classes: its category ids do not fit "
            f"dataset.num_classes {num_columns}",
            file=sys.stderr,
        )
    return None, ""


def build_runner(
    loaded: LoadedSpec,
    subtask: str,
    folder: Path,
    checkpoint: str | None = None,
    exported: ExportedInput | None = None,
    **changes: Any,
) -> QuietRunner:
    """An mmengine Runner for a subtask, its config left in the results folder.

    Args:
        loaded: the spec.
        subtask: ``train``, ``evaluate`` or ``inference``.
        folder: the results folder.
        checkpoint: see :func:`config_source`.
        exported: likewise.
        changes: top-level config values to set, e.g. ``load_from`` and ``resume``.
    """
    text = config_source(loaded, subtask, checkpoint, exported)
    path = folder / CONFIG_NAME
    numbering = category_numbering(loaded, subtask, checkpoint, exported)
    if numbering is not None and is_first_rank():
        write_text_whole(folder / CATEGORY_IDS_NAME, category_ids_text(numbering))
    if is_first_rank():
        config = Config.fromfile(str(write_text_whole(path, text)))
    else:
        config = Config.fromstring(text, ".py")
    config.launcher = "pytorch" if is_rank() else "none"
    for name, value in changes.items():
        config[name] = value
    runner: QuietRunner = RUNNERS.get(config.get("runner_type", "QuietRunner")).from_cfg(config)
    return runner


def build_predicting_runner(loaded: LoadedSpec, subtask: str, folder: Path) -> QuietRunner:
    """A Runner with the network that a subtask's ``checkpoint`` or ``trt_engine`` holds, ready to predict.

    Args:
        loaded: the spec.
        subtask: ``evaluate`` or ``inference``.
        folder: the results folder.

    Raises:
        WeightsError: when the file is not what its name says, or does not fit the spec.
        StackError: when the runtime of an exported graph is not installed.
    """
    given = getattr(loaded.spec, subtask)
    exported = exported_input(given.checkpoint, given.trt_engine, where=subtask)
    runner = build_runner(loaded, subtask, folder, given.checkpoint, exported)
    # Ground truth names the classes that the network's must be brought to; images alone name none.
    data = data_columns(runner.test_dataloader.dataset.metainfo) if subtask == "evaluate" else None
    if exported is None:
        load_to_predict(
            runner.model,
            given.checkpoint,
            where=f"{subtask}.checkpoint",
            class_names=data,
            selection=weights_selection(loaded.spec),
        )
    elif data is not None:
        set_graph_columns(unwrapped(runner.model), exported, data, given.trt_engine or given.checkpoint)
    return runner


def data_columns(metainfo: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The class of every label of a data set, None for the background and gaps."""
    return named_columns(metainfo.get("classes") or (), metainfo.get("category_ids"))


def set_graph_columns(model: Any, exported: ExportedInput, data: Columns, path: str) -> None:
    """Bring the class columns of an exported graph to the data's category ids, by name, and say so.

    Args:
        model: an ``ExportedDetector``.
        exported: names the graph's classes; without names its columns are taken for category ids.
        data: the data's classes by category id.
        path: the graph, for messages.

    Raises:
        WeightsError: graph and data have no class in common.
    """
    note = graph_columns_note(model, exported, data, path)
    if note and is_first_rank():
        print(f"{printable(path)}: {printable(note)}", file=sys.stderr)


def graph_columns_note(model: Any | None, exported: ExportedInput, data: Columns, path: str) -> str:
    """:func:`set_graph_columns` without printing; with no model it only compares."""
    known = named_columns(exported.class_names or ())
    if not any(name is not None for name in known):
        return NAMELESS
    columns, note = head_columns(known, data, path=path)
    if columns is not None and model is not None:
        model.class_columns = columns
    return note


NAMELESS = "the file names no classes: its class columns are taken for the data's category ids"


def build_model(
    loaded: LoadedSpec, subtask: str, checkpoint: str, *, where: str, class_names: Columns | None = None
) -> tuple[nn.Module, Config]:
    """The network of a spec with the weights of a checkpoint, in eval mode, without a Runner.

    Args:
        loaded: the spec.
        subtask: what the config is for.
        checkpoint: a checkpoint of any known format.
        where: the spec key that named it, for messages.
        class_names: see :func:`load_checkpoint`.

    Returns:
        The detector and its config.
    """
    config = Config.fromstring(config_source(loaded, subtask, checkpoint), ".py")
    register_scope(config)
    model = MODELS.build(config.model)
    selection = weights_selection(loaded.spec)
    load_checkpoint(model, checkpoint, where=where, class_names=class_names, selection=selection)
    return model.eval(), config


def register_scope(config: Config) -> None:
    """Make the config's default scope the current one, as a Runner does."""
    init_default_scope(config.get("default_scope", "mmdet"))


def weights_selection(spec: ExperimentSpec) -> Selection:
    """Which of several sets of weights in a checkpoint a spec asks for."""
    return Selection(spec.ddetr_mm.checkpoint_entry, spec.ddetr_mm.use_ema)


def load_to_predict(
    model: nn.Module,
    path: str,
    *,
    where: str,
    class_names: Columns | None = None,
    selection: Selection = DEFAULT,
) -> None:
    """:func:`load_checkpoint` into a model that will only predict: its norms are folded away.

    Raises:
        WeightsError: as there.
    """
    load_checkpoint(model, path, where=where, class_names=class_names, selection=selection)
    fuse_norms(unwrapped(model))
    unwrapped(model).requires_finite = True


def load_checkpoint(
    model: nn.Module,
    path: str,
    *,
    where: str,
    class_names: Columns | None = None,
    selection: Selection = DEFAULT,
) -> None:
    """Load a checkpoint of any known format into a model and say how it went.

    Args:
        model: a spec's, built for evaluation, inference or export: its class columns are category ids.
        path: the checkpoint.
        where: the spec key that named it, for messages.
        class_names: the data's classes by category id, where there are data; a checkpoint that numbers its
            classes otherwise is brought to them by name.
        selection: which of several sets of weights to read.

    Raises:
        WeightsError: when the file is missing, is not a checkpoint or leaves parameters without values.
    """
    columns = unwrapped(model).bbox_head.num_classes
    checkpoint = to_category_ids(read_checkpoint(path, selection=selection), columns, class_names)
    if class_names and known_columns(checkpoint.meta) is None and not numbered_by_position(checkpoint.meta):
        checkpoint.notes.append(NAMELESS)
    report = fill_model(model, checkpoint, strict=True)
    if is_first_rank():
        print(report.summary(), file=sys.stderr)
