"""``${…}`` in values."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ddetr_mm.spec import get_field
from ddetr_mm.spec.schema import DataSource


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        (
            "results_dir: /r\nevaluate: {checkpoint: '${results_dir}/train/a.pth'}",
            "evaluate.checkpoint",
            "/r/train/a.pth",
        ),
        ("model: {num_select: '${model.num_queries}'}", "model.num_select", 300),
        ("model: {num_select: '${.num_queries}'}", "model.num_select", 300),
        ("model: {num_select: '${..train.seed}'}", "model.num_select", 1234),
        ("evaluate: {gpu_ids: '${train.gpu_ids}'}\ntrain: {gpu_ids: [0, 1]}", "evaluate.gpu_ids", [0, 1]),
        (
            "evaluate: {gpu_ids: ['${train.gpu_ids[0]}', 1]}\ntrain: {gpu_ids: [3]}",
            "evaluate.gpu_ids",
            [3, 1],
        ),
        ("results_dir: ${oc.env:SPEC_TEST_DIR}/r", "results_dir", "/env/r"),
        ("results_dir: ${oc.env:SPEC_TEST_NOT_SET,/d}/r", "results_dir", "/d/r"),
        ("model_name: a\nwandb: {name: '${model_name}-${train.num_epochs}'}", "wandb.name", "a-10"),
        ("inference: {color_map: {a: red, b: '${.a}'}}", "inference.color_map", {"a": "red", "b": "red"}),
        (
            "dataset: {train_data_sources: [{image_dir: a, json_file: b}],"
            " val_data_sources: '${dataset.train_data_sources}'}",
            "dataset.val_data_sources",
            [DataSource(image_dir="a", json_file="b")],
        ),
        (
            "dataset: {val_data_sources: [{image_dir: a, json_file: b}],"
            " test_data_sources: '${dataset.val_data_sources[0]}'}",
            "dataset.test_data_sources",
            DataSource(image_dir="a", json_file="b"),
        ),
        (
            "dataset: {infer_data_sources: {image_dir: '${results_dir}/x'}}",
            "dataset.infer_data_sources.image_dir",
            ["/results/x"],
        ),
        ("results_dir: 'a\\${b}'", "results_dir", "a${b}"),
        ("ddetr_mm: {backbone: {type: X, n: '${model.hidden_dim}'}}", "ddetr_mm.backbone.n", 256),
        ("ddetr_mm: {backbone: {type: X, n: [1, '${train.gpu_ids}']}}", "ddetr_mm.backbone.n", [1, [0]]),
        ("model_name: '${.results_dir}x\\\\${train.seed}'", "model_name", "/resultsx\\1234"),
        ("model_name: '${oc.env:SPEC_TEST_NOT_SET,null}'", "model_name", None),
        ("model_name: ${train.optim.lr_backbone}", "model_name", "2e-05"),
        ("train: {optim: {lr: '${oc.env:SPEC_TEST_NUMBER}'}}", "train.optim.lr", 0.5),
        ("train: {verbose: '${train.is_dry_run}', is_dry_run: yes}", "train.verbose", True),
    ],
)
def test_interpolation(load, monkeypatch, text: str, path: str, value: object):
    monkeypatch.setenv("SPEC_TEST_DIR", "/env")
    monkeypatch.setenv("SPEC_TEST_NUMBER", "0.5")
    monkeypatch.delenv("SPEC_TEST_NOT_SET", raising=False)
    assert get_field(load(text).spec, path) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("results_dir: ${nope}", "names nope, which the spec does not have"),
        ("results_dir: ${train.nope}", "names train.nope"),
        ("results_dir: ${results_dir}", "circle"),
        ("results_dir: ${model_name}\nmodel_name: ${results_dir}", "circle"),
        ("results_dir: '${oc.env:SPEC_TEST_NOT_SET}'", "cannot be resolved"),
        ("results_dir: '${oc.decode:x}'", "is not an interpolation that a spec may hold"),
        ("results_dir: '${now:%Y}'", "is not an interpolation"),
        ("results_dir: '${${model_name}}'", "is not an interpolation"),
        ("results_dir: '${unclosed'", "is not an interpolation"),
        ("results_dir: '${'", "is not an interpolation"),
        ("train: {seed: '${model.backbone}'}", "cannot be resolved"),
        ("train: {gpu_ids: '${train.seed}'}", "train.gpu_ids"),
        ("train: ${model}", "is not a section"),
        ("results_dir: 'a/${model_name}'", "${model_name} is null"),
        ("results_dir: 'a/${model}'", "${model} is no single value"),
        ("train: {seed: '${train.verbose}'}", "cannot be resolved"),
        ("dataset: {test_data_sources: '${model}'}", "cannot be resolved"),
        ("dataset: {val_data_sources: ['${model}']}", "val_data_sources[0], line 1: cannot be resolved"),
        ("train: {gpu_ids: [0, '${model.backbone}']}", "train.gpu_ids[1], line 1: cannot be resolved"),
        ("train: {seed: '${model}'}", "cannot be resolved"),
        ("train: {num_epochs: '${model.seed_}'}", "names model.seed_"),
        ("train: {num_epochs: '${export.gpu_id}'}", "out of range"),
        ("train: {num_epochs: '\\${export.gpu_id}'}", "of the wrong type"),
        ("train: {gpu_ids: '\\${train.gpu_ids}'}", "is not a list"),
        ("train: {gpu_ids: '${train.gpu_ids}x'}", "is not a list"),
        ("dataset: {test_data_sources: '\\${0}'}", "is not a section"),
        ("inference: {color_map: '\\${0}'}", "is not a mapping"),
    ],
)
def test_bad_interpolation(problems, monkeypatch, text: str, words: str):
    monkeypatch.delenv("SPEC_TEST_NOT_SET", raising=False)
    found = problems(text)
    assert any(words in one for one in found), found


def test_interpolations_that_expand_without_end_are_bounded(problems):
    names = [f"k{n:02}" for n in range(40)]
    entries = [f"{names[0]}: '{'x' * 100}'"]
    entries += [f"{name}: '${{.{last}}}${{.{last}}}'" for last, name in pairwise(names)]
    found = problems("inference: {color_map: {" + ", ".join(entries) + "}}")
    assert any("expands to more than" in one for one in found)


def test_long_chains_and_many_interpolations_are_bounded(problems):
    entries = ", ".join(f"k{n}: '${{.k{n + 1}}}'" for n in range(3000))
    found = problems("inference: {color_map: {" + entries + ", k3000: red}}")
    assert any("too many" in one for one in found)


def test_a_chain_of_moderate_length_resolves(load):
    entries = ", ".join(f"k{n}: '${{.k{n + 1}}}'" for n in range(10))
    loaded = load("inference: {color_map: {" + entries + ", k10: red}}")
    assert loaded.spec.inference.color_map["k0"] == "red"


def test_a_chain_of_great_length_is_refused(problems):
    entries = ", ".join(f"k{n}: '${{.k{n + 1}}}'" for n in range(100))
    found = problems("inference: {color_map: {" + entries + ", k100: red}}")
    assert any("more than 50 steps" in one for one in found)


def test_a_reference_to_a_wrong_value_is_not_reported_beside_it(problems):
    found = problems(
        "model: {num_select: '${.num_queries}', num_queries: x}\nmodel_name: '${model.num_select}'"
    )
    assert len(found) == 1
    assert "model.num_queries" in found[0]


def test_a_resolved_list_is_a_copy(load):
    spec = load("evaluate: {gpu_ids: '${train.gpu_ids}'}").spec
    spec.evaluate.gpu_ids.append(5)
    assert spec.train.gpu_ids == [0]


def test_one_bad_interpolation_does_not_hide_other_problems(problems):
    found = problems("results_dir: ${nope}\nmodel: {backbone: x, num_select: 0}")
    assert len(found) == 3


def test_the_key_is_not_shown(problems):
    found = problems("encryption_key: 'secret${nope}'")
    assert found
    assert "secret" not in found[0]
