"""Which subtasks read a field, and that a value which a subtask does not read is never an error."""

from __future__ import annotations

from typing import Any

import pytest

from ddetr_mm.spec import iter_fields
from ddetr_mm.spec.fields import Section
from ddetr_mm.spec.notes import NO_EFFECT
from ddetr_mm.spec.readers import ALL, AUTOML, READ_BY, USED_IF_GIVEN, Reader, reader_of, readers_of
from ddetr_mm.translate import to_config

PATHS = [info.path for info in iter_fields("train")]


@pytest.mark.parametrize("path", PATHS)
def test_every_field_has_readers_or_a_reason(path: str):
    without = any(path == name or path.startswith((name + ".", name + "[")) for name in NO_EFFECT)
    assert (readers_of(path) == ()) is without


def test_rows_are_fields_and_subtasks():
    sections = {path.rpartition(".")[0] for path in PATHS} | {path.partition(".")[0] for path in PATHS}
    assert {*READ_BY, *USED_IF_GIVEN} <= {*PATHS, *sections}
    assert all(set(subtasks) <= {*ALL, *AUTOML} for subtasks in (*READ_BY.values(), *USED_IF_GIVEN.values()))


@pytest.mark.parametrize(
    ("path", "subtasks"),
    [
        ("dataset.batch_size", ("train", "evaluate", "inference", "quantize")),
        ("dataset.train_data_sources[0].image_dir", ("train",)),
        ("model", ("train", "evaluate", "inference", "export", "quantize")),
        ("model.num_feature_levels", ("train", "evaluate", "inference", "export", "quantize")),
        ("dataset.augmentation", ALL),
        ("gen_trt_engine.tensorrt.calibration.cal_image_dir", ("gen_trt_engine",)),
        ("quantize.mode", ("quantize",)),
        ("quantize.layers[0].weights.dtype", ("quantize",)),
    ],
)
def test_readers(path: str, subtasks: tuple[str, ...]):
    assert readers_of(path) == subtasks


# Written into the config of every subtask that has the network, and used in training only.
WITHOUT_EFFECT = {
    "ddetr_mm.deterministic",
    "ddetr_mm.log_interval",
    "model.aux_loss",
    "model.bbox_loss_coef",
    "model.cls_loss_coef",
    "model.dropout_ratio",
    "model.focal_alpha",
    "model.giou_loss_coef",
    "model.loss_types",
    "model.precise_msda",
    "model.train_backbone",
    "train.activation_checkpoint",
    "train.distributed_strategy",
    "train.seed",
}


@pytest.mark.parametrize("subtask", ["train", "evaluate", "inference", "export"])
def test_the_table_has_what_a_translation_reads(load, monkeypatch, subtask: str):
    text = """
dataset:
  train_data_sources: [{image_dir: a, json_file: b}]
  val_data_sources: [{image_dir: a, json_file: b}]
  test_data_sources: {image_dir: a, json_file: b}
  infer_data_sources: {image_dir: [a]}
"""
    loaded = load(text, (), subtask, require_mandatory=False)
    names = dict(_sections(loaded.spec))
    read: set[str] = set()
    original = Section.__getattribute__

    def spy(part: Section, name: str) -> Any:
        if id(part) in names and name in type(part).model_fields:
            read.add(names[id(part)] + name)
        return original(part, name)

    with monkeypatch.context() as patched:
        patched.setattr(Section, "__getattribute__", spy)
        to_config(loaded, subtask)
    fields = {path for path in read if path in PATHS}
    assert len(fields) > 30
    unknown = {path for path in fields if subtask not in readers_of(path) and path not in NO_EFFECT}
    assert unknown <= WITHOUT_EFFECT
    assert subtask != "train" or not unknown


def _sections(part: Section, prefix: str = ""):
    yield id(part), prefix
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Section):
            yield from _sections(value, f"{prefix}{name}.")
        for item in value if isinstance(value, list) else ():
            if isinstance(item, Section):
                yield from _sections(item, f"{prefix}{name}[].")


# --- Values that are not read ---

