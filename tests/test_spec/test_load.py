"""Loading as a whole: the documentation's examples, types, all errors at once, sources, results folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ddetr_mm.spec.load as loading
from ddetr_mm.errors import SpecError
from ddetr_mm.spec import ConvertSpec, ExperimentSpec, get_field, load_spec, task_results_dir
from ddetr_mm.spec.schema import DataSource

ASSETS = Path(__file__).parent / "assets"
SOURCES = "dataset: {train_data_sources: [{image_dir: a, json_file: b}]}\n"


def test_documentation_example_of_training():
    loaded = load_spec(ASSETS / "documentation_experiment.yaml", subtask="train")
    spec = loaded.spec
    assert isinstance(spec, ExperimentSpec)
    assert spec.model.pretrained_backbone_path == "/path/to/your-pretrained-backbone-model"
    assert spec.dataset.train_data_sources == [
        DataSource(
            image_dir="/path/to/coco/train2017/",
            json_file="/path/to/coco/annotations/instances_train2017.json",
        )
    ]
    assert spec.train.optim.lr_backbone == 2e-5
    assert spec.train.checkpoint_interval == 5
    assert loaded.origin["model.num_queries"] == "line 28"
    assert loaded.notes == ["model.pretrained_model_path (line 22) is read as model.pretrained_backbone_path"]


def test_documentation_example_of_convert():
    for subtask in (None, "convert"):
        loaded = load_spec(ASSETS / "documentation_convert.yaml", subtask=subtask)
        assert isinstance(loaded.spec, ConvertSpec)
        assert loaded.spec.num_shards == 32
        assert loaded.spec.image_dir_name == "images"
        assert loaded.notes == []


def test_empty_file_means_defaults(load):
    for text in ("", "# only a comment\n", "{}", "model:\ntrain: ~\n"):
        assert load(text).spec == ExperimentSpec()
    assert load("", (), "convert", require_mandatory=False).spec == ConvertSpec()


@pytest.mark.parametrize("text", ["- a", "3", "text", "[1, 2]"])
def test_not_a_mapping(problems, text: str):
    assert "the spec is not a mapping" in problems(text)[0]


def test_all_problems_of_a_spec_are_reported_at_once(problems):
    found = problems(
        """
num_queries: 300
trian: {}
model:
  num_queries: many
  backbone: resnet50
  dropout_ratio: 1.5
  return_interm_indices: 3
  nheads: [8]
train:
  precision: 16
  optim: {lr: .nan, momentum: true, lr_steps: [1, x, 2.5]}
  seed: 99999999999999999999
