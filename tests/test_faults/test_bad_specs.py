"""Wrong specs, overrides and arguments, by every command: one message, exit status 2, nothing left."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from bad_input_project import assert_told, run_here

from ddetr_mm.cli import build_parser

LAUGHS = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise("abcdefghij")]
)

TEXTS = {
    "not-yaml": ("model:\n  num_queries: [1,\n", ("bad.yaml", "line 3")),
    "tabs": ("model:\n\tnum_queries: 3\n", ("bad.yaml", "line 2")),
    "twice": ("model:\n  num_queries: 3\n  num_queries: 4\n", ("line 3", "num_queries")),
    "python-tag": ("!!python/object/apply:os.system ['touch touched']\n", ("bad.yaml", "line 1")),
    "billion-laughs": (LAUGHS + "\n", ("bad.yaml",)),
    "a-list": ("- model\n- train\n", ("bad.yaml", "not a mapping")),
    "binary": (b"\xff\xfe\x00\x01", ("bad.yaml",)),
    "unknown-key": ("model:\n  num_querys: 3\n", ("line 2", "num_queries")),
    "unknown-section": ("modle:\n  num_queries: 3\n", ("line 1", "model")),
    "wrong-type": ("train:\n  optim:\n    lr: fast\n", ("train.optim.lr, line 3", "'fast'")),
    "out-of-range": ("model:\n  num_queries: -3\n", ("model.num_queries, line 2", "-3", "allowed")),
    "no-option": ("model:\n  backbone: resnet_51\n", ("model.backbone, line 2", "resnet_50")),
    "not-finite": ("train:\n  optim:\n    lr: .nan\n", ("train.optim.lr, line 3",)),
    "huge-number": (f"model:\n  num_queries: {'9' * 40}\n", ("model.num_queries, line 2",)),
    "scalar-section": ("model: 3\n", ("model, line 1",)),
    "rule": ("model:\n  hidden_dim: 64\n  nheads: 7\n", ("model.nheads, line 3",)),
    "circle": ("results_dir: ${model.backbone}\nmodel:\n  backbone: ${results_dir}\n", ("line 1",)),
    "no-interpolation": ("results_dir: ${nowhere.at_all}\n", ("results_dir, line 1",)),
    "resolver": ("results_dir: ${nowhere:HOME}\n", ("results_dir, line 1",)),
    "code-as-type": (
        "ddetr_mm:\n  backbone:\n    type: os.system\n    command: touch touched\n",
        ("ddetr_mm.backbone.type, line 3", "os.system", "ResNet"),
    ),
    "null-character": ('results_dir: "a\\0b"\n', ("results_dir, line 1", "null character")),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_spec(project: Path, tmp_path: Path, kind: str):
    text, parts = TEXTS[kind]
    spec = tmp_path / "bad.yaml"
    spec.write_bytes(text if isinstance(text, bytes) else text.encode())
    ended = run_here(tmp_path, "check", "-e", str(spec))
    assert_told(ended, *parts)
    assert not ended.new


COMMANDS = ("convert", "train", "evaluate", "inference", "export", "gen_trt_engine", "check")


@pytest.mark.parametrize("command", COMMANDS)
def test_spec_that_is_missing(project: Path, tmp_path: Path, command: str):
    assert_told(run_here(tmp_path, command, "-e", "nowhere.yaml"), "nowhere.yaml")


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_key_in_any_command(project: Path, tmp_path: Path, command: str):
    (tmp_path / "bad.yaml").write_text("resluts_dir: here\n")
    ended = run_here(tmp_path, command, "-e", "bad.yaml")
    assert_told(ended, "bad.yaml: resluts_dir, line 1", "results_dir")


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_given_names_what_is_needed(project: Path, tmp_path: Path, command: str):
    (tmp_path / "empty.yaml").write_text("results_dir: results\n")
    assert_told(run_here(tmp_path, command, "-e", "empty.yaml"), "empty.yaml", "is needed for")


def test_spec_that_is_a_folder(project: Path):
    assert_told(run_here(project, "train", "-e", "data"), "data")


def test_spec_of_another_command(project: Path):
    ended = run_here(project, "train", "-e", "convert.yaml")
    assert_told(ended, "input_source, line 4", "belongs to the spec of convert")


OVERRIDES = {
    "no-value": ("train.optim.lr", ("train.optim.lr", "key=value")),
    "unknown-key": ("train.optim.ler=1", ("train.optim.ler", "train.optim.lr")),
    "wrong-type": ("train.num_epochs=many", ("train.num_epochs", "'many'")),
    "below-a-value": ("train.num_epochs.first=1", ("train.num_epochs",)),
    "list-index": ("dataset.train_data_sources.7.image_dir=x", ("dataset.train_data_sources",)),
    "not-yaml": ("train.gpu_ids=[1,", ("train.gpu_ids",)),
    "empty-key": ("=3", ("=3",)),
    "out-of-range": ("dataset.batch_size=0", ("dataset.batch_size", "0", "allowed")),
    "code-as-type": ("ddetr_mm.backbone={type: os.system, command: touch touched}", ("os.system",)),
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_override(project: Path, kind: str):
    text, parts = OVERRIDES[kind]
    ended = run_here(project, "train", "-e", "spec.yaml", text)
    assert_told(ended, *parts)
    assert not ended.new


ARGUMENTS = {
    "no-command": ((), "COMMAND"),
    "unknown-command": (("fly",), "invalid choice: 'fly'"),
    "unknown-option": (("train", "-e", "spec.yaml", "--fast"), "--fast"),
    "no-spec": (("train",), "-e/--experiment_spec"),
    "no-such-subtask": (("check", "-e", "spec.yaml", "--for", "fly"), "invalid choice: 'fly'"),
    "no-such-format": (("weights", "random.pth", "x", "--to", "keras"), "invalid choice: 'keras'"),
    "no-destination": (("weights", "random.pth", "--to", "tao"), "DST"),
    "no-such-spec": (("spec", "fly"), "invalid choice: 'fly'"),
    "translate-to-no-config": (("translate", "-e", "spec.yaml", "-o", "x.txt"), "*.py"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments(project: Path, kind: str):
    arguments, part = ARGUMENTS[kind]
    ended = run_here(project, *arguments)
    assert_told(ended, part)
    assert not ended.new


@pytest.mark.parametrize("jobs", ["0", "-3", "some"])
def test_number_of_compiler_jobs(jobs: str, capsys: pytest.CaptureFixture[str]):
    # Parsed only: a command that got through would change the environment.
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["install-ops", "--jobs", jobs])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err