WRONG = {
    "dataset.batch_size": "-1",
    "dataset.workers": "many",
    "dataset.train_data_sources": "[{image_dir: a}]",
    "dataset.test_data_sources": "{json_file: a}",
    "dataset.infer_data_sources": "{classmap: a}",
    "dataset.eval_class_ids": "[1, 1]",
    "dataset.augmentation.train_random_crop_min": "9999",
    "dataset.augmentation.fixed_random_crop": "33",
    "model.num_feature_levels": "2",
    "model.hidden_dim": "100",
    "model.dropout_ratio": "7",
    "model.backbone": "resnet_1000",
    "train.num_epochs": "0",
    "train.gpu_ids": "[1, 1]",
    "train.optim.lr_steps": "[3, 1]",
    "train.optim": "fast",
    "evaluate.input_width": "640",
    "evaluate.batch_size": "0",
    "inference.color_map": "[red]",
    "export.opset_version": "'???'",
    "export.format": "pdf",
    "gen_trt_engine.tensorrt.opt_batch_size": "8",
    "gen_trt_engine.tensorrt.data_type": "INT4",
    "wandb.enable": "perhaps",
    "ddetr_mm.accumulate_steps": "${nowhere}",
    "quantize.mode": "best",
    "quantize.layers": "all",
    "gen_trt_engine.batch_size": "-7",
    "train.optim.monitor_name": "loss",
}


@pytest.mark.parametrize("subtask", ALL)
@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_value_matters_where_it_is_read_only(load, problems, path: str, subtask: str):
    text = nested_text(path) + WRONG[path]
    if subtask in readers_of(path):
        assert any(path in one for one in problems(text, (), subtask, require_mandatory=False))
    else:
        loaded = load(text, (), subtask, require_mandatory=False)
        assert all(f"no matter, as {subtask} does not read it" in note for note in loaded.notes)


def test_the_note_names_the_value_and_the_default_is_used(load):
    loaded = load("dataset: {batch_size: -1}", (), "export", require_mandatory=False)
    (note,) = loaded.notes
    assert note == "dataset.batch_size (line 1) is out of range: no matter, as export does not read it"
    assert loaded.spec.dataset.batch_size == 4


def test_an_unknown_key_matters_to_every_subtask(problems):
    for subtask in ALL:
        found = problems("train: {num_epoch: 3}", (), subtask, require_mandatory=False)
        assert len(found) == 1 and "did you mean train.num_epochs?" in found[0]


@pytest.mark.parametrize("subtask", ["evaluate", "inference"])
@pytest.mark.parametrize(
    "given", ["trt_engine: a.engine", "checkpoint: a.onnx", "checkpoint: a.plan", "trt_engine: a"]
)
def test_an_exported_graph_has_its_network_within_it(load, problems, subtask: str, given: str):
    text = f"{subtask}: {{{given}}}\nmodel: {{num_feature_levels: 2, nheads: 7, num_queries: many}}"
    loaded = load(text, (), subtask, require_mandatory=False)
    assert any(note.startswith("model.num_queries (line 2)") for note in loaded.notes)
    found = problems(text.replace(given, "checkpoint: a.pth"), (), subtask, require_mandatory=False)
    assert len(found) == 3
    # What applies to its detections is read.
    wrong = f"{subtask}: {{{given}}}\nmodel: {{num_select: 0}}\ndataset: {{num_classes: 0}}"
    assert len(problems(wrong, (), subtask, require_mandatory=False)) == 2


def test_reader_of_a_spec(load):
    spec = load("evaluate: {trt_engine: ''}\ninference: {checkpoint: a.onnx}").spec
    assert reader_of(spec, "evaluate") == Reader("evaluate", False)
    assert reader_of(spec, "inference") == Reader("inference", True)
    assert reader_of(spec, "train") == Reader("train", False)
    assert reader_of(load("quantize: {model_path: a.pth}").spec, "quantize") == Reader("quantize", False)
    assert reader_of(spec, "evaluate", must_be_given=True) == Reader("evaluate", True)
    assert reader_of(spec, None).reads("quantize.mode")


def nested_text(path: str) -> str:
    """``a.b.c`` as YAML up to the value."""
    *above, last = path.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate([*above, last])]
    return "\n".join(lines) + " "