results_dir: ${nowhere}
""",
        ["train.num_epochs=0"],
    )
    expected = [
        ("num_queries, line 2: is not a key", "did you mean model.num_queries?"),
        ("trian, line 3: is not a key", "did you mean train?"),
        ("model.num_queries, line 5: is of the wrong type", "an integer"),
        ("model.backbone, line 6: is not an option", "did you mean resnet_50?"),
        ("model.dropout_ratio, line 7: is out of range", "at most 1"),
        ("model.return_interm_indices, line 8: is not a list", "write [3]"),
        ("model.nheads, line 9: is a list", "an integer"),
        ("train.precision, line 11: is not an option", "did you mean"),
        ("train.optim.lr, line 12: is not a finite number", "more than 0"),
        ("train.optim.momentum, line 12: is of the wrong type", "a number"),
        ("train.optim.lr_steps[1], line 12", "an integer"),
        ("train.optim.lr_steps[2], line 12", "2.5"),
        ("train.seed, line 13: is too large", "64 bits"),
        ("results_dir, line 14: names nowhere", "${path.to.key}"),
        ("train.num_epochs, override: is out of range", "at least 1"),
    ]
    for place, words in expected:
        assert any(place in one and words in one for one in found), (place, found)
    assert len(found) == len(expected)
    assert all("spec.yaml" in one for one in found)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("train: {seed: '7'}", "train.seed", 7),
        ("train: {seed: 7.0}", "train.seed", 7),
        ("train: {seed: 1e3}", "train.seed", 1000),
        ("train: {optim: {lr: 1}}", "train.optim.lr", 1.0),
        ("train: {optim: {lr: '2e-4'}}", "train.optim.lr", 2e-4),
        ("train: {optim: {lr: 2e-4}}", "train.optim.lr", 2e-4),
        ("train: {verbose: 'yes'}", "train.verbose", True),
        ("train: {verbose: 1}", "train.verbose", True),
        ("train: {verbose: off}", "train.verbose", False),
        ("train: {verbose: 'Y'}", "train.verbose", True),
        ("train: {verbose: '0'}", "train.verbose", False),
        ("encryption_key: 0123", "encryption_key", "0123"),
        ("wandb: {name: 2024-01-01}", "wandb.name", "2024-01-01"),
        ("wandb: {name: no}", "wandb.name", "no"),
        ("wandb: {tags: [1, no, x]}", "wandb.tags", ["1", "no", "x"]),
        ("inference: {color_map: {no: red, 1: blue}}", "inference.color_map", {"no": "red", "1": "blue"}),
        ("gen_trt_engine: {tensorrt: {data_type: fp16}}", "gen_trt_engine.tensorrt.data_type", "FP16"),
        ("export: {batch_size: null}", "export.batch_size", None),
        ("export: {input_channel: '3'}", "export.input_channel", 3),
        ("quantize: {device: 'cuda:1'}", "quantize.device", "cuda:1"),
        (
            "quantize: {layers: [{module_name: a, weights: {dtype: int8, quant_axis: 0}}]}",
            "quantize.layers[0].weights.quant_axis",
            0,
        ),
        ("ddetr_mm: {backbone: {type: X, x: [1, {y: 1e-3}], z: ~}}", "ddetr_mm.backbone.x[1].y", 1e-3),
    ],
)
def test_values_are_converted(load, text: str, path: str, value: object):
    found = get_field(load(text).spec, path)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {seed: true}", "an integer"),
        ("train: {seed: 1.5}", "an integer"),
        ("train: {seed: [1]}", "is a list"),
        ("train: {seed: {a: 1}}", "is a mapping"),
        ("train: {seed: -2}", "at least -1"),
        ("train: {verbose: 2}", "true or false"),
        ("train: {verbose: maybe}", "true or false"),
        ("train: {verbose: t}", "true or false"),
        ("train: {verbose: 1.0}", "true or false"),
        ("train: {optim: {lr: true}}", "a number"),
        ("train: {optim: {lr: .inf}}", "finite"),
        ("train: {optim: {lr: 1e999}}", "finite"),
        ("train: {optim: {lr: 0}}", "more than 0"),
        ("train: {optim: {lr: '???'}}", "placeholder ???"),
        ("train: {optim: 3}", "is not a section"),
        ("train: {seed: '99999999999999999999'}", "64 bits"),
        ("train: {seed: 1e300}", "64 bits"),
        ("train: {seed: .inf}", "finite"),
        ("train: {gpu_ids: [0, -99999999999999999999]}", "train.gpu_ids[1]"),
        ("export: {input_channel: true}", "is not an option"),
        ("train: {gpu_ids: [-1]}", "train.gpu_ids[0]"),
        ("train: {gpu_ids: [[0]]}", "an integer"),
        ("train: {gpu_ids: [0, ~]}", "an integer"),
        ("train: {gpu_ids: {a: 1}}", "is not a list"),
        ("train: {freeze: [a, '???']}", "train.freeze[1]"),
        ("model: {loss_types: ['???']}", "placeholder ???"),
        ("inference: {color_map: red}", "is not a mapping"),
        ("inference: {color_map: {a: ~}}", "inference.color_map.a"),
        ("quantize: {device: gpu}", "cuda:N"),
        ("gen_trt_engine: {tensorrt: {layers_precision: [fp16]}}", "layer:precision"),
        ("ddetr_mm: {backbone: {type: '???'}}", "placeholder"),
        ("ddetr_mm: {backbone: {type: X, y: [.nan]}}", "ddetr_mm.backbone.y[0]"),
        ("ddetr_mm: {backbone: resnet}", "is not a mapping"),
        ("model: {num_querys: 3}", "did you mean model.num_queries?"),
        ("input_source: a\nmodel: {}", "belongs to the spec of convert"),
        ("model: {pretrained_model_path: a, pretrained_backbone_path: b}", "another name of"),
        ("dataset: {train_data_sources: [a]}", "train_data_sources[0], line 1: is not a section"),
        ("dataset: {train_data_sources: [{image_dir: a}]}", "train_data_sources[0].json_file"),
        (
            "dataset: {train_data_sources: [{image_dir: a, json: b}]}",
            "did you mean dataset.train_data_sources[0].json_file?",
        ),
        ("dataset: {test_data_sources: {image_dir: a}}", "test_data_sources.json_file"),
        ("dataset: {test_data_sources: [{}, {}]}", "is not a section"),
        ("dataset: {infer_data_sources: {classmap: a}}", "infer_data_sources.image_dir"),
    ],
)
def test_wrong_values(problems, text: str, words: str):
    found = problems(text)
    assert any(words in one for one in found), found


def test_wrong_items_keep_the_places_of_the_others(problems):
    text = "dataset: {train_data_sources: [a, {image_dir: b}]}\ntrain: {gpu_ids: [~, -1], freeze: [[a], b]}"
    found = problems(text)
    places = [
        "train_data_sources[0]",
        "train_data_sources[1].json_file",
        "gpu_ids[0]",
        "gpu_ids[1]",
        "freeze[0]",
    ]
    assert len(found) == len(places)
    assert all(any(place in one for one in found) for place in places), found


def test_a_wrong_section_is_reported_without_what_it_lacks(problems):
    found = problems("evaluate: 3\ndataset: {test_data_sources: 4}\nmodel: 5", (), "evaluate")
    assert [one.split(": ")[1].split(",")[0] for one in found] == [
        "evaluate",
        "dataset.test_data_sources",
        "model",
    ]


def test_at_most_a_hundred_problems_are_shown(problems):
    found = problems("train: {optim: {lr_steps: [" + "x, " * 500 + "]}}")
    assert len(found) == 101
    assert found[-1].endswith("400 more problems are not shown")


def test_sources_in_other_forms(load):
    loaded = load(
        "dataset:\n"
        "  train_data_sources: {image_dir: a, json_file: b}\n"
        "  test_data_sources: [{image_dir: c, json_file: d}]\n"
        "  infer_data_sources: {image_dir: e}\n"
    )
    assert loaded.spec.dataset.train_data_sources == [DataSource(image_dir="a", json_file="b")]
    assert loaded.spec.dataset.test_data_sources == DataSource(image_dir="c", json_file="d")
    assert loaded.spec.dataset.infer_data_sources.image_dir == ["e"]
    assert len(loaded.notes) == 2
    assert "dataset.train_data_sources (line 2) takes a list" in loaded.notes[0]
    assert "dataset.test_data_sources (line 3) takes one source" in loaded.notes[1]


def test_list_of_image_folders(load):
    loaded = load("dataset: {infer_data_sources: {image_dir: [a, b], classmap: c}}")
    assert loaded.spec.dataset.infer_data_sources.image_dir == ["a", "b"]
    assert loaded.spec.dataset.infer_data_sources.classmap == "c"


NEEDED = {
    "train": ["dataset.train_data_sources", "dataset.val_data_sources"],
    "evaluate": ["evaluate.checkpoint", "dataset.test_data_sources"],
    "inference": ["inference.checkpoint", "dataset.infer_data_sources"],
    "export": ["export.checkpoint", "export.onnx_file"],
    "gen_trt_engine": ["gen_trt_engine.onnx_file"],
    "convert": ["input_source", "results_dir", "image_dir_name", "label_dir_name"],
}


@pytest.mark.parametrize("subtask", NEEDED)
def test_mandatory_fields(load, problems, subtask: str):
    found = problems("", (), subtask)
    assert [one.split(": ")[1].split(",")[0].split(" ")[0] for one in found] == NEEDED[subtask]
    assert all(f"is needed for {subtask}" in one for one in found)
    load("", (), subtask, require_mandatory=False)


def test_placeholders_count_as_not_given(problems):
    assert (
        len(problems("evaluate:\n  checkpoint: ???\ndataset:\n  test_data_sources: null", (), "evaluate"))
        == 2
    )


@pytest.mark.parametrize("task", ["evaluate", "inference"])
def test_an_engine_replaces_a_checkpoint(load, task: str):
    sources = "dataset: {test_data_sources: {image_dir: a, json_file: b}, infer_data_sources: {image_dir: a}}"
    loaded = load(f"{sources}\n{task}: {{trt_engine: e}}", (), task)
    assert getattr(loaded.spec, task).trt_engine == "e"


def test_calibration_is_needed_for_int8_alone(problems):
    text = "gen_trt_engine: {onnx_file: a, tensorrt: {data_type: %s}}"
    assert problems(text % "FP16", (), "gen_trt_engine") == []
    found = problems(text % "int8", (), "gen_trt_engine")
    assert len(found) == 2
    assert "cal_image_dir" in found[0]


@pytest.mark.parametrize(
    ("text", "subtask", "folder"),
    [
        ("", "train", "/results/train"),
        ("results_dir: /r", "evaluate", "/r/evaluate"),
        ("results_dir: /r\ninference: {results_dir: /i}", "inference", "/i"),
        ("results_dir: ''\nexport: {results_dir: /e}", "export", "/e"),
        ("results_dir: /r\ntrain: {results_dir: ''}", "train", "/r/train"),
    ],
)
def test_results_folder(load, text: str, subtask: str, folder: str):
    loaded = load(text, (), subtask, require_mandatory=False)
    assert task_results_dir(loaded.spec, subtask) == Path(folder)


def test_results_without_a_folder_go_to_this_one(load, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "TAO_RESULTS", tmp_path / "results")
    text = "evaluate: {checkpoint: '${results_dir}/train/a.pth'}"
    loaded = load(text, (), "evaluate", require_mandatory=False)
    assert loaded.spec.results_dir == "results" and loaded.spec.evaluate.checkpoint == "results/train/a.pth"
    assert [note for note in loaded.notes if "results go to ./results" in note]
    (tmp_path / "results").mkdir()
    kept = load(text, (), "evaluate", require_mandatory=False)
    assert kept.spec.results_dir == "/results" and not [note for note in kept.notes if "results go" in note]


@pytest.mark.parametrize("given", ["results_dir: r", "evaluate: {results_dir: r}"])
def test_nothing_is_noted_of_a_folder_that_is_given(load, tmp_path, monkeypatch, given):
    monkeypatch.setattr(loading, "TAO_RESULTS", tmp_path / "results")
    assert not [
        note for note in load(given, (), "evaluate", require_mandatory=False).notes if "results go" in note
    ]


def test_no_results_folder(load, problems):
    for text in ("results_dir: ''", "results_dir: null"):
        assert any("results_dir" in one and "is empty" in one for one in problems(text, (), "train"))
        spec = load(text).spec
        with pytest.raises(SpecError, match="no place for the results"):
            task_results_dir(spec, "train")
    with pytest.raises(SpecError, match="no place"):
        task_results_dir(ConvertSpec(), "convert")


def test_unknown_subtask(load):
    with pytest.raises(SpecError, match="did you mean train"):
        load("", (), "trian")


def test_kind_of_spec_is_found_by_its_keys(load):
    assert isinstance(load("input_source: a").spec, ConvertSpec)
    assert isinstance(load("results_dir: a").spec, ExperimentSpec)
    assert isinstance(load("ddetr_mm: {log_interval: 3}").spec, ExperimentSpec)


def test_get_field():
    spec = ExperimentSpec()
    assert get_field(spec, "train.optim.lr") == 2e-4
    assert get_field(spec, "dataset.augmentation.scales[0]") == 480
    assert get_field(spec, "dataset.test_data_sources.image_dir") is None
    for path in ("train.nope", "dataset.augmentation.scales[99]", "dataset.augmentation.scales.x"):
        with pytest.raises(KeyError):
            get_field(spec, path)


def test_spec_imports_neither_torch_nor_openmmlab_nor_numpy():
    code = (
        "import sys, ddetr_mm.spec; "
        "print(*sorted({'torch', 'mmengine', 'mmcv', 'mmdet', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- Not given ---


@pytest.mark.parametrize("blank", ["''", "'  '", "~", "[]", "['']", "[~]", "[' ', ~]"])
@pytest.mark.parametrize(
    ("path", "default"),
    [
        ("train.num_epochs", 10),
        ("train.optim.lr", 2e-4),
        ("train.verbose", False),
        ("train.precision", "fp32"),
        ("model.return_interm_indices", [1, 2, 3, 4]),
        ("model.loss_types", ["labels", "boxes"]),
        ("dataset.augmentation.scales", [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]),
        ("dataset.augmentation.input_std", [0.229, 0.224, 0.225]),
        ("train.gpu_ids", [0]),
        ("wandb.project", "TAO Toolkit"),
        ("ddetr_mm.log_interval", 50),
    ],
)
def test_a_blank_value_is_the_default_and_a_note_says_so(load, blank: str, path: str, default):
    loaded = load(f"{nested_text(path)}{blank}")
    assert get_field(loaded.spec, path) == default
    shown = str(default).lower() if isinstance(default, bool) else default
    (note,) = loaded.notes
    assert note.startswith(f"{path} (line ") and note.endswith(f"is blank: its default, {shown}, is used")


@pytest.mark.parametrize("blank", ["''", "~", "[]", "['']", "'???'", "['???']"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dataset.train_data_sources", None),
        ("dataset.test_data_sources", None),
        ("dataset.infer_data_sources", None),
        ("dataset.eval_class_ids", None),
        ("dataset.augmentation.fixed_random_crop", None),
        ("evaluate.trt_engine", None),
        ("inference.color_map", None),
        ("encryption_key", None),
        ("train.pretrained_model_path", None),
    ],
)
def test_a_blank_value_of_an_optional_field_is_null(load, blank: str, path: str, value):
    loaded = load(f"{nested_text(path)}{blank}")
    assert get_field(loaded.spec, path) is value and loaded.notes == []


@pytest.mark.parametrize("blank", ["''", "~", "[]", "['']"])
def test_a_blank_section_is_its_defaults(load, blank: str):
    assert load(f"wandb: {blank}\ntrain: {{optim: {blank}}}").spec == ExperimentSpec()


def test_lists_that_may_be_empty_stay_so(load):
    text = "train: {freeze: [''], optim: {lr_steps: []}}\nwandb: {tags: []}\nmodel: {backbone_names: []}"
    spec = load(text).spec
    assert (spec.train.freeze, spec.train.optim.lr_steps, spec.wandb.tags) == ([], [], [])
    assert spec.model.backbone_names == []


def test_null_stays_a_value_where_it_is_one(load):
    spec = load("export: {batch_size: ~}\nddetr_mm: {category_ids: ~}").spec
    assert spec.export.batch_size is None
    assert load("export: {batch_size: ''}").spec.export.batch_size == -1


def test_a_reference_to_a_blank_value_is_not_given(load, monkeypatch):
    monkeypatch.setenv("SPEC_TEST_BLANK", "")
    text = "train: {num_epochs: '${oc.env:SPEC_TEST_BLANK}', precision: '${oc.env:SPEC_TEST_BLANK}'}"
    spec = load(text).spec
    assert (spec.train.num_epochs, spec.train.precision) == (10, "fp32")


BLANK_SOURCES = """
results_dir: /results
dataset:
  train_data_sources: [{image_dir: '', json_file: ''}]
  val_data_sources: [{image_dir: ~, json_file: '???'}]
  test_data_sources: {image_dir: '', json_file: ''}
  infer_data_sources: {image_dir: [''], classmap: ''}
  quant_calibration_data_sources: {image_dir: '', json_file: ''}
