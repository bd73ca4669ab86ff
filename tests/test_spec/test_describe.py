"""The printed default spec, and a spec written as YAML."""

from __future__ import annotations

import copy

import pytest
import yaml

from ddetr_mm.spec import SUBTASKS, default_spec_text, get_field, iter_fields, load_spec, spec_to_yaml
from ddetr_mm.spec.describe import aliases
from ddetr_mm.spec.fields import TAO_5_1
from ddetr_mm.spec.schema import root_of


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_default_spec_loads_back_unchanged(load, subtask: str):
    loaded = load(default_spec_text(subtask), (), subtask, require_mandatory=False)
    assert loaded.spec == root_of(subtask)()
    assert loaded.notes == []


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_default_spec_has_a_comment_on_every_field(subtask: str):
    text = default_spec_text(subtask)
    lines = text.splitlines()
    folded = " ".join(line.strip().removeprefix("#").strip() for line in lines)
    written = 0
    for info in iter_fields(subtask):
        assert " ".join(info.doc.split()) in folded, info.path
        if info.bounds:
            assert info.bounds in folded
        for option in info.options or ():
            assert str(option) in folded
        written += 1
    keys = [index for index, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    assert all(lines[index - 1].strip().startswith("#") for index in keys)
    assert written > 10
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_default_spec_shows_every_default(subtask: str):
    plain = yaml.safe_load(default_spec_text(subtask))
    for info in iter_fields(subtask):
        if info.origin == TAO_5_1 or "[]" in info.path:
            continue
        value = plain
        for step in info.path.split("."):
            value = value[step] if isinstance(value, dict) else None
        if value is None and "data_sources." in info.path:
            continue
        expected = "2e-05" if info.default == 2e-5 else info.default  # YAML 1.1 has no 2e-05
        assert value in (info.default, expected), info.path


def test_mandatory_fields_are_placeholders(problems):
    text = default_spec_text("export")
    assert "  checkpoint: ???\n" in text
    found = problems(text, (), "export")
    assert len(found) == 2
    assert "export.checkpoint, line" in found[0]
    folded = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    assert "Mandatory for evaluate (unless evaluate.trt_engine is set)." in folded
    assert "Mandatory for convert" not in folded


def test_default_spec_can_be_filled_in_on_the_command_line(load):
    overrides = ["export.checkpoint=a.pth", "export.onnx_file=a.onnx"]
    loaded = load(default_spec_text("export"), overrides, "export")
    assert loaded.spec.export.onnx_file == "a.onnx"


def test_written_spec_loads_back(load, spec_file):
    loaded = load(
        """
results_dir: /r
encryption_key: secret
dataset:
  train_data_sources: [{image_dir: a, json_file: "b: c"}]
  infer_data_sources: {image_dir: [x, y]}
inference: {color_map: {no: red, "1e-4": "#ff0000", "a.b": ~x}}
evaluate: {checkpoint: '${results_dir}/a.pth'}
wandb: {name: "1e-4", tags: [yes, "null", ""]}
train: {optim: {lr: 1e-7}, freeze: null}
ddetr_mm: {backbone: {type: ResNet, a: "1e-4", b: 1e-4, c: [~, true, {d: "no"}], e: {}}}
"""
    )
    text = spec_to_yaml(loaded.spec)
    assert "secret" not in text
    assert yaml.safe_load(text)["encryption_key"] is None
    spec_file.write_text(text)
    expected = copy.deepcopy(loaded.spec)
    expected.encryption_key = None
    assert load_spec(spec_file).spec == expected
    assert get_field(expected, "inference.color_map")["no"] == "red"


@pytest.mark.parametrize("value", ["${x}", "a${", r"\${x}", r"\\${x}", "$x", "\\", "a\\"])
def test_text_that_looks_like_an_interpolation_survives_writing(load, monkeypatch, value: str):
    monkeypatch.setenv("SPEC_TEST_VALUE", value)
    loaded = load("wandb: {name: '${oc.env:SPEC_TEST_VALUE}'}")
    assert loaded.spec.wandb.name == value
    assert load(spec_to_yaml(loaded.spec)).spec == loaded.spec


@pytest.mark.parametrize(
    "character", ["\x85", "\u2028", "\u2029", "\ufeff", "\r", "\n", "\t", "\x1b"], ids=ascii
)
def test_line_breaks_of_unicode_survive_writing(load, character: str):
    spec = load("").spec
    spec.wandb.name = f"a{character}b"
    spec.wandb.tags = [character]
    spec.inference.color_map = {f"x{character}y": f"{character}z"}
    spec.ddetr_mm.backbone = {"type": "X", f"k{character}": [f"{character}v"]}
    assert load(spec_to_yaml(spec)).spec == spec


def test_aliases_are_dotted_paths():
    assert aliases() == {
        "model.pretrained_model_path": "model.pretrained_backbone_path",
        "train.optim.lr_monitor": "train.optim.monitor_name",
    }
