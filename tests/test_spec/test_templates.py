"""Specs in the shapes that NVIDIA ships: taken as they are, or refused with what is missing and nothing else.

``assets/templates`` has one file for each shape of the public templates and tutorials, with other values.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_mm.errors import SpecError
from ddetr_mm.spec import SUBTASKS, load_spec
from ddetr_mm.translate import to_config

ASSETS = Path(__file__).parent / "assets"
TEMPLATES = ASSETS / "templates"

# What a template leaves to the command line, by subtask.
GIVEN = {
    "train": [],
    "evaluate": ["evaluate.checkpoint=model.pth"],
    "inference": ["inference.checkpoint=model.pth"],
    "export": ["export.checkpoint=model.pth", "export.onnx_file=model.onnx"],
    "gen_trt_engine": ["gen_trt_engine.onnx_file=model.onnx", "gen_trt_engine.trt_engine=model.engine"],
    "convert": [],
}
RESULTS = ["results_dir=results"]
SOURCE = ["dataset.test_data_sources.image_dir=a", "dataset.test_data_sources.json_file=b"]
FOLDERS = ["dataset.infer_data_sources.image_dir=[a]"]
TRAINING = [
    "dataset.train_data_sources=[{image_dir: a, json_file: b}]",
    "dataset.val_data_sources=[{image_dir: a, json_file: b}]",
]
CALIBRATION = [
    "gen_trt_engine.tensorrt.calibration.cal_image_dir=[a]",
    "gen_trt_engine.tensorrt.calibration.cal_cache_file=b",
]

TAKEN = [
    ("train_two_levels", "train", []),
    ("train_two_levels", "evaluate", [*GIVEN["evaluate"], *SOURCE]),
    ("train_two_levels", "inference", [*GIVEN["inference"], *FOLDERS]),
    ("train_two_levels", "export", GIVEN["export"]),
    ("train_two_levels", "gen_trt_engine", GIVEN["gen_trt_engine"]),
    ("evaluate_two_levels", "evaluate", GIVEN["evaluate"]),
    ("inference_two_levels", "inference", GIVEN["inference"]),
    ("export_placeholders", "export", [*GIVEN["export"], *RESULTS]),
    ("export_placeholders", "export", [*GIVEN["export"], *RESULTS, "encryption_key=nvidia_tao"]),
    ("export_tutorial", "export", GIVEN["export"]),
    ("engine_int8", "gen_trt_engine", [*GIVEN["gen_trt_engine"], *CALIBRATION, *RESULTS]),
    ("engine_tutorial", "gen_trt_engine", GIVEN["gen_trt_engine"]),
    ("evaluate_engine", "evaluate", [*SOURCE, "evaluate.trt_engine=model.engine", *RESULTS]),
    ("evaluate_engine", "evaluate", [*SOURCE, "evaluate.checkpoint=model.onnx", *RESULTS]),
    ("inference_engine", "inference", [*FOLDERS, "inference.trt_engine=model.engine", *RESULTS]),
    ("generated_defaults", "train", [*TRAINING, *RESULTS]),
    ("generated_defaults", "evaluate", [*GIVEN["evaluate"], *SOURCE, *RESULTS]),
    ("generated_defaults", "inference", [*GIVEN["inference"], *FOLDERS, *RESULTS]),
    ("generated_defaults", "export", [*GIVEN["export"], *RESULTS]),
    ("generated_defaults", "gen_trt_engine", [*GIVEN["gen_trt_engine"], *RESULTS]),
    ("quantize_template", "train", []),
    ("quantize_template", "export", GIVEN["export"]),
    ("quantize_template", "quantize", []),
    ("newest_training", "train", []),
    ("newest_training", "automl", []),
    ("convert_random", "convert", []),
    ("documentation_experiment", "train", []),
    ("documentation_convert", "convert", []),
]


def path_of(template: str) -> Path:
    folder = ASSETS if template.startswith("documentation") else TEMPLATES
    return folder / f"{template}.yaml"


@pytest.mark.parametrize(("template", "subtask", "overrides"), TAKEN)
def test_taken(template: str, subtask: str, overrides: list[str]):
    loaded = load_spec(path_of(template), overrides, subtask)
    untranslated = ("convert", "gen_trt_engine", "quantize", "automl")
    if subtask not in untranslated and "trt_engine" not in str(overrides):
        to_config(loaded, subtask)  # what the rules let pass can be translated


REFUSED = [
    ("export_placeholders", "export", [], ["export.checkpoint", "export.onnx_file", "results_dir"]),
    ("export_tutorial", "export", [], ["export.checkpoint", "export.onnx_file"]),
    ("evaluate_two_levels", "evaluate", [], ["evaluate.checkpoint"]),
    ("inference_two_levels", "inference", [], ["inference.checkpoint"]),
    ("engine_tutorial", "gen_trt_engine", [], ["gen_trt_engine.onnx_file"]),
    (
        "engine_int8",
        "gen_trt_engine",
        [],
        [
            "gen_trt_engine.onnx_file",
            "gen_trt_engine.tensorrt.calibration.cal_cache_file",
            "gen_trt_engine.tensorrt.calibration.cal_image_dir",
            "results_dir",
        ],
    ),
    (
        "evaluate_engine",
        "evaluate",
        [],
        ["dataset.test_data_sources", "evaluate.checkpoint", "results_dir"],
    ),
    (
        "inference_engine",
        "inference",
        [],
        ["dataset.infer_data_sources", "inference.checkpoint", "results_dir"],
    ),
    (
        "generated_defaults",
        "train",
        [],
        ["dataset.train_data_sources", "dataset.val_data_sources", "results_dir"],
    ),
    (
        "generated_defaults",
        "evaluate",
        [],
        ["dataset.test_data_sources", "evaluate.checkpoint", "results_dir"],
    ),
    ("generated_defaults", "gen_trt_engine", [], ["gen_trt_engine.onnx_file", "results_dir"]),
    (
        "convert_all_fields",
        "convert",
        [],
        ["image_dir_name", "input_source", "label_dir_name", "results_dir"],
    ),
]


@pytest.mark.parametrize(("template", "subtask", "overrides", "missing"), REFUSED)
def test_refused_with_what_is_missing(template: str, subtask: str, overrides: list[str], missing: list[str]):
    with pytest.raises(SpecError) as caught:
        load_spec(path_of(template), overrides, subtask)
    named = sorted((problem.where or "").split(" ")[0].split(",")[0] for problem in caught.value.problems)
    assert named == missing
    assert all("not given" in problem.what or "is empty" in problem.what for problem in caught.value.problems)
    assert all(problem.hint for problem in caught.value.problems)


HINTS = [
    ("convert_generated_random", "convert", ["allowed: 2"]),
    ("convert_old_keys", "convert", ["did you mean results_dir?", "results_dir"]),
    (
        "train_old_keys",
        "train",
        [
            "did you mean results_dir?",
            "did you mean encryption_key?",
            "did you mean train.num_gpus or evaluate.num_gpus or inference.num_gpus?",
            "did you mean dataset.workers?",
            "did you mean wandb.run_id?",
            "WANDB_API_KEY",
        ],
    ),
]


@pytest.mark.parametrize(("template", "subtask", "hints"), HINTS)
def test_refused_with_a_hint(template: str, subtask: str, hints: list[str]):
    with pytest.raises(SpecError) as caught:
        load_spec(path_of(template), (), subtask)
    assert len(caught.value.problems) == len(hints)
    for problem, hint in zip(caught.value.problems, hints, strict=True):
        assert hint in str(problem)


def test_every_template_and_subtask_is_tried():
    tried = {case[0] for case in (*TAKEN, *REFUSED, *HINTS)}
    assert tried >= {path.stem for path in TEMPLATES.glob("*.yaml")}
    assert {case[1] for case in TAKEN} == set(SUBTASKS)


def test_notes_of_an_export_name_what_it_does_not_read():
    loaded = load_spec(path_of("export_tutorial"), GIVEN["export"], "export")
    assert loaded.notes == [
        "dataset.batch_size (line 11) is out of range: no matter, as export does not read it"
    ]