"""


@pytest.mark.parametrize(
    ("subtask", "needs"),
    [
        ("train", ["dataset.train_data_sources", "dataset.val_data_sources"]),
        ("evaluate", ["dataset.test_data_sources", "evaluate.checkpoint"]),
        ("inference", ["dataset.infer_data_sources", "inference.checkpoint"]),
        ("export", ["export.checkpoint", "export.onnx_file"]),
        ("gen_trt_engine", ["gen_trt_engine.onnx_file"]),
    ],
)
def test_only_the_subtasks_own_needs_are_asked_for(problems, subtask: str, needs: list[str]):
    found = problems(BLANK_SOURCES, (), subtask)
    assert sorted(needs) == sorted(path for path in needs if any(f": {path}" in one for one in found))
    assert len(found) == len(needs) and all(f"is needed for {subtask} and not given" in one for one in found)


def nested_text(path: str) -> str:
    """``a.b.c`` as YAML up to the value."""
    *above, last = path.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate([*above, last])]
    return "\n".join(lines) + " "


# --- The key of checkpoints is shown nowhere ---


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ('encryption_key: "a\\0HIDDEN"', ()),
        ('encryption_key: "a${HIDDEN}b"', ()),
        ('encryption_key: "HIDDEN${"', ()),
        ("encryption_key: [HIDDEN]", ()),
        ("encryption_key: {a: HIDDEN}", ()),
        ('encryption_key: "HIDDEN', ()),
        ("encryption_key: HIDDEN: x", ()),
        ('encryption_key: HIDDEN\ntrain: {precision: "${encryption_key}"}', ()),
        ('encryption_key: HIDDEN\nwandb: {name: "a${encryption_key}"}', ()),
        ('encryption_key: HIDDEN\nresults_dir: "${wandb.name}"\nwandb: {name: "${encryption_key}"}', ()),
        ("encryption_keyy: HIDDEN", ()),
        ("train: {encryption_key: HIDDEN}", ()),
        ("{}", ("encryption_key:HIDDEN",)),
        ("{}", ("encryption_key HIDDEN",)),
        ("{}", ("encryption_key={HIDDEN",)),
        ("{}", ("encryption_key.x=HIDDEN",)),
    ],
)
def test_no_message_shows_the_key(text, overrides, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides, "train")
    assert "HIDDEN" not in str(caught.value) and len(caught.value.problems) >= 1
    assert (
        "encryption_key" in str(caught.value)
        or "YAML" in str(caught.value)
        or "override" in str(caught.value)
    )
