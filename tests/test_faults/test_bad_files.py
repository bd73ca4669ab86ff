"""Wrong checkpoints, ONNX files and outputs, by the commands that read or write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from bad_input_project import assert_told, run_here

SPEC = ("-e", "spec.yaml")


class Attack:
    """Unpickling it would leave a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch touched",)


def write_bad(path: Path, kind: str, whole: Path) -> None:
    """One kind of bad checkpoint."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello\n")
    elif kind == "cut":
        path.write_bytes(whole.read_bytes()[:5000])
    elif kind == "code":
        torch.save({"state_dict": {"a": Attack()}}, path)
    elif kind == "another-model":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)
    elif kind == "a-list":
        torch.save([1, 2], path)
    elif kind == "not-finite":
        content = torch.load(whole, weights_only=True)
        for value in content["state_dict"].values():
            if value.is_floating_point():
                value.fill_(float("nan"))
        torch.save(content, path)
    elif kind == "encrypted":
        path.write_bytes(os.urandom(4096))


KINDS = ("missing", "empty", "text", "cut", "code", "another-model", "a-list", "not-finite", "encrypted")


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(own_project: Path, kind: str):
    write_bad(own_project / "bad.pth", kind, own_project / "random.pth")
    export = ("export.checkpoint=bad.pth", "export.onnx_file=x.onnx")
    for command in (("weights", "bad.pth", "out.pth", "--to", "tao"), ("export", *SPEC, *export)):
        assert_told(run_here(own_project, *command), "bad.pth")
    assert not list(own_project.rglob("touched"))


STARTS = {
    "resume": "train.resume_training_checkpoint_path",
    "pretrained": "train.pretrained_model_path",
    "backbone": "model.pretrained_backbone_path",
}


@pytest.mark.parametrize("kind", ["missing", "text", "code", "another-model"])
@pytest.mark.parametrize("start", STARTS)
def test_what_a_training_starts_from(own_project: Path, start: str, kind: str):
    write_bad(own_project / "bad.pth", kind, own_project / "random.pth")
    assert_told(run_here(own_project, "train", *SPEC, f"{STARTS[start]}=bad.pth"), "bad.pth")
    assert not list(own_project.rglob("touched"))


def test_resuming_from_weights_alone(project: Path, tmp_path: Path):
    key = "train.resume_training_checkpoint_path"
    ended = run_here(project, "train", *SPEC, f"{key}=random.pth", f"results_dir={tmp_path}")
    assert_told(ended, key, "optimizer is missing", "train.pretrained_model_path")


MISFITS = {
    "width": "model.hidden_dim=64",
    "queries": "model.num_queries=16",
    "classes": "dataset.num_classes=7",
    "layers": "model.dec_layers=2",
    "backbone": "ddetr_mm.backbone.depth=34",
}


@pytest.mark.parametrize("kind", MISFITS)
def test_checkpoint_of_another_model(project: Path, tmp_path: Path, kind: str):
    paths = ("export.checkpoint=random.pth", f"export.onnx_file={tmp_path / 'x.onnx'}")
    ended = run_here(project, "export", *SPEC, *paths, MISFITS[kind], f"results_dir={tmp_path}")
    assert_told(ended, "random.pth")


@pytest.mark.parametrize("command", ["evaluate", "inference", "export"])
def test_missing_checkpoint(project: Path, tmp_path: Path, command: str):
    paths = (f"{command}.checkpoint=nowhere.pth", f"export.onnx_file={tmp_path / 'x.onnx'}")
    ended = run_here(project, command, *SPEC, *paths, f"results_dir={tmp_path}")
    assert_told(ended, "nowhere.pth", f"{command}.checkpoint")


def spoil_onnx(path: Path, kind: str) -> None:
    """One kind of bad ONNX file."""
    if kind == "text":
        path.write_text("hello\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:20_000])
    else:
        model = onnx.load(path)
        if kind == "other-outputs":
            model.graph.output[0].name = "scores"
        elif kind == "no-size":
            model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
        elif kind == "data-elsewhere":
            weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
            weight.ClearField("raw_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            entry = weight.external_data.add()
            entry.key, entry.value = "location", "../../../../etc/passwd"
        path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "other-outputs", "no-size", "data-elsewhere"])
def test_onnx_file(own_project: Path, kind: str):
    spoil_onnx(own_project / "random.onnx", kind)
    ended = run_here(own_project, "evaluate", *SPEC, "evaluate.checkpoint=random.onnx")
    assert_told(ended, "random.onnx")


def test_onnx_file_of_other_classes(project: Path, tmp_path: Path):
    results = f"results_dir={tmp_path}"
    ended = run_here(
        project, "evaluate", *SPEC, "evaluate.checkpoint=random.onnx", "dataset.num_classes=7", results
    )
    assert_told(ended, "random.onnx", "dataset.num_classes", "7")


ENGINES = {
    "missing-onnx": ("gen_trt_engine.onnx_file=x.onnx", "x.onnx"),
    "onnx-is-text": ("gen_trt_engine.onnx_file=spec.yaml", "spec.yaml"),
    "no-tensorrt": ("gen_trt_engine.onnx_file=random.onnx", "TensorRT"),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_engine(project: Path, tmp_path: Path, kind: str):
    if kind == "no-tensorrt":
        try:
            import tensorrt  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("TensorRT is here")
    override, part = ENGINES[kind]
    engine = f"gen_trt_engine.trt_engine={tmp_path / 'x.engine'}"
    assert_told(run_here(project, "gen_trt_engine", *SPEC, override, engine, f"results_dir={tmp_path}"), part)


OUTPUTS = {
    "export-onto-a-file": (
        ("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=random.onnx"),
        ("random.onnx", "--force"),
    ),
    "export-onto-a-folder": (
        ("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=data"),
        ("data", "export.onnx_file"),
    ),
    "export-below-a-file": (
        ("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=spec.yaml/x.onnx"),
        ("export.onnx_file",),
    ),
    "translate-onto-a-folder": (("translate", *SPEC, "-o", "folder.py"), ("folder.py",)),
    "translate-below-a-file": (("translate", *SPEC, "-o", "spec.yaml/x.py"), ("spec.yaml",)),
    "weights-onto-a-folder": (("weights", "random.pth", "data", "--to", "tao"), ("data", "folder")),
    "weights-below-a-file": (("weights", "random.pth", "spec.yaml/x.pth", "--to", "tao"), ("spec.yaml",)),
    "results-below-a-file": (("train", *SPEC, "results_dir=spec.yaml"), ("results_dir", "spec.yaml")),
    "results-name-too-long": (("train", *SPEC, f"results_dir={'x' * 300}"), ("results_dir",)),
    "check-below-a-file": (("check", *SPEC, "results_dir=spec.yaml"), ("spec.yaml",)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_output(own_project: Path, kind: str):
    (own_project / "folder.py").mkdir()
    arguments, parts = OUTPUTS[kind]
    assert_told(run_here(own_project, *arguments), *parts)
