"""The search space: TAO's sixteen fields, what ``ddetr_mm.automl.parameters`` changes, what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddetr_mm.automl.space import search_space, with_values
from ddetr_mm.errors import SpecError
from ddetr_mm.spec import load_spec
from ddetr_mm.spec.describe import iter_fields

DATA = """
dataset:
  train_data_sources: [{image_dir: a, json_file: b}]
  val_data_sources: [{image_dir: a, json_file: b}]
"""
# The table of TAO's schema: path → smallest, largest (None: infinite), left open at the lower end.
TAO = {
    "dataset.augmentation.horizontal_flip_prob": (0, 1, False),
    "dataset.augmentation.train_random_crop_max": (32, 1333, False),
    "dataset.augmentation.train_random_crop_min": (32, None, False),
    "dataset.batch_size": (1, None, False),
    "dataset.workers": (1, None, False),
    "model.dec_layers": (1, 12, False),
    "model.enc_layers": (1, 12, False),
    "model.num_queries": (100, 900, False),
    "model.num_select": (1, 1000, False),
    "train.optim.lr": (0, 0.01, True),
    "train.optim.lr_backbone": (0, 0.001, True),
    "train.optim.lr_decay": (0, 1, True),
    "train.optim.lr_linear_proj_mult": (0, 1, True),
    "train.optim.lr_step_size": (1, 10000, False),
    "train.optim.momentum": (0, 1, True),
    "train.optim.weight_decay": (0, 0.1, True),
}


@pytest.fixture
def space(tmp_path: Path):
    """The search space of a spec with overrides; a short name of a field of ``ddetr_mm.automl`` will do."""

    def build(*overrides: str):
        path = tmp_path / "spec.yaml"
        path.write_text(DATA)
        own = [one if "." in one.partition("=")[0] else f"ddetr_mm.automl.{one}" for one in overrides]
        return search_space(load_spec(path, own, "automl"))

    return build


def test_the_sixteen_fields_are_marked_with_taos_bounds():
    marked = {info.path: info.searched for info in iter_fields("train") if info.searched}
    assert set(marked) == set(TAO)
    for path, (low, high, is_open) in TAO.items():
        words = f"{'more than' if is_open else 'at least'} {low:g}"
        assert marked[path].startswith(words), path
        assert (high is None) is (f"at most {high or 0:g}" not in marked[path]), path
    assert "at most model.num_queries" in marked["model.num_select"]
    assert "train_random_crop_min" in marked["dataset.augmentation.train_random_crop_max"]


def test_default_space_stays_within_the_bounds_and_leaves_out_what_does_not_matter(space):
    found = space()
    left_out = {note.partition(" ")[0] for note in found.notes}
    assert set(found.parameters) | left_out == set(TAO) and not set(found.parameters) & left_out
    assert left_out == {
        "dataset.workers",  # cannot change the result
        "train.optim.momentum",  # AdamW
        "train.optim.lr_step_size",  # MultiStep
        "train.optim.lr_decay",  # its one step, 40, is beyond 27 epochs
    }
    for path, one in found.parameters.items():
        low, high, is_open = TAO[path]
        assert (one.low > low if is_open else one.low >= low) and (high is None or one.high <= high)
    logs = {path for path, one in found.parameters.items() if one.log}
    assert {"train.optim.lr", "train.optim.lr_backbone", "train.optim.weight_decay"} <= logs
    assert "dataset.batch_size" not in logs


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["train.optim.optimizer=SGD"], "train.optim.momentum"),
        (["train.optim.lr_scheduler=StepLR"], "train.optim.lr_step_size"),
        (["train.optim.lr_steps=[5]"], "train.optim.lr_decay"),
        (["max_epochs=50"], "train.optim.lr_decay"),
        (["parameters=[{field: dataset.workers}]"], "dataset.workers"),
        (["parameters=[{field: train.optim.optimizer}]"], "train.optim.momentum"),
    ],
)
def test_a_field_is_searched_where_it_matters(space, overrides, path):
    assert path in space(*overrides).parameters


def test_a_decay_period_ends_with_the_run(space):
    assert space("train.optim.lr_scheduler=StepLR").parameters["train.optim.lr_step_size"].high == 27


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["model.train_backbone=false"], "train.optim.lr_backbone"),
        (["dataset.augmentation.fixed_random_crop=64"], "dataset.augmentation.train_random_crop_min"),
        (["metric=val_loss"], "model.num_select"),
        (["parameters=[{field: model.enc_layers, search: false}]"], "model.enc_layers"),
    ],
)
def test_a_field_is_left_out(space, overrides, path):
    assert path not in space(*overrides).parameters


def test_dependent_fields_are_moved_to_what_is_allowed(space):
    found = space()
    drawn = {path: one.nearest_own() for path, one in found.parameters.items()}
    crop_min, crop_max = (f"dataset.augmentation.train_random_crop_{end}" for end in ("min", "max"))
    drawn |= {"model.num_queries": 150, "model.num_select": 900, crop_min: 700, crop_max: 40}
    values = found.values(drawn)
    assert values["model.num_select"] == 150
    assert values[crop_max] == 701 and values[crop_min] == 700
    assert found.parameters[crop_min].high < 1333


def test_parameters_narrow_and_add(space):
    entries = (
        "{field: train.optim.lr, range: [0.0001, 0.001], log: false},"
        "{field: model.enc_layers, choices: [2, 4]},"
        "{field: model.dropout_ratio, range: [0, 0.5]}, {field: model.with_box_refine},"
        "{field: model.backbone, choices: [resnet_50, gc_vit_tiny]}"
    )
    found = space(f"parameters=[{entries}]", "default_parameters=false").parameters
    assert (found["train.optim.lr"].low, found["train.optim.lr"].high) == (1e-4, 1e-3)
    assert not found["train.optim.lr"].log
    assert found["model.enc_layers"].choices == (2, 4)
    assert found["model.dropout_ratio"].words() == "0 to 0.5"
    assert found["model.with_box_refine"].choices == (True, False)
    assert found["model.backbone"].choices == ("resnet_50", "gc_vit_tiny")
    assert len(found) == 5
    assert len(space(f"parameters=[{entries}]").parameters) > 12


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{field: train.optim.lr_rate}", "did you mean train.optim.lr"),
        ("{field: lr_backbone}", "did you mean train.optim.lr_backbone?"),
        ("{field: train.optim.lr, range: [0.001, 0.1]}", "is outside the field's bounds"),
        ("{field: train.optim.lr, range: [0, 0.01]}", "more than 0, at most 0.01"),
        ("{field: model.enc_layers, range: [1, 13]}", "at least 1, at most 12"),
        ("{field: model.enc_layers, range: [1.5, 3]}", "has a fraction"),
        ("{field: model.enc_layers, range: [3, 1]}", "is not two ascending numbers"),
        ("{field: model.enc_layers, choices: [0, 2]}", "has 0, which is out of range"),
        ("{field: model.enc_layers, choices: [a]}", "has a, which is of the wrong type"),
        ("{field: model.enc_layers, choices: [2, 2]}", "has a value twice"),
        ("{field: model.enc_layers, choices: [2], range: [1, 2]}", "is given beside range"),
        ("{field: model.dropout_ratio, range: [0, 1.5]}", "is outside the field's bounds"),
        ("{field: model.dropout_ratio, log: true}", "needs a range above 0"),
        ("{field: model.cls_loss_coef}", "is needed for a field without bounds"),
        ("{field: model.backbone, choices: [resnet_51]}", "has resnet_51, which is not an option"),
        ("{field: model.nheads, choices: [3, 8]}", "does not divide model.hidden_dim"),
        ("{field: dataset.augmentation.scales}", "is a list, a mapping or a section"),
        ("{field: train.pretrained_model_path}", "is text, for which choices are needed"),
        ("{field: train.num_epochs, range: [1, 9]}", "set ddetr_mm.automl.max_epochs"),
        ("{field: export.batch_size, range: [1, 9]}", "is not read by train"),
        ("{field: model.enc_layers}, {field: model.enc_layers}", "is listed twice"),
    ],
)
def test_wrong_parameters_are_refused(space, entry, words):
    with pytest.raises(SpecError) as caught:
        space(f"parameters=[{entry}]")
    (problem,) = caught.value.problems
    assert words in str(problem) and "ddetr_mm.automl.parameters[" in str(problem)


def test_all_wrong_parameters_are_named_at_once(space):
    with pytest.raises(SpecError) as caught:
        space("parameters=[{field: a}, {field: model.enc_layers, range: [0, 1]}]")
    assert len(caught.value.problems) == 2


def test_nothing_to_search_is_refused(space):
    with pytest.raises(SpecError, match="leaves no field to search"):
        space("default_parameters=false")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bfbo", "the nearest is bayesian"),
        ("pbt", "the nearest is asha"),
        ("dehb", "the nearest is bohb"),
        ("hyperband_es", "the nearest is hyperband"),
        ("llm", "asks a language model in TAO; the nearest here is bayesian"),
        ("bayesain", "did you mean bayesian?"),
    ],
)
def test_other_algorithms_are_answered_with_the_nearest(space, name, words):
    with pytest.raises(SpecError) as caught:
        space(f"algorithm={name}")
    assert words in str(caught.value) and "hyperband, bohb" in str(caught.value)


def test_grid_points(space):
    found = space(
        "parameters=[{field: model.enc_layers, range: [1, 4]},"
        "{field: train.optim.lr, range: [0.0001, 0.01]},"
        "{field: model.num_queries, range: [100, 900]}, {field: dataset.batch_size, choices: [2, 8]}]",
        "default_parameters=false",
    )
    grids = {path: one.grid() for path, one in found.parameters.items()}
    assert grids["model.enc_layers"] == [1, 2, 3, 4]
    assert grids["train.optim.lr"] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert grids["model.num_queries"] == [100, 500, 900]
    assert found.grid_size() == 4 * 3 * 3 * 2


def test_other_values_make_another_spec(tmp_path: Path):
    path = tmp_path / "spec.yaml"
    path.write_text(DATA)
    spec = load_spec(path, (), "automl").spec
    other = with_values(spec, {"train.optim.lr": 0.5, "model.enc_layers": 2})
    assert other.train.optim.lr == 0.5 and other.model.enc_layers == 2 and spec.model.enc_layers == 6
